"""many: dense Hessians and their signs at many points of one small landscape, in one vectorised program.

For networks of up to a few hundred parameters. One Hessian is the Jacobian of the gradient, reverse over reverse
(forward mode is wrong or raises for common losses, see `hessian.py`); points and rows are both vectorised.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.batching import Batch
from thalweg.errors import NumericalError, ShapeError
from thalweg.kernels import plain_kernels
from thalweg.objective import Objective
from thalweg.probes.degeneracy import Inertia, inertia
from thalweg.probes.hessian import _tape, hessian

# Bytes that the points of one vectorised replay may save: (points) × (rows) × (bytes on the tape of one gradient).
# Chosen by us: with 9 parameters and 50 samples, 1,500 Hessians took 0.40 s at 16 MB, 5 s at 1 MB, and 0.4 to 0.6 s
# at 64 to 256 MB (one run each on a busy machine).
_CHUNK_BYTES = 16 * 2**20


def hessians(objective: Objective, thetas: Float[Tensor, "points params"]) -> Float[Tensor, "points params params"]:
    """Assemble ∇²R at many points, each exact up to rounding and exactly symmetric.

    Args:
        objective: the landscape.
        thetas: the points, shape (points, params).

    Returns:
        The Hessians in the objective's dtype; a Hessian that is not finite stays so.

    Raises:
        ShapeError: the points do not fit the module.

    **Source:** ours; `hessian` point by point is what it is tested against.

    Example:
        >>> x = torch.linspace(-1, 1, 3, dtype=torch.float64).unsqueeze(1)
        >>> objective = Objective(torch.nn.Linear(1, 1).double(), torch.nn.MSELoss(), (x, x))
        >>> hessians(objective, torch.zeros(4, 2, dtype=torch.float64)).shape
        torch.Size([4, 2, 2])
    """
    if thetas.shape[-1] != objective.num_params:
        raise ShapeError(
            f"Expected points of shape (points, {objective.num_params}). Got {tuple(thetas.shape)}. "
            "Build them with Objective.theta(module)."
        )
    thetas = thetas.detach().to(device=objective.device, dtype=objective.dtype)
    count = thetas.shape[1]
    total, weights = thetas.new_zeros(len(thetas), count, count), 0.0
    if not len(thetas):
        return total
    with plain_kernels():
        for weight, batch in objective.weighted_batches():
            total += weight * _of_batch(objective, thetas, batch)
            weights += weight
    if objective.reduction != "sum":
        total /= weights
    return (total + total.mT) / 2


def _of_batch(objective: Objective, thetas: Tensor, batch: Batch) -> Tensor:
    """Hessians of one batch's loss; point by point where functorch cannot trace the module."""
    saved_bytes = _tape(objective, thetas[0], batch)[2]
    points = int(max(1, _CHUNK_BYTES // max(saved_bytes * thetas.shape[1], 1)))

    def slope(point: Tensor) -> Tensor:
        gradient: Tensor = torch.func.grad(lambda theta: objective.batch_loss(theta, *batch))(point)
        return gradient

    try:
        vectorised = torch.func.vmap(torch.func.jacrev(slope), chunk_size=points)
        found: Tensor = vectorised(thetas).detach()
    except RuntimeError:  # data-dependent control flow, or an operation without a batching rule
        found = torch.stack([_alone(objective, theta, batch) for theta in thetas])
    return found


def _alone(objective: Objective, theta: Tensor, batch: Batch) -> Tensor:
    """The Hessian of one batch's loss at one point; NaN where it is not finite."""
    twin = Objective(objective.module, objective.loss, [batch], reduction=objective.reduction, mode=objective.mode)
    try:
        return hessian(twin, theta, "blockwise")
    except NumericalError:
        return theta.new_full((len(theta), len(theta)), float("nan"))


def inertias(
    objective: Objective, thetas: Float[Tensor, "points params"], threshold: float | None = None
) -> tuple[Inertia, ...]:
    """Count the negative, zero and positive eigenvalues of ∇²R at many points.

    Args:
        objective: the landscape.
        thetas: the points, shape (points, params).
        threshold: an eigenvalue within ± this is zero. Default: rounding noise at each point, see `inertia`.

    Returns:
        One `Inertia` for each point.

    Raises:
        ShapeError: the points do not fit the module.
        NumericalError: a Hessian is not finite.

    **Source:** Zhang et al. 2021 (arXiv 2105.14573), Fig. 4: the zeros of a critical point are its degeneracy.

    Example:
        >>> x = torch.linspace(-1, 1, 3, dtype=torch.float64).unsqueeze(1)
        >>> objective = Objective(torch.nn.Linear(1, 1).double(), torch.nn.MSELoss(), (x, x))
        >>> [signs.positive for signs in inertias(objective, torch.zeros(2, 2, dtype=torch.float64))]
        [2, 2]
    """
    matrices = hessians(objective, thetas)
    if not bool(torch.isfinite(matrices).all()):
        raise NumericalError("Expected finite Hessians. Got NaN or infinity. Check that the loss is finite there.")
    return tuple(inertia(values, threshold) for values in torch.linalg.eigvalsh(matrices))
