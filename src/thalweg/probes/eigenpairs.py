"""eigenpairs: extreme eigenvalues and vectors of the Hessian of any network, each with a certificate.

Written here because no library does it: they stop when two estimates agree, which bounds nothing, or run a fixed
number of steps; and because it is faster (`benchmarks/eigenvalues.py`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from thalweg.errors import ConfigError, DataError, ShapeError
from thalweg.objective import Objective
from thalweg.probes.curvature import TAPE_BYTES, Curvature, HessianOperator, Work
from thalweg.probes.lanczos import RitzPairs, Which, lanczos
from thalweg.probes.power import power_iteration

Progress = Callable[[float, str], None]
Method = Literal["lanczos", "power"]

# Error relative to |λ| at which a pair has converged: the tolerance of the tools that this is measured against.
TOLERANCE = 1e-3
# Products after which an unfinished search is given up. Chosen by us: the most negative eigenvalue of a trained
# MLP took 250 to six digits.
MAX_PRODUCTS = 500
# Bytes of the basis and of its products; chosen by us as for tapes. Within it, 40 vectors: λ1 of trained networks
# takes 3 to 8, so that only long searches for the negative end restart.
_BASIS_BYTES = 2 * 2**30
_BASIS_VECTORS = 40
# A first run on a share of the data, but on 50 samples at least, finds the start of the full one. Chosen by us: on
# two networks, a twentieth to 1e-2 took 3 to 6 cheap products and saved one or two full ones; below 500 samples the
# full run is short itself.
_WARM_SHARE, _WARM_LEAST, _WARM_TOLERANCE, _WARM_SAMPLES = 0.05, 50, 1e-2, 500


@dataclass(frozen=True)
class Eigenpairs:
    """Extreme eigenvalues of a Hessian, the wanted end first.

    What is certain: an eigenvalue of H lies within ±residual of each value (for a symmetric H, ‖Hv - λv‖ bounds
    the distance to the spectrum), up to rounding of the products. What is estimated: `errors`. What no method
    that multiplies with few vectors can exclude: an eigenvalue further out whose vector the start did not touch.

    Args:
        values: Rayleigh quotients, shape (pairs,), float64.
        vectors: orthonormal, one per row, shape (pairs, params), in the objective's dtype.
        residuals: ‖Hv - λv‖, shape (pairs,).
        errors: estimated error of each value, at most its residual.
        converged: whether that error is at most the tolerance, for each pair; or at most ten roundings of the
            largest |λ|, below which no eigenvalue can be told in this precision.
        which: "largest", "smallest" or "magnitude".
        tolerance: asked for, relative to |λ|.
        method: in words.
        work: gradients and products, in passes over the full data.
        seconds: wall time.
    """

    values: Float[Tensor, " pairs"]
    vectors: Float[Tensor, "pairs params"]
    residuals: Float[Tensor, " pairs"]
    errors: Float[Tensor, " pairs"]
    converged: tuple[bool, ...]
    which: Which
    tolerance: float
    method: str
    work: Work
    seconds: float

    @property
    def intervals(self) -> Float[Tensor, "pairs 2"]:
        """What is certain: each [λ - residual, λ + residual] holds an eigenvalue."""
        return torch.stack([self.values - self.residuals, self.values + self.residuals], 1)


def eigenpairs(  # noqa: PLR0913 - each keyword is a choice a user has
    objective: Objective,
    theta: Float[Tensor, " params"],
    num_pairs: int = 1,
    *,
    which: Which = "largest",
    tolerance: float = TOLERANCE,
    method: Method = "lanczos",
    block: Sequence[str] | None = None,
    max_products: int = MAX_PRODUCTS,
    tape_bytes: int = TAPE_BYTES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Eigenpairs:
    """Find extreme eigenpairs of ∇²R(theta) on all data.

    For the largest eigenvalue of a large data set, a run on a random twentieth of it gives the start. Every other
    search starts from the gradient plus a random vector of its length; where the gradient is zero, as at a
    critical point, from the random one alone.

    Args:
        objective: the landscape.
        theta: the point, shape (params,).
        num_pairs: how many, k ≥ 1.
        which: "largest" (by sign), "smallest" (the most negative), or largest "magnitude".
        tolerance: of each value, relative to it. Default: 1e-3.
        method: "lanczos" (thick restart), or "power": power iteration with deflation, for the largest magnitude.
        block: names of parameters, to look at their diagonal block only. Default: all.
        max_products: give up after so many.
        tape_bytes: bytes of gradient graphs to keep, see `HessianOperator`.
        seed: of the start.
        progress: called as progress(fraction, text) after every product.

    Returns:
        The pairs; those that did not converge are there and say so.

    Raises:
        ConfigError: fewer than one pair, a tolerance that is not positive, or power iteration for a sign.
        ShapeError: theta does not fit the module, or no parameter has a name of the block.
        NumericalError: a product is not finite.

    **Source:** power iteration is what d'Ascoli et al. 2019 (arXiv 1906.06766) follow along training; thick
    restart: Wu & Simon, SIAM J. Matrix Anal. Appl. 22 (2000). The certificate is the classical residual bound
    (Parlett, The Symmetric Eigenvalue Problem, theorem 4.5.1); the stopping rule and the warm start are ours.

    Example:
        >>> x = torch.linspace(-1, 1, 3, dtype=torch.float64).unsqueeze(1)
        >>> objective = Objective(torch.nn.Linear(1, 1).double(), torch.nn.MSELoss(), (x, x))
        >>> found = eigenpairs(objective, torch.ones(2, dtype=torch.float64), 2)
        >>> found.values.round(decimals=6), found.converged
        (tensor([2.0000, 1.3333], dtype=torch.float64), (True, True))
    """
    start = time.perf_counter()
    curvature = HessianOperator(objective, theta, block=block, tape_bytes=tape_bytes)
    checked = _checked(num_pairs, which, tolerance, method, max_products)
    begin, spent = _start(curvature, which, num_pairs if method == "lanczos" else 0, seed)
    found = _search(curvature, begin, checked, seed, progress)
    return _result(found, checked, curvature.work.plus(spent), time.perf_counter() - start)


def eigenpairs_of(  # noqa: PLR0913 - the keywords of `eigenpairs`, and the start
    curvature: Curvature,
    num_pairs: int = 1,
    *,
    which: Which = "largest",
    tolerance: float = TOLERANCE,
    method: Method = "lanczos",
    max_products: int = MAX_PRODUCTS,
    start: Float[Tensor, "starts params"] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Eigenpairs:
    """Find extreme eigenpairs of any symmetric map: a block, a Gauss-Newton or a Fisher matrix, your own.

    Args:
        curvature: the map.
        num_pairs: how many, k ≥ 1.
        which: "largest" (by sign), "smallest" or largest "magnitude".
        tolerance: of each value, relative to it.
        method: "lanczos" or "power".
        max_products: give up after so many.
        start: vectors to begin with, one per row. Default: a random one.
        seed: of the random vectors.
        progress: called as progress(fraction, text) after every product.

    Returns:
        The pairs, as `eigenpairs` gives them.

    Raises:
        ConfigError: fewer than one pair, a tolerance that is not positive, or power iteration for a sign.
        ShapeError: a start vector is zero or of another length.
        NumericalError: a product is not finite.

    Example:
        >>> x = torch.linspace(-1, 1, 3, dtype=torch.float64).unsqueeze(1)
        >>> objective = Objective(torch.nn.Linear(1, 1).double(), torch.nn.MSELoss(), (x, x))
        >>> bias = HessianOperator(objective, torch.ones(2, dtype=torch.float64), block=["bias"])
        >>> eigenpairs_of(bias).values
        tensor([2.], dtype=torch.float64)
    """
    began = time.perf_counter()
    checked = _checked(num_pairs, which, tolerance, method, max_products)
    before = curvature.work
    begin = _random(curvature, seed)[None] if start is None else _usable(curvature, start)
    found = _search(curvature, begin, checked, seed, progress)
    return _result(found, checked, curvature.work.plus(before, -1.0), time.perf_counter() - began)


def _usable(curvature: Curvature, start: Tensor) -> Tensor:
    if start.ndim != 2 or start.shape[1] != curvature.size or not bool((start.norm(dim=1) > 0).all()):
        raise ShapeError(
            f"Expected start vectors that are not zero, of shape (starts, {curvature.size}). "
            f"Got shape {tuple(start.shape)}, or zeros. Leave it out for a random one."
        )
    return start.detach().to(device=curvature.device, dtype=curvature.dtype)


@dataclass(frozen=True)
class _Wanted:
    num_pairs: int
    which: Which
    tolerance: float
    method: Method
    max_products: int


def _checked(num_pairs: int, which: Which, tolerance: float, method: Method, max_products: int) -> _Wanted:
    if num_pairs < 1 or max_products < 1:
        raise ConfigError(
            f"Expected at least one pair and one product. Got {num_pairs} and {max_products}. Ask for more."
        )
    if which not in ("largest", "smallest", "magnitude") or method not in ("lanczos", "power"):
        raise ConfigError(
            "Expected which 'largest', 'smallest' or 'magnitude' and method 'lanczos' or 'power'. "
            f"Got {which!r} and {method!r}. Choose among them."
        )
    if not 0.0 < tolerance < 1.0:
        raise ConfigError(f"Expected a tolerance between 0 and 1. Got {tolerance}. Choose one such as 1e-3.")
    if method == "power" and which != "magnitude":
        raise ConfigError(
            f"Expected which='magnitude' for power iteration. Got {which!r}. It finds nothing else; use lanczos."
        )
    return _Wanted(num_pairs, which, tolerance, method, max_products)


def _search(curvature: Curvature, start: Tensor, wanted: _Wanted, seed: int, progress: Progress | None) -> RitzPairs:
    def watch(products: int, converged: int, error: float) -> None:
        if progress is not None:
            done = max(converged / wanted.num_pairs, products / wanted.max_products)
            progress(
                min(done, 1.0), f"{products} products, {converged} of {wanted.num_pairs} pairs, error {error:.1e}"
            )

    limits = {"tolerance": wanted.tolerance, "max_products": wanted.max_products}
    if wanted.method == "power":
        return power_iteration(curvature.product, start[0], wanted.num_pairs, watch=watch, **limits)  # type: ignore[arg-type]
    bytes_of_one = 2 * curvature.size * start.element_size()
    fits = min(_BASIS_VECTORS, _BASIS_BYTES // max(bytes_of_one, 1))
    basis = min(curvature.size, max(fits, 2 * wanted.num_pairs + 4))
    generator = torch.Generator().manual_seed(seed + 1)
    return lanczos(
        *(curvature.product, start, wanted.num_pairs),
        which=wanted.which,
        basis_size=basis,
        generator=generator,
        watch=watch,
        **limits,  # type: ignore[arg-type]
    )


def _result(found: RitzPairs, wanted: _Wanted, work: Work, seconds: float) -> Eigenpairs:
    return Eigenpairs(
        values=found.values,
        vectors=found.vectors,
        residuals=found.residuals,
        errors=found.errors,
        converged=found.converged,
        which=wanted.which,
        tolerance=wanted.tolerance,
        method="thick-restart Lanczos" if wanted.method == "lanczos" else "power iteration with deflation",
        work=work,
        seconds=seconds,
    )


def _random(curvature: Curvature, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(curvature.size, generator=generator, dtype=torch.float64)
    return vector.to(device=curvature.device, dtype=curvature.dtype)


def _start(curvature: HessianOperator, which: Which, num_pairs: int, seed: int) -> tuple[Tensor, Work]:
    """Give the vector to begin with, and what it cost."""
    random = normalize(_random(curvature, seed), dim=0)
    objective = curvature.objective
    if which == "largest" and num_pairs == 1 and objective.in_memory and not objective.module.training:
        warm = _warm_start(curvature, random, seed)
        if warm is not None:
            return warm
    return (random + normalize(curvature.gradient, dim=0))[None], Work()


def _warm_start(curvature: HessianOperator, random: Tensor, seed: int) -> tuple[Tensor, Work] | None:
    total = curvature.objective.num_samples()
    if total is None or total < _WARM_SAMPLES:
        return None
    count = max(_WARM_LEAST, round(_WARM_SHARE * total))
    try:
        sample = curvature.sampled(count, seed)
        begin = (random + normalize(sample.gradient, dim=0))[None]
    except DataError:  # batches that cannot be cut, or a sample in which no target counts
        return None
    found = lanczos(
        *(sample.product, begin, 1),
        which="largest",
        tolerance=_WARM_TOLERANCE,
        max_products=20,
        basis_size=min(20, curvature.size),
        generator=torch.Generator().manual_seed(seed),
    )
    return found.vectors, Work().plus(sample.work, count / total)
