"""Figure 13: from the convolutional network's solution to the relaxed one's, by weights and by outputs.

Counts as reproduced: paths in weight space have a barrier of training loss, but of test accuracy they have more
within than at both ends; averaged outputs gain at least as much.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thalweg.lab.claims import Claim
from thalweg.lab.parts import Share, part
from thalweg.lab.recipe import Context, Outcome, Recipe
from thalweg.lab.tables import Table, Tables
from thalweg.recipes.needle_in_the_haystack import relax
from thalweg.recipes.needle_in_the_haystack.images import scores
from thalweg.recipes.needle_in_the_haystack.measures import CNN_COST, sizes
from thalweg.recipes.needle_in_the_haystack.protocol import (
    Protocol,
    ProtocolPreset,
    Relaxed,
    derived,
    loaded,
)

if TYPE_CHECKING:
    from pathlib import Path as File

    from torch import Tensor

    from thalweg.lab.figures import Figure
    from thalweg.paths import Path

METHODS = ("linear", "string", "outputs")


class InterpolatePreset(ProtocolPreset):
    """Parameters of the interpolation: those of the protocol, and of the paths."""

    points: int = 11
    """Interpolated points, both ends included (ours: the figure has about as many)."""
    images: int = 3
    """Free images of the string (the paper's code: 5 with the ends); none is inserted."""
    string_epochs: int = 3
    """Passes over the data that the string relaxes for (the paper's code)."""
    string_learning_rate: float = 0.1
    """Of the images (the paper's code)."""
    string_batch_size: int = 50
    """Samples of a mini-batch of the string (the paper's code)."""
    stiffness: float = 10.0
    """Of the springs, k: with a rate of 0.1, that of the paper's code, 1, in its units."""


# Four relax times as in the figure, whose numbers are lost: ours, spread over the epochs. 100 epochs: its caption.
PAPER = derived(InterpolatePreset, relax.PAPER, epochs=100, relax_times=(1, 6, 23, 78))
PAPER_ADAM = derived(InterpolatePreset, relax.PAPER_ADAM, epochs=100, relax_times=(1, 6, 23, 78))
PAPER_ALEXNET = derived(InterpolatePreset, relax.PAPER_ALEXNET, epochs=100, relax_times=(1, 6, 23, 78))
CPU = derived(InterpolatePreset, relax.CPU, relax_times=(1, 5, 30))
QUICK = derived(
    InterpolatePreset,
    relax.QUICK,
    points=5,
    relax_times=(0, 8),
    relaxed_epochs=3,
    string_epochs=1,
    string_learning_rate=0.05,
)


def run(preset: InterpolatePreset, context: Context) -> Outcome:
    """Run the protocol, and interpolate from the convolutional network's end to each relaxed network's."""
    images = loaded(preset, context)
    data = images.name
    rows: Table = []
    shares = Share(context).split([1.0] * len(preset.seeds))
    for seed, share in zip(preset.seeds, shares, strict=True):
        protocol = Protocol(preset, context, seed, images)
        context.progress(share.start, sizes(protocol, [("fc", time) for time in preset.times]))
        string_cost = 3 * preset.images * preset.string_epochs
        parts = share.split([CNN_COST * preset.epochs, *[preset.relaxed_epochs, string_cost] * len(preset.times)])
        snapshots, _ = protocol.convolutional(next(parts), (*preset.times, preset.epochs))
        for time in preset.times:
            first, second = next(parts), next(parts)

            def compute(
                folder: "File | None",
                time: int = time,
                shares: tuple[Share, Share] = (first, second),
                protocol: Protocol = protocol,
                states: "dict[int, dict[str, Tensor]]" = snapshots,
            ) -> dict[str, Any]:
                made = protocol.relaxed(states[time], time, "fc", shares[0], folder)
                return {"rows": _interpolated(preset, protocol, states[preset.epochs], made, shares[1], folder)}

            rows += part(context, f"{seed}-{time}", data, compute)["rows"]
    ends = _summaries(rows)
    measured = {"ends": _end_gap(rows)}
    if preset.data != "digits":  # neither of a size nor of a kind at which the paper looks
        measured |= _measured(ends)
    return Outcome(tables={"paths": rows, "summaries": ends}, measured=measured)


def _interpolated(
    preset: InterpolatePreset,
    protocol: Protocol,
    solution: "Mapping[str, Tensor]",
    made: Relaxed,
    share: Share,
    folder: "File | None",
) -> Table:
    """Measure the three ways between the convolutional network's end, α = 0, and the relaxed one's, α = 1."""
    import torch

    from thalweg.paths import elastic_string, linear, profile

    end = {name: t.clone() for name, t in made.state.items()}
    start = made.lifting.lazily(solution)
    objective = protocol.images.objective(made.module, protocol.context)
    test = protocol.images.objective(made.module, protocol.context, is_test=True)
    space = objective.space
    alphas = [k / (preset.points - 1) for k in range(preset.points)]
    string = elastic_string(
        objective,
        start,
        end,
        generator=torch.Generator().manual_seed(protocol.seed),
        images=preset.images,
        stiffness=preset.stiffness,
        learning_rate=preset.string_learning_rate,
        batch_size=preset.string_batch_size,
        cycles=preset.string_epochs,
        insert=False,
        kept_in=folder,
        progress=lambda cycle, loss: share.told("the string")(cycle / preset.string_epochs, f"loss {loss:.4g}"),
    )
    straight = linear(space, space.theta(start), space.theta(end))
    paths: dict[str, Path] = {"linear": straight, "string": string.path}
    rows: Table = []
    for name, path in paths.items():
        found = profile(path, objective, test=test, times=alphas, refine=False)
        rows += [
            {key: row[key] for key in ("t", "train_loss", "train_accuracy", "test_loss", "test_accuracy")}
            | {"method": name, "status": string.status if name == "string" else "finished"}
            for row in found.rows()
            if any(abs(row["t"] - alpha) < 1e-9 for alpha in alphas)
        ]
    rows += _outputs(protocol, made, start, end, alphas)
    return [{"seed": protocol.seed, "relax_time": made.time, **row} for row in rows]


def _outputs(
    protocol: Protocol,
    made: Relaxed,
    start: "Mapping[str, Tensor]",
    end: "Mapping[str, Tensor]",
    alphas: Sequence[float],
) -> Table:
    """Interpolate the logits of both ends."""
    logits: dict[tuple[str, int], Tensor] = {}
    device = next(made.module.parameters()).device
    parts = {"train": protocol.images.train, "test": protocol.images.test}
    for place, state in enumerate((start, end)):
        made.module.load_state_dict({name: state[name] for name in state})
        for part_name, (inputs, _) in parts.items():
            logits[part_name, place] = protocol.images.outputs(made.module, inputs, device)
    rows: Table = []
    for alpha in alphas:
        row: dict[str, Any] = {"t": alpha, "method": "outputs", "status": "finished"}
        for part_name, (_, targets) in parts.items():
            mixed = (1 - alpha) * logits[part_name, 0] + alpha * logits[part_name, 1]
            row[f"{part_name}_loss"], row[f"{part_name}_accuracy"] = scores(mixed, targets)
        rows.append(row)
    return rows


def _summaries(rows: Table) -> Table:
    """Give one row for each network and method: ends, best within, barrier of the training loss."""
    groups: dict[tuple[Any, ...], Table] = {}
    for row in rows:
        groups.setdefault((row["seed"], row["relax_time"], row["method"]), []).append(row)
    found = []
    for (seed, time, method), own in groups.items():
        own = sorted(own, key=lambda row: float(row["t"]))  # noqa: PLW2901 - the same rows in order
        chord = [(1 - row["t"]) * own[0]["train_loss"] + row["t"] * own[-1]["train_loss"] for row in own]
        ends = max(own[0]["test_accuracy"], own[-1]["test_accuracy"])
        within = max(row["test_accuracy"] for row in own[1:-1])
        found.append(
            {
                **{"seed": seed, "relax_time": time, "method": method, "status": own[0]["status"]},
                **{"ends": ends, "within": within, "middle": own[len(own) // 2]["test_accuracy"]},
                "barrier": max(row["train_loss"] - c for row, c in zip(own, chord, strict=True)),
                "peak": max(row["train_loss"] for row in own) - max(own[0]["train_loss"], own[-1]["train_loss"]),
            }
        )
    return found


def _end_gap(rows: Table) -> float:
    """Compare what the three ways have at α = 0 and 1, in the size of the loss."""
    ends: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row["t"] in (0.0, 1.0):
            key = row["seed"], row["relax_time"], row["t"]
            ends.setdefault(key, []).extend([row["train_loss"], row["test_loss"]])
    pairs = [own for values in ends.values() for own in (values[::2], values[1::2])]
    return max((max(own) - min(own)) / max(own) for own in pairs)


def _measured(summaries: Table) -> dict[str, Any]:
    """Measure the claims; accuracies in percent."""
    by_key = {(row["seed"], row["relax_time"], row["method"]): row for row in summaries}
    cases = sorted({key[:2] for key in by_key})
    early, late = min(time for _, time in cases), max(time for _, time in cases)
    methods = ["linear"]
    if all(row["status"] == "finished" for row in summaries):
        methods.append("string")
    weights = {case: max(by_key[(*case, method)]["within"] for method in methods) for case in cases}
    gains = [
        by_key[(*case, method)]["middle"] > by_key[(*case, method)]["ends"] for case in cases for method in methods
    ]
    behind = [100 * (weights[case] - by_key[(*case, "outputs")]["within"]) for case in cases]
    barriers = {method: [by_key[(*case, method)]["peak"] for case in cases if case[1] == early] for method in methods}
    measured: dict[str, Any] = {
        "gain": sum(gains) / len(gains),
        "outputs": max(behind),
        "barrier": min(min(values) for values in barriers.values()),
    }
    if "string" in methods:
        measured["string"] = max(
            by_key[(*case, "string")]["peak"] - by_key[(*case, "linear")]["peak"] for case in cases
        )
    if late > early:
        rises = {time: [by_key[seed, time, "linear"]["peak"] for seed, _ in cases] for time in (early, late)}
        measured["late"] = {"latest": max(rises[late]), "earliest": min(rises[early])}
    return measured


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw training loss and test accuracy along the ways, relax time by relax time, for the first seed."""
    from thalweg.lab.figures import curves

    seed = tables["paths"][0]["seed"]
    times = sorted({row["relax_time"] for row in tables["paths"]})
    found = []
    for time in times:
        rows = [row for row in tables["paths"] if row["relax_time"] == time and row["seed"] == seed]
        for column, words in (("train_loss", "training loss"), ("test_accuracy", "test accuracy")):
            found.append(
                curves(
                    rows,
                    id=f"{column.replace('_', '-')}-{time}",
                    title=f"Lifted at epoch {time}: {words} between the two solutions",
                    caption="α = 0: the convolutional network at its end; α = 1: the relaxed one at its end.",
                    x="t",
                    y=column,
                    series="method",
                    x_title="α",
                    y_title=words,
                )
            )
    return found


RECIPE = Recipe(
    name="needle_in_the_haystack/interpolate",
    title="Between the convolutional solution and the relaxed one",
    source="dascoli2019finding, figure 13",
    version=2,
    presets={
        "paper": PAPER,
        "paper_adam": PAPER_ADAM,
        "paper_alexnet": PAPER_ALEXNET,
        "cpu": CPU,
        "quick": QUICK,
    },
    claims=(
        Claim(
            "ends",
            "All three ways begin at one network and end at one: largest difference of their losses at the ends.",
            "0",
            "at most 1e-5 of the loss, in single precision",
            lambda m: m <= 1e-5,
        ),
        Claim(
            "barrier",
            "At the earliest relax time both paths in weight space have a barrier: least rise of the training loss "
            "above the worse end.",
            "a barrier",
            "at least 0.05 for the straight path and the string, every network (ours)",
            lambda m: m >= 0.05,
        ),
        Claim(
            "late",
            "At late relax times the straight path has none: rises above the worse end.",
            "no barrier",
            "at the latest below 0.05 and below a tenth of that at the earliest, every network (ours)",
            lambda m: m["latest"] < min(0.05, 0.1 * m["earliest"]),
        ),
        Claim(
            "string",
            "The string lowers the barrier, if not to nothing: its rise less that of the straight path.",
            "lower or equal",
            "at most 0.01 for every relax time (ours: the string's images see mini-batches)",
            lambda m: m <= 0.01,
        ),
        Claim(
            "gain",
            "Within the paths, test accuracy is higher than at both ends: share of paths where it is in the middle.",
            "all",
            "at least half of all straight paths and strings, over relax times and networks",
            lambda m: m >= 0.5,
        ),
        Claim(
            "outputs",
            "Averaged outputs gain most: largest lead of a path in weight space, in points of test accuracy.",
            "none",
            "at most 0.3 points, every relax time",
            lambda m: m <= 0.3,
        ),
    ),
    run=run,
    figures=figures,
    summary=(
        "Three ways from the solution with constraints to the one without: straight in weight space, along an "
        "elastic string that falls down the landscape, and by averaging outputs."
    ),
)
