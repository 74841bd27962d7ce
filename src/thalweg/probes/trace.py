"""trace: the trace of a Hessian by XTrace, with its error.

curvlinops has this estimator without an error, and slower products under it; `SpectralDensity.trace` is
Hutchinson's estimate from products that a density has taken anyway.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import ConfigError, NumericalError
from thalweg.probes.curvature import Curvature, Work

Progress = Callable[[float, str], None]

# Chosen by us: 10 test vectors, as many as the density's probes, and their 10 images.
NUM_PRODUCTS = 20


@dataclass(frozen=True)
class TraceEstimate:
    """An estimate of Tr H.

    Args:
        value: the estimate.
        standard_error: its own estimate of its error.
        work: gradients and products, in passes over the full data.
        seconds: wall time.
    """

    value: float
    standard_error: float
    work: Work
    seconds: float


def hessian_trace(
    curvature: Curvature, num_products: int = NUM_PRODUCTS, *, seed: int = 0, progress: Progress | None = None
) -> TraceEstimate:
    """Estimate Tr H from a given number of products.

    Half of them find a subspace that holds most of H; for each test vector, the subspace of the *others* gives a
    part of the trace exactly and the vector itself the rest, and the mean over the vectors is the estimate. It is
    exact where H has a rank below half the products.

    Args:
        curvature: the map, e.g. `HessianOperator(objective, theta)`.
        num_products: an even number of at least 4; more than twice the size is cut to that.
        seed: of the test vectors.
        progress: called as progress(fraction, text) after every product.

    Returns:
        The estimate.

    Raises:
        ConfigError: the number of products is below 4 or odd.
        NumericalError: a product is not finite.

    **Source:** Epperly, Tropp & Webber 2024 (arXiv 2301.07825), XTrace with normalisation (their sections 2.1 and
    2.2, error estimate eq. 1.6).

    Example:
        >>> from thalweg.objective import Objective
        >>> from thalweg.probes.curvature import HessianOperator
        >>> x = torch.linspace(-1, 1, 3, dtype=torch.float64).unsqueeze(1)
        >>> objective = Objective(torch.nn.Linear(1, 1).double(), torch.nn.MSELoss(), (x, x))
        >>> round(hessian_trace(HessianOperator(objective, torch.ones(2, dtype=torch.float64)), 4).value, 6)
        3.333333
    """
    if num_products < 4 or num_products % 2:
        raise ConfigError(f"Expected an even number of at least 4 products. Got {num_products}. Change it.")
    start, before = time.perf_counter(), curvature.work
    half = min(num_products // 2, curvature.size)
    done = 0

    def images(columns: Tensor) -> Tensor:
        nonlocal done
        found = []
        for column in columns.T:
            found.append(curvature.product(column.to(curvature.dtype)).double())
            if not bool(torch.isfinite(found[-1]).all()):
                raise NumericalError("Expected finite products. Got NaN or infinity. Check the point, and your map.")
            done += 1
            if progress is not None:
                progress(done / (2 * half), f"product {done} of {2 * half}")
        return torch.stack(found, 1)

    generator = torch.Generator().manual_seed(seed)
    tests = torch.randn(curvature.size, half, generator=generator, dtype=torch.float64).to(curvature.device)
    basis, mix = torch.linalg.qr(images(tests))
    if half == curvature.size:
        value, error = float((basis * images(basis)).sum()), 0.0
    else:
        value, error = _leave_one_out(tests, basis, mix, basis.T @ images(basis))
    return TraceEstimate(value, error, curvature.work.plus(before, -1.0), time.perf_counter() - start)


def _leave_one_out(tests: Tensor, basis: Tensor, mix: Tensor, inner: Tensor) -> tuple[float, float]:
    """Average over test vectors ω_i, each beside the basis Q of the others' images; AΩ = QR, inner = QᵀAQ."""
    size, count = tests.shape
    estimates = []
    for i in range(count):
        # Of span Q, the direction that only ω_i's image gave: orthogonal to all others', also where R is singular.
        others = torch.cat([mix[:, :i], mix[:, i + 1 :]], 1)
        unit = torch.linalg.qr(others, mode="complete")[0][:, -1]
        rest = torch.eye(count, dtype=mix.dtype, device=mix.device) - torch.outer(unit, unit)
        seen = rest @ (basis.T @ tests[:, i])
        image = mix[:, i]
        outside = tests[:, i] @ (basis @ image) - 2 * (seen @ image) + seen @ inner @ seen
        length = float(tests[:, i] @ tests[:, i] - seen @ seen)
        scale = (size - count + 1) / length if length > 0 else 0.0
        estimates.append(float((rest * inner).sum()) + scale * float(outside))
    values = torch.tensor(estimates, dtype=torch.float64)
    return float(values.mean()), float(values.std()) / math.sqrt(count)
