"""Table 1: accuracy at the worst point of every kind of path between networks with one hidden layer.

Counts as reproduced: Linear below Arc below the learned bijection below weight adjustment and transport, and both
together within half a point of the end points, without any training of the path.

Departures: the paper takes the worst point of a path at t = 1/2 and evaluates neither the way to the adjusted weights
at t = 0 nor the permutation of units at the end. Here the worst point is searched along the whole path. "Met" columns
hold up to where B's function is reached, which is what the paper's numbers are about; "worst" ones hold to the end.
The permutation is one of free slots, which is ours; `permutation=swaps` takes the paper's. The bijection's optimiser
is not recorded; ours starts as the identity, so that it begins as Arc.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from thalweg.lab.claims import Claim
from thalweg.lab.recipe import Context, Outcome, Recipe
from thalweg.lab.tables import Table, Tables
from thalweg.recipes.low_loss_connection.comparison import (
    drawn,
    end_accuracies,
    ends_are_exact,
    ends_row,
    measure,
    profile_rows,
    rows_of,
    step_ratio,
    summary,
)
from thalweg.recipes.low_loss_connection.endpoints import Task, TrainedPreset, endpoints, load, pairs_of

if TYPE_CHECKING:
    from torch import nn

    from thalweg.lab.figures import Figure
    from thalweg.paths.panel import Own

CLOSED = ("linear", "arc", "linear+wa", "arc+wa", "ot", "ot+wa", "linear+ridge", "arc+ridge", "ot+ridge", "joint")
PUBLISHED: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "mnist": {
        "Linear": (96.54, 95.87),
        "Arc": (97.89, 97.03),
        "IAF flow": (96.34, 95.80),
        "RealNVP bijection": (98.50, 97.53),
        "Linear + WA": (98.76, 97.86),
        "Arc + WA": (98.75, 97.86),
        "OT": (98.78, 97.87),
        "OT + WA": (98.92, 97.91),
        "Garipov (3)": (99.10, 97.98),
        "Garipov (5)": (99.03, 97.93),
        "End points": (99.14, 98.01),
    },
    "cifar10": {
        "Linear": (32.09, 39.34),
        "Arc": (49.97, 41.34),
        "RealNVP bijection": (63.46, 53.94),
        "Linear + WA": (52.63, 57.66),
        "Arc + WA": (58.77, 57.88),
        "OT": (66.19, 56.49),
        "OT + WA": (67.02, 58.96),
        "Garipov (3)": (68.51, 58.74),
        "Garipov (5)": (67.20, 57.88),
        "End points": (70.60, 59.12),
    },
}
"""Train and test accuracy in percent. Of CIFAR-10's Linear and Linear + WA the train value lies below the test value,
which is likely a misprint."""


class Table1Preset(TrainedPreset):
    """Parameters of table 1."""

    width: int = 2_000
    """Hidden neurons."""
    num_networks: int = 7
    """Networks that are connected, consecutive ones with each other: 6 pairs; three networks make 3."""
    points: int = 21
    """Points of a profile, at least."""
    fit_samples: int = 60_000
    """Samples that the next layer is fitted on (the paper: all)."""
    measured_samples: int = 60_000
    """Training samples that loss and accuracy along paths are measured on (the paper: all)."""
    knots: int = 10
    """Stretches between two fits of a stage (the paper's code: 21 points over two legs)."""
    permutation: Literal["free_slots", "swaps", "reflections"] = "free_slots"
    """How units are put into B's order at the end."""
    curve_epochs: int = 60
    """Passes over the data of Garipov's curves; 0 leaves them out."""
    num_flow_networks: int = 16
    """Further networks that flows are fitted on; 0 leaves the flows out."""
    bijection_steps: int = 2_000
    """Steps of the bijection, one pair and one mini-batch each (the paper's number is not recorded)."""
    flow_epochs: int = 120
    """Passes over the units of the IAF flow (the authors' checkpoint)."""
    bijection_batch_size: int = 128
    """Samples of one of its mini-batches."""
    bijection_hidden: tuple[int, ...] = (2_000,)
    """Hidden widths of its networks (the authors': 2,000 on MNIST, 3,000 on CIFAR-10)."""
    bijection_noise: float = 0.0
    """Noise on the units while it is fitted, over their deviation. Ours: wide networks learn the training nets by
    heart, narrow ones with noise carry over to others."""
    bijection_learning_rate: float = 1e-4
    """Of Adam on it (ours; the closest sibling in the authors' code has 1e-5)."""


PAPER = Table1Preset()
CPU = PAPER.model_copy(
    update={
        "num_networks": 3,
        "epochs": 6,
        "learning_rate": 0.05,
        "fit_samples": 10_000,
        "measured_samples": 10_000,
        "curve_epochs": 6,
        "num_flow_networks": 3,
        "bijection_steps": 400,
        "bijection_batch_size": 256,
        "bijection_hidden": (128, 128),
        "bijection_noise": 0.5,
        "bijection_learning_rate": 1e-3,
        "flow_epochs": 3,
    }
)
QUICK = CPU.model_copy(
    update={
        "data": "digits",
        "num_train": 1_300,
        "num_test": 440,
        "width": 100,
        "num_networks": 2,
        "epochs": 20,
        "curve_epochs": 10,
        "batch_size": 64,
        "points": 7,
        "knots": 3,
        "bijection_steps": 40,
        "bijection_batch_size": 64,
        "bijection_hidden": (32,),
        "num_flow_networks": 2,
    }
)


def run(preset: Table1Preset, context: Context) -> Outcome:
    """Train the networks, connect every pair by every method, and measure all paths."""
    from thalweg.paths.methods import Settings
    from thalweg.paths.pair import Pair

    task = load(preset, context, flat=True)
    nets = endpoints(
        lambda: _net(preset, task),
        task,
        preset,
        context,
        seeds=[preset.seed * 1_000 + k for k in range(preset.num_networks + preset.num_flow_networks)],
        progress=lambda x, text: context.progress(0.5 * x, text),
    )
    ends, others = nets[: preset.num_networks], nets[preset.num_networks :]
    test = task.test_objective(nets[0], context)
    pairs = pairs_of(len(ends))
    settings = Settings(knots=preset.knots, permutation=preset.permutation, seed=preset.seed)
    rows: Table = []
    profiles: Table = []
    accuracies, exact = [], []
    steps: list[float] = []
    maps: dict[str, Own] = {}
    for place, (first, second) in enumerate(pairs):
        objective = task.objective(ends[first], context)
        pair = Pair.of(objective, ends[first], ends[second], fit_samples=preset.fit_samples, seed=preset.seed)
        maps = maps or _flows(preset, pair, others, context)

        def tell(x: float, text: str, place: int = place) -> None:
            context.progress(0.6 + 0.4 * (place + x) / len(pairs), f"pair {place + 1} of {len(pairs)}: {text}")

        found = measure(
            pair,
            CLOSED,
            own={**maps, **_curves(preset)},
            on=task.objective(ends[first], context, preset.measured_samples),
            test=test,
            points=preset.points,
            settings=settings,
            progress=tell,
        )
        rows += rows_of(place, found)
        profiles += profile_rows(place, found)
        accuracies.append(end_accuracies(found))
        exact.append(ends_are_exact(pair, found))
        steps += [step_ratio(row.connection) for row in found if row.connection is not None]
    published = PUBLISHED.get(preset.data, {})
    table = [*summary(rows, published), ends_row(accuracies, published.get("End points", (float("nan"),) * 2))]
    return Outcome(
        tables={"table": table, "pairs": rows, "profiles": profiles},
        measured=_measured(preset, table, exact, steps),
    )


def _net(preset: Table1Preset, task: Task) -> "nn.Module":
    from thalweg.nets import MLP

    return MLP((task.train[0].shape[1], preset.width, task.num_classes), "relu")


def _curves(preset: Table1Preset) -> "dict[str, Own]":
    from thalweg.paths.trained import TrainedSettings, trained

    if not preset.curve_epochs:
        return {}
    settings = TrainedSettings(
        epochs=preset.curve_epochs,
        learning_rate=preset.learning_rate,
        batch_size=preset.batch_size,
        momentum=preset.momentum,
        weight_decay=preset.weight_decay,
        seed=preset.seed,
    )
    return {name: trained(name, settings) for name in ("polygon-3", "polygon-5")}


def _flows(preset: Table1Preset, pair: Any, nets: "Sequence[nn.Module]", context: Context) -> "dict[str, Own]":
    """Fit a flow and a bijection on networks that are in no pair."""
    import torch

    from thalweg.paths.flow import fit_bijection, fit_flow
    from thalweg.paths.trained import flow_method

    if len(nets) < 2:
        return {}
    objective, group = pair.objective, pair.view.groups[0].name
    thetas = torch.stack([objective.space.theta(net) for net in nets])
    states = [dict(net.named_parameters()) for net in nets]
    generator = torch.Generator().manual_seed(preset.seed)
    context.progress(0.5, "fitting the flow")
    flow = fit_flow(pair.view, group, states, kind="iaf", generator=generator, epochs=preset.flow_epochs)
    context.progress(0.52, "fitting the bijection")
    bijection = fit_bijection(
        objective,
        pair.view,
        group,
        thetas,
        generator=generator,
        hidden=preset.bijection_hidden,
        steps=preset.bijection_steps,
        batch_size=preset.bijection_batch_size,
        learning_rate=preset.bijection_learning_rate,
        noise=preset.bijection_noise,
        progress=lambda step, loss: context.progress(
            0.52 + 0.08 * step / preset.bijection_steps, f"bijection: loss {loss:.3g}"
        ),
    )
    return {"iaf": flow_method(flow, "iaf"), "bijection": flow_method(bijection, "bijection")}


def _measured(preset: Table1Preset, table: Any, exact: list[bool], steps: list[float]) -> dict[str, object]:
    """What the claims judge, in points.

    Those whose criteria are about MNIST are left out on other data: on CIFAR-10 the paper's own numbers do not meet
    them, and digits at the quick size are too easy.
    """
    met = {row["row"]: {p: 100 * row[f"{p} (met)"] for p in ("train", "test")} for row in table}
    whole = {row["row"]: {p: 100 * row[f"{p} (worst)"] for p in ("train", "test")} for row in table}
    ends = met["End points"]
    measured: dict[str, object] = {
        "exact": all(exact),
        "continuous": max(steps),
        "linear_arc": {name: met[name]["train"] for name in ("Linear", "Arc")},
        "order": {n: met[n]["train"] for n in ("Arc", "Linear + WA", "Arc + WA", "OT", "OT + WA", "End points")},
        "permuted": {p: met["OT + WA"][p] - whole["OT + WA"][p] for p in ("train", "test")},
        "ot_wa": {p: ends[p] - met["OT + WA"][p] for p in ("train", "test")},
    }
    if "RealNVP bijection" in met:
        measured["bijection"] = {n: met[n]["train"] for n in ("Arc", "RealNVP bijection")}
        measured["flow"] = {n: met[n]["train"] for n in ("Arc", "IAF flow")}
    if "Garipov (3)" in met:
        measured["garipov"] = {n: met[n]["test"] for n in ("OT + WA", "Garipov (3)")}
    about_mnist = {"cifar10": ("order", "ot_wa"), "digits": ("order", "linear_arc", "bijection", "flow")}
    for name in about_mnist.get(preset.data, ()):
        measured.pop(name, None)
    least = {"mnist": 97.5 if preset.width == PAPER.width else None, "digits": 90.0}.get(preset.data)
    if least is not None:
        measured["trained"] = {"test": ends["test"], "at least": least}
    return measured


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw the table, and accuracy along the paths of one pair."""
    return drawn(tables, subject="One hidden layer")


RECIPE = Recipe(
    name="low_loss_connection/table_1",
    title="Low-loss paths between networks with one hidden layer",
    source="anokhin2020lowloss, table 1",
    version=2,
    presets={"paper": PAPER, "cpu": CPU, "quick": QUICK},
    claims=(
        Claim(
            "trained",
            "The end points are well trained: test accuracy in percent.",
            "98.01",
            "MNIST at width 2,000: at least 97.5; digits: 90 (ours: what the other claims are about)",
            lambda m: m["test"] >= m["at least"],
        ),
        Claim("exact", "Every path begins at A and ends at B.", "yes", "bit for bit", lambda m: m),
        Claim(
            "continuous",
            "No path jumps: the largest step in theta on a grid four times as fine, over that on the coarse one.",
            "1/4",
            "at most 0.5 (a leg that jumps has 1), on every leg of every method's path, for every pair",
            lambda m: m <= 0.5,
        ),
        Claim(
            "linear_arc",
            "Arc is better than Linear: train accuracy at the worst point, in percent.",
            "96.54, 97.89",
            "by at least 0.5 points (these two permute nothing)",
            lambda m: m["Arc"] - m["Linear"] >= 0.5,
        ),
        Claim(
            "order",
            "Weight adjustment and transport are better than Arc, and together they are best: train accuracy.",
            "97.89, 98.76, 98.75, 98.78, 98.92, 99.14",
            "each at least that of the ends less 1, and Arc's; both at least the better less 0.1; up to B's function",
            lambda m: (
                min(m[n] for n in ("Linear + WA", "Arc + WA", "OT")) >= max(m["End points"] - 1, m["Arc"])
                and m["OT + WA"] >= max(m[n] for n in ("Linear + WA", "Arc + WA", "OT")) - 0.1
            ),
        ),
        Claim(
            "ot_wa",
            "Transport with weight adjustment comes near the end points: points lost, train and test.",
            "0.22, 0.10",
            "at most 0.5 points, up to B's function; from there on see the next claim",
            lambda m: max(m.values()) <= 0.5,
        ),
        Claim(
            "permuted",
            "Putting the units into B's own order costs nothing: points lost by that part of the path of OT + WA.",
            "not evaluated in the paper",
            "at most 0.3 points (that of a single swap in the authors' notes)",
            lambda m: max(m.values()) <= 0.3,
        ),
        Claim(
            "bijection",
            "A bijection of units trained on other networks beats Arc on pairs it never saw: train accuracy.",
            "97.89, 98.50",
            "by at least 0.2 points",
            lambda m: m["RealNVP bijection"] - m["Arc"] >= 0.2,
        ),
        Claim(
            "flow",
            "A flow fitted by likelihood is no better than Arc: train accuracy.",
            "97.89, 96.34",
            "at most Arc's plus 0.3 points",
            lambda m: m["IAF flow"] <= m["Arc"] + 0.3,
        ),
        Claim(
            "garipov",
            "Without any training of the path, it is nearly as good as a trained curve: test accuracy.",
            "97.91, 97.98",
            "within 1 point, up to B's function",
            lambda m: m["Garipov (3)"] - m["OT + WA"] <= 1.0,
        ),
    ),
    run=run,
    figures=figures,
    summary=(
        "Two networks trained from different seeds lie in valleys that a straight line does not connect. Paths that "
        "move the distribution of neurons, transport each neuron to a partner, or fit the next layer anew all the "
        "way, connect them with almost no loss of accuracy, and none of them trains the path."
    ),
)
