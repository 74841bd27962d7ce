"""critical: from a recorded training to exact critical points: find the plateaux, then polish their best points."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.errors import ConfigError, NumericalError
from thalweg.objective import Objective
from thalweg.probes.degeneracy import inertia
from thalweg.probes.hessian import hessian
from thalweg.probes.spectrum import eigen
from thalweg.training.single import TrainingRun

# Damping in units of λ_max²: start, factor after a good step, factor after a bad one, and the bound beyond
# which no step helps. Chosen by us: the start moves only along the steep directions, so that a point far
# from critical does not jump along the flat ones; twelve good steps later the step is Newton's for
# eigenvalues down to 1e-8·λ_max.
_START, _BETTER, _WORSE, _HOPELESS = 1e-4, 0.1, 4.0, 1e8
# Least damping: that of eigenvalues at rounding noise, (eps·λ_max)².
_LEAST = 1e-32


@dataclass(frozen=True)
class CriticalPoint:
    """A point before and after polishing.

    Args:
        theta: the polished point, float64, shape (params,): the best one met.
        raw_theta: the point that was given, float64.
        value: R(theta).
        gradient_l1: ‖∇R(theta)‖₁.
        raw_gradient_l1: ‖∇R‖₁ at the given point; NaN or infinite only if status is "not finite".
        distance: ‖theta - raw_theta‖₂.
        steps: accepted steps.
        status: "converged" (gradient_l1 within the bound), "stalled" (no step lowers it, or steps ran out),
            "not finite" (R, its gradient or its Hessian at the given point is not).
    """

    theta: Float[Tensor, " params"]
    raw_theta: Float[Tensor, " params"]
    value: float
    gradient_l1: float
    raw_gradient_l1: float
    distance: float
    steps: int
    status: Literal["converged", "stalled", "not finite"]


@dataclass(frozen=True)
class Plateau:
    """A stretch of a training along which the loss barely moves.

    Args:
        start: first recorded step of the stretch.
        stop: last recorded step of the stretch.
        level: median of the recorded losses in it.
        step: the step, among those whose theta was kept, of least ‖∇R‖₁.
        loss: R there.
        gradient_l1: ‖∇R‖₁ there.
        theta: the point there, shape (params,).
    """

    start: int
    stop: int
    level: float
    step: int
    loss: float
    gradient_l1: float
    theta: Float[Tensor, " params"]


def polish(
    objective: Objective, theta: Float[Tensor, " params"], *, gradient_l1: float = 1e-12, max_steps: int = 200
) -> CriticalPoint:
    """Bring a point to a critical point nearby, a saddle or a degenerate one included, in float64.

    Levenberg–Marquardt on ‖∇R‖²: with H = Σ λ_i v_i v_iᵀ, the step is d = -Σ λ_i/(λ_i² + μ)·(v_i·∇R) v_i over
    the eigenvalues that are not zero within rounding. It is a step of descent for ‖∇R‖² whatever the signs
    of the λ_i, leaves the null space of a degenerate point alone, and is Newton's as μ → 0. Only steps that
    lower ‖∇R‖₂ are taken.

    Args:
        objective: the landscape, in any dtype; the computation is in float64.
        theta: the point, shape (params,).
        gradient_l1: stop at ‖∇R‖₁ ≤ this. Default 1e-12: above the rounding noise of small networks in
            float64 (the paper's own points have 7.15e-15 and 3.72e-13).
        max_steps: accepted steps before giving up. Chosen by us; points of a plateau take 10 to 30.

    Returns:
        The best point met beside the raw one.

    Raises:
        ShapeError: theta does not fit the module.
        ConfigError: the bound or the number of steps is negative, or the bound is NaN.

    **Source:** the empirical critical points of Zhang et al. 2021 (arXiv 2105.14573), Fig. 3, are met by
    training alone; the polish is ours.

    Example:
        >>> x = torch.linspace(-1, 1, 3, dtype=torch.float64).unsqueeze(1)
        >>> objective = Objective(torch.nn.Linear(1, 1), torch.nn.MSELoss(), (x, 2 * x))
        >>> polish(objective, torch.zeros(2)).theta.round(decimals=6)
        tensor([2., 0.], dtype=torch.float64)
    """
    if not gradient_l1 >= 0 or max_steps < 0:
        raise ConfigError(
            f"Expected a bound and a number of steps of at least 0. Got {gradient_l1} and {max_steps}. Raise them."
        )
    if objective.dtype != torch.float64:
        objective = objective.in_dtype(torch.float64)
    raw = theta.detach().to(device=objective.device, dtype=torch.float64)
    value, gradient = objective.value_and_gradient(raw)
    raw_l1 = float(gradient.abs().sum())
    best, best_value, best_l1, steps = raw, float(value), raw_l1, 0
    finite = math.isfinite(best_value) and math.isfinite(raw_l1)
    if finite and raw_l1 > gradient_l1 and max_steps:
        try:
            for point, risk, slope in _descend(objective, raw, gradient):
                l1 = float(slope.abs().sum())
                steps += 1
                if l1 < best_l1:
                    best, best_value, best_l1 = point, float(risk), l1
                if best_l1 <= gradient_l1 or steps >= max_steps:
                    break
        except NumericalError:
            finite = steps > 0
    done: Literal["converged", "stalled"] = "converged" if best_l1 <= gradient_l1 else "stalled"
    distance = float((best - raw).norm())
    return CriticalPoint(best, raw, best_value, best_l1, raw_l1, distance, steps, done if finite else "not finite")


def _descend(objective: Objective, point: Tensor, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (point, R, ∇R) of ever smaller ‖∇R‖₂; end when no step lowers it."""
    damping = _START
    while True:
        values, vectors = eigen(hessian(objective, point), vectors=True)
        assert vectors is not None  # noqa: S101 - our own contract: asked for
        steepest = float(values.abs().max())
        kept = values.abs() > inertia(values).threshold
        values, vectors = values[kept], vectors[:, kept]
        along = vectors.T @ gradient
        while damping < _HOPELESS and len(values):
            step = vectors @ (values * along / (values.square() + damping * steepest**2))
            trial = point - step
            value, slope = objective.value_and_gradient(trial)
            if bool(slope.norm() < gradient.norm()) and bool(torch.isfinite(value)):
                break
            damping *= _WORSE
        else:
            return
        yield trial, value, slope
        point, gradient = trial, slope
        damping = max(damping * _BETTER, _LEAST)


def stagnation(run: TrainingRun, *, max_slope: float = 0.1, min_ratio: float = 1.2) -> tuple[Plateau, ...]:
    """Find the plateaux of a run and the point of least gradient in each.

    A plateau is a maximal stretch of records between all neighbours of which |Δ log R| ≤ max_slope·Δ
    log(step + 1), and whose last step + 1 is at least min_ratio times its first step + 1. Two stretches are
    one if the same bound holds across the gap (a spike of the optimizer does not end a plateau). Both
    conditions are free of scale: neither the unit of the loss nor that of time (the learning rate) enters.

    Args:
        run: a recorded training; `record="log"` suits.
        max_slope: largest exponent p of a loss that falls as step^-p and still counts as stagnant. Default
            0.1, a fall by a fifth in a decade of steps; on the width-1 plateau of the paper's Fig. 1 the
            exponent is 0.014.
        min_ratio: shortest plateau. Default 1.2; the shortest that the paper shows (Fig. 5, steps 4142 to
            5203) has 1.26.

    Returns:
        The plateaux in the order of time, possibly none. One none of whose thetas was kept in memory is left
        out.

    Raises:
        ConfigError: max_slope is negative or min_ratio below 1.

    **Source:** the point of least L1 gradient norm represents a plateau as in Zhang et al. 2021 (arXiv
    2105.14573), Sec. 5; the definition of a plateau is ours (the paper picks by eye).

    Example:
        >>> x = torch.linspace(-1, 1, 5).unsqueeze(1)
        >>> objective = Objective(torch.nn.Linear(1, 1), torch.nn.MSELoss(), (x, x**2))
        >>> from thalweg.training.single import train
        >>> run = train(objective, torch.zeros(2), learning_rate=0.2, steps=100, optimizer="gd")
        >>> [round(plateau.level, 3) for plateau in stagnation(run)]
        [0.175]
    """
    if max_slope < 0 or min_ratio < 1:
        raise ConfigError(
            f"Expected max_slope ≥ 0 and min_ratio ≥ 1. Got {max_slope} and {min_ratio}. Use the defaults."
        )
    times = torch.log(run.steps.double() + 1).tolist()
    levels = torch.log(run.losses.clamp_min(torch.finfo(torch.float64).tiny)).tolist()
    plateaux = []
    for first, last in _stretches(times, levels, max_slope):
        if times[last] - times[first] < math.log(min_ratio):
            continue
        plateau = _plateau(run, first, last)
        if plateau is not None:
            plateaux.append(plateau)
    return tuple(plateaux)


def _stretches(times: Sequence[float], levels: Sequence[float], max_slope: float) -> list[tuple[int, int]]:
    """Index pairs (first, last) of the maximal stagnant stretches, gaps at the same level closed."""

    def flat(a: int, b: int) -> bool:
        return abs(levels[b] - levels[a]) <= max_slope * (times[b] - times[a])

    stretches: list[tuple[int, int]] = []
    for index in range(1, len(times)):
        if not flat(index - 1, index):
            continue
        if stretches and (stretches[-1][1] == index - 1 or flat(stretches[-1][1], index - 1)):
            stretches[-1] = (stretches[-1][0], index)
        else:
            stretches.append((index - 1, index))
    return stretches


def _plateau(run: TrainingRun, first: int, last: int) -> Plateau | None:
    start, stop = int(run.steps[first]), int(run.steps[last])
    kept = torch.nonzero((run.theta_steps >= start) & (run.theta_steps <= stop)).flatten()
    if not len(kept):
        return None
    records = torch.searchsorted(run.steps, run.theta_steps[kept])
    least = int(run.gradient_l1[records].argmin())
    record = int(records[least])
    return Plateau(
        start=start,
        stop=stop,
        level=float(run.losses[first : last + 1].median()),
        step=int(run.steps[record]),
        loss=float(run.losses[record]),
        gradient_l1=float(run.gradient_l1[record]),
        theta=run.thetas[int(kept[least])],
    )
