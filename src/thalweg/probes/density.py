"""density: the spectral density of a Hessian by stochastic Lanczos quadrature, with what is certain about it.

Written here because it is faster than the libraries' (tapes, `curvature.py`; `benchmarks/density.py`) and because
none of them gives a confidence band, or bounds on the mass near zero.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from thalweg.errors import ConfigError, NumericalError
from thalweg.probes.curvature import Curvature, Work

Progress = Callable[[float, str], None]

# Probes and steps of the tools that this is measured against; with 10 probes the trace is good to 10-25 %.
NUM_PROBES, NUM_STEPS = 10, 50
# Width of the kernel over the range of the spectrum; chosen by us: a hundredth is what a figure resolves.
_KERNEL_SHARE = 0.01
# A new direction shorter than this many roundings of ‖H‖ is none: the Krylov space is exhausted.
_ROUNDINGS = 100.0


@dataclass(frozen=True)
class DensityCurve:
    """A smoothed spectral density on a grid, normalised to 1.

    Args:
        eigenvalues: the grid, shape (points,).
        mean: over the probes.
        lower: of the confidence band at each point; at least 0.
        upper: of the confidence band.
        kernel_width: standard deviation of the Gaussian that smooths, in units of the eigenvalues.
        confidence: of the band, pointwise.
    """

    eigenvalues: Float[Tensor, " points"]
    mean: Float[Tensor, " points"]
    lower: Float[Tensor, " points"]
    upper: Float[Tensor, " points"]
    kernel_width: float
    confidence: float


@dataclass(frozen=True)
class Estimate:
    """A mean over random probes.

    Args:
        value: the mean.
        standard_error: of the mean; infinite for one probe.
    """

    value: float
    standard_error: float


@dataclass(frozen=True)
class NearZero:
    """The share of eigenvalues within ±threshold, as far as the quadrature knows it.

    Args:
        value: mean over probes of the weights of the nodes inside: the estimate, which means little where lower is 0.
        lower: mean over probes of what is certainly inside (Chebyshev-Markov-Stieltjes); 0 where the threshold is
            below the distance of the nodes, the resolution of the quadrature.
        upper: mean over probes of what may be inside.
        standard_error: of the mean over random probes, the largest of the three; the resolution is not in it.
        threshold: the bound on |λ|.
    """

    value: float
    lower: float
    upper: float
    standard_error: float
    threshold: float


@dataclass(frozen=True)
class SpectralDensity:
    """Gauss quadratures of the spectral measures of random vectors.

    Args:
        nodes: Ritz values, ascending, shape (probes, steps), float64; a short quadrature repeats its last.
        weights: squared first components, each row summing to 1 (0 for repeats).
        num_params: number of eigenvalues that the density is of.
        exhausted: for each probe, whether its quadrature spans all that the vector reaches, and so is its measure.
        residuals: of the smallest and the largest Ritz value over all probes: an eigenvalue lies within.
        work: gradients and products, in passes over the full data.
        seconds: wall time.
    """

    nodes: Float[Tensor, "probes steps"]
    weights: Float[Tensor, "probes steps"]
    num_params: int
    exhausted: tuple[bool, ...]
    residuals: tuple[float, float]
    work: Work
    seconds: float

    @property
    def extremes(self) -> tuple[float, float]:
        """Smallest and largest Ritz value: the spectrum reaches at least so far."""
        return float(self.nodes.min()), float(self.nodes.max())

    @property
    def trace(self) -> Estimate:
        """Tr H as the mean of vᵀHv over the probes (Hutchinson)."""
        return _mean(self.num_params * (self.nodes * self.weights).sum(1))

    def curve(
        self,
        eigenvalues: Float[Tensor, " points"] | None = None,
        *,
        kernel_width: float | None = None,
        confidence: float = 0.95,
    ) -> DensityCurve:
        """Smooth the density with a Gaussian; the band is Student's t over the probes, pointwise.

        Args:
            eigenvalues: grid. Default: 1,001 points that span the spectrum and three kernel widths more.
            kernel_width: standard deviation of the Gaussian. Default: a hundredth of the range.
            confidence: of the band, in (0, 1).

        Returns:
            The curve.

        Raises:
            ConfigError: a width that is not positive, or a confidence outside (0, 1).
        """
        low, high = self.extremes
        width = (
            kernel_width if kernel_width is not None else max(_KERNEL_SHARE * (high - low), 1e-12, 1e-6 * abs(high))
        )
        if width <= 0 or not 0 < confidence < 1:
            raise ConfigError(
                f"Expected a positive width and a confidence in (0, 1). Got {width} and {confidence}. Change them."
            )
        grid = eigenvalues
        if grid is None:
            grid = torch.linspace(low - 3 * width, high + 3 * width, 1001, dtype=torch.float64)
        scaled = (grid.double()[:, None, None] - self.nodes) / width
        kernel = torch.exp(-0.5 * scaled.square()) / (width * math.sqrt(2 * math.pi))
        curves = (kernel * self.weights).sum(2)  # (points, probes)
        count = curves.shape[1]
        mean = curves.mean(1)
        spread = curves.std(1) / math.sqrt(count) if count > 1 else torch.full_like(mean, math.inf)
        half = spread * (float(stats.t.ppf(0.5 + confidence / 2, count - 1)) if count > 1 else 1.0)
        return DensityCurve(grid, mean, (mean - half).clamp_min(0.0), mean + half, width, confidence)

    def near_zero(self, threshold: float) -> NearZero:
        """Bound the share of eigenvalues within ±threshold.

        An m-point Gauss quadrature pins the spectral measure μ of its vector between sums of weights:
        Σ_{i<k} w_i ≤ μ((-∞, x_k)) ≤ μ((-∞, x_k]) ≤ Σ_{i≤k} w_i. What those sums leave open is the quadrature's
        resolution; the rest of the uncertainty is that of random probes.

        Args:
            threshold: bound on |λ|, not negative.

        Returns:
            The bracket.

        Raises:
            ConfigError: the threshold is negative.

        **Source:** Szegő, Orthogonal Polynomials, theorem 3.41.1 (Chebyshev-Markov-Stieltjes).
        """
        if threshold < 0:
            raise ConfigError(f"Expected a threshold of at least 0. Got {threshold}. Pass its absolute value.")
        rows = zip(self.nodes, self.weights, self.exhausted, strict=True)
        pairs = [_bracket(x, w, threshold, is_exact=done) for x, w, done in rows]
        lower, upper = (_mean(torch.tensor(side, dtype=torch.float64)) for side in zip(*pairs, strict=True))
        inside = _mean((self.weights * (self.nodes.abs() <= threshold)).sum(1))
        error = max(part.standard_error for part in (inside, lower, upper))
        return NearZero(inside.value, lower.value, upper.value, error, threshold)


def spectral_density(
    curvature: Curvature,
    *,
    num_probes: int = NUM_PROBES,
    num_steps: int = NUM_STEPS,
    seed: int = 0,
    progress: Progress | None = None,
) -> SpectralDensity:
    """Estimate the spectral density of a symmetric map by stochastic Lanczos quadrature.

    Each probe is a random vector of signs; Lanczos with full reorthogonalisation turns it into a Gauss quadrature
    of its spectral measure, whose expectation is the density (1/P) Σ δ(λ - λ_i).

    Args:
        curvature: the map, e.g. `HessianOperator(objective, theta)`, or a block of it.
        num_probes: random vectors; the band narrows with their square root.
        num_steps: Lanczos steps for each; details finer than about range/steps are not resolved.
        seed: of the probes.
        progress: called as progress(fraction, text) after every product.

    Returns:
        The quadratures.

    Raises:
        ConfigError: fewer than one probe or step.
        NumericalError: a product is not finite.

    **Source:** Ghorbani, Krishnan & Xiao 2019 (arXiv 1901.10159), Algorithm 1; Golub & Welsch 1969. Signs in place
    of their Gaussian vectors: the same expectation, less variance of the trace.

    Example:
        >>> from thalweg.objective import Objective
        >>> from thalweg.probes.curvature import HessianOperator
        >>> x = torch.linspace(-1, 1, 3, dtype=torch.float64).unsqueeze(1)
        >>> objective = Objective(torch.nn.Linear(1, 1).double(), torch.nn.MSELoss(), (x, x))
        >>> found = spectral_density(HessianOperator(objective, torch.ones(2, dtype=torch.float64)))
        >>> [round(value, 6) for value in found.extremes], round(found.trace.value, 6)
        ([1.333333, 2.0], 3.333333)
    """
    if num_probes < 1 or num_steps < 1:
        raise ConfigError(
            f"Expected at least one probe and one step. Got {num_probes} and {num_steps}. Ask for more."
        )
    start, before = time.perf_counter(), curvature.work
    steps = min(num_steps, curvature.size)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.empty(steps, curvature.size, dtype=curvature.dtype, device=curvature.device)
    rows = []
    for probe in range(num_probes):
        signs = torch.randint(0, 2, (curvature.size,), generator=generator).mul_(2).sub_(1)
        first = signs.to(basis) / math.sqrt(curvature.size)

        def watch(step: int, probe: int = probe) -> None:
            if progress is not None:
                share = (probe * steps + step) / (num_probes * steps)
                progress(share, f"probe {probe + 1} of {num_probes}, step {step} of {steps}")

        rows.append(_quadrature(curvature, first, basis, watch))
    nodes, weights, residuals, exhausted = zip(*rows, strict=True)
    low = min(range(num_probes), key=lambda i: float(nodes[i][0]))
    high = max(range(num_probes), key=lambda i: float(nodes[i][-1]))
    return SpectralDensity(
        nodes=torch.stack([_padded(n, steps, float(n[-1])) for n in nodes]),
        weights=torch.stack([_padded(w, steps, 0.0) for w in weights]),
        num_params=curvature.size,
        exhausted=tuple(exhausted),
        residuals=(residuals[low][0], residuals[high][1]),
        work=curvature.work.plus(before, -1.0),
        seconds=time.perf_counter() - start,
    )


def _quadrature(
    curvature: Curvature, first: Tensor, basis: Tensor, watch: Callable[[int], None]
) -> tuple[Tensor, Tensor, tuple[float, float], bool]:
    """Lanczos from a unit vector: Ritz values, squared first components, residuals of both ends, whether it ended."""
    alphas: list[float] = []
    betas: list[float] = []
    vector, scale, is_exhausted = first, 0.0, False
    eps = torch.finfo(basis.dtype).eps
    for step in range(len(basis)):
        basis[step] = vector
        image = curvature.product(vector)
        alphas.append(float(vector @ image))
        known = basis[: step + 1]
        image = image - (known @ image) @ known
        if step:  # a second sweep keeps the basis orthogonal to rounding; the first leaves eps·‖H‖/β
            image = image - (known @ image) @ known
        beta = float(image.norm())
        scale = max(scale, abs(alphas[-1]), beta)
        betas.append(beta)
        watch(step + 1)
        is_exhausted = beta <= _ROUNDINGS * eps * scale
        if is_exhausted:
            break
        vector = image / beta
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    inner = torch.tensor(betas[:-1], dtype=torch.float64)
    if len(inner):
        matrix += torch.diag(inner, 1) + torch.diag(inner, -1)
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError("Expected finite Lanczos coefficients. Got NaN or infinity. Check the point.")
    nodes, columns = torch.linalg.eigh(matrix)
    last = columns[-1].abs() * betas[-1]
    return nodes, columns[0].square(), (float(last[0]), float(last[-1])), is_exhausted


def _padded(values: Tensor, length: int, filler: float) -> Tensor:
    return torch.cat([values, values.new_full((length - len(values),), filler)])


def _bracket(nodes: Tensor, weights: Tensor, threshold: float, *, is_exact: bool) -> tuple[float, float]:
    """What is certainly, and what is possibly within ±threshold of zero under the measure of one quadrature."""
    if is_exact:
        mass = float(weights[nodes.abs() <= threshold].sum())
        return mass, mass
    x, total = nodes, torch.cat([weights.new_zeros(1), weights.cumsum(0)])
    first = int((x < -threshold).sum())  # nodes below the interval
    last = int((x <= threshold).sum())  # nodes below its end
    # Below -threshold lies at most what lies at or below the next node; at least what lies below the last one.
    below_most, below_least = float(total[min(first + 1, len(x))]), float(total[max(first - 1, 0)])
    until_most, until_least = float(total[min(last + 1, len(x))]), float(total[max(last - 1, 0)])
    return max(0.0, until_least - below_most), min(1.0, until_most - below_least)


def _mean(values: Tensor) -> Estimate:
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else math.inf
    return Estimate(float(values.mean()), error)
