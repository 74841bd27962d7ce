"""Closed forms of Gaussian overlaps against samples, at the angles where they are known, and their gradients."""

import math

import pytest
import torch

from thalweg.errors import ConfigError, ShapeError
from thalweg.teacher_student import (
    angles_between,
    correlations,
    gaussian_activations,
    gaussian_correlations,
    gaussian_gates,
    sample_overlaps,
    simplex_clones,
)

SAMPLES = 200_000


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_samples_agree_with_the_closed_forms_within_five_standard_errors():
    ours, theirs, x = rows(4, 5, 0), rows(3, 5, 1), rows(SAMPLES, 5, 2)
    first, second = (x @ ours.T).relu(), (x @ theirs.T).relu()
    for exact, one, other in (
        (gaussian_gates(ours, theirs), (first > 0).double(), (second > 0).double()),
        (gaussian_activations(ours, theirs), first, second),
    ):
        mean = one.T @ other / SAMPLES
        variance = one.square().T @ other.square() / SAMPLES - mean.square()
        assert ((mean - exact).abs() <= 5 * (variance / SAMPLES).sqrt()).all()


def test_sample_overlaps_are_plain_averages():
    ours, theirs, x = rows(3, 4, 0), rows(2, 4, 1), rows(50, 4, 2)
    found = sample_overlaps(x)
    for i in range(3):
        for j in range(2):
            a, b = x @ ours[i], x @ theirs[j]
            assert float(found.gates(ours, theirs)[i, j]) == float(((a > 0) & (b > 0)).double().mean())
            own = float((a.clamp(min=0) * b.clamp(min=0)).mean())
            assert float(found.activations(ours, theirs)[i, j]) == pytest.approx(own, rel=1e-12)


@pytest.mark.parametrize(
    ("angle", "gates", "activations"), [(0.0, 0.5, 0.5), (math.pi / 2, 0.25, 1 / (2 * math.pi)), (math.pi, 0.0, 0.0)]
)
def test_overlaps_are_exact_where_they_are_known(angle, gates, activations):
    one = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    turned = {0.0: [3.0, 0.0], math.pi: [-3.0, 0.0]}.get(angle, [0.0, 3.0])
    other = torch.tensor([turned], dtype=torch.float64)
    assert float(gaussian_gates(one, other)) == pytest.approx(gates, abs=1e-15)
    assert float(gaussian_activations(one, other)) == pytest.approx(6 * activations, abs=1e-14)


def test_gradients_are_finite_where_weights_are_equal_opposite_or_zero():
    w = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    for closed in (gaussian_gates, gaussian_activations):
        (gradient,) = torch.autograd.grad(closed(w, w).sum(), w)
        assert gradient.isfinite().all()
    (radial,) = torch.autograd.grad(gaussian_activations(w, w.detach())[0, 0], w)
    torch.testing.assert_close(radial[0], 0.5 * w.detach()[0])  # d/dw of ‖w‖‖w'‖/2 at w = w'


def test_the_closed_correlation_is_what_the_streaming_one_converges_to():
    a, b = (
        torch.nn.Sequential(torch.nn.Linear(5, n, bias=False), torch.nn.ReLU(), torch.nn.Linear(n, 2)) for n in (2, 3)
    )
    for net, seed in ((a, 0), (b, 1)):
        net.double()
        net[0].weight.data = rows(*net[0].weight.shape, seed)
    (rho,) = correlations(a, b, rows(SAMPLES, 5, 2))
    exact = gaussian_correlations(b[0].weight, a[0].weight)
    torch.testing.assert_close(rho.double(), exact.detach(), atol=5 / SAMPLES**0.5, rtol=0)


def test_a_zero_row_is_a_silent_node():
    w = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    for closed in (gaussian_gates, gaussian_activations, gaussian_correlations):
        found = closed(w, w)
        assert (found[1] == 0).all()
        assert (found[:, 1] == 0).all()


def test_small_angles_keep_their_digits():
    turned = torch.tensor([math.cos(1e-9), math.sin(1e-9)], dtype=torch.float64)
    found = angles_between(torch.tensor([1.0, 0.0], dtype=torch.float64), turned)
    assert float(found) == pytest.approx(1e-9, rel=1e-12)


def test_nodes_on_clones_are_separated_and_their_vertices_eigenvectors():
    w, x = simplex_clones(5, 7, torch.Generator().manual_seed(0), copies=20)
    gates = sample_overlaps(x).gates(w, w)
    torch.testing.assert_close(gates, 0.2 * torch.eye(5, dtype=torch.float64))
    clone = x[:20]
    pulled = clone.T @ clone @ w[0] / 20
    torch.testing.assert_close(pulled, w[0], atol=1e-12, rtol=0)


def test_refusals():
    with pytest.raises(ShapeError, match="at least one input"):
        sample_overlaps(torch.zeros(0, 3))
    with pytest.raises(ConfigError, match="Expected 2 or more nodes"):
        simplex_clones(5, 3, torch.Generator().manual_seed(0))
