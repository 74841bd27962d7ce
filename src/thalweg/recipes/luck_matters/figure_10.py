"""Figure 10: where a student node behaves like a teacher node, the outputs see both together: β* and H*.

Counts as reproduced: with the students in the order of the teacher nodes that they correlate with, the diagonal of H*
stands out after training and not before, and more so than that of β*.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from thalweg.lab.claims import Claim
from thalweg.lab.parts import Share, averages
from thalweg.lab.recipe import Context, Outcome, Recipe
from thalweg.lab.tables import Table, Tables
from thalweg.recipes.luck_matters.falling import FallPreset, Pairs, Setting, fall, gaussian_pairs, rows_of
from thalweg.recipes.luck_matters.pictures import by_epoch, layer_figures

if TYPE_CHECKING:
    from torch import Tensor, nn

    from thalweg.lab.figures import Figure

QUANTITIES = {"H*": "h_star", "β*": "beta_star"}
WHEN = ("before", "after")
_ENOUGH = 200_000  # samples: shorter trainings do not tell what a long one comes to, chosen by us


class Figure10Preset(FallPreset):
    """Parameters of the run: a fully connected teacher, students without BatchNorm."""

    drawn_students: int = Field(default=3, ge=1)
    """Students for each teacher node in the pictures: the best so many, one after the other (ours)."""


PAPER = Figure10Preset()
# Chosen by us: the paper's small teacher.
CPU = PAPER.model_copy(
    update={
        "fc_widths": (10, 15, 20, 25),
        "epochs": 20,
        "epoch_samples": 50_000,
        "num_seeds": 3,
    }
)
QUICK = CPU.model_copy(
    update={
        "fc_widths": (5, 6),
        "num_outputs": 20,
        "learning_rate": 0.02,
        "epoch_samples": 10_000,
        "num_seeds": 2,
        "eval_samples": 512,
    }
)


def run(preset: Figure10Preset, context: Context) -> Outcome:
    """Train, and contract β* and H* of every layer before and after."""
    setting = Setting("FC, without BN", "fc", preset.fc_widths)
    pairs = gaussian_pairs(preset, setting, context)
    starts = pairs.students
    folder = context.folder / "falls" if context.folder is not None else None
    falls = fall(preset, pairs, Share(context, 0.0, 0.9), setting.name, folder, observed=min(preset.epochs, 20) + 1)
    tables = rows_of(preset, setting.name, pairs, falls)
    ends = [_written(student, found) for student, found in zip(starts, falls, strict=True)]
    ratios: Table = []
    entries: Table = []
    for k, seed in enumerate(pairs.seeds):
        context.progress(0.9 + 0.1 * k / len(pairs.seeds), f"seed {seed}: H* and β* before and after")
        for when, student in zip(WHEN, (starts[k], ends[k]), strict=True):
            found = modulated(pairs, k, student, preset.drawn_students)
            ratios += [{"seed": seed, "when": when, **row} for row in found["ratios"]]
            if k == 0:
                entries += [{"when": when, **row} for row in found["entries"]]
    means = averages(ratios, ("quantity", "layer", "when"), ("diagonal", "off_diagonal", "ratio"))
    everything = {**tables, "by_epoch": by_epoch(tables["layers"]), "ratios": ratios, "means": means}
    return Outcome(tables={**everything, "entries": entries}, measured=measured(ratios, preset))


def _written(student: "nn.Module", found: Any) -> "nn.Module":
    import copy

    end = copy.deepcopy(student)
    found.write(end)
    return end


def modulated(pairs: Pairs, k: int, student: "nn.Module", drawn: int) -> Mapping[str, Table]:
    """Contract β* and H* of one student, in the order of the correlations that it has at that time.

    The diagonal is made of each teacher node and its best student; off it are that student and all other teacher
    nodes. Entries count by their magnitude: β* has both signs.

    Args:
        pairs: who learned from whom.
        k: number of the pair.
        student: in the state to look at.
        drawn: students for each teacher node in the pictures.

    Returns:
        "ratios": mean magnitudes on the diagonal and off it, for each layer; "entries": of the matrices to draw.
    """
    from thalweg.teacher_student import correlations, modulation

    teacher, x = pairs.teachers[k], pairs.evaluations[k]
    rho = correlations(teacher, student, x)
    layers = modulation(teacher, student, x, wanted=("beta_star", "d_star"))
    ratios: Table = []
    entries: Table = []
    for place, (own, found) in enumerate(zip(rho, layers, strict=True)):
        for quantity, name in QUANTITIES.items():
            values: Tensor = getattr(found, name).to(own)
            square = values[own.argmax(0)].abs()  # a row for each teacher node: its best student
            diagonal, count = float(square.diagonal().mean()), len(square)
            off = float((square.sum() - square.diagonal().sum()) / max(count * (count - 1), 1))
            ratios.append(
                {
                    "quantity": quantity,
                    "layer": place,
                    "diagonal": diagonal,
                    "off_diagonal": off,
                    "ratio": diagonal / off if off > 0 else None,
                }
            )
            chosen = own.topk(min(drawn, len(own)), dim=0).indices.T.flatten()
            entries += [
                {
                    "quantity": quantity,
                    "layer": place,
                    "student": f"{row}: node {int(node)}",
                    "teacher": column,
                    "value": value,
                }
                for row, node in enumerate(chosen)
                for column, value in enumerate(values[node].tolist())
            ]
    return {"ratios": ratios, "entries": entries}


def measured(ratios: Table, preset: Figure10Preset) -> dict[str, Any]:
    """Measure the claims on means over layers and seeds; layers of one teacher node have nothing off the diagonal."""
    mean: dict[tuple[str, str], float] = {}
    for key in ((quantity, when) for quantity in QUANTITIES for when in WHEN):
        own = [row["ratio"] for row in ratios if (row["quantity"], row["when"]) == key]
        values = [ratio for ratio in own if ratio is not None]
        if values:
            mean[key] = sum(values) / len(values)
    found = {"before": mean.get(("H*", "before")), "after": mean.get(("H*", "after"))}
    if mean.get(("β*", "after")) and found["after"] is not None:
        found["more"] = found["after"] / mean["β*", "after"]
    is_long = preset.epochs * preset.epoch_samples >= _ENOUGH
    return {name: value for name, value in found.items() if value is not None and (is_long or name == "before")}


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw H* and β* of every layer, before and after, for the first seed, and ρ̄."""
    from thalweg.lab.figures import matrix

    found = []
    entries = tables["entries"]
    for layer in dict.fromkeys(row["layer"] for row in entries):
        for quantity, name in QUANTITIES.items():
            for when in WHEN:
                own = [r for r in entries if (r["layer"], r["quantity"], r["when"]) == (layer, quantity, when)]
                found.append(
                    matrix(
                        own,
                        id=f"{name.replace('_', '-')}-{layer}-{when}",
                        title=f"{quantity} of layer {layer}, {when} training",
                        caption="Rows: the students that correlate best with each teacher node, teacher by teacher.",
                        row="student",
                        column="teacher",
                        value="value",
                        x_title="teacher node",
                        y_title="student node",
                    )
                )
    return [*found, *layer_figures(tables["by_epoch"], ("correlation",))]


RECIPE = Recipe(
    name="luck_matters/figure_10",
    title="H* and β*: top-down modulation matches the correlations from below",
    source="tian2019luck, figure 10",
    version=1,
    presets={"paper": PAPER, "cpu": CPU, "quick": QUICK},
    claims=(
        Claim(
            "before",
            "Before training, H* knows nothing of the correlations: mean magnitude on the diagonal in that off it, "
            "on average over layers and seeds.",
            "no structure",
            "between 0.5 and 2",
            lambda m: 0.5 <= m <= 2,
        ),
        Claim(
            "after",
            "After training, H* is large where a student correlates with a teacher node: the same ratio.",
            "identity matrix structure",
            "at least 5",
            lambda m: m >= 5,
        ),
        Claim(
            "more",
            "The structure is more prominent in H* than in β*: ratio of both ratios after training.",
            "more prominent in H*",
            "above 1",
            lambda m: m > 1,
        ),
    ),
    run=run,
    figures=figures,
    summary=(
        "Correlations come from the weights below a layer, β* from those above it. That both agree on which student "
        "belongs to which teacher node is what lets all layers learn at once."
    ),
)
