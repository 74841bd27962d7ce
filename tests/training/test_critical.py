import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from thalweg.errors import ConfigError, ShapeError
from thalweg.objective import Objective
from thalweg.probes import inertia, spectrum
from thalweg.training import Plateau, TrainingRun, polish, stagnation, train


def tanh_net(width: int, dtype: torch.dtype = torch.float64) -> Objective:
    """The paper's 1-D data and network: hidden biases, no output bias, plain mean squared error."""
    x = torch.linspace(-15, 15, 50, dtype=torch.float64).unsqueeze(1)
    y = torch.tanh(x - 7) + torch.tanh(x) + torch.tanh(x + 7)
    net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1, bias=False))
    return Objective(net, nn.MSELoss(), (x, y), dtype=dtype)


def small(width: int, seed: int) -> Tensor:
    """All parameters N(0, variance 1/m³), the paper's initialisation."""
    generator = torch.Generator().manual_seed(seed)
    return width**-1.5 * torch.randn(3 * width, generator=generator, dtype=torch.float64)


def neurons(theta: Tensor) -> Tensor:
    """Neurons (w, b, a), one per row, the sign symmetry of tanh and the order of neurons taken out."""
    rows = theta.view(3, -1).T
    flipped = torch.stack([-rows[:, 0], -rows[:, 1], -rows[:, 2]], 1)
    rows = torch.where(rows[:, :1] < 0, flipped, rows)
    return rows[rows[:, 0].argsort(descending=True)]


def test_the_width_one_critical_point_is_found_from_a_small_start() -> None:
    objective = tanh_net(1)
    run = train(objective, small(1, 0), learning_rate=0.02, steps=4000)
    found = polish(objective, run.theta)
    assert found.status == "converged"
    assert found.gradient_l1 <= 1e-12
    assert found.value == pytest.approx(0.109023, abs=5e-7)
    printed = torch.tensor([[0.0895366, 0.0, 3.746951]], dtype=torch.float64)
    assert_close(neurons(found.theta), printed, rtol=0, atol=1e-6)


def test_the_width_two_critical_point_is_found_from_a_small_start() -> None:
    objective = tanh_net(2)
    run = train(objective, small(2, 1), learning_rate=0.02, steps=5000)
    found = polish(objective, run.theta)
    assert found.status == "converged"
    assert found.gradient_l1 <= 1e-12
    assert found.value == pytest.approx(0.0697915, abs=5e-8)
    printed = torch.tensor([[1.302005, 9.335645, 0.788588], [0.154989, 0.417625, 2.341854]]).double()
    rows = neurons(found.theta)
    assert_close(rows.abs(), printed, rtol=0, atol=1e-5)
    assert float(rows[0, 1] * rows[1, 1]) < 0


def test_the_last_plateau_is_at_the_critical_point() -> None:
    objective = tanh_net(2)
    run = train(objective, small(2, 0), learning_rate=0.02, steps=6000)
    last = stagnation(run)[-1]
    assert last.loss == pytest.approx(0.0697915, rel=2e-3)
    assert last.gradient_l1 < 0.1


def test_a_degenerate_saddle_is_polished_to_itself() -> None:
    """The width-1 point, split in two equal halves, is a saddle with one zero eigenvalue; noise must not lose it."""
    narrow = polish(tanh_net(1), torch.tensor([0.0895366, 0.0, 3.746951], dtype=torch.float64)).theta
    wide = narrow.repeat_interleave(2) * torch.tensor([1, 1, 1, 1, 0.5, 0.5], dtype=torch.float64)
    noise = 1e-5 * torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    objective = tanh_net(2)
    found = polish(objective, wide + noise)
    assert found.status == "converged"
    assert found.distance < 1e-3
    assert found.raw_gradient_l1 > 1e-6
    signs = inertia(spectrum(objective, found.theta), threshold=1e-9)
    assert (signs.negative, signs.zero, signs.positive) == (1, 1, 4)


@settings(max_examples=20, deadline=None)
@given(
    signs=st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_the_critical_point_of_a_quadratic_is_the_nearest_one(signs: list[float], seed: int) -> None:
    """For R = ½ Σ λ_i (θ_i - c_i)² with any signs: θ goes to c where λ_i ≠ 0, and does not move where λ_i = 0."""
    count = len(signs)
    generator = torch.Generator().manual_seed(seed)
    curvature = torch.tensor(signs, dtype=torch.float64) * (1 + torch.arange(count))
    centre = torch.randn(count, generator=generator, dtype=torch.float64)
    net = nn.Linear(count, 1, bias=False).double()
    eye = torch.eye(count, dtype=torch.float64)
    objective = Objective(net, lambda o, t: 0.5 * (curvature * (o[:, 0] - t) ** 2).sum(), (eye, centre))
    raw = torch.randn(count, generator=generator, dtype=torch.float64)
    found = polish(objective, raw)
    assert found.status == "converged"
    assert_close(found.theta, torch.where(curvature != 0, centre, raw), rtol=0, atol=1e-11)
    assert found.distance == pytest.approx(float((found.theta - raw).norm()))


def test_a_float32_objective_is_polished_in_float64() -> None:
    found = polish(tanh_net(1, torch.float32), torch.tensor([0.0895366, 0.0, 3.746951]))
    assert found.theta.dtype == torch.float64
    assert found.status == "converged"


def test_a_point_that_is_critical_already_stays() -> None:
    objective = tanh_net(1)
    first = polish(objective, torch.tensor([0.0895366, 0.0, 3.746951], dtype=torch.float64))
    again = polish(objective, first.theta)
    assert (again.steps, again.distance) == (0, 0.0)
    assert_close(again.theta, first.theta, rtol=0, atol=0)


def test_running_out_of_steps_is_a_status_with_the_best_point() -> None:
    objective = tanh_net(2)
    found = polish(objective, small(2, 0), max_steps=1)
    assert (found.status, found.steps) == ("stalled", 1)
    assert found.gradient_l1 <= found.raw_gradient_l1


def test_a_landscape_without_a_critical_point_stalls() -> None:
    ones = torch.ones(3, 1, dtype=torch.float64)
    objective = Objective(nn.Linear(1, 1).double(), lambda o, t: (o * t).mean(), (ones, ones))
    found = polish(objective, torch.zeros(2, dtype=torch.float64))
    assert (found.status, found.steps, found.gradient_l1) == ("stalled", 0, 2.0)


def test_a_point_that_is_not_finite_is_a_status() -> None:
    found = polish(tanh_net(1), torch.tensor([torch.nan, 0.0, 0.0], dtype=torch.float64))
    assert found.status == "not finite"
    assert math.isnan(found.raw_gradient_l1)


def recorded(losses: list[float], steps: list[int] | None = None) -> TrainingRun:
    count = len(losses)
    times = torch.tensor(steps or [2**i for i in range(count)])
    gradients = torch.tensor([1 / (1 + i) for i in range(count)], dtype=torch.float64)
    thetas = torch.arange(float(count)).unsqueeze(1)
    values = torch.tensor(losses, dtype=torch.float64)
    return TrainingRun(times, values, gradients, times, thetas, thetas[-1], "finished", int(times[-1]), 0.0)


def spans(plateaux: tuple[Plateau, ...]) -> list[tuple[int, int]]:
    return [(plateau.start, plateau.stop) for plateau in plateaux]


def test_plateaux_are_the_stretches_where_the_loss_barely_moves() -> None:
    run = recorded([5.0, 1.0, 0.99, 0.98, 0.1, 0.1, 0.1, 0.01])
    found = stagnation(run)
    assert spans(found) == [(2, 8), (16, 64)]
    assert [plateau.level for plateau in found] == pytest.approx([0.99, 0.1])
    assert [plateau.step for plateau in found] == [8, 64]  # where the gradient is least
    assert [float(plateau.theta) for plateau in found] == [3.0, 6.0]


@settings(max_examples=20, deadline=None)
@given(unit=st.floats(1e-6, 1e6))
def test_the_unit_of_the_loss_does_not_matter(unit: float) -> None:
    losses = [5.0, 1.0, 0.99, 0.98, 0.1, 0.1, 0.1, 0.01]
    assert spans(stagnation(recorded([unit * loss for loss in losses]))) == spans(stagnation(recorded(losses)))


def test_a_spike_does_not_end_a_plateau() -> None:
    assert spans(stagnation(recorded([5.0, 1.0, 1.0, 1.7, 1.0, 1.0]))) == [(2, 32)]


def test_a_short_rest_is_no_plateau() -> None:
    assert stagnation(recorded([1.0, 0.5, 0.5, 0.2], [100, 200, 210, 400])) == ()


def test_a_steady_descent_has_no_plateau() -> None:
    assert stagnation(recorded([1 / (1 + i) for i in range(1, 8)])) == ()


def test_a_loss_of_zero_is_a_plateau() -> None:
    assert spans(stagnation(recorded([1.0, 0.0, 0.0, 0.0]))) == [(2, 8)]


def test_a_run_without_records_has_no_plateau() -> None:
    objective = tanh_net(1)
    run = train(objective, torch.full((3,), torch.nan).double(), learning_rate=1.0, steps=3)
    assert stagnation(run) == ()


def test_negative_bounds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Expected a bound and a number of steps of at least 0\. Got -1\.0"):
        polish(tanh_net(1), torch.zeros(3).double(), gradient_l1=-1.0)
    with pytest.raises(ConfigError, match=r"Expected max_slope ≥ 0 and min_ratio ≥ 1\. Got 0\.1 and 0\.5"):
        stagnation(recorded([1.0, 1.0]), min_ratio=0.5)


def test_a_theta_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="Expected theta"):
        polish(tanh_net(1), torch.zeros(4).double())
