"""Many points are polished as one by one: the same steps, the same points, the same verdicts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from thalweg.data import three_tanh
from thalweg.errors import ConfigError, ShapeError
from thalweg.nets import two_layer
from thalweg.objective import Objective
from thalweg.probes import inertia, spectrum
from thalweg.training import CriticalPoints, polish, polish_all

WIDTH_2 = [1.302005, 0.154989, -9.335645, 0.417625, 0.788588, 2.341854]


def landscape(width: int, dtype: torch.dtype = torch.float64) -> Objective:
    data = three_tanh()
    return Objective(two_layer(width).double(), nn.MSELoss(), (data.inputs, data.targets), dtype=dtype)


def split_minima(count: int, generator: torch.Generator) -> Tensor:
    """The width-2 minimum, its shallow unit split by random shares: degenerate saddles of width 3."""
    w, b, a = polish(landscape(2), torch.tensor(WIDTH_2, dtype=torch.float64)).theta.view(3, 2)[:, [0, 1, 1]]
    shares = 0.2 + 0.6 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    shares = torch.cat([torch.ones_like(shares), shares, 1 - shares], 1)
    return torch.cat([w.expand(count, 3), b.expand(count, 3), a * shares], 1)


def test_a_batch_takes_the_steps_of_its_points() -> None:
    """Near isolated points: steps, points and values are those of `polish`."""
    generator = torch.Generator().manual_seed(0)
    minimum = torch.tensor(WIDTH_2, dtype=torch.float64)
    thetas = minimum * (1 + 0.05 * torch.randn(8, 6, generator=generator, dtype=torch.float64))
    objective = landscape(2)
    found = polish_all(objective, thetas)
    for row, theta in enumerate(thetas):
        alone = polish(objective, theta)
        assert found.status[row] == alone.status == "converged"
        assert int(found.steps[row]) == alone.steps
        assert_close(found.thetas[row], alone.theta, rtol=0, atol=1e-8)
        assert float(found.values[row]) == pytest.approx(alone.value, rel=1e-12, abs=1e-14)
        assert float(found.raw_gradient_l1[row]) == pytest.approx(alone.raw_gradient_l1, rel=1e-10)
        assert float(found.distances[row]) == pytest.approx(alone.distance, abs=1e-8)
    assert float(found.gradient_l1.max()) <= 1e-12


def test_degenerate_saddles_stay_where_they_are() -> None:
    generator = torch.Generator().manual_seed(1)
    exact = split_minima(6, generator)
    objective = landscape(3)
    found = polish_all(objective, exact * (1 + 1e-5 * torch.randn(6, 9, generator=generator, dtype=torch.float64)))
    assert set(found.status) == {"converged"}
    assert float(found.distances.max()) < 1e-3
    for theta, start in zip(found.thetas, exact, strict=True):
        assert_close(theta, start, rtol=0, atol=1e-3)
        signs = inertia(spectrum(objective, theta), threshold=1e-6)
        assert (signs.negative, signs.zero, signs.positive) == (1, 1, 7)


@settings(max_examples=10)
@given(
    signs=st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_the_critical_points_of_a_quadratic_are_the_nearest_ones(signs: list[float], seed: int) -> None:
    """For R = ½ Σ λ_i (θ_i - c_i)²: θ goes to c where λ_i ≠ 0, and does not move where λ_i = 0."""
    count = len(signs)
    generator = torch.Generator().manual_seed(seed)
    curvature = torch.tensor(signs, dtype=torch.float64) * (1 + torch.arange(count))
    centre = torch.randn(count, generator=generator, dtype=torch.float64)
    net = nn.Linear(count, 1, bias=False).double()
    eye = torch.eye(count, dtype=torch.float64)
    objective = Objective(net, lambda o, t: 0.5 * (curvature * (o[:, 0] - t) ** 2).sum(), (eye, centre))
    raw = torch.randn(4, count, generator=generator, dtype=torch.float64)
    found = polish_all(objective, raw)
    assert set(found.status) == {"converged"}
    assert_close(found.thetas, torch.where(curvature != 0, centre, raw), rtol=0, atol=1e-11)
    assert_close(found.distances, (found.thetas - raw).norm(dim=1))


def test_every_status_occurs_beside_the_others() -> None:
    """One point converges, one runs out of steps, one is not finite; none disturbs another."""
    objective = landscape(2)
    minimum = polish(objective, torch.tensor(WIDTH_2, dtype=torch.float64)).theta
    found = polish_all(objective, torch.stack([minimum, minimum + 0.3, minimum * float("nan")]), max_steps=3)
    assert found.status == ("converged", "stalled", "not finite")
    assert found.steps.tolist() == [0, 3, 0]
    stalled = polish(objective, minimum + 0.3, max_steps=3)
    assert_close(found.thetas[1], stalled.theta, rtol=0, atol=1e-12)
    assert float(found.gradient_l1[1]) < float(found.raw_gradient_l1[1])
    assert found.is_converged.tolist() == [True, False, False]


def test_a_point_that_is_critical_already_stays() -> None:
    objective = landscape(2)
    first = polish_all(objective, torch.tensor([WIDTH_2], dtype=torch.float64))
    again = polish_all(objective, first.thetas)
    assert again.steps.tolist() == [0]
    assert_close(again.thetas, first.thetas, rtol=0, atol=0)
    assert again.distances.tolist() == [0.0]


def test_an_objective_of_several_batches_in_float32_is_polished_in_float64() -> None:
    data = three_tanh()
    pairs = (data.inputs, data.targets)
    objective = Objective(two_layer(2), nn.MSELoss(), pairs, batch_size=15)
    found = polish_all(objective, torch.tensor([WIDTH_2]))
    assert found.status == ("converged",)
    assert found.thetas.dtype == torch.float64
    assert float(found.values[0]) == pytest.approx(0.0697915, abs=5e-8)


def test_points_are_selected_by_number_and_by_mask() -> None:
    objective = landscape(1)
    found = polish_all(objective, torch.tensor([[0.09, 0.0, 3.7], [0.08, 0.1, 3.0], [-0.09, 0.0, -3.7]]).double())
    by_number, by_mask = found.select([0, 2]), found.select(torch.tensor([True, False, True]))
    for chosen in (by_number, by_mask):
        assert isinstance(chosen, CriticalPoints)
        assert len(chosen) == 2
        assert_close(chosen.thetas, found.thetas[[0, 2]], rtol=0, atol=0)


def test_no_points_are_polished_to_no_points() -> None:
    found = polish_all(landscape(1), torch.zeros(0, 3, dtype=torch.float64))
    assert len(found) == 0
    assert found.is_converged.shape == (0,)


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        polish_all(landscape(1), torch.zeros(1, 3, dtype=torch.float64), gradient_l1=-1.0)


def test_a_bound_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at least 0\. Got nan"):
        polish_all(landscape(1), torch.zeros(1, 3, dtype=torch.float64), gradient_l1=math.nan)
    with pytest.raises(ConfigError, match=r"at least 0\. Got nan"):
        polish(landscape(1), torch.zeros(3, dtype=torch.float64), gradient_l1=math.nan)


@pytest.mark.parametrize("shape", [(3,), (), (1, 1, 3)])
def test_points_that_are_no_rows_are_refused(shape: tuple[int, ...]) -> None:
    """Without the checks of shapes, as a user calls it."""
    with pytest.raises(ShapeError, match=r"Expected points of shape \(points, 3\). Got"):
        polish_all.__wrapped__(landscape(1), torch.zeros(shape, dtype=torch.float64))


def test_points_of_another_network_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(points, 3\)"):
        polish_all(landscape(1), torch.zeros(2, 4, dtype=torch.float64))
