"""Figures of lab 4, drawn from its tables."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thalweg.lab.parts import averages
from thalweg.lab.tables import Table

if TYPE_CHECKING:
    from thalweg.lab.figures import Figure

MEASURES = {
    "correlation": ("Correlation ρ̄", "Mean over the teacher's nodes of the best student's correlation"),
    "rank": ("Mean rank r̄", "Rank that the students which win at the end have, 0 is first and chance is 0.5"),
}


def by_epoch(layers: Table) -> Table:
    """Average over the seeds, with the range."""
    return averages(
        layers, ("setting", "layer", "epoch"), ("correlation", "rank", "fan_out_winners", "fan_out_others")
    )


def left_out(diverged: Sequence[dict[str, Any]]) -> str:
    """Say which trainings diverged, as a sentence for captions; nothing if none did."""
    names = [f"seed {row['seed']} of {row['setting']}" for row in diverged]
    return f" Left out, as their training diverged: {'; '.join(names)}." if names else ""


def layer_figures(
    means: Table, measures: tuple[str, ...] = ("correlation", "rank"), diverged: Sequence[dict[str, Any]] = ()
) -> "list[Figure]":
    """Draw ρ̄ and r̄ over the epochs, one picture for each setting and a line with a band for each layer."""
    from thalweg.lab.figures import curves

    found, ending = [], left_out(diverged)
    for setting in dict.fromkeys(row["setting"] for row in means):
        for name in measures:
            word, caption = MEASURES[name]
            rows = [row for row in means if row["setting"] == setting and row.get(name) is not None]
            if not rows:  # no teacher node varies
                continue
            found.append(
                curves(
                    [{**row, "line": f"layer {row['layer']}"} for row in rows],
                    id=f"{name}-{slug(setting)}",
                    title=f"{word}: {setting}",
                    caption=f"{caption}. Layer 0 is the lowest. Means over seeds with their range.{ending}",
                    x="epoch",
                    y=name,
                    series="line",
                    lower=f"{name}_least",
                    upper=f"{name}_most",
                    x_title="epoch",
                    y_title=word,
                )
            )
    return found


def student_figures(students: Table, name: str, title: str, caption: str, *, log_y: bool = False) -> "list[Figure]":
    """Draw what was measured of whole students over the epochs, a line with a band for each setting."""
    from thalweg.lab.figures import curves

    means = averages(students, ("setting", "epoch"), (name,))
    shared: dict[str, Any] = {"x": "epoch", "x_title": "epoch", "series": "setting", "log_y": log_y}
    return [
        curves(
            means,
            id=f"student-{name.replace('_', '-')}",
            title=title,
            caption=f"{caption} Means over seeds with their range.",
            y=name,
            lower=f"{name}_least",
            upper=f"{name}_most",
            y_title=title,
            **shared,
        )
    ]


def loss_figures(students: Table, diverged: Sequence[dict[str, Any]] = ()) -> "list[Figure]":
    """Draw the loss of all settings."""
    caption = "Mean squared difference of the outputs of student and teacher, on samples of their own."
    return student_figures(students, "loss", "Loss", f"{caption}{left_out(diverged)}", log_y=True)


def fan_out_figures(means: Table, diverged: Sequence[dict[str, Any]] = ()) -> "list[Figure]":
    """Draw how much the nodes of the top hidden layer are read: winners, and all others."""
    from thalweg.lab.figures import curves

    caption = "Mean norm of the weights that read a node: the teacher nodes' best students, and others."
    tops = {row["setting"]: 0 for row in means}
    for row in means:
        tops[row["setting"]] = max(tops[row["setting"]], row["layer"])
    rows = [
        {"epoch": row["epoch"], "line": f"{row['setting']}: {words}", "norm": row[name]}
        for words, name in (("winners", "fan_out_winners"), ("others", "fan_out_others"))
        for row in means
        if row["layer"] == tops[row["setting"]] and row.get(name) is not None
    ]
    return [
        curves(
            rows,
            id="fan-out",
            title="How much the top hidden layer's nodes are read",
            caption=f"{caption}{left_out(diverged)}",
            x="epoch",
            y="norm",
            series="line",
            x_title="epoch",
            y_title="norm of the fan-out weights",
        )
    ]


def slug(words: str) -> str:
    """Make an id of a setting's name."""
    return "".join(c if c.isalnum() else "-" for c in words.lower()).strip("-")
