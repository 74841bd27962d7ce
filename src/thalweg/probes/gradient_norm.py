"""gradient_norm: how far a point is from being critical."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from thalweg.objective import Objective


@dataclass(frozen=True)
class GradientNorm:
    """Norms of ∇R at a point, and R there.

    Args:
        l1: Σ|∂R/∂θ_i|, the norm in which the paper states how critical its points are.
        l2: the Euclidean norm.
        max: the largest absolute entry.
        value: R(theta).
    """

    l1: float
    l2: float
    max: float
    value: float


def gradient_norm(objective: Objective, theta: Float[Tensor, " params"]) -> GradientNorm:
    """Measure ∇R(theta) in the norms l1, l2 and max, with R(theta) from the same pass over the data.

    Args:
        objective: the landscape.
        theta: the point, shape (params,).

    Returns:
        The norms and the value, as Python floats.

    Raises:
        ShapeError: theta does not fit the module.

    **Source:** the L1 norm is that of Zhang et al. 2021 (arXiv 2105.14573), Fig. 3.

    Example:
        >>> import torch
        >>> x = torch.ones(4, 1)
        >>> objective = Objective(torch.nn.Linear(1, 1), torch.nn.MSELoss(), (x, x))
        >>> gradient_norm(objective, torch.tensor([2.0, 0.0]))
        GradientNorm(l1=4.0, l2=2.8284270763397217, max=2.0, value=1.0)
    """
    value, gradient = objective.value_and_gradient(theta)
    return GradientNorm(
        l1=float(gradient.abs().sum()),
        l2=float(gradient.norm()),
        max=float(gradient.abs().max()),
        value=float(value),
    )
