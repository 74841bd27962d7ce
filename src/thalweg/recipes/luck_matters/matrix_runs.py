"""Runs of the authors' matrix dynamics, each computed once, and what is told of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.lab.parts import Share, part
from thalweg.lab.tables import Table

if TYPE_CHECKING:
    from thalweg.recipes.luck_matters.theorem_5 import Theorem5Preset
    from thalweg.teacher_student import MatrixCourse


def matrix_courses(preset: "Theorem5Preset", share: Share) -> "list[MatrixCourse]":
    """Follow the dynamics from several starts; an interrupted run finds those that it had.

    Args:
        preset: of the run.
        share: of its progress.
    """
    import torch

    from thalweg.teacher_student import MatrixCourse, matrix_course

    own: dict[str, Any] = {"step": preset.learning_rate, "steps": preset.iterations}
    own |= {name: getattr(preset, name) for name in ("factor", "batch_size", "perturbation", "record_every")}
    courses = []
    for number, piece in enumerate(share.split([1.0] * preset.num_runs)):
        piece.told("matrix dynamics")(0.0, f"run {number + 1} of {preset.num_runs}")

        def compute(folder: Path | None, number: int = number) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(preset.seed * 1_000 + number)
            course = matrix_course(preset.widths, generator, **own)
            found = {name: getattr(course, name).tolist() for name in ("relevant", "irrelevant", "alignment")}
            return found | {"steps": course.steps}

        kept = part(share.context, f"matrix-{number}", preset.model_dump_json(), compute)
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in kept.items() if name != "steps"}
        courses.append(MatrixCourse(steps=tuple(kept["steps"]), **tensors))
    return courses


def ratios_of(course: "MatrixCourse") -> dict[str, float]:
    """Hold the fan-outs of relevant students against those of the others, at the end."""
    near, far = course.relevant[-1], course.irrelevant[-1]
    return {
        "extremes": float(near.min() / far.max()),
        "medians": float(near.median() / far.median()),
        "least_relevant": float(near.min()),
        "most_irrelevant": float(far.max()),
        "least_alignment": float(course.alignment.min()),
    }


def bands(courses: "Sequence[MatrixCourse]") -> Table:
    """Give median, least and most ‖v_j‖ over the nodes of all runs."""
    import torch

    rows = []
    for name in ("relevant", "irrelevant"):
        norms = torch.cat([getattr(course, name) for course in courses], 1)
        for step, values in zip(courses[0].steps, norms, strict=True):
            low, high = float(values.min()), float(values.max())
            rows.append({"set": name, "step": step, "norm": float(values.median()), "least": low, "most": high})
    return rows
