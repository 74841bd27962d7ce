"""density and trace: quadratures are exact where theory says so, and bracket what they cannot resolve."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.probes.test_curvature import cnn_landscape, quadratic
from tests.probes.test_eigenpairs import matrix_of, mlp_landscape
from torch import Tensor
from torch.testing import assert_close

from thalweg.errors import ConfigError, NumericalError
from thalweg.probes import HessianOperator, hessian, hessian_trace, layers, spectral_density


def operator(values: Tensor, seed: int = 0) -> HessianOperator:
    objective = quadratic(matrix_of(values, seed))
    return HessianOperator(objective, objective.theta())


def signs(size: int, probes: int, seed: int = 0) -> Tensor:
    """The probes that a seed draws, one per row."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 2, (size,), generator=generator) for _ in range(probes)]
    return torch.stack(rows).double() * 2 - 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(3, 30), steps=st.integers(1, 12))
def test_m_steps_integrate_polynomials_of_degree_2m_minus_1_exactly(seed: int, size: int, steps: int) -> None:
    values = 2 * torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
    curvature = operator(values, seed)
    found = spectral_density(curvature, num_probes=2, num_steps=steps, seed=seed)
    dense = hessian(curvature.objective, curvature.theta)
    for probe, vector in enumerate(signs(size, 2, seed) / math.sqrt(size)):
        image = vector
        for power in range(1, min(2 * steps, 12)):
            image = dense @ image
            moment = float((found.weights[probe] * found.nodes[probe] ** power).sum())
            assert abs(moment - float(vector @ image)) <= 1e-10


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    size=st.integers(3, 40),
    steps=st.integers(1, 15),
    threshold=st.floats(0, 0.5),
    zeros=st.integers(0, 10),
)
def test_the_bracket_holds_the_true_mass_near_zero(
    seed: int, size: int, steps: int, threshold: float, zeros: int
) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[: min(zeros, size)] = 0.0
    curvature = operator(values, seed)
    dense, columns = torch.linalg.eigh(hessian(curvature.objective, curvature.theta))
    inside = dense.abs() <= threshold + 1e-9
    masses = (signs(size, 3, seed) @ columns).square()[:, inside].sum(1) / size
    found = spectral_density(curvature, num_probes=3, num_steps=steps, seed=seed).near_zero(threshold + 1e-9)
    assert found.lower - 1e-9 <= float(masses.mean()) <= found.upper + 1e-9
    assert found.lower - 1e-9 <= found.value <= found.upper + 1e-9


def test_enough_probes_find_the_share_of_zeros() -> None:
    values = torch.cat([torch.zeros(150), torch.linspace(-5, -1, 25), torch.linspace(1, 5, 25)]).double()
    density = spectral_density(operator(values), num_probes=20, num_steps=20)
    fine, coarse = density.near_zero(1e-3), density.near_zero(2.5)
    assert abs(fine.value - 0.75) <= 4 * fine.standard_error
    assert fine.lower == 0.0  # one node stands at 0; what is that close to it, no quadrature knows
    assert 0.75 - 4 * coarse.standard_error <= coarse.lower
    assert coarse.lower <= coarse.value <= coarse.upper < 0.99


def test_the_extremes_are_those_of_the_dense_spectrum() -> None:
    objective = mlp_landscape()
    dense = torch.linalg.eigvalsh(hessian(objective, objective.theta()))
    found = spectral_density(HessianOperator(objective, objective.theta()), num_probes=4, num_steps=60)
    assert_close(found.extremes[1], float(dense[-1]), rtol=1e-8, atol=0)
    assert_close(found.extremes[0], float(dense[0]), rtol=1e-6, atol=0)
    assert max(found.residuals) <= 1e-3 * float(dense[-1])


def test_the_curve_is_a_density_with_a_band_that_narrows() -> None:
    objective = mlp_landscape()
    curvature = HessianOperator(objective, objective.theta())
    few, many = (spectral_density(curvature, num_probes=n, num_steps=30).curve() for n in (4, 32))
    for curve in (few, many):
        step = float(curve.eigenvalues[1] - curve.eigenvalues[0])
        assert abs(float(curve.mean.sum()) * step - 1) < 1e-3
        assert bool(((curve.lower <= curve.mean) & (curve.mean <= curve.upper)).all())
        assert float(curve.lower.min()) >= 0
    assert float((many.upper - many.mean).mean()) < 0.6 * float((few.upper - few.mean).mean())


def test_the_band_covers_the_smoothed_dense_density() -> None:
    objective = mlp_landscape()
    dense = torch.linalg.eigvalsh(hessian(objective, objective.theta()))
    curve = spectral_density(
        HessianOperator(objective, objective.theta()), num_probes=12, num_steps=objective.num_params
    ).curve()
    width = curve.kernel_width
    scaled = (curve.eigenvalues[:, None] - dense) / width
    truth = torch.exp(-0.5 * scaled.square()).mean(1) / (width * math.sqrt(2 * math.pi))
    covered = ((curve.lower - 1e-9 <= truth) & (truth <= curve.upper + 1e-9)).double().mean()
    assert float(covered) > 0.8


def test_one_probe_has_no_band() -> None:
    found = spectral_density(operator(torch.tensor([1.0, 2.0]).double()), num_probes=1)
    assert math.isinf(found.trace.standard_error)
    assert bool(torch.isinf(found.curve().upper).all())


def test_a_matrix_of_rank_one_ends_the_quadrature_early() -> None:
    values = torch.zeros(30, dtype=torch.float64)
    values[0] = 4.0
    found = spectral_density(operator(values), num_probes=5, num_steps=20)
    assert found.nodes.shape == (5, 20)
    assert_close(found.weights.sum(1), torch.ones(5, dtype=torch.float64))
    bracket = found.near_zero(1e-9)
    assert bracket.lower == bracket.upper
    assert found.work.products < 5 * 5


def test_layers_have_densities_of_their_own() -> None:
    objective = cnn_landscape()
    theta = objective.theta()
    dense = hessian(objective, theta)
    for names in layers(objective.space).values():
        rows = torch.cat([torch.arange(objective.num_params)[objective.space.slice_of(n)] for n in names])
        found = spectral_density(HessianOperator(objective, theta, block=names), num_probes=3, num_steps=40)
        top = float(torch.linalg.eigvalsh(dense[rows][:, rows])[-1])
        assert_close(found.extremes[1], top, rtol=1e-6, atol=1e-9)
        assert found.num_params == len(rows)


def test_the_trace_lies_within_its_error() -> None:
    objective = mlp_landscape()
    curvature = HessianOperator(objective, objective.theta())
    truth = float(hessian(objective, objective.theta()).trace())
    by_density = spectral_density(curvature, num_probes=60, num_steps=1).trace
    assert abs(by_density.value - truth) <= 4 * by_density.standard_error
    by_xtrace = hessian_trace(curvature, 60)
    assert abs(by_xtrace.value - truth) <= 5 * by_xtrace.standard_error
    assert by_xtrace.standard_error < by_density.standard_error
    assert by_xtrace.work.products == 60


def naive_xtrace(dense: Tensor, tests: Tensor) -> tuple[float, float]:
    """The paper's definition: for each test vector, a basis of the images of all others, by a QR of its own."""
    size, count = tests.shape
    estimates = []
    for i in range(count):
        others = torch.cat([tests[:, :i], tests[:, i + 1 :]], 1)
        basis = torch.linalg.qr(dense @ others)[0]
        outside = tests[:, i] - basis @ (basis.T @ tests[:, i])
        outside = outside * math.sqrt(size - count + 1) / outside.norm()
        estimates.append(float((basis.T @ dense @ basis).trace() + outside @ dense @ outside))
    found = torch.tensor(estimates, dtype=torch.float64)
    return float(found.mean()), float(found.std()) / math.sqrt(count)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(12, 40), half=st.integers(2, 8))
def test_xtrace_is_the_leave_one_out_mean_of_the_paper(seed: int, size: int, half: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    curvature = operator(values, seed)
    found = hessian_trace(curvature, 2 * half, seed=seed)
    tests = torch.randn(size, half, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    value, error = naive_xtrace(hessian(curvature.objective, curvature.theta), tests)
    assert_close(found.value, value, rtol=1e-7, atol=1e-7)
    assert_close(found.standard_error, error, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_trace_of_a_low_rank_is_exact(rank: int) -> None:
    values = torch.zeros(50, dtype=torch.float64)
    values[:rank] = torch.tensor([3.0, -1.0, 0.5])[:rank].double()
    found = hessian_trace(operator(values), 12)
    assert_close(found.value, float(values.sum()), rtol=1e-8, atol=1e-8)
    assert found.standard_error <= 1e-7


def test_the_trace_of_a_small_matrix_is_exact() -> None:
    assert_close(hessian_trace(operator(torch.tensor([1.0, 2.0]).double()), 8).value, 3.0)


def test_progress_counts_products() -> None:
    told: list[float] = []
    spectral_density(
        operator(torch.arange(9).double()), num_probes=2, num_steps=3, progress=lambda s, _: told.append(s)
    )
    assert told == [pytest.approx(i / 6) for i in range(1, 7)]
    told.clear()
    hessian_trace(operator(torch.arange(9).double()), 4, progress=lambda s, _: told.append(s))
    assert told == [0.25, 0.5, 0.75, 1.0]


def test_wrong_wishes_are_told() -> None:
    curvature = operator(torch.arange(4).double())
    with pytest.raises(ConfigError, match="at least one probe and one step"):
        spectral_density(curvature, num_probes=0)
    for count in (2, 5):
        with pytest.raises(ConfigError, match="an even number of at least 4 products"):
            hessian_trace(curvature, count)
    found = spectral_density(curvature)
    with pytest.raises(ConfigError, match="threshold of at least 0"):
        found.near_zero(-1.0)
    with pytest.raises(ConfigError, match="positive width"):
        found.curve(kernel_width=0.0)
    with pytest.raises(ConfigError, match="confidence in"):
        found.curve(confidence=1.0)
    broken = HessianOperator(mlp_landscape(), mlp_landscape().theta() * math.nan)
    with pytest.raises(NumericalError, match="finite Hessian products"):
        spectral_density(broken)
    with pytest.raises(NumericalError, match="finite Hessian products"):
        hessian_trace(broken)
