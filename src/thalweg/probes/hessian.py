"""hessian: the dense matrix of second derivatives at a point.

Two methods. *Structured* (`two_layer.py`) is the closed form of a two-layer network, computed in float64 and
checked there at every call against Hessian–vector products, entry by entry and up to rounding. *Blockwise*
serves any module: one tape of the gradient per batch, replayed for blocks of unit vectors (`torch.func.vjp`
of `torch.func.grad`, the replay vectorised). It needs no forward-mode derivative (that of `nn.MSELoss`
raises, pytorch#123996), and a module that functorch cannot trace falls back to a plain tape. Speed and memory
against torch and curvlinops: `benchmarks/hessian.py`; against `jacrev(jacrev)` it was faster at 529
parameters, while at 2,913 parameters runs disagree.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.batching import Batch
from thalweg.errors import NumericalError, StructureError
from thalweg.kernels import plain_kernels
from thalweg.objective import Objective
from thalweg.probes.two_layer import is_two_layer, two_layer_hessian

Method = Literal["auto", "structured", "blockwise"]

# Bytes of one vectorised replay: (rows of the block) × (bytes saved on the tape). Chosen by us: at 2,913
# parameters and 1,000 samples, blocks of 16 to 32 rows took 1.5 s, of 128 rows 3.4 s. Single arrays above 32
# MB are returned to the system after every operation, and fetching their pages again dominates.
_REPLAY_BYTES = 32 * 2**20
_MAX_ROWS = 128
# The check of the closed form (`_excess`). Chosen by us: over 1,260 two-layer networks (six activations; inputs
# spread over eight decades, zero and copied units) the excess was at most 0.06; a term 1e-6·(mean of o)² that
# couples samples, against a mean squared error, has 1e5, softmax units 1e11.
_NUM_PROBES = 2
_ROUNDING = 300.0
_CANCELLATION = 10.0
# Rows of |H| held at once: a slab of 3 MB at 2,913 parameters, which the allocator recycles.
_ROWS_PER_SLAB = 128


def hessian(
    objective: Objective, theta: Float[Tensor, " params"], method: Method = "auto"
) -> Float[Tensor, "params params"]:
    """Assemble ∇²R(theta), exact up to rounding and exactly symmetric.

    Args:
        objective: the landscape.
        theta: the point, shape (params,).
        method: "structured" uses the closed form of a two-layer network, "blockwise" works for any module,
            "auto" takes the first where it applies and agrees with Hessian–vector products, else the second.

    Returns:
        The Hessian, shape (params, params), in the objective's dtype; 8·params² bytes in float64.

    Raises:
        ShapeError: theta does not fit the module.
        StructureError: method is "structured" and the module is no two-layer network with a loss per sample.
        NumericalError: the Hessian is not finite.

    Example:
        >>> x = torch.linspace(-1, 1, 3, dtype=torch.float64).unsqueeze(1)
        >>> objective = Objective(torch.nn.Linear(1, 1).double(), torch.nn.MSELoss(), (x, x))
        >>> hessian(objective, torch.zeros(2, dtype=torch.float64)).round(decimals=6)
        tensor([[1.3333, 0.0000],
                [0.0000, 2.0000]], dtype=torch.float64)
    """
    objective.space.parameters(theta)
    theta = theta.detach().to(device=objective.device, dtype=objective.dtype)
    matrix = None
    if method == "structured" or (method == "auto" and is_two_layer(objective)):
        matrix = _checked_structured(objective, theta, required=method == "structured")
    if matrix is None:
        matrix = _blockwise(objective, theta)
    if not math.isfinite(_largest(matrix)):
        raise NumericalError(
            "Expected a finite Hessian. Got NaN or infinity. Check that the loss is finite at this theta."
        )
    return matrix


def _checked_structured(objective: Objective, theta: Tensor, *, required: bool) -> Tensor | None:
    """Give the closed form if it reproduces H·v in float64, None (or an error if required) otherwise."""
    try:
        exact = objective if objective.dtype == torch.float64 else objective.in_dtype(torch.float64)
        theta = theta.to(exact.dtype)
        matrix = two_layer_hessian(exact, theta)
        excess = _excess(matrix, exact, theta)
    except StructureError:
        if required:
            raise
        return None
    except (RuntimeError, TypeError) as error:  # the module or the device insists on another type
        if required:
            raise StructureError(
                f"Expected a module that runs in float64. Got {str(error).partition(chr(10))[0]} "
                "Use method='blockwise'."
            ) from error
        return None
    if excess <= 1.0:
        return matrix.to(objective.dtype)
    if required:
        raise StructureError(
            "Expected an elementwise activation and a loss that is a sum over samples. Got a matrix whose product "
            f"with a vector is wrong by {excess:.1e} times what rounding explains. Use method='blockwise'."
        )
    return None


def _excess(matrix: Tensor, objective: Objective, theta: Tensor) -> float:
    """How far H·v is from a Hessian–vector product, in units of rounding: the largest entry; NaN if any is.

    Rounding of entry i is bounded by _ROUNDING·eps·Σ_j|H_ij||v_j|. Where H_ij itself is the rest of a
    cancellation over samples (a unit that is read with weight 0), that sum knows nothing of the terms, and
    the bound is _CANCELLATION·eps·max|H|·‖v‖₁ instead.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(_NUM_PROBES, len(theta), generator=generator, dtype=theta.dtype).to(theta.device)
    sizes = vectors.abs()
    spread = torch.cat([sizes @ rows.abs().T for rows in torch.split(matrix, _ROWS_PER_SLAB)], 1)  # H is symmetric
    floor = _CANCELLATION * _largest(matrix) * sizes.sum(1, keepdim=True)
    bound = torch.finfo(theta.dtype).eps * (_ROUNDING * spread + floor)
    difference = (vectors @ matrix - objective.hvp_block(theta, vectors)).abs()
    return float(torch.where(difference == 0, difference, difference / bound).max())


def _largest(matrix: Tensor) -> float:
    """max|H_ij| without a second matrix; NaN if any entry is."""
    low, high = (float(bound) for bound in torch.aminmax(matrix))
    return max(-low, high)


def _blockwise(objective: Objective, theta: Tensor) -> Tensor:
    total, weights = theta.new_zeros(len(theta), len(theta)), 0.0
    for weight, batch in objective.weighted_batches():
        _add_batch(total, weight, objective, theta, batch)
        weights += weight
    if objective.reduction != "sum":
        total.div_(weights)
    return (total + total.T).div_(2)


def _add_batch(total: Tensor, weight: float, objective: Objective, theta: Tensor, batch: Batch) -> None:
    with plain_kernels():
        slope, point, saved_bytes = _tape(objective, theta, batch)
        if not slope.requires_grad:  # the loss is affine in theta
            return
        rows = int(min(_MAX_ROWS, max(1, _REPLAY_BYTES // max(saved_bytes, 1))))
        for replay in (_traced(objective, theta, batch), _taped(slope, point, batched=True)):
            try:
                products = replay(_units(theta, 0, rows))
            except RuntimeError:  # data-dependent control flow, or an operation without a batching rule
                continue
            break
        else:
            replay = _taped(slope, point, batched=False)
            products = replay(_units(theta, 0, rows))
        total[:rows].add_(products, alpha=weight)
        for start in range(rows, len(theta), rows):
            total[start : start + rows].add_(replay(_units(theta, start, rows)), alpha=weight)


def _units(theta: Tensor, start: int, rows: int) -> Tensor:
    """The unit vectors start … start+rows-1, one per row."""
    count = min(rows, len(theta) - start)
    units = theta.new_zeros(count, len(theta))
    units[:, start:].fill_diagonal_(1.0)
    return units


def _tape(objective: Objective, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor, int]:
    """Record the gradient of one batch with its graph; count the bytes that the graph keeps."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    point = theta.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        slope = objective.batch_loss(point, *batch)
        if slope.requires_grad:
            (slope,) = torch.autograd.grad(slope, point, create_graph=True)
    return slope, point, sum(sizes.values())


def _traced(objective: Objective, theta: Tensor, batch: Batch) -> Callable[[Tensor], Tensor]:
    """Replay through functorch, traced on first use."""
    pulls: list[Callable[[Tensor], tuple[Tensor]]] = []

    def batch_loss(point: Tensor) -> Tensor:
        return objective.batch_loss(point, *batch)

    def replay(rows: Tensor) -> Tensor:
        if not pulls:
            pulls.append(torch.func.vjp(torch.func.grad(batch_loss), theta)[1])
        products: Tensor = torch.func.vmap(lambda row: pulls[0](row)[0])(rows)
        return products

    return replay


def _taped(slope: Tensor, point: Tensor, *, batched: bool) -> Callable[[Tensor], Tensor]:
    """Replay the recorded gradient, all rows at once or row by row."""

    def product(row: Tensor, *, batched: bool) -> Tensor:
        return torch.autograd.grad(
            slope, point, row, retain_graph=True, materialize_grads=True, is_grads_batched=batched
        )[0]

    def replay(rows: Tensor) -> Tensor:
        if batched:
            return product(rows, batched=True)
        return torch.stack([product(row, batched=False) for row in rows])

    return replay
