"""peers: other libraries agree with our curvature where they are right. Each test is skipped where they are not."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from thalweg.objective import Objective
from thalweg.probes import (
    HessianOperator,
    eigenpairs,
    eigenpairs_of,
    from_curvlinops,
    hessian,
    hessian_trace,
    spectral_density,
)

# They warn of themselves: reference cycles, deprecated calls of torch.
pytestmark = pytest.mark.filterwarnings("ignore")

exact = functools.partial(assert_close, rtol=1e-10, atol=1e-12)
KINDS = ("hessian", "gauss_newton", "fisher", "fisher_mc", "kfac")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classifier() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    for i, parameter in enumerate(net.parameters()):
        parameter.data = 0.5 * randn(*parameter.shape, seed=i)
    return net.eval()


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    count = sum(sizes)
    labels = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(7))
    return list(zip(randn(count, 6, seed=8).split(sizes), labels.split(sizes), strict=True))


RAGGED, EVEN = batches(10, 10, 5), batches(10, 10)


def landscape(data: Any) -> Objective:
    return Objective(classifier(), nn.CrossEntropyLoss(), data)


def curvature(data: Any) -> HessianOperator:
    objective = landscape(data)
    return HessianOperator(objective, objective.theta())


def top(data: Any) -> Tensor:
    objective = landscape(data)
    return eigenpairs(objective, objective.theta(), tolerance=1e-9).values[0]


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Some draw from the global generator."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        yield


def pyhessian_solver(**data: Any) -> Any:
    source = pytest.importorskip("pyhessian")
    return source.hessian(classifier(), nn.CrossEntropyLoss(), cuda=False, **data)


def eigenthings_operator(data: Any) -> Any:
    source = pytest.importorskip("hessian_eigenthings")
    return source.HessianOperator(classifier(), data, source.supervised_loss(nn.CrossEntropyLoss()))


def test_pyhessian_multiplies_alike_over_ragged_batches() -> None:
    solver, ours = pyhessian_solver(dataloader=RAGGED), curvature(RAGGED)
    vector = randn(ours.size, seed=3)
    parts = list(ours.space.parameters(vector).values())
    value, product = solver.dataloader_hv_product(parts)
    flat = torch.cat([part.reshape(-1) for part in product])
    exact(flat, ours.product(vector))
    assert value == pytest.approx(float(vector @ ours.product(vector)), rel=1e-10)


@pytest.mark.parametrize("keyword", ["data", "dataloader"])
def test_pyhessian_finds_the_same_largest_eigenvalue(keyword: str) -> None:
    data = RAGGED if keyword == "dataloader" else EVEN[:1]
    solver = pyhessian_solver(**{keyword: data if keyword == "dataloader" else data[0]})
    with seeded():
        values, _ = solver.eigenvalues(maxIter=2000, tol=1e-12)
    assert values[0] == pytest.approx(float(top(data)), rel=1e-5)  # it normalises by |v| + 1e-6


def test_hessian_eigenthings_multiplies_alike_over_equal_batches() -> None:
    vector = randn(curvature(EVEN).size, seed=3)
    exact(eigenthings_operator(EVEN).matvec(vector), curvature(EVEN).product(vector))


def test_hessian_eigenthings_finds_the_same_largest_eigenvalue() -> None:
    source = pytest.importorskip("hessian_eigenthings")
    operator = eigenthings_operator(EVEN)
    found = source.lanczos(operator, k=1, max_iter=50, which="LA", seed=0)
    value, *_ = source.power_iteration_one(operator, max_iter=2000, tol=1e-7, seed=0)
    exact(found.eigenvalues[0], top(EVEN), rtol=1e-8)
    assert value == pytest.approx(float(top(EVEN)), rel=1e-8)


def test_hessian_eigenthings_gives_the_same_moments_of_the_density() -> None:
    source = pytest.importorskip("hessian_eigenthings")
    theirs = source.spectral_density(eigenthings_operator(EVEN), num_runs=60, lanczos_steps=20, seed=0)
    ours = spectral_density(curvature(EVEN), num_probes=60, num_steps=20)
    size = ours.num_params
    trace = float(hessian(landscape(EVEN), landscape(EVEN).theta()).trace())
    probes = size * (theirs.raw_eigenvalues * theirs.raw_weights).sum(1)
    for mean, error in ((probes.mean(), probes.std() / 60**0.5), (ours.trace.value, ours.trace.standard_error)):
        assert abs(float(mean) - trace) < 4 * float(error)
    assert float(theirs.raw_eigenvalues.max()) == pytest.approx(ours.extremes[1], rel=1e-6)


def test_curvlinops_multiplies_alike_over_ragged_batches() -> None:
    source = pytest.importorskip("curvlinops")
    net, ours = classifier(), curvature(RAGGED)
    operator = source.HessianLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), RAGGED)
    vector = randn(ours.size, seed=3)
    exact((operator @ vector).detach(), ours.product(vector))


def test_the_hessian_of_curvlinops_is_ours() -> None:
    pytest.importorskip("curvlinops")
    objective, ours = landscape(RAGGED), curvature(RAGGED)
    theirs = from_curvlinops(objective, objective.theta(), "hessian")
    for seed in range(3):
        vector = randn(ours.size, seed=seed)
        exact(theirs.product(vector), ours.product(vector))
    exact(eigenpairs_of(theirs, tolerance=1e-9).values[0], top(RAGGED), rtol=1e-8)
    assert (theirs.size, theirs.dtype, theirs.device) == (ours.size, ours.dtype, ours.device)


def test_from_curvlinops_looks_at_theta_not_at_the_module() -> None:
    pytest.importorskip("curvlinops")
    objective = landscape(RAGGED)
    theta = objective.theta() + 0.1 * randn(objective.num_params, seed=9)
    vector = randn(objective.num_params, seed=3)
    theirs = from_curvlinops(objective, theta, "hessian")
    exact(theirs.product(vector), HessianOperator(objective, theta).product(vector))
    exact(objective.theta(), landscape(RAGGED).theta())


def test_the_gauss_newton_matrix_of_a_linear_net_under_mse_is_its_hessian() -> None:
    pytest.importorskip("curvlinops")
    data = [(x, randn(len(x), 2, seed=4 + i)) for i, (x, _) in enumerate(RAGGED)]
    objective = Objective(nn.Linear(6, 2).double(), nn.MSELoss(), data)
    dense = hessian(objective, objective.theta())
    theirs = from_curvlinops(objective, objective.theta(), "gauss_newton")
    exact(torch.stack([theirs.product(row) for row in torch.eye(theirs.size, dtype=torch.float64)]), dense)


def test_the_gauss_newton_matrix_of_a_relu_net_has_the_diagonal_of_its_hessian() -> None:
    """The network is affine in each of its weights, so that only the curvature of the loss counts there."""
    pytest.importorskip("curvlinops")
    objective = landscape(RAGGED)
    dense = hessian(objective, objective.theta())
    theirs = from_curvlinops(objective, objective.theta(), "gauss_newton")
    matrix = torch.stack([theirs.product(row) for row in torch.eye(theirs.size, dtype=torch.float64)])
    exact(matrix.diagonal(), dense.diagonal())
    assert float((matrix - dense).abs().max()) > 1e-3


def test_the_trace_through_curvlinops_is_ours() -> None:
    pytest.importorskip("curvlinops")
    objective = landscape(RAGGED)
    theirs = hessian_trace(from_curvlinops(objective, objective.theta(), "hessian"), seed=1)
    ours = hessian_trace(curvature(RAGGED), seed=1)
    assert theirs.value == pytest.approx(ours.value, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_eigenpairs_of_a_matrix_of_curvlinops_are_those_of_its_dense_form(kind: Any) -> None:
    pytest.importorskip("curvlinops")
    objective = landscape(RAGGED)
    with seeded():
        matrix = from_curvlinops(objective, objective.theta(), kind)
    dense = torch.stack([matrix.product(row) for row in torch.eye(matrix.size, dtype=torch.float64)], 1)
    found = eigenpairs_of(matrix, 2, tolerance=1e-9)
    assert all(found.converged)
    exact(dense, dense.T, atol=1e-10)
    exact(found.values, torch.linalg.eigvalsh(dense).flip(0)[:2], rtol=1e-7)
