"""Figure 7: ensembles of networks that share a backbone, against the number of networks.

Counts as reproduced: independent networks do best, then ensembles with more layers of their own; the one that shares
all but the last layer, a single net after averaging, is above a single network.

The text names neither the network of the figure nor its data set, and of the numbers of own layers only 14, with two
common layers: VGG16's 16. Networks take the backbone's place in turn, up to a number of orders; accuracies are means
over them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

from thalweg.lab.claims import Claim
from thalweg.lab.ranks import spearman
from thalweg.lab.recipe import Context, Outcome, Recipe
from thalweg.lab.tables import Table, Tables
from thalweg.recipes.low_loss_connection.endpoints import DataName, Task, TrainedPreset, endpoints, load

if TYPE_CHECKING:
    from torch import nn

    from thalweg.ensembles import Ensemble
    from thalweg.lab.figures import Figure
    from thalweg.objective import Objective

INDEPENDENT = "Ind"
"""Independent networks, under the figure's name."""


class Figure7Preset(TrainedPreset):
    """Parameters of figure 7."""

    data: DataName = "cifar10"
    """Data set. The text does not name it; that of its other experiments."""
    num_train: int = 50_000
    """Samples to train on."""
    epochs: int = 200
    """Passes over the data (the paper's code for VGG16)."""
    network: Literal["vgg16", "cnn", "mlp"] = "vgg16"
    """VGG16 without norm and with dropout; a narrow one with four convolutions and two linear layers; or hidden
    layers of equal width, fully connected."""
    width: int = 64
    """Of the first convolution (VGG16's is 64; later ones are wider in proportion), or of all hidden layers."""
    depth: int = 3
    """Hidden layers of "mlp"."""
    num_networks: int = 7
    """Networks (the figure: up to 7)."""
    num_orders: int = 3
    """How many of them take the backbone's place in turn (ours: the figure has one order)."""
    own_layers: tuple[int, ...] = (1, 3, 8, 14)
    """Numbers n of WA(n): layers, counted from the end, that every network has for itself."""
    fit_samples: int = 50_000
    """Samples that layers are fitted on, at most (the paper: all)."""
    ridge: float = 0.0
    """Of the fits; 0 is the paper's least squares."""


PAPER = Figure7Preset()
CPU = PAPER.model_copy(
    update={
        "num_train": 10_000,
        "num_test": 5_000,
        "image_size": 16,
        "epochs": 15,
        "learning_rate": 0.03,
        "network": "cnn",
        "width": 16,
        "num_networks": 4,
        "own_layers": (1, 2, 3, 5),
        "fit_samples": 10_000,
    }
)
QUICK = CPU.model_copy(
    update={
        "data": "digits",
        "num_train": 400,
        "num_test": 440,
        "image_size": None,
        "network": "mlp",
        "width": 64,
        "epochs": 20,
        "learning_rate": 0.05,
        "batch_size": 64,
        "own_layers": (1, 2, 3),
    }
)


def run(preset: Figure7Preset, context: Context) -> Outcome:
    """Train the networks, make the ensembles of every kind, and let them grow network by network."""
    from thalweg.ensembles import output_ensemble, wa_ensemble

    task = load(preset, context, flat=preset.network == "mlp")
    nets = endpoints(
        lambda: _net(preset, task),
        task,
        preset,
        context,
        seeds=[preset.seed * 1_000 + k for k in range(preset.num_networks)],
        progress=lambda x, text: context.progress(0.7 * x, text),
    )
    train, test = task.objective(nets[0], context), task.test_objective(nets[0], context)
    orders = [[*nets[k:], *nets[:k]] for k in range(min(preset.num_orders, len(nets)))]
    rows, averaged = _singles(nets, train, test), []
    for place, order in enumerate(orders):
        rows += _grown(output_ensemble(train, order), INDEPENDENT, place, test)
        for step, count in enumerate(preset.own_layers):
            done = (place + step / len(preset.own_layers)) / len(orders)
            context.progress(0.7 + 0.3 * done, f"backbone {place + 1} of {len(orders)}: {count} own layers")
            made = wa_ensemble(
                train,
                order,
                own_layers=count,
                ridge=preset.ridge,
                fit_samples=preset.fit_samples,
                seed=preset.seed,
            )
            rows += _grown(made, f"WA({count})", place, test)
            if count == 1:
                averaged.append(_averaged(made, order, place, train, test))
    means = _means(rows)
    return Outcome(
        tables={"ensembles": rows, "means": means, "averaged": averaged},
        measured=_measured(preset, means, averaged),
    )


def _net(preset: Figure7Preset, task: Task) -> "nn.Module":
    from thalweg.nets import MLP, VGG, vgg16

    shape, width = task.train[0].shape[1:], preset.width
    if preset.network == "mlp":
        return MLP((shape[0], *[width] * preset.depth, task.num_classes), "relu")
    if preset.network == "vgg16":
        return vgg16(width / 64, num_classes=task.num_classes, dropout=0.5)
    stages = ((width,), (2 * width,), (4 * width, 4 * width))
    return VGG(stages, (4 * width,), in_channels=shape[0], image_size=shape[-1], num_classes=task.num_classes)


def _singles(nets: "Sequence[nn.Module]", train: "Objective", test: "Objective") -> Table:
    """Measure every network by itself."""
    from thalweg.ensembles import single

    return [row for place, net in enumerate(nets) for row in _grown(single(train, net), "single", place, test)]


def _grown(ensemble: "Ensemble", name: str, place: int, test: "Objective") -> Table:
    """Measure the ensembles of the first 1, 2, … members."""
    from thalweg.ensembles import growth

    return [
        {
            "ensemble": name,
            "order": place,
            "models": models,
            "accuracy": score.accuracy,
            "loss": score.loss,
            "parameters": score.parameters,
            "multiply_adds": score.multiply_adds,
            "worst_fit": max((fit.residual for fit in ensemble.fits), default=None),
        }
        for models, score in enumerate(growth(ensemble, test), 1)
    ]


def _averaged(
    made: "Ensemble", order: "Sequence[nn.Module]", place: int, train: "Objective", test: "Objective"
) -> dict[str, Any]:
    """Average the adjusted last layers into one plain net, and compare losses on the training data."""
    from thalweg.ensembles import evaluate, single

    plain = single(train, replace(made, average="outputs").export(), "averaged")
    on_train, on_test = evaluate(plain, train), evaluate(plain, test)
    return {
        "order": place,
        "averaged_loss": on_train.loss,
        "largest_adjusted_loss": max(evaluate(single(train, member), train).loss for member in made.members),
        "largest_single_loss": max(evaluate(single(train, net), train).loss for net in order),
        "test_accuracy": on_test.accuracy,
        "parameters": on_test.parameters,
        "multiply_adds": on_test.multiply_adds,
    }


def _means(rows: Table) -> Table:
    """Average over the orders, with the range."""
    groups: dict[tuple[str, int], Table] = {}
    for row in rows:
        groups.setdefault((row["ensemble"], row["models"]), []).append(row)
    return [
        {
            "ensemble": name,
            "models": models,
            "accuracy": mean(row["accuracy"] for row in own),
            "least": min(row["accuracy"] for row in own),
            "most": max(row["accuracy"] for row in own),
            "parameters": own[0]["parameters"],
            "multiply_adds": own[0]["multiply_adds"],
        }
        for (name, models), own in groups.items()
    ]


def _measured(preset: Figure7Preset, means: Table, averaged: Table) -> dict[str, Any]:
    """Measure the claims at the full number of networks, in percent of test accuracy."""
    reached = {row["ensemble"]: round(100 * row["accuracy"], 3) for row in means}
    by_layers = [reached[f"WA({count})"] for count in sorted(preset.own_layers)]
    measured: dict[str, Any] = {"independent": reached, "gain": reached}
    if len(by_layers) > 2:
        measured["order"] = spearman(range(len(by_layers)), by_layers)
    if averaged:
        worst = max(averaged, key=lambda row: float(row["averaged_loss"] / row["largest_single_loss"]))
        measured["convex"] = max(row["averaged_loss"] / row["largest_adjusted_loss"] - 1 for row in averaged)
        measured["bound"] = {"averaged": worst["averaged_loss"], "largest single": worst["largest_single_loss"]}
    return measured


def _is_best(measured: Mapping[str, float]) -> bool:
    return all(measured[INDEPENDENT] >= value for value in measured.values())


def _gains(measured: Mapping[str, float]) -> bool:
    return all(value >= measured["single"] + 0.3 for name, value in measured.items() if name != "single")


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw accuracy against the number of networks, and against what it costs."""
    from thalweg.lab.figures import curves

    several = [row for row in tables["means"] if row["ensemble"] != "single"]
    alone = next(row for row in tables["means"] if row["ensemble"] == "single")
    counts = sorted({int(row["models"]) for row in several})
    level = [{**alone, "models": count} for count in counts]
    return [
        curves(
            [*several, *level],
            id="growth",
            title="Ensembles on one backbone gain most of what independent networks gain",
            caption=(
                "Test accuracy against the number of networks; Ind: independent ones, WA(n): the last n layers are "
                "each network's own, adjusted to the first one's features. Means over backbones, with their range."
            ),
            x="models",
            y="accuracy",
            series="ensemble",
            lower="least",
            upper="most",
            x_title="networks",
            y_title="test accuracy",
        ),
        *(
            curves(
                several,
                id=f"cost-{column.replace('_', '-')}",
                title=f"What accuracy costs in {words}",
                caption="The same ensembles; what networks share is counted once.",
                x=column,
                y="accuracy",
                series="ensemble",
                log_x=True,
                x_title=words,
                y_title="test accuracy",
            )
            for column, words in (("multiply_adds", "multiply-adds for one sample"), ("parameters", "parameters"))
        ),
    ]


RECIPE = Recipe(
    name="low_loss_connection/figure_7",
    title="Ensembles whose networks share a backbone",
    source="anokhin2020lowloss, figure 7",
    version=1,
    presets={"paper": PAPER, "cpu": CPU, "quick": QUICK},
    claims=(
        Claim(
            "independent",
            "The ensemble of independently trained networks is the best: test accuracy in percent.",
            "Ind above every WA(n)",
            "at least every WA(n), with all networks, mean over backbones",
            _is_best,
        ),
        Claim(
            "order",
            "A longer common backbone costs accuracy: WA(14) comes next, and so on.",
            "more own layers, higher accuracy",
            "Spearman's correlation of own layers with test accuracy at least 0.8, with all networks (ours)",
            lambda m: m >= 0.8,
        ),
        Claim(
            "gain",
            "Every ensemble is above a single network: test accuracy in percent.",
            "yes",
            "by at least 0.3 points, mean over backbones against the mean over networks (ours)",
            _gains,
        ),
        Claim(
            "convex",
            "The net of averaged last layers loses no more than the worst adjusted network: ratio of losses, less 1.",
            "at most 0: the loss is convex",
            "at most 1e-6, for every backbone",
            lambda m: m <= 1e-6,
        ),
        Claim(
            "bound",
            "The loss of the averaged net does not exceed the largest of the single networks: training loss.",
            "at most",
            "at most, for every backbone; the adjusted networks only approximate the single ones",
            lambda m: m["averaged"] <= m["largest single"],
        ),
    ),
    run=run,
    figures=figures,
    summary=(
        "Several networks share the first layers of one of them; the next layer of each is fitted to give, from "
        "these features, what it gave in its own network. The averaged predictions take a fraction of the cost of "
        "independent networks; with only the last layer apart, averaged outputs are those of a single net."
    ),
)
