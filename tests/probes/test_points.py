"""gradient_norm, spectrum, degeneracy: what a point is like."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from thalweg.errors import NumericalError, ShapeError
from thalweg.objective import Objective
from thalweg.probes import eigen, gradient_norm, hessian, inertia, spectrum

# Parameters (w; b; a) of the exact critical points of y = tanh(x-7) + tanh(x) + tanh(x+7) on 50 points of [-15, 15].
SHALLOW, STEEP = (0.154989, 0.417625, 2.341854), (1.302005, -9.335645, 0.788588)


def line() -> Tensor:
    return torch.linspace(-15, 15, 50, dtype=torch.float64).unsqueeze(1)


def half_mse(width: int) -> Objective:
    x = line()
    y = torch.tanh(x - 7) + torch.tanh(x) + torch.tanh(x + 7)
    net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1, bias=False)).double()
    return Objective(net, lambda o, t: 0.5 * ((o - t) ** 2).mean(), (x, y))


def polished(neurons: list[tuple[float, float, float]]) -> tuple[Objective, Tensor]:
    """Newton's method from the six printed digits to the exact point."""
    objective = half_mse(len(neurons))
    theta = torch.tensor([n[i] for i in range(3) for n in neurons], dtype=torch.float64)
    for _ in range(6):
        theta = theta - torch.linalg.solve(hessian(objective, theta), objective.gradient(theta))
    return objective, theta


def test_the_width_two_critical_point_has_the_published_spectrum() -> None:
    found = spectrum(*polished([STEEP, SHALLOW]))
    printed = torch.tensor([1.31e-4, 0.0650, 1.060, 1.874, 3.048, 70.40], dtype=torch.float64)  # of the whole MSE
    assert_close(2 * found.eigenvalues, printed, rtol=5e-3, atol=0)


@pytest.mark.parametrize(("splits", "counts"), [([], (0, 0, 6)), ([1], (1, 1, 7)), ([0, 1], (2, 2, 8))])
def test_splitting_neurons_gives_the_published_counts(splits: list[int], counts: tuple[int, ...]) -> None:
    _, theta = polished([STEEP, SHALLOW])
    neurons = list(theta.view(3, 2).T)
    for index in splits:
        half = neurons[index] * torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)
        neurons[index] = half
        neurons.append(half)
    wide = torch.stack(neurons, 1).reshape(-1)
    found = inertia(spectrum(half_mse(len(neurons)), wide))
    assert (found.negative, found.zero, found.positive) == counts


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 8), rank=st.integers(0, 8), negative=st.integers(0, 8), seed=st.integers(0, 99))
def test_inertia_counts_what_was_put_in(size: int, rank: int, negative: int, seed: int) -> None:
    rank = min(rank, size)
    negative = min(negative, rank)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    signs = torch.tensor([-1.0] * negative + [1.0] * (rank - negative) + [0.0] * (size - rank)).double()
    sizes = 10 ** (-3 * torch.rand(size, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.diag(signs * sizes) @ basis.T
    found = inertia(eigen((matrix + matrix.T) / 2)[0])
    assert (found.negative, found.zero, found.positive) == (negative, size - rank, rank - negative)


def test_an_own_threshold_moves_the_line() -> None:
    values = torch.tensor([-1.0, -1e-3, 1e-3, 1.0])
    assert inertia(values).zero == 0
    found = inertia(values, threshold=1e-2)
    assert (found.negative, found.zero, found.positive) == (1, 2, 1)
    assert "as given" in found.rule
    assert "P·eps·max|λ|" in inertia(values).rule


def test_an_all_zero_spectrum_is_all_zero() -> None:
    assert inertia(torch.zeros(3)).zero == 3


def test_values_come_with_vectors_that_solve_the_problem() -> None:
    objective = half_mse(3)
    theta = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = hessian(objective, theta)
    found = spectrum(objective, theta, vectors=True)
    assert found.eigenvectors is not None
    assert_close(matrix @ found.eigenvectors, found.eigenvectors * found.eigenvalues, rtol=1e-10, atol=1e-11)
    assert_close(found.eigenvalues, spectrum(objective, theta).eigenvalues, rtol=1e-10, atol=1e-11)
    assert "scipy evd" in found.method
    assert found.seconds > 0


def test_gradient_norms_are_the_norms_of_the_gradient() -> None:
    objective = half_mse(2)
    theta = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient = objective.gradient(theta)
    found = gradient_norm(objective, theta)
    norms = torch.tensor([found.l1, found.l2, found.max, found.value], dtype=torch.float64)
    expected = [gradient.abs().sum(), gradient.square().sum().sqrt(), gradient.abs().max(), objective.value(theta)]
    assert_close(norms, torch.stack(expected))


def test_a_gradient_at_a_critical_point_vanishes() -> None:
    assert gradient_norm(*polished([STEEP, SHALLOW])).l1 < 1e-13


def test_eigenvalues_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericalError, match=r"Expected finite eigenvalues. Got NaN or infinity"):
        inertia(torch.tensor([1.0, torch.inf]))


def test_a_negative_threshold_is_refused() -> None:
    with pytest.raises(NumericalError, match=r"Expected a threshold of at least 0. Got -1.0"):
        inertia(torch.ones(2), threshold=-1.0)


def test_a_matrix_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NumericalError, match=r"Expected a finite matrix. Got NaN or infinity"):
        eigen(torch.full((2, 2), torch.nan))


def test_a_theta_that_does_not_fit_is_refused() -> None:
    for probe in (gradient_norm, spectrum):
        with pytest.raises(ShapeError, match="Expected theta"):
            probe(half_mse(2), torch.zeros(5, dtype=torch.float64))
