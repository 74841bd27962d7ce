"""lanczos: eigenpairs of a symmetric linear map at one end of its spectrum, with measured residuals.

Thick-restart Lanczos (Wu & Simon 2000) in the form of a Rayleigh-Ritz method: the basis V and its products HV are
both kept, so that the residual of a Ritz pair is computed from products that were really taken, not from a
recurrence that rounding may have falsified, and any number of starting vectors may be given. The next direction
is the residual of the first wanted pair that has not converged, which in exact arithmetic is Lanczos's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.errors import NumericalError

Which = Literal["largest", "smallest", "magnitude"]
Watch = Callable[[int, int, float], None]

# A direction that loses more than this share of its length to the basis is no new one: chosen by us, a few
# roundings of a float32 sum over a long vector.
_LOST = 1e-5
# A pair counts as converged at this many roundings of ‖H‖ whatever was asked for: chosen by us; products of a
# float32 network differ from those in float64 by some 5 roundings.
_ROUNDINGS = 10.0


@dataclass(frozen=True)
class RitzPairs:
    """Approximate eigenpairs, the wanted end first.

    Args:
        values: Rayleigh quotients, shape (pairs,), float64.
        vectors: orthonormal, one per row, shape (pairs, params).
        residuals: ‖Hv - λv‖, shape (pairs,): an eigenvalue of H lies within this of λ.
        errors: what the value is estimated to be wrong by, shape (pairs,): the residual, or its square over half
            the gap to the other Ritz values where that is smaller.
        converged: the error is at most what was asked for, or ten roundings of the largest Ritz value.
        products: products taken.
    """

    values: Float[Tensor, " pairs"]
    vectors: Float[Tensor, "pairs params"]
    residuals: Float[Tensor, " pairs"]
    errors: Float[Tensor, " pairs"]
    converged: tuple[bool, ...]
    products: int


def lanczos(  # noqa: PLR0913 - a solver of its own, whose every limit is the caller's
    product: Callable[[Tensor], Tensor],
    starts: Float[Tensor, "starts params"],
    num_pairs: int,
    *,
    which: Which,
    tolerance: float,
    max_products: int,
    basis_size: int,
    generator: torch.Generator,
    watch: Watch | None = None,
) -> RitzPairs:
    """Find eigenpairs at one end of a spectrum.

    Args:
        product: the symmetric map.
        starts: vectors to begin with, at least one that is not zero.
        num_pairs: how many.
        which: "largest" and "smallest" by sign, or largest "magnitude".
        tolerance: a pair has converged when its error is at most this times |λ|.
        max_products: give up after so many.
        basis_size: vectors kept between restarts, more than num_pairs + 1 unless it is all of the space.
        generator: of new directions, should the start lie in an invariant subspace.
        watch: called after each product as watch(products, converged, worst relative error).

    Returns:
        The best pairs found, converged or not.

    Raises:
        NumericalError: a product is not finite.
    """
    search = _Search(product, starts, basis_size, generator)
    wanted = min(num_pairs, starts.shape[1])
    while True:
        is_grown = search.grow()
        found = search.pairs(wanted, which, tolerance)
        if watch is not None:
            watch(search.products, sum(found.converged), float((found.errors / found.values.abs()).max()))
        enough = search.size >= wanted and search.starts_left == 0
        if not is_grown or (enough and all(found.converged)) or search.products >= max_products:
            return found
        search.aim(found)
        if search.size == basis_size:
            search.restart(which, keep=min(basis_size - 2, 2 * wanted + _KEPT))


# Ritz vectors kept at a restart beyond twice the wanted ones; chosen by us, as Wu & Simon advise to keep more than
# are wanted.
_KEPT = 6


class _Search:
    """A basis V of orthonormal rows, its products HV, and V H Vᵀ."""

    def __init__(
        self, product: Callable[[Tensor], Tensor], starts: Tensor, basis_size: int, generator: torch.Generator
    ) -> None:
        self._product = product
        self._queue = list(starts)
        self._generator = generator
        self._basis = starts.new_empty(basis_size, starts.shape[1])
        self._images = torch.empty_like(self._basis)
        self._inner = torch.zeros(basis_size, basis_size, dtype=torch.float64)
        self.size = 0
        self.products = 0

    @property
    def starts_left(self) -> int:
        """Vectors that wait to be added."""
        return len(self._queue)

    def grow(self) -> bool:
        """Add one direction and its product; False if the basis spans everything."""
        direction = self._next()
        if direction is None:
            return False
        place = self.size
        self._basis[place] = direction
        self._images[place] = self._product(direction)
        self.products += 1
        if not bool(torch.isfinite(self._images[place]).all()):
            raise NumericalError("Expected finite products. Got NaN or infinity. Check the point, and your map.")
        column = (self._basis[: place + 1] @ self._images[place]).double().cpu()
        self._inner[place, : place + 1] = column
        self._inner[: place + 1, place] = column
        self.size += 1
        return True

    def _next(self) -> Tensor | None:
        while self._queue:
            direction = self._orthonormal(self._queue.pop(0))
            if direction is not None:
                return direction
        if self.size >= min(self._basis.shape):
            return None
        # Everything asked for lies in the span: the rest of the space is reached by chance only.
        shape = self._basis.shape[1:]
        fresh = torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self._basis)
        return self._orthonormal(fresh)

    def _orthonormal(self, vector: Tensor) -> Tensor | None:
        before = float(vector.norm())
        if not before > 0.0:
            return None
        vector = vector / before
        basis = self._basis[: self.size]
        for _ in range(2):  # twice is enough (Kahan)
            vector = vector - (basis @ vector) @ basis
        after = float(vector.norm())
        return vector / after if after > _LOST else None

    def pairs(self, num_pairs: int, which: Which, tolerance: float) -> RitzPairs:
        """Solve in the basis and measure residuals."""
        size = self.size
        values, columns = torch.linalg.eigh(self._inner[:size, :size])
        order = _order(values, which)
        head = order[: num_pairs + 1]  # the first unwanted one bounds the gap
        mix = columns[:, head].T.to(self._basis)
        vectors = mix @ self._basis[:size]
        residuals = mix @ self._images[:size]
        self._residuals = residuals - values[head].to(vectors)[:, None] * vectors
        norms = self._residuals.norm(dim=1).double().cpu()
        errors = _errors(values[head], norms, values[order])
        scale = torch.finfo(self._basis.dtype).eps * float(values.abs().max())
        allowed = (tolerance * values[head].abs()).clamp_min(_ROUNDINGS * scale)
        kept = slice(min(num_pairs, size))
        return RitzPairs(
            values=values[head][kept],
            vectors=vectors[kept],
            residuals=norms[kept],
            errors=errors[kept],
            converged=tuple((errors <= allowed)[kept].tolist()),
            products=self.products,
        )

    def aim(self, found: RitzPairs) -> None:
        """Choose the next direction: the residual of the first pair that has not converged."""
        if not self._queue and not all(found.converged):
            self._queue.append(self._residuals[found.converged.index(False)])
        elif not self._queue:
            self._queue.append(self._residuals[len(found.values) - 1])

    def restart(self, which: Which, keep: int) -> None:
        """Shrink the basis to the best Ritz vectors; their products are combined, not taken again."""
        values, columns = torch.linalg.eigh(self._inner)
        head = _order(values, which)[:keep]
        mix = columns[:, head].T.to(self._basis)
        self._basis[:keep] = mix @ self._basis
        self._images[:keep] = mix @ self._images
        self._inner.zero_()
        self._inner[:keep, :keep] = torch.diag(values[head])
        self.size = keep


def _order(values: Tensor, which: Which) -> Tensor:
    key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
    return torch.argsort(key, stable=True)


def _errors(values: Tensor, residuals: Tensor, others: Tensor) -> Tensor:
    """min(r, r²/gap), with half the gap to the next Ritz value: eigenvalues not yet seen may lie in it.

    The gap is shortened by the residual of that value, too. What is left is an estimate, no bound; r is one.
    """
    errors = residuals.clone()
    for i, value in enumerate(values):
        apart = [abs(float(value - values[j])) - float(residuals[j]) for j in range(len(values)) if j != i]
        far = others[len(values) :]
        if len(far):
            apart.append(float((far - value).abs().min()))
        gap = min(apart, default=0.0) / 2
        if gap > residuals[i]:
            errors[i] = float(residuals[i]) ** 2 / gap
    return errors
