"""Structured pruning: nodes are kept by their top-down modulation, by their weights, or by what they contribute.

The paper suggests the first in place of the second, and shows no experiment. Counts as borne out: at equal widths the
networks kept by modulation lose less than those kept by weight norm, as they are, and after a short training.

What a removed node gave on average is not put into the next layer's bias: all rules are compared without that repair.
BatchNorm's running statistics stay as they are until the short training updates them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from thalweg.errors import ConfigError
from thalweg.lab.claims import Claim
from thalweg.lab.parts import Share, part
from thalweg.lab.recipe import Context, Outcome, Recipe
from thalweg.lab.tables import Table, Tables
from thalweg.recipes.luck_matters.falling import (
    WORDS,
    FallPreset,
    Norm,
    Pairs,
    Setting,
    fall,
    fan_out,
    gaussian_pairs,
    rows_of,
)
from thalweg.recipes.luck_matters.pictures import slug
from thalweg.recipes.luck_matters.tickets import (
    again,
    chooser,
    difference_figure,
    interval,
    part_of,
    raised,
    spread,
    top,
    trained,
    weight_norm,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from thalweg.lab.figures import Figure

WEIGHT = "weight norm ‖w‖"
FAN_OUT = "fan-out ‖v‖"
MODULATION = "modulation β"
CONTRIBUTION = "contribution β·l"
ORACLE = "oracle ρ"
RANDOM = "random"
RULES = (MODULATION, CONTRIBUTION, FAN_OUT, WEIGHT, ORACLE, RANDOM)
STATES = ("pruned", "trained again")
_DRAWN = 800  # distance from a pair's seed to that of the random nodes


class PruningPreset(FallPreset):
    """Parameters of the run."""

    fc_widths: tuple[int, ...] = (10, 15, 20, 25)
    """Nodes of the teacher (the paper's small one)."""
    norms: tuple[Norm, ...] = ("none", "after_relu")
    """Where the students' BatchNorm stands (the paper: nowhere, and after the ReLU)."""
    num_seeds: int = Field(default=10, ge=1)
    """Teachers, each with a student (the authors' code)."""
    multiples: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0)
    """Nodes that are kept in each layer, over the teacher's (ours)."""
    again_samples: int = Field(default=100_000, ge=1)
    """Samples of the short training after pruning (ours: an epoch)."""

    @model_validator(mode="after")
    def _fits(self) -> "PruningPreset":
        if not self.multiples or min(self.multiples) <= 0 or max(self.multiples) > self.factor:
            raise ConfigError(
                f"Expected multiples above 0 and up to factor={self.factor}. Got {self.multiples}. Keep at least a "
                "node and at most all."
            )
        if not self.norms or any(len(set(own)) < len(own) for own in (self.norms, self.multiples)):
            raise ConfigError(
                f"Expected norms, and each of norms and multiples once. Got {self.norms} and {self.multiples}. "
                "Leave out what comes twice."
            )
        return self


PAPER = PruningPreset()
# Chosen by us: a ninth of the paper's steps, at the authors' rate, and a short training of a tenth of that.
CPU = PAPER.model_copy(update={"epochs": 10, "epoch_samples": 45_000, "num_seeds": 6, "again_samples": 45_000})
QUICK = CPU.model_copy(
    update={
        "fc_widths": (3, 4),
        "num_outputs": 20,
        "epochs": 2,
        "epoch_samples": 2_000,
        "num_seeds": 3,
        "eval_samples": 256,
        "multiples": (1.0, 3.0),
        "again_samples": 320,
    }
)


def run(preset: PruningPreset, context: Context) -> Outcome:
    """Train students, prune them by every rule to every width, and train what is left for a short while."""
    students: Table = []
    shares = Share(context).split([1.0 for _ in preset.norms])
    for norm, share in zip(preset.norms, shares, strict=True):
        students += _pruned(preset, norm, context, share)["students"]
    rows = _differences(students)
    keys = ("norm", "state", "name")
    tables = {"students": students, "differences": rows, "summary": spread(rows, keys, "difference")}
    is_quick = preset.epochs * preset.epoch_samples < 200_000  # too short to tell what a long training comes to
    return Outcome(tables=tables, measured={} if is_quick else measured(rows))


def _pruned(preset: PruningPreset, norm: Norm, context: Context, share: Share) -> dict[str, Any]:
    """Train the students of one kind and prune them."""
    words = WORDS[norm]

    def compute(folder: Path | None) -> dict[str, Any]:
        base = gaussian_pairs(preset, Setting(words, "fc", preset.fc_widths, norm), context)
        shares = share.split([2.0, *(0.3 for _ in preset.multiples)])
        falls = fall(preset, base, next(shares), words, folder, observed=2)
        whole = rows_of(preset, words, base, falls)["students"]
        rows = [_row(row, norm, "", float(preset.factor), "whole") for row in whole if row["epoch"] == preset.epochs]
        ended = [trained(*pair) for pair in zip(base.students, falls, strict=True)]
        scores = [scored(preset, base, k, student) for k, student in enumerate(ended)]
        for multiple, own in zip(preset.multiples, shares, strict=True):
            rows += _at_width(preset, base, ended, scores, (norm, multiple, own, folder))
        return {"students": rows}

    return part(context, f"pruned-{norm}", words, compute)


def scored(preset: PruningPreset, base: Pairs, k: int, student: "nn.Module") -> "dict[str, list[Tensor]]":
    """Score every node of a trained student by every rule; the highest are kept.

    Args:
        preset: of the run.
        base: all pairs.
        k: number of the pair.
        student: its student at the end.

    Returns:
        By rule, a score for each node of each hidden layer. Samples that decide are others than those that losses are
        measured on.
    """
    import torch

    from thalweg.teacher_student import correlations, modulation

    x = chooser(preset, base, k)
    places = range(len(preset.fc_widths))
    seen = modulation(base.teachers[k], student, x, wanted=("beta", "l"))
    generator = torch.Generator().manual_seed(base.seeds[k] + _DRAWN)
    beta = [layer.beta.diag() for layer in seen if layer.beta is not None]
    squares = [layer.l.diag() for layer in seen if layer.l is not None]
    return {
        MODULATION: beta,
        CONTRIBUTION: [b * squared for b, squared in zip(beta, squares, strict=True)],
        FAN_OUT: [fan_out(student, place) for place in places],
        WEIGHT: [weight_norm(student, place) for place in places],
        ORACLE: [rho.amax(1) for rho in correlations(base.teachers[k], student, x)],
        RANDOM: [torch.rand(len(own), generator=generator) for own in beta],
    }


def _at_width(
    preset: PruningPreset,
    base: Pairs,
    ended: "Sequence[nn.Module]",
    scores: "Sequence[dict[str, list[Tensor]]]",
    job: tuple[Norm, float, Share, Path | None],
) -> Table:
    """Prune all students by all rules to one width, and train them together for a short while."""
    norm, multiple, share, folder = job
    widths = [max(1, round(multiple * width)) for width in preset.fc_widths]
    cases = [(rule, k) for rule in RULES for k in range(len(ended))]
    left = []
    for rule, k in cases:
        kept = [top(own, count) for own, count in zip(scores[k][rule], widths, strict=True)]
        left.append(part_of(ended[k], kept))
    short = preset.model_copy(update={"epochs": 1, "epoch_samples": preset.again_samples})
    pairs = again(preset, base, [k for _, k in cases], left)
    name = f"{WORDS[norm]}, {multiple:g} times the teacher's width"
    falls = fall(short, pairs, share, name, folder, observed=2)
    seen = rows_of(short, name, pairs, falls)["students"]
    rules = [rule for rule, _ in cases for _ in STATES]  # start and end of each pair, in their order
    return [_row(row, norm, rule, multiple, STATES[row["epoch"] > 0]) for row, rule in zip(seen, rules, strict=True)]


def _row(row: dict[str, Any], norm: Norm, rule: str, multiple: float, state: str) -> dict[str, Any]:
    from math import log10

    named = {"norm": WORDS[norm], "rule": rule, "multiple": multiple, "state": state, "seed": row["seed"]}
    return named | {"loss": row["loss"], "log_loss": log10(row["loss"]), "agreement": row["agreement"]}


def _differences(students: Table) -> Table:
    """Compare every rule with the weight norm: difference of log10 loss of one seed, on average over the widths."""
    from statistics import mean

    by = {_key(row): row["log_loss"] for row in students}
    rows = []
    for norm, state, seed in dict.fromkeys((r["norm"], r["state"], r["seed"]) for r in students):
        multiples = sorted({key[3] for key in by if key[:2] == (norm, state)})
        for rule in RULES:
            if rule == WEIGHT or state not in STATES:
                continue
            own = [by[norm, state, rule, m, seed] - by[norm, state, WEIGHT, m, seed] for m in multiples]
            shared = {"norm": norm, "state": state, "name": f"{rule} - {WEIGHT}", "seed": seed}
            rows.append(shared | {"difference": mean(own)})
    return rows


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["norm"], row["state"], row["rule"], row["multiple"], row["seed"]


def measured(rows: Table) -> dict[str, Any]:
    """Measure the claims: mean and interval over the seeds."""
    found: dict[str, Any] = {}
    for norm, ending in (("none", ""), ("after_relu", "_norm")):
        for state, start in zip(STATES, ("pruned", "again"), strict=True):
            case = {"norm": WORDS[norm], "state": state, "name": f"{MODULATION} - {WEIGHT}"}  # type: ignore[index]
            own = [row["difference"] for row in rows if case.items() <= row.items()]
            value = interval(own)
            if value is not None:
                found[start + ending] = value
    return found


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw the loss over the width by every rule, and the differences from the weight norm."""
    from thalweg.lab.figures import curves

    found = []
    rows = [row for row in tables["students"] if row["state"] in STATES]
    for norm, state in dict.fromkeys((row["norm"], row["state"]) for row in rows):
        case = {"norm": norm, "state": state}
        own = [row for row in rows if case.items() <= row.items()]
        found.append(
            difference_figure(
                [row for row in tables["differences"] if case.items() <= row.items()],
                [f"{rule} - {WEIGHT}" for rule in RULES if rule != WEIGHT],
                id=f"differences-{slug(norm)}-{slug(state)}",
                title=f"Differences of log10 loss from keeping by weight norm: {norm}, {state}",
                caption="Below 0 is better. One dot for each seed, over all widths; mean and 95 % interval.",
                x_title="difference of log10 loss",
            )
        )
        found.append(
            curves(
                raised(spread(own, ("rule", "multiple"), "log_loss")),
                id=f"loss-{slug(norm)}-{slug(state)}",
                title=f"Loss over the width that is kept: {norm}, {state}",
                caption="Mean over seeds of log10 loss on samples of their own, with the 95 % interval of the mean.",
                x="multiple",
                y="mean",
                series="rule",
                lower="low",
                upper="high",
                log_y=True,
                x_title="nodes kept, over the teacher's",
                y_title="loss",
            )
        )
    return found


def _claim(name: str, words: str, after: str) -> Claim:
    return Claim(
        name,
        f"{words}: kept by top-down modulation {after} at equal width than kept by weight norm: difference of log10 "
        "loss, over all widths, mean and 95 % interval over the seeds.",
        "a principled structured pruning method: not by its weight norm, but by its top-down modulation",
        "upper end below 0",
        lambda m: m["high"] < 0,
    )


RECIPE = Recipe(
    name="luck_matters/modulation_pruning",
    title="Pruning by top-down modulation, and by other scores, at equal width",
    source="tian2019luck, section 5",
    version=1,
    presets={"paper": PAPER, "cpu": CPU, "quick": QUICK},
    claims=(
        _claim("pruned", "Students without BatchNorm", "lose less"),
        _claim("again", "Students without BatchNorm, trained again for a short while", "lose less"),
        _claim("pruned_norm", "Students with BatchNorm", "lose less"),
        _claim("again_norm", "Students with BatchNorm, trained again for a short while", "lose less"),
    ),
    run=run,
    figures=figures,
    summary=(
        "Trained students are cut to a few times their teacher's width. In each layer those nodes are kept that "
        "score highest: by modulation β, by β times the mean square l of the node's activation, by the norm of the "
        "weights that read it, or of those that it reads, by the best correlation with any teacher node (which needs "
        "the teacher), or at random. Every cut network is measured as it is, and after a short training. What a "
        "removed node gave on average is not put into the next layer's bias."
    ),
)
