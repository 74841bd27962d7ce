"""newton: from a point of a small landscape to a minimum nearby, by second-order steps."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from thalweg.errors import ConfigError
from thalweg.objective import Objective
from thalweg.probes.hessian import hessian


@dataclass(frozen=True)
class Minimum:
    """Where a second-order descent ended.

    Args:
        theta: the best point met, float64, shape (params,).
        value: R(theta).
        gradient_l1: ‖∇R(theta)‖₁.
        steps: accepted and rejected steps.
        status: "converged" (gradient within the bound), "stalled" (steps ran out, or the model of R is no use
            any more: often a minimum at infinity), "not finite" (R or its derivatives are not).
    """

    theta: Float[Tensor, " params"]
    value: float
    gradient_l1: float
    steps: int
    status: Literal["converged", "stalled", "not finite"]


def minimise(
    objective: Objective, theta: Float[Tensor, " params"], *, gradient_l1: float = 1e-9, max_steps: int = 300
) -> Minimum:
    """Descend to a minimum by Newton's method in a trust region, in float64.

    Each step minimises the exact quadratic model of R within a ball whose radius follows how well the model
    predicted R (SciPy's "trust-exact"); it needs the dense Hessian, so up to a few thousand parameters.
    Unlike `polish` it goes downhill only: it leaves saddles and does not stop at them.

    Args:
        objective: the landscape, in any dtype; the computation is in float64.
        theta: the start, shape (params,).
        gradient_l1: stop at ‖∇R‖₁ ≤ this. Default 1e-9, chosen by us: from there `polish` takes a step or two.
        max_steps: steps before giving up. Default chosen by us: minima at a finite place take 50 to 150.

    Returns:
        The end, which is the best point met.

    Raises:
        ShapeError: theta does not fit the module.
        ConfigError: the bound or the number of steps is not positive.

    Source:
        Conn, Gould, Toint: Trust-Region Methods (2000), algorithm 7.3.4, in SciPy's implementation.

    Example:
        >>> x = torch.linspace(-1, 1, 5, dtype=torch.float64).unsqueeze(1)
        >>> net = torch.nn.Linear(1, 1).double()
        >>> end = minimise(Objective(net, torch.nn.MSELoss(), (x, 2 * x)), torch.zeros(2, dtype=torch.float64))
        >>> end.status, end.theta.round(decimals=6)
        ('converged', tensor([2., 0.], dtype=torch.float64))
    """
    if not gradient_l1 > 0 or max_steps < 1:
        raise ConfigError(
            f"Expected a positive bound and number of steps. Got {gradient_l1} and {max_steps}. Raise them."
        )
    exact = objective.in_dtype(torch.float64)
    start = theta.detach().to(exact.device, torch.float64)

    def point(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(exact.device)

    value, gradient = exact.value_and_gradient(start)
    if not bool(torch.isfinite(value) & torch.isfinite(gradient).all()):
        return Minimum(start, float(value), float(gradient.abs().sum()), 0, "not finite")
    result = minimize(
        lambda v: float(exact.value(point(v))),
        start.cpu().numpy(),
        jac=lambda v: exact.gradient(point(v)).cpu().numpy(),
        hess=lambda v: hessian(exact, point(v)).cpu().numpy(),
        method="trust-exact",
        # SciPy bounds ‖∇R‖₂, which is at least ‖∇R‖₁/√P.
        options={"gtol": gradient_l1 / max(1.0, len(start)) ** 0.5, "maxiter": max_steps},
    )
    end = point(np.asarray(result.x))
    slope = float(exact.gradient(end).abs().sum())
    status: Literal["converged", "stalled"] = "converged" if slope <= gradient_l1 else "stalled"
    return Minimum(end, float(exact.value(end)), slope, int(result.nit), status)
