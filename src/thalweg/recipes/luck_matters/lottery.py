"""Lottery tickets: students that met a teacher node are set back to their start, and trained again without the rest.

The paper explains tickets of Frankle & Carbin by lucky nodes, and shows no experiment. Counts as borne out: lucky
nodes that are set back learn as well as the whole student did, and better than the same nodes drawn anew, or than
others of the same start.
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
    FallPreset,
    Pairs,
    Setting,
    Watch,
    fall,
    fan_out,
    gaussian_pairs,
    rows_of,
    student_of,
)
from thalweg.recipes.luck_matters.tickets import (
    again,
    chooser,
    difference_figure,
    interval,
    lucky,
    others,
    part_of,
    raised,
    spread,
    top,
    trained,
    weight_norm,
)

if TYPE_CHECKING:
    from torch import nn

    from thalweg.lab.figures import Figure

DENSE = "whole student"
RESET = "lucky, set back"
NEW = "lucky, drawn anew"
RANDOM = "others, set back"
LARGEST = "largest, set back"
OWN = "narrow, torch's own start"
PRUNED = "lucky, not trained again"
RETRAINED = (RESET, NEW, RANDOM, LARGEST, OWN)
COMPARED = ((RESET, DENSE), (NEW, RESET), (RANDOM, RESET), (LARGEST, RESET), (OWN, RESET))

TOLERANCE = 0.1
_SIZES = (1, 2, 3)
# Distances from a pair's seed to those of what else is drawn; `falling` takes 0, 1 and 500, `tickets` 600 and 700.
_NEW, _OWN, _OTHERS = 300, 400, 800


class LotteryPreset(FallPreset):
    """Parameters of the run."""

    fc_widths: tuple[int, ...] = (10, 15, 20, 25)
    """Nodes of the teacher (the paper's small one)."""
    num_seeds: int = Field(default=10, ge=1, lt=300)
    """Teachers, each with a student (the authors' code)."""
    sizes: tuple[int, ...] = _SIZES
    """Nodes that are kept for each teacher node (ours; 2 leave less than a tenth of the weights)."""
    looks: int = Field(default=11, ge=2)
    """How often students are looked at, start and end included (ours)."""

    @model_validator(mode="after")
    def _has_others(self) -> "LotteryPreset":
        different = set(self.sizes)
        if len(different) != len(self.sizes) or not different <= set(range(1, self.factor // 2 + 1)) or not different:
            raise ConfigError(
                f"Expected sizes from 1 to half of factor={self.factor}, each once. Got {self.sizes}. Keep fewer "
                "nodes, so that as many others are left."
            )
        return self


PAPER = LotteryPreset()
# Chosen by us: a ninth of the paper's steps, at the authors' rate (at twice that, a student diverged).
CPU = PAPER.model_copy(update={"epochs": 10, "epoch_samples": 45_000, "num_seeds": 6})
QUICK = CPU.model_copy(
    update={
        "fc_widths": (3, 4),
        "num_outputs": 20,
        "epochs": 4,
        "epoch_samples": 1_600,
        "num_seeds": 3,
        "eval_samples": 256,
        "sizes": (1, 2),
        "looks": 3,
    }
)


def run(preset: LotteryPreset, context: Context) -> Outcome:
    """Train whole students, choose the nodes to keep, and train networks of these from several starts."""
    base = gaussian_pairs(preset, Setting(DENSE, "fc", preset.fc_widths), context)
    jobs = [(kind, size) for size in preset.sizes for kind in RETRAINED]
    shares = Share(context).split([3.0, *(1.0 for _ in jobs)])
    dense = _whole(preset, base, context, next(shares))
    layers, students = list(dense["layers"]), list(dense["students"])
    for (kind, size), share in zip(jobs, shares, strict=True):
        found = _again(preset, base, context, share, (kind, size, dense["nodes"]))
        layers += found["layers"]
        students += found["students"]
    final = _ends(layers, students)
    rows = _differences(final, preset.sizes)
    tables = {"students": students, "layers": layers, "ends": final, "differences": rows, "summary": _summary(rows)}
    is_quick = preset.epochs * preset.epoch_samples < 200_000  # too short to tell what a long training comes to
    return Outcome(tables=tables, measured={} if is_quick else measured(rows))


def _whole(preset: LotteryPreset, base: Pairs, context: Context, share: Share) -> dict[str, Any]:
    """Train the whole students; choose nodes of each, and look at the network of the lucky ones as it then is."""

    def compute(folder: Path | None) -> dict[str, Any]:
        falls = fall(preset, base, share, DENSE, folder, observed=preset.looks)
        found = rows_of(preset, DENSE, base, falls)
        found = {name: [row | _named(DENSE, preset.factor) for row in rows] for name, rows in found.items()}
        ended = [trained(*pair) for pair in zip(base.students, falls, strict=True)]
        nodes = [chosen(preset, base, k, student) for k, student in enumerate(ended)]
        watch = Watch(base)
        for size in preset.sizes:
            for k, student in enumerate(ended):
                seen = watch(0, k, part_of(student, nodes[k][str(size)]["lucky"]))
                shared = {"setting": _setting(PRUNED, size), "seed": base.seeds[k], "epoch": float(preset.epochs)}
                shared |= _named(PRUNED, size)
                found["students"].append(shared | {name: float(seen[name]) for name in ("loss", "agreement")})
                found["layers"] += [
                    shared | {"layer": place, "correlation": float(seen[f"best_{place}"].mean())}
                    for place in range(len(preset.fc_widths))
                ]
        return {**found, "nodes": nodes}

    return part(context, "whole", DENSE, compute)


def chosen(preset: LotteryPreset, base: Pairs, k: int, student: "nn.Module") -> dict[str, Any]:
    """Choose the nodes to keep of a trained student, in each hidden layer, for each size and by each rule.

    Args:
        preset: of the run.
        base: all pairs.
        k: number of the pair.
        student: its student at the end.

    Returns:
        By size and rule ("lucky", "largest", "others"), the numbers for each layer. Samples that decide are others
        than those that losses are measured on.
    """
    import torch

    from thalweg.teacher_student import correlations

    rho = correlations(base.teachers[k], student, chooser(preset, base, k))
    generator = torch.Generator().manual_seed(base.seeds[k] + _OTHERS)
    found: dict[str, Any] = {}
    for size in preset.sizes:
        kept = [lucky(own, size) for own in rho]
        norms = [weight_norm(student, place) * fan_out(student, place).double() for place in range(len(rho))]
        found[str(size)] = {
            "lucky": kept,
            "largest": [top(own, len(nodes)) for own, nodes in zip(norms, kept, strict=True)],
            "others": [others(nodes, len(own), generator) for own, nodes in zip(rho, kept, strict=True)],
        }
    return found


def _again(
    preset: LotteryPreset, base: Pairs, context: Context, share: Share, job: tuple[str, int, list[dict[str, Any]]]
) -> dict[str, Table]:
    """Train the networks of one kind and size, those of all seeds together."""
    kind, size, nodes = job

    def compute(folder: Path | None) -> dict[str, Any]:
        starts = [start(preset, base, k, kind, size, own[str(size)]) for k, own in enumerate(nodes)]
        pairs = again(preset, base, range(len(starts)), starts)
        falls = fall(preset, pairs, share, _setting(kind, size), folder, observed=preset.looks)
        found = rows_of(preset, _setting(kind, size), pairs, falls)
        return {name: [row | _named(kind, size) for row in rows] for name, rows in found.items()}

    return part(context, f"{size}-{RETRAINED.index(kind)}", f"{kind} {nodes}", compute)


def start(
    preset: LotteryPreset, base: Pairs, k: int, kind: str, size: int, nodes: dict[str, list[list[int]]]
) -> "nn.Module":
    """Build the network that training begins with again.

    Args:
        preset: of the run.
        base: all pairs, with students at their start.
        k: number of the pair.
        kind: one of `RETRAINED`.
        size: nodes for each teacher node.
        nodes: what was chosen at this size.
    """
    teacher, seed = base.teachers[k], base.seeds[k]
    if kind == OWN:
        narrow: nn.Module = student_of(teacher, size, "none", seed + _OWN)
        return narrow
    if kind == NEW:
        return part_of(student_of(teacher, preset.factor, "none", seed + _NEW), nodes["lucky"])
    rule = {RESET: "lucky", RANDOM: "others", LARGEST: "largest"}[kind]
    return part_of(base.students[k], nodes[rule])


def _setting(kind: str, size: int) -> str:
    return f"{kind}, {size} a teacher node"


def _named(kind: str, size: int) -> dict[str, Any]:
    return {"kind": kind, "size": size}


def _ends(layers: Table, students: Table) -> Table:
    """Give what every network came to, with ρ̄ on average over the layers."""
    from math import log10
    from statistics import mean

    last = max(row["epoch"] for row in students)
    found = []
    for row in students:
        if row["epoch"] != last:
            continue
        own = [r["correlation"] for r in layers if r["epoch"] == last and _key(r) == _key(row)]
        names = ("kind", "size", "seed", "loss", "agreement")
        found.append({name: row[name] for name in names} | {"log_loss": log10(row["loss"]), "correlation": mean(own)})
    return found


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["kind"], row["size"], row["seed"]


def _differences(final: Table, sizes: Sequence[int]) -> Table:
    """Compare networks of one seed: log10 of the loss and the agreement with the teacher."""
    by = {(row["kind"], row["seed"]) if row["kind"] == DENSE else _key(row): row for row in final}
    seeds = sorted({row["seed"] for row in final})
    rows = []
    for size in sizes:
        for one, other in COMPARED:
            for seed in seeds:
                a, b = by[one, size, seed], by[(other, seed) if other == DENSE else (other, size, seed)]
                gained = {"difference": a["log_loss"] - b["log_loss"], "agreement": a["agreement"] - b["agreement"]}
                rows.append({"name": f"{one} - {other}", "size": size, "seed": seed, **gained})
    return rows


def _summary(rows: Table) -> Table:
    keys = ("name", "size")
    both = zip(spread(rows, keys, "difference"), spread(rows, keys, "agreement"), strict=True)
    return [loss | {f"agreement_{end}": seen[end] for end in ("mean", "low", "high")} for loss, seen in both]


def measured(rows: Table) -> dict[str, Any]:
    """Measure the claims, which are about some sizes: mean and interval of differences of log10 loss over seeds."""
    found: dict[str, Any] = {}
    for size in sorted({row["size"] for row in rows} & set(_SIZES)):
        for claim, (one, other) in zip(("reset_as_well", "anew_worse", "others_worse"), COMPARED, strict=False):
            own = [r["difference"] for r in rows if r["size"] == size and r["name"] == f"{one} - {other}"]
            value = interval(own)
            if value is not None:
                found[f"{claim}_{size}"] = value
    return found


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw the paired differences, and losses and agreement over time."""
    found = []
    whole = [row for row in tables["students"] if row["kind"] == DENSE]
    for size in sorted({row["size"] for row in tables["ends"] if row["kind"] != DENSE}):
        words = f"nodes kept: {size} for each teacher node"
        own = [row for row in tables["students"] if row["size"] == size and row["kind"] in RETRAINED]
        found += [
            difference_figure(
                [row for row in tables["differences"] if row["size"] == size],
                [f"{one} - {other}" for one, other in COMPARED],
                id=f"differences-{size}",
                title=f"Differences of log10 loss at the end, {words}",
                caption="Below 0 the first is better. One dot for each seed; mean and 95 % interval (Student's t).",
                x_title="difference of log10 loss",
            ),
            _course([*own, *whole], "loss", f"loss-{size}", f"Loss, {words}"),
            _course([*own, *whole], "agreement", f"agreement-{size}", f"Agreement with the teacher, {words}"),
        ]
    return found


def _course(rows: Table, name: str, id: str, title: str) -> "Figure":  # noqa: A002 - the figure's word
    """Draw a measure over the epochs, a line for each start; losses are averaged as logarithms."""
    from math import log10

    from thalweg.lab.figures import curves

    is_loss = name == "loss"
    values = [row | {"value": log10(row[name]) if is_loss else row[name]} for row in rows]
    means = spread(values, ("kind", "epoch"), "value")
    return curves(
        raised(means) if is_loss else means,
        id=id,
        title=title,
        caption="Means over seeds, on samples of their own, with their 95 % intervals.",
        x="epoch",
        y="mean",
        series="kind",
        lower="low",
        upper="high",
        log_y=is_loss,
        y_title=name,
    )


def _claims(size: int) -> tuple[Claim, ...]:
    """Claim the same for each size; the paper's words are of the first and the second."""
    kept = f"{size} for each teacher node"
    measure = "difference of log10 loss, mean and 95 % interval over the seeds"
    return (
        Claim(
            f"reset_as_well_{size}",
            f"Lucky nodes, {kept}, set back and trained again learn as well as the whole student: {measure}.",
            "the test performance is the same or better",
            f"upper end at most {TOLERANCE:g}: a loss that is a quarter larger counts as the same",
            lambda m: m["high"] <= TOLERANCE,
        ),
        Claim(
            f"anew_worse_{size}",
            f"Lucky nodes, {kept}, are worse drawn anew than set back: {measure}.",
            "if we reinitialize, much worse",
            "lower end above 0",
            lambda m: m["low"] > 0,
        ),
        Claim(
            f"others_worse_{size}",
            f"Others of the same start, {kept}, are worse than the lucky ones: {measure}.",
            "lucky nodes overlap with teacher nodes after initialisation",
            "lower end above 0",
            lambda m: m["low"] > 0,
        ),
    )


RECIPE = Recipe(
    name="luck_matters/lottery",
    title="Lottery tickets: lucky students, set back to their start and trained without the rest",
    source="tian2019luck, section 2 and figure 3",
    version=1,
    presets={"paper": PAPER, "cpu": CPU, "quick": QUICK},
    claims=tuple(claim for size in _SIZES for claim in _claims(size)),
    run=run,
    figures=figures,
    summary=(
        "A student ten times wider learns its teacher; then every teacher node has a student or more of its own, by "
        "the assignment of the largest correlations. These lucky ones alone, set back to their initial weights, are "
        "trained for as many steps on new samples, and compared with the same nodes of a new draw, with others of "
        "the same start, with the largest by weights, and with a narrow network as torch starts it. All nodes of a "
        "start are drawn alike, so that those of a new draw are any nodes: lucky ones differ from them by luck alone."
    ),
)
