"""Theorem 5's recipe in its quick size: what is tested holds, and its claims can fail."""

import pytest
from pydantic import ValidationError

from thalweg.lab.claims import judge
from thalweg.lab.recipe import Context
from thalweg.recipes.luck_matters.theorem_5 import RECIPE, Theorem5Preset
from thalweg.teacher_student import matrix_course

TESTED = {"unlucky", "lucky", "theorem_4", "orthogonal", "conserved"}


def test_claims_hold_or_are_untested_and_figures_are_drawn():
    seen: list[float] = []
    outcome = RECIPE.run(RECIPE.presets["quick"], Context(progress=lambda part, _: seen.append(part)))
    assert seen == sorted(seen)
    verdicts = {result.id: result.verdict for result in judge(RECIPE.claims, outcome.measured)}
    assert verdicts == {name: "holds" if name in TESTED else "untested" for name in verdicts}
    assert [figure.id for figure in RECIPE.figures(outcome.tables)] == ["fan_out", "separated", "drift"]
    assert {row["inputs"]: row["rate"] is None for row in outcome.tables["bounds"]} == {
        "separated": False,
        "Gaussian": True,
    }


def test_claims_can_fail_and_a_vacuous_bound_tests_nothing():
    slow = {"rate": 0.99, "start": 1.0, "end": 1e-9}
    measured = {
        "extremes": {"iterations": 6_000, "ratios": [20.0, 9.0]},
        "medians": {"iterations": 6_000, "ratios": [99.0]},
        "unlucky": {"unlucky": slow, "bound": 0.98},
        "lucky": {"W_u": slow, "V_u": slow | {"end": 0.1}, "bound": 0.995},
        "theorem_4": {"angles": slow, "bound": None},
        "orthogonal": {"after_relu": 1e-9},
        "conserved": {"after_relu": 1.0, "before_relu": 1.2},
    }
    verdicts = {result.id: result.verdict for result in judge(RECIPE.claims, measured)}
    assert verdicts == {name: "untested" if name == "theorem_4" else "fails" for name in verdicts}


@pytest.mark.parametrize("sizes", [{"students": 3}, {"teachers": 6}, {"num_inputs": 5}])
def test_sizes_that_leave_no_unlucky_student_are_refused_before_anything_runs(sizes):
    with pytest.raises(ValidationError, match="Expected teachers < students <= num_inputs"):
        Theorem5Preset(**sizes)


def test_an_interrupted_run_does_not_follow_a_course_again(tmp_path, monkeypatch):
    preset = RECIPE.presets["quick"].model_copy(update={"num_runs": 3, "iterations": 40})
    whole = RECIPE.run(preset, Context())
    followed: list[int] = []

    def counted(*args, **options):
        followed.append(1)
        return matrix_course(*args, **options)

    def stop(share: float, text: str) -> None:
        if text.startswith("matrix dynamics: run 3"):
            raise KeyboardInterrupt

    monkeypatch.setattr("thalweg.teacher_student.matrix_course", counted)
    with pytest.raises(KeyboardInterrupt):
        RECIPE.run(preset, Context(folder=tmp_path, progress=stop))
    assert len(followed) == 2
    again = RECIPE.run(preset, Context(folder=tmp_path))
    assert len(followed) == 3
    assert (again.measured, again.tables) == (whole.measured, whole.tables)
