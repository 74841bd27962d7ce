"""eigenpairs: extreme eigenvalues agree with the dense spectrum, and say how sure they are."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.probes.test_curvature import cnn_landscape, labels, quadratic, randn
from torch import Tensor, nn
from torch.testing import assert_close

from thalweg.errors import ConfigError, NumericalError, ShapeError
from thalweg.objective import Objective
from thalweg.probes import HessianOperator, eigenpairs, eigenpairs_of, hessian, spectrum
from thalweg.probes.lanczos import lanczos


def matrix_of(values: Tensor, seed: int = 0) -> Tensor:
    basis = torch.linalg.qr(randn(len(values), len(values), seed=seed))[0]
    found = (basis * values) @ basis.T
    return (found + found.T) / 2


def mlp_landscape(samples: int = 60, dtype: torch.dtype = torch.float64) -> Objective:
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(0.6 * randn(*p.shape, seed=i))
    return Objective(net, nn.CrossEntropyLoss(), (randn(samples, 6, seed=9), labels(3, samples)), dtype=dtype)


@pytest.mark.parametrize("landscape", [mlp_landscape, cnn_landscape])
@pytest.mark.parametrize(("which", "count"), [("largest", 1), ("largest", 5), ("smallest", 3), ("magnitude", 4)])
def test_they_agree_with_the_dense_spectrum(landscape, which: str, count: int) -> None:
    objective = landscape()
    theta = objective.theta()
    dense = spectrum(objective, theta).eigenvalues
    order = {"largest": dense.flip(0), "smallest": dense, "magnitude": dense[dense.abs().argsort(descending=True)]}
    found = eigenpairs(objective, theta, count, which=which, tolerance=1e-9)
    assert all(found.converged)
    assert_close(found.values, order[which][:count], rtol=1e-8, atol=0)
    products = found.vectors @ hessian(objective, theta)
    assert_close(products, found.values[:, None] * found.vectors, rtol=0, atol=1e-4 * float(dense.abs().max()))
    assert_close(found.vectors @ found.vectors.T, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_default_tolerance_is_met_by_the_value() -> None:
    for seed in range(5):
        objective = mlp_landscape()
        theta = objective.theta() + 0.1 * randn(objective.num_params, seed=seed)
        dense = spectrum(objective, theta).eigenvalues[-1]
        found = eigenpairs(objective, theta, seed=seed)
        assert abs(float(found.values[0] - dense)) <= 1e-3 * float(dense)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    size=st.integers(2, 40),
    count=st.integers(1, 4),
    which=st.sampled_from(["largest", "smallest", "magnitude"]),
    budget=st.integers(1, 60),
)
def test_every_interval_holds_an_eigenvalue_converged_or_not(
    seed: int, size: int, count: int, which: str, budget: int
) -> None:
    values = 10 ** (2 * torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)) - 20
    objective = quadratic(matrix_of(values, seed))
    found = eigenpairs(objective, objective.theta(), count, which=which, max_products=budget, seed=seed)
    assert len(found.values) <= min(count, size)
    for low, high in found.intervals.tolist():
        assert bool(((values >= low - 1e-9) & (values <= high + 1e-9)).any())
    assert bool((found.errors <= found.residuals + 1e-15).all())


def test_what_has_not_converged_says_so() -> None:
    objective = quadratic(matrix_of(torch.linspace(0.9, 1.0, 200, dtype=torch.float64)))
    found = eigenpairs(objective, objective.theta(), tolerance=1e-8, max_products=3)
    assert found.converged == (False,)
    assert found.work.products == 3
    assert float(found.residuals[0]) > 1e-8


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_restarts_lose_nothing(which: str) -> None:
    values = torch.linspace(-1, 1, 300, dtype=torch.float64) ** 3
    matrix = matrix_of(values)
    found = lanczos(
        *(lambda v: matrix @ v, randn(1, 300), 2),
        which=which,  # type: ignore[arg-type]
        tolerance=1e-9,
        max_products=2000,
        basis_size=14,
        generator=torch.Generator().manual_seed(0),
    )
    ends = values.flip(0) if which == "largest" else values
    assert all(found.converged)
    assert found.products > 14
    assert_close(found.values, ends[:2], rtol=1e-8, atol=0)


def test_at_a_critical_point_the_start_is_random() -> None:
    values = torch.tensor([-3.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    objective = quadratic(matrix_of(values))
    theta = objective.theta()  # 0, where the gradient is 0
    assert float(objective.gradient(theta).abs().max()) == 0.0
    found = eigenpairs(objective, theta, 4, tolerance=1e-10)
    assert_close(found.values, values.flip(0), rtol=1e-9, atol=1e-9)


def test_a_gradient_in_an_invariant_subspace_hides_nothing() -> None:
    """Two equal neurons: the gradient is symmetric under their exchange, the sharpest direction is not."""
    net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.fill_(0.5)
        net[0].bias.fill_(0.2)
        net[2].weight.fill_(-0.7)
    x = torch.linspace(-2, 2, 30, dtype=torch.float64).unsqueeze(1)
    objective = Objective(net, nn.MSELoss(), (x, 3 * torch.sin(2 * x)))
    theta = objective.theta()
    dense, columns = torch.linalg.eigh(hessian(objective, theta))
    gradient = objective.gradient(theta)
    hidden = [i for i in range(len(dense)) if abs(float(columns[:, i] @ gradient)) < 1e-12]
    assert hidden
    found = eigenpairs(objective, theta, len(dense), tolerance=1e-10)
    assert_close(found.values, dense.flip(0), rtol=1e-8, atol=1e-10)


def test_a_flat_landscape_has_zero_eigenvalues() -> None:
    objective = quadratic(torch.zeros(5, 5, dtype=torch.float64))
    found = eigenpairs(objective, objective.theta(), 3)
    assert found.values.tolist() == [0.0, 0.0, 0.0]
    assert all(found.converged)


def test_more_pairs_than_parameters_are_all_there_are() -> None:
    objective = quadratic(torch.eye(2, dtype=torch.float64))
    found = eigenpairs(objective, objective.theta(), 7)
    assert_close(found.values, torch.ones(2, dtype=torch.float64))


def test_the_warm_start_from_a_part_of_the_data_changes_no_result() -> None:
    objective = mlp_landscape(samples=1500)
    theta = objective.theta()
    found = eigenpairs(objective, theta, tolerance=1e-7)
    assert_close(found.values[0], spectrum(objective, theta).eigenvalues[-1], rtol=1e-7, atol=0)
    assert found.work.products != int(found.work.products)  # products on a share of the data are counted as such
    again = eigenpairs(objective, theta, tolerance=1e-7)
    assert torch.equal(found.values, again.values)


def test_float32_reaches_its_own_floor_and_says_converged() -> None:
    objective = mlp_landscape(dtype=torch.float32)
    found = eigenpairs(objective, objective.theta(), tolerance=1e-12)
    exact = spectrum(objective.in_dtype(torch.float64), objective.theta().double()).eigenvalues[-1]
    assert found.converged == (True,)
    assert abs(float(found.values[0] - exact)) <= 1e-5 * float(exact)


def test_power_iteration_finds_the_largest_magnitudes() -> None:
    values = torch.tensor([-5.0, 0.1, 1.0, 2.0, 3.5], dtype=torch.float64)
    objective = quadratic(matrix_of(values))
    found = eigenpairs(objective, objective.theta(), 2, which="magnitude", method="power", tolerance=1e-6)
    assert all(found.converged)
    assert_close(found.values, torch.tensor([-5.0, 3.5], dtype=torch.float64), rtol=1e-6, atol=0)
    short = eigenpairs(objective, objective.theta(), 2, which="magnitude", method="power", max_products=2)
    assert short.converged == (False,)


def test_a_users_own_map_is_taken() -> None:
    objective = quadratic(matrix_of(torch.tensor([1.0, 2.0, 7.0], dtype=torch.float64)))

    class Shifted:
        """H minus 10."""

        def __init__(self) -> None:
            self._inner = HessianOperator(objective, objective.theta())
            self.size, self.dtype, self.device = 3, torch.float64, torch.device("cpu")

        @property
        def work(self):
            return self._inner.work

        def product(self, vector: Tensor) -> Tensor:
            return self._inner.product(vector) - 10 * vector

    found = eigenpairs_of(Shifted(), 2, which="magnitude", tolerance=1e-9)
    assert_close(found.values, torch.tensor([-9.0, -8.0], dtype=torch.float64), rtol=1e-8, atol=0)


def test_progress_is_told_after_every_product() -> None:
    objective, told = mlp_landscape(), []
    found = eigenpairs(objective, objective.theta(), 3, progress=lambda share, text: told.append((share, text)))
    assert len(told) == found.work.products
    assert all(0 <= share <= 1 for share, _ in told)
    assert "3 of 3 pairs" in told[-1][1]


def test_wrong_wishes_are_told() -> None:
    objective = mlp_landscape()
    theta = objective.theta()
    with pytest.raises(ConfigError, match="at least one pair"):
        eigenpairs(objective, theta, 0)
    with pytest.raises(ConfigError, match="at least one pair and one product"):
        eigenpairs(objective, theta, max_products=0)
    for tolerance in (0.0, -1.0, math.nan, 1.0):
        with pytest.raises(ConfigError, match="tolerance between 0 and 1"):
            eigenpairs(objective, theta, tolerance=tolerance)
    with pytest.raises(ConfigError, match="magnitude"):
        eigenpairs(objective, theta, method="power")
    with pytest.raises(ConfigError, match="at least one pair"):
        eigenpairs_of(HessianOperator(objective, theta), 0)
    for start in (torch.zeros(1, objective.num_params).double(), torch.ones(1, 3).double()):
        with pytest.raises(ShapeError, match="start vectors that are not zero"):
            eigenpairs_of(HessianOperator(objective, theta), start=start)
    with pytest.raises(ShapeError, match="theta of shape"):
        eigenpairs(objective, theta[:-1])
    with pytest.raises(NumericalError, match="finite Hessian products"):
        eigenpairs(objective, theta * torch.nan)
