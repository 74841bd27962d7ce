"""curvature: the Hessian at a point as a linear map, known by its products with vectors.

Written here rather than taken from a library because it is faster: the graph of the gradient (a *tape*) of every
piece of the data is recorded once and replayed for each product, which then costs 1.4 gradients where peers'
recomputation costs 2.4 to 4.5 (`benchmarks/eigenvalues.py`). Gauss-Newton, Fisher and K-FAC matrices are taken
from curvlinops instead: `from_curvlinops.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.errors import DataError, NumericalError, ShapeError
from thalweg.kernels import plain_kernels
from thalweg.objective import Objective
from thalweg.probes.tape import Tape, in_pieces, record
from thalweg.space import Space

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

# Bytes of tapes that are kept for replay. Chosen by us: fits a laptop beside its browser; what does not fit is
# recomputed at each product.
TAPE_BYTES = 2 * 2**30
# Relative difference of the loss between two passes over a loader that counts as another landscape. Chosen by us:
# far above the rounding of a sum in another order, far below what another augmentation of the data changes.
_SAME_LOSS = 1e-4


@dataclass(frozen=True)
class Work:
    """What was computed, in passes over the full data.

    Args:
        gradients: gradients, recorded tapes among them, and what of them is recorded again at a product.
        products: products with a vector.
    """

    gradients: float = 0.0
    products: float = 0.0

    def plus(self, other: "Work", share: float = 1.0) -> "Work":
        """Add other work, done on a share of the data."""
        return Work(self.gradients + share * other.gradients, self.products + share * other.products)


@runtime_checkable
class Curvature(Protocol):
    """A symmetric matrix of second derivatives, known by its products: the socket of the probes.

    `HessianOperator` is one, `from_curvlinops` gives others, and a user's own class may be one.
    """

    @property
    def size(self) -> int:
        """Number of rows."""

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the vectors."""

    @property
    def device(self) -> torch.device:
        """Where the vectors live."""

    @property
    def work(self) -> Work:
        """What was computed so far."""

    def product(self, vector: Float[Tensor, " params"]) -> Float[Tensor, " params"]:
        """Multiply with a vector."""


class HessianOperator:
    """∇²R(theta), or one of its diagonal blocks, as a linear map.

    Exact over all data, whatever the batches; symmetric and repeatable up to rounding. Tapes are recorded on first
    use and kept while they fit into `tape_bytes`; what does not fit is recomputed at each product. Data that
    loaders give must be the same on every pass.

    Args:
        objective: the landscape.
        theta: the point, shape (params,).
        block: names of the parameters whose block is meant, e.g. those of one layer. Default: all.
        tape_bytes: bytes of tapes to keep. Default: 2 GiB.

    Raises:
        ShapeError: theta does not fit the module, or there is no parameter of a name.

    Example:
        >>> x = torch.linspace(-1, 1, 3, dtype=torch.float64).unsqueeze(1)
        >>> objective = Objective(torch.nn.Linear(1, 1).double(), torch.nn.MSELoss(), (x, x))
        >>> curvature = HessianOperator(objective, torch.zeros(2, dtype=torch.float64))
        >>> curvature.product(torch.tensor([1.0, 1.0], dtype=torch.float64))
        tensor([1.3333, 2.0000], dtype=torch.float64)
        >>> curvature.work
        Work(gradients=1.0, products=1.0)
    """

    def __init__(
        self,
        objective: Objective,
        theta: Float[Tensor, " params"],
        *,
        block: Sequence[str] | None = None,
        tape_bytes: int = TAPE_BYTES,
    ) -> None:
        leaves = objective.leaves(one_point(objective, theta))
        names = objective.space.names if block is None else tuple(block)
        for name in names:
            objective.space.slice_of(name)
        self.objective = objective
        self.theta = theta.detach().to(device=objective.device, dtype=objective.dtype)
        self.space = Space(names, tuple(tuple(leaves[n].shape) for n in names))
        self.work = Work()
        self._tape_bytes = tape_bytes
        self._leaves = {n: leaves[n] for n in names}
        self._point = {n: leaf if n in self._leaves else leaf.detach() for n, leaf in leaves.items()}
        self._tapes: list[Tape] = []
        self._rest: _Rest | None = None
        self._summary: _Summary | None = None

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.space.num_params

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the vectors."""
        return self.objective.dtype

    @property
    def device(self) -> torch.device:
        """Where the vectors live."""
        return self.objective.device

    @property
    def value(self) -> float:
        """R(theta), a by-product of recording."""
        return self._recorded().value

    @property
    def gradient(self) -> Float[Tensor, " params"]:
        """∇R(theta) in the block, a by-product of recording."""
        return self._recorded().gradient

    def product(self, vector: Float[Tensor, " params"]) -> Float[Tensor, " params"]:
        """Multiply with a vector.

        Raises:
            ShapeError: the vector is not `size` long.
            NumericalError: the product is not finite.
            DataError: a loader gave other data than on the first pass.
        """
        return self.products(vector.unsqueeze(0))[0]

    def products(self, vectors: Float[Tensor, "vectors params"]) -> Float[Tensor, "vectors params"]:
        """Multiply with several vectors, one per row; at once where the network is small, else one by one.

        Raises:
            ShapeError: the vectors are not `size` long.
            NumericalError: a product is not finite.
            DataError: a loader gave other data than on the first pass.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.size:
            raise ShapeError(
                f"Expected vectors of {self.size} entries. Got shape {tuple(vectors.shape)}. "
                "Give one row for each vector, in the order of the space."
            )
        weights = self._recorded().weights
        parts = self.space.parameters(vectors.detach().to(device=self.device, dtype=self.dtype))
        totals = [torch.zeros_like(part, memory_format=torch.contiguous_format) for part in parts.values()]
        for tape in self._tapes:
            tape.add_products(parts, totals)
        if self._rest is not None:
            weights = self._recompute(self._rest, parts, totals) or weights
        self.work = self.work.plus(Work(products=float(len(vectors))))
        found = torch.cat([total.reshape(len(vectors), -1) for total in totals], 1).div_(weights)
        if not math.isfinite(float(found.sum())):
            raise NumericalError(
                "Expected finite Hessian products. Got NaN or infinity. Check that the loss is finite and can be "
                "differentiated twice at this theta."
            )
        return found

    def sampled(self, count: int, seed: int = 0) -> "HessianOperator":
        """Give the Hessian on a fixed random sample of the data.

        Raises:
            DataError: there are fewer samples, or the batches cannot be cut.
        """
        sample = self.objective.sample(count, seed)
        return HessianOperator(sample, self.theta, block=self.space.names, tape_bytes=self._tape_bytes)

    def to_scipy(self) -> "LinearOperator":
        """Give the same map as a SciPy `LinearOperator` on NumPy vectors, e.g. for `scipy.sparse.linalg.eigsh`."""
        return to_scipy(self)

    def _recorded(self) -> "_Summary":
        if self._summary is None:
            self._summary = self._record()
        return self._summary

    def _record(self) -> "_Summary":
        """Take one pass over the data: R and ∇R, and the tapes that fit."""
        with plain_kernels():
            pieces, sizes = in_pieces(self.objective, self.theta, self._leaves, self._tape_bytes)
            totals = [torch.zeros_like(leaf) for leaf in self._leaves.values()]
            value = weights = kept_bytes = 0.0
            is_kept = True
            for weight, batch in pieces.weighted_batches():
                tape = record(pieces, self._point, self._leaves, weight, batch, sizes.of(batch))
                tape.add_gradient(totals)
                value, weights = value + weight * tape.loss, weights + weight
                kept_bytes += tape.num_bytes
                is_kept = is_kept and kept_bytes <= self._tape_bytes
                if is_kept:
                    self._tapes.append(tape)
        if not is_kept:
            if not pieces.in_memory:  # a loader may give its batches in another order
                self._tapes = []
            self._rest = _Rest(pieces, len(self._tapes), sizes, value / weights)
        self.work = self.work.plus(Work(gradients=1.0))
        weights = 1.0 if pieces.reduction == "sum" else weights
        gradient = torch.cat([total.reshape(-1) for total in totals]).div_(weights)
        return _Summary(value / weights, gradient, weights)

    def _recompute(self, rest: "_Rest", parts: dict[str, Tensor], totals: list[Tensor]) -> float | None:
        """Add what is on no tape; give the total weight if that is everything, as this pass has it."""
        value = weights = 0.0
        num_pieces = 0
        with plain_kernels():
            for place, (weight, batch) in enumerate(rest.pieces.weighted_batches()):
                num_pieces += 1
                if place >= rest.skipped:
                    tape = record(rest.pieces, self._point, self._leaves, weight, batch, rest.sizes.of(batch))
                    tape.add_products(parts, totals)
                    value, weights = value + weight * tape.loss, weights + weight
        self.work = self.work.plus(Work(gradients=1.0 - rest.skipped / num_pieces))
        if rest.skipped:
            return None
        if not math.isclose(value / weights, rest.value, rel_tol=_SAME_LOSS, abs_tol=1e-30):
            raise DataError(
                f"Expected the same data on every pass. Got a loss of {value / weights:.6g} after {rest.value:.6g}. "
                "Switch off random augmentation, or pass a fixed sample."
            )
        return 1.0 if rest.pieces.reduction == "sum" else weights


@dataclass(frozen=True)
class _Summary:
    """What the first pass over the data gave."""

    value: float
    gradient: Tensor
    weights: float


@dataclass(frozen=True)
class _Rest:
    """What is recomputed at each product: pieces after the first so many; the mean loss of all of them."""

    pieces: Objective
    skipped: int
    sizes: Any
    value: float


def one_point(objective: Objective, theta: Float[Tensor, "*points params"]) -> Float[Tensor, " params"]:
    """See that theta is one point of the objective's space.

    Raises:
        ShapeError: it is not.
    """
    if tuple(theta.shape) != (objective.num_params,):
        raise ShapeError(
            f"Expected theta of shape ({objective.num_params},). Got {tuple(theta.shape)}. "
            "Build it with Objective.theta(module)."
        )
    return theta.detach().to(device=objective.device, dtype=objective.dtype)


def layers(space: Space) -> dict[str, tuple[str, ...]]:
    """Group the parameters by the module that holds them, in the order of theta.

    Args:
        space: the coordinates.

    Returns:
        Name of a layer -> names of its parameters, each a block of `HessianOperator`.

    Example:
        >>> layers(Space.of(torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1))))
        {'0': ('0.weight', '0.bias'), '1': ('1.weight', '1.bias')}
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in space.names:
        layer = name.rpartition(".")[0] or "(module)"
        found[layer] = (*found.get(layer, ()), name)
    return found


def to_scipy(curvature: Curvature) -> "LinearOperator":
    """Give a curvature as a SciPy `LinearOperator` on NumPy vectors, e.g. for `scipy.sparse.linalg.eigsh`.

    Args:
        curvature: any.

    Returns:
        The operator, symmetric, in the dtype of the curvature.

    Example:
        >>> x = torch.ones(1, 1, dtype=torch.float64)
        >>> objective = Objective(torch.nn.Linear(1, 1, bias=False).double(), torch.nn.MSELoss(), (x, x))
        >>> to_scipy(HessianOperator(objective, objective.theta())).matvec([3.0])
        array([6.])
    """
    import numpy as np
    from scipy.sparse.linalg import LinearOperator

    def multiply(vector: Any) -> Any:
        flat = torch.as_tensor(np.ascontiguousarray(vector).reshape(-1))
        return curvature.product(flat.to(device=curvature.device, dtype=curvature.dtype)).cpu().numpy()

    dtype = torch.empty(0, dtype=curvature.dtype).numpy().dtype
    shape = (curvature.size, curvature.size)
    return LinearOperator(shape, matvec=multiply, rmatvec=multiply, dtype=dtype)
