"""Theorems 4 and 5: measured contraction against what is promised, and the dynamics against plain loops."""

import math

import pytest
import torch

from thalweg.errors import ConfigError, NumericalError, ShapeError
from thalweg.teacher_student import (
    GAUSSIAN,
    Constants,
    bound_of_theorem_4,
    bound_of_theorem_5,
    drawn_near,
    fitted_rate,
    matched_course,
    matrix_course,
    measured_constants,
    modulated_course,
    sample_overlaps,
    simplex_clones,
)

ANGLE = 0.12
SEPARATED = Constants(0.1, 0.0, 0.0, 0.0, 1.0, 0.5, 0.25, 0.25)


def drawn(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    found = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return found / found.norm(dim=1, keepdim=True)


def turned(w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    sideways = drawn(*w.shape, generator)
    sideways = sideways - (sideways * w).sum(1, keepdim=True) * w
    return math.cos(ANGLE) * w + math.sin(ANGLE) * sideways / sideways.norm(dim=1, keepdim=True)


@pytest.fixture(scope="module", params=[0, 1], ids=["apart", "overlapping"])
def setting(request):
    generator = torch.Generator().manual_seed(0)
    w, x = simplex_clones(4, 6, generator, copies=200, noise=0.005, shared=request.param)
    return w, sample_overlaps(x), generator


def test_theorem_4_every_step_contracts_at_least_as_fast_as_promised(setting):
    w, overlaps, generator = setting
    start = turned(w, generator)
    found = measured_constants(overlaps, w, angle=ANGLE, generator=generator)
    least = float(overlaps.gates(start, w).diag().min())
    bound = bound_of_theorem_4(found, nodes=4, step=0.4, start_overlap=least)
    course = matched_course(w, start, overlaps, step=0.4, steps=150)
    sines = course.angles.sin().amax(1)
    assert bound.rate is not None
    assert bound.rate < 1
    assert (sines[1:] <= bound.rate * sines[:-1] + 1e-15).all()
    assert fitted_rate(course.steps, sines) <= bound.rate
    torch.testing.assert_close(course.weights.norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_theorem_5_lucky_nodes_arrive_and_the_others_vanish_as_fast_as_promised(setting):
    w, overlaps, generator = setting
    v = drawn(4, 3, generator)
    v_start = v.clone()
    v_start[:2] += 0.2 * drawn(2, 3, generator)
    start = torch.cat([turned(w[:2], generator), w[2:]])
    found = measured_constants(overlaps, w, angle=ANGLE, generator=generator)
    bound = bound_of_theorem_5(found, teachers=2, students=4, step=0.4, fan_out=1.0, fan_out_error=0.2)
    course = modulated_course((w[:2], v[:2]), (start, v_start), overlaps, step=0.4, steps=250)
    assert bound.rate is not None
    for values in (course.angles.sin(), course.fan_out_errors, course.unlucky_norms):
        largest = values.amax(1)
        assert largest[-1] < 1e-9 * largest[0]
        assert fitted_rate(course.steps, largest) <= bound.rate < 1


def test_with_gaussian_inputs_the_bounds_are_vacuous_and_say_so():
    generator = torch.Generator().manual_seed(0)
    w = torch.eye(4, dtype=torch.float64)
    found = measured_constants(GAUSSIAN, w, angle=ANGLE, generator=generator, draws=4)
    for bound in (
        bound_of_theorem_4(found, nodes=4, step=0.1, start_overlap=0.5),
        bound_of_theorem_5(found, teachers=2, students=4, step=0.1, fan_out=1.0, fan_out_error=0.2),
    ):
        assert bound.rate is None
        assert bound.reason


def test_a_large_error_of_the_fan_out_leaves_no_gamma():
    generator = torch.Generator().manual_seed(0)
    w, x = simplex_clones(4, 6, generator)
    found = measured_constants(sample_overlaps(x), w, angle=ANGLE, generator=generator)
    bound = bound_of_theorem_5(found, teachers=2, students=4, step=0.1, fan_out=1.0, fan_out_error=1.0)
    assert (bound.rate, bound.reason) == (None, "no gamma above 0 solves equations 41 and 42")


def test_what_theorem_5_promises_holds_for_small_fan_outs_which_make_angles_slow():
    generator = torch.Generator().manual_seed(0)
    w, x = simplex_clones(4, 6, generator, copies=20, noise=0.005)
    v = 0.5 * drawn(4, 3, generator)
    start = torch.cat([turned(w[:2], generator), w[2:]])
    found = measured_constants(sample_overlaps(x), w, angle=ANGLE, generator=generator)
    bound = bound_of_theorem_5(found, teachers=2, students=4, step=0.4, fan_out=0.5, fan_out_error=0.1)
    v_start = torch.cat([v[:2] + 0.1 * drawn(2, 3, generator), v[2:]])
    course = modulated_course((w[:2], v[:2]), (start, v_start), sample_overlaps(x), step=0.4, steps=400)
    for values in (course.angles.sin(), course.fan_out_errors, course.unlucky_norms):
        assert fitted_rate(course.steps, values.amax(1)) <= bound.rate < 1


def test_steps_too_large_and_silent_centres_promise_nothing():
    fan = {"teachers": 2, "students": 4, "fan_out": 1.0, "fan_out_error": 0.2}
    for step in (5.0, 100.0):  # Euler's steps jump over the teacher
        bounds = [
            bound_of_theorem_4(SEPARATED, nodes=4, step=step, start_overlap=0.25),
            bound_of_theorem_5(SEPARATED, step=step, **fan),
        ]
        assert [bound.rate for bound in bounds] == [None, None]
        assert all("step is larger" in bound.reason for bound in bounds)
    x = torch.tensor([[1.0, 0.2], [1.0, -0.2]], dtype=torch.float64)
    centres = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)  # no sample reaches the second
    found = measured_constants(sample_overlaps(x), centres, angle=0.05, generator=torch.Generator().manual_seed(0))
    assert (found.eps_d, found.eps_l, found.own_d) == (0.0, 0.0, 0.0)
    assert bound_of_theorem_5(found, step=0.1, **fan).rate is None


def test_constants_at_a_tiny_angle_are_those_of_small_ones():
    found = [
        measured_constants(GAUSSIAN, torch.eye(3, dtype=torch.float64), angle=a, generator=generator)
        for a, generator in ((angle, torch.Generator().manual_seed(0)) for angle in (1e-2, 1e-4))
    ]
    assert found[1].curvature == pytest.approx(found[0].curvature, rel=0.01)


def test_one_step_is_that_of_plain_loops():
    generator = torch.Generator().manual_seed(0)
    w_star, v_star, w, v = (drawn(*shape, generator) for shape in ((2, 5), (2, 3), (4, 5), (4, 3)))
    x = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    course = modulated_course((w_star, v_star), (w, v), sample_overlaps(x), step=0.1, steps=1)
    for j in range(4):
        own = x @ w[j]
        pull, push = torch.zeros(5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        for others, fans, sign in ((w_star, v_star, 1), (w, v, -1)):
            for other, fan in zip(others, fans, strict=True):
                theirs = x @ other
                gate = ((own > 0) & (theirs > 0)).double().mean()
                pull += sign * other * gate * (v[j] @ fan)
                push += sign * fan * (own.relu() * theirs.relu()).mean()
        moved = w[j] + 0.1 * (pull - (pull @ w[j]) * w[j])
        torch.testing.assert_close(course.weights[j], moved / moved.norm(), atol=1e-12, rtol=0)
        torch.testing.assert_close(course.fan_out[j], v[j] + 0.1 * push, atol=1e-12, rtol=0)


def test_the_fit_leaves_out_the_start_and_the_rounding():
    steps = range(0, 400, 2)
    values = 0.8 ** torch.tensor(list(steps), dtype=torch.float64) + 0.5 ** torch.tensor(list(steps)) + 1e-16
    assert fitted_rate(steps, values) == pytest.approx(0.8, abs=1e-3)
    with pytest.raises(NumericalError, match="at least 3"):
        fitted_rate([0, 1], torch.tensor([1.0, 0.0]))
    with pytest.raises(ShapeError, match="a step for each value"):
        fitted_rate(range(5), torch.ones(4))


def test_irrelevant_fan_outs_shrink_in_the_matrix_dynamics_and_relevant_ones_do_not():
    course = matrix_course((6, 4, 8), torch.Generator().manual_seed(0), steps=1_500, record_every=500)
    assert course.irrelevant[-1].median() < 0.2 * course.irrelevant[0].median()
    assert course.relevant[-1].min() > 0.5
    assert course.alignment.min() > 0.95


def test_refusals():
    w, v = torch.eye(3), torch.ones(3, 2)
    with pytest.raises(ShapeError, match="teacher's shape"):
        matched_course(w, w[:2], GAUSSIAN, step=0.1, steps=1)
    with pytest.raises(ShapeError, match="as many students"):
        modulated_course((w, v), (w[:2], v[:2]), GAUSSIAN, step=0.1, steps=1)
    with pytest.raises(ConfigError, match="positive step"):
        matched_course(w, w, GAUSSIAN, step=0.0, steps=1)
    with pytest.raises(ConfigError, match="positive step"):
        modulated_course((w, v), (w, v), GAUSSIAN, step=0.1, steps=0)
    with pytest.raises(ConfigError, match="angle in"):
        measured_constants(GAUSSIAN, w, angle=0.0, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="factor of 2"):
        matrix_course((2, 2, 2), torch.Generator().manual_seed(0), factor=1)
    with pytest.raises(ConfigError, match="positive step and perturbation"):  # all other students would be 0 / 0
        matrix_course((2, 2, 2), torch.Generator().manual_seed(0), perturbation=0.0)
    with pytest.raises(ConfigError, match="have a direction"):
        measured_constants(GAUSSIAN, 0 * w, angle=0.1, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ShapeError, match="2 or more coordinates"):
        drawn_near(torch.ones(1, 1), 0.1, 2, torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="a node or more"):
        bound_of_theorem_4(SEPARATED, nodes=0, step=0.1, start_overlap=0.25)
    with pytest.raises(ConfigError, match="as many students as teachers"):
        bound_of_theorem_5(SEPARATED, teachers=3, students=2, step=0.1, fan_out=1.0, fan_out_error=0.1)


def test_courses_that_do_not_stay_finite_are_refused():
    w, v = torch.eye(3), torch.eye(3)
    with pytest.raises(NumericalError, match="by step 1"):
        matched_course(torch.zeros(3, 3), w, GAUSSIAN, step=0.1, steps=2)
    with pytest.raises(NumericalError, match="smaller step"):
        modulated_course((w, v), (w, 2 * v), GAUSSIAN, step=50.0, steps=60)
    with pytest.raises(ShapeError, match="equal columns"):
        modulated_course((w, v), (torch.ones(3, 4), v), GAUSSIAN, step=0.1, steps=1)
