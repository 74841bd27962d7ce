"""Figure 9: small teachers are found much sooner than large ones, and a finite set of samples stalls.

Counts as reproduced: the lowest layer of the small teacher is covered in a third of the time or less, BatchNorm slows
the small one down, and on the same number of samples a finite set leaves correlations behind.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from thalweg.lab.claims import Claim
from thalweg.lab.parts import Share, averages
from thalweg.lab.recipe import Context, Outcome, Recipe
from thalweg.lab.tables import Table, Tables
from thalweg.recipes.luck_matters.falling import WORDS, FallPreset, Kind, Setting, fallen, in_common, require_some
from thalweg.recipes.luck_matters.figure_7 import courses
from thalweg.recipes.luck_matters.pictures import by_epoch, layer_figures, left_out, loss_figures

if TYPE_CHECKING:
    from thalweg.lab.figures import Figure

SMALL, LARGE = "small", "large"
INFINITE, FINITE = "infinite samples", "finite samples"
_ENOUGH = 200_000  # samples: shorter trainings tell of the small finite set alone, chosen by us


class Figure9Preset(FallPreset):
    """Parameters of the runs."""

    small_widths: tuple[int, ...] = Field(default=(10, 15, 20, 25), min_length=1)
    """Nodes of the small teacher (the paper); those of the large one are `fc_widths`."""
    finite_samples: int = Field(default=100_000, ge=1)
    """Samples of the finite set (the authors' code draws so many)."""
    finite_kind: Kind = "cnn"
    """Networks that finite and infinite samples are compared on (the paper: convolutional)."""
    finite_epochs: int | None = Field(default=None, ge=1)
    """Epochs of that comparison. None: as of the other."""
    threshold: float = 0.9
    """ρ̄ of the lowest layer that counts as covered (ours)."""


PAPER = Figure9Preset()
# Chosen by us: the large teacher has half the paper's width; finite and infinite samples are compared on the small
# fully connected one, where minutes suffice to see a difference, on 2,000 samples.
CPU = PAPER.model_copy(
    update={
        "fc_widths": (25, 40, 50, 60),
        "epoch_samples": 15_000,
        "num_seeds": 3,
        "finite_samples": 2_000,
        "finite_kind": "fc",
    }
)
QUICK = CPU.model_copy(
    update={
        "fc_widths": (6, 8),
        "small_widths": (2, 3),
        "num_outputs": 20,
        "learning_rate": 0.02,
        "epochs": 5,
        "epoch_samples": 4_000,
        "num_seeds": 2,
        "eval_samples": 512,
        "finite_samples": 50,
    }
)


def run(preset: Figure9Preset, context: Context) -> Outcome:
    """Let the students of every setting fall."""
    sizes = [
        (preset, Setting(f"{size}, {WORDS[norm]}", "fc", widths, norm))
        for size, widths in ((SMALL, preset.small_widths), (LARGE, preset.fc_widths))
        for norm in ("none", "after_relu")
    ]
    longer = preset.of_kind(preset.finite_kind, "none").model_copy(
        update={"epochs": preset.finite_epochs or preset.epochs}
    )
    widths = preset.small_widths if preset.finite_kind == "fc" else preset.cnn_channels
    amounts = [
        (longer, Setting(name, preset.finite_kind, widths, "none", samples))
        for name, samples in ((INFINITE, None), (FINITE, preset.finite_samples))
    ]
    tables: dict[str, Table] = {"layers": [], "students": [], "diverged": []}
    # the small teacher without BatchNorm is what the finite set is held against, where that is fully connected
    alike = {(own, replace(setting, name="")): setting.name for own, setting in sizes}
    jobs = [*sizes, *(job for job in amounts if (job[0], replace(job[1], name="")) not in alike)]
    shares = Share(context).split([_cost(setting) for _, setting in jobs])
    for (own, setting), share in zip(jobs, shares, strict=True):
        for name, rows in fallen(own, setting, context, share).items():
            tables[name].extend(rows)
    require_some(tables)
    for own, setting in amounts:
        done = alike.get((own, replace(setting, name="")))
        for rows in tables.values() if done else ():
            rows += [row | {"setting": setting.name} for row in rows if row["setting"] == done]
    means = by_epoch(tables["layers"])
    found = measured(by_epoch(in_common(tables)), preset.threshold)
    if preset.epochs * preset.epoch_samples < _ENOUGH:
        found = {name: value for name, value in found.items() if name == "stalls"}
    return Outcome(tables={**tables, "by_epoch": means}, measured=found)


def _cost(setting: Setting) -> float:
    """Guess how long a setting takes: weights of the teacher, chosen by us."""
    if setting.kind == "cnn":
        return 1e5
    return 2e3 + sum(a * b for a, b in itertools.pairwise(setting.widths))


def measured(means: Table, threshold: float) -> dict[str, Any]:
    """Measure the claims on the means over seeds."""
    names = {(size, norm): f"{size}, {WORDS[norm]}" for size in (SMALL, LARGE) for norm in ("none", "after_relu")}
    layers = {key: courses(means, name) for key, name in (*names.items(), (INFINITE, INFINITE), (FINITE, FINITE))}
    ends = {key: _end(own) for key, own in layers.items() if own}  # one whose trainings all diverged has none
    found: dict[str, Any] = {}
    small, large = layers[SMALL, "none"], layers[LARGE, "none"]
    if small and large:
        found |= _faster(small[0], large[0], threshold)
    for claim, size in (("norm_hurts", SMALL), ("norm_helps", LARGE)):
        if {(size, "none"), (size, "after_relu")} <= set(ends):
            found[claim] = ends[size, "after_relu"] - ends[size, "none"]
    if {INFINITE, FINITE} <= set(ends):
        found["stalls"] = ends[INFINITE] - ends[FINITE]
    return found


def _faster(small: Table, large: Table, threshold: float) -> dict[str, Any]:
    """Compare when the lowest layers are covered; what is not covered at all counts with the whole training."""
    reached, whole = [_reached(course, threshold) for course in (small, large)], large[-1]["epoch"]
    if reached == [None, None]:
        return {}
    epochs = [whole if epoch is None else epoch for epoch in reached]
    ratio = epochs[1] / epochs[0] if epochs[0] else math.inf if epochs[1] else 1.0
    return {"faster": {"ratio": ratio, "small": reached[0], "large": reached[1], "epochs": whole}}


def _end(layers: Sequence[Table]) -> float:
    """ρ̄ at the end, on average over the layers."""
    return float(sum(course[-1]["correlation"] for course in layers) / len(layers))


def _reached(course: Table, threshold: float) -> float | None:
    """Epoch at which ρ̄ first reaches a threshold, between two looks by a line; None if it does not."""
    if course[0]["correlation"] >= threshold:
        return 0.0
    for before, after in itertools.pairwise(course):
        low, high = before["correlation"], after["correlation"]
        if low < threshold <= high:
            share = (threshold - low) / (high - low)
            return float(before["epoch"] + share * (after["epoch"] - before["epoch"]))
    return None


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw the settings side by side, then ρ̄ of each layer in every one, and the losses."""
    means, diverged = tables["by_epoch"], tables.get("diverged", [])
    lowest = [row for row in means if row["layer"] == 0 and row["setting"] not in (INFINITE, FINITE)]
    both = averages(
        [row for row in means if row["setting"] in (INFINITE, FINITE)], ("setting", "epoch"), ("correlation",)
    )
    compared = [
        _compared(lowest, "sizes", "Lowest layer: small teachers and large ones", "of the lowest layer", diverged),
        _compared(both, "samples", "Infinite samples and finite ones", "on average over the layers", diverged),
    ]
    layers = layer_figures(means, ("correlation",), diverged)
    return [*(figure for figure in compared if figure), *layers, *loss_figures(tables["students"], diverged)]


def _compared(rows: Table, name: str, title: str, which: str, diverged: Table) -> "Figure | None":
    """Draw ρ̄ of several settings in one picture; nothing where none is left."""
    from thalweg.lab.figures import curves

    if not rows:
        return None
    return curves(
        rows,
        id=f"compared-{name}",
        title=title,
        caption=f"Mean ρ̄ {which} over the epochs.{left_out(diverged)}",
        x="epoch",
        y="correlation",
        series="setting",
        x_title="epoch",
        y_title="Correlation ρ̄",
    )


RECIPE = Recipe(
    name="luck_matters/figure_9",
    title="Small teachers and large ones, infinite samples and finite ones",
    source="tian2019luck, figure 9",
    version=2,
    presets={"paper": PAPER, "cpu": CPU, "quick": QUICK},
    claims=(
        Claim(
            "faster",
            "The lowest layer of the small teacher is covered sooner: epochs of the large one in those of the small "
            "one, without BatchNorm. Large ones that are not covered count with the whole training.",
            "much faster in small models",
            "at least 3",
            lambda m: m["ratio"] >= 3,
        ),
        Claim(
            "norm_hurts",
            "BatchNorm hurts with the small teacher: ρ̄ at the end with it less ρ̄ without, mean over the layers.",
            "hurts in small models",
            "below 0",
            lambda m: m < 0,
        ),
        Claim(
            "norm_helps",
            "BatchNorm helps with the large teacher: ρ̄ at the end with it less ρ̄ without, mean over the layers.",
            "definitely increases the growth of the correlation",
            "above 0",
            lambda m: m > 0,
        ),
        Claim(
            "stalls",
            "A finite set stalls: ρ̄ at the end on infinite samples less that on a finite set, after as many steps, "
            "on average over the layers.",
            "stalls using finite samples",
            "at least 0.03",
            lambda m: m >= 0.03,
        ),
    ),
    run=run,
    figures=figures,
    summary=(
        "How soon students find the nodes of their teacher depends on how many of these there are; on a finite set "
        "some nodes hardly ever see a sample that activates them."
    ),
)
