"""polishing: bring many points to critical points at once, each by the steps that `polish` would take.

One program: a vectorised Hessian for the points that have moved, a batched eigenvalue solver, and one trial step
for every point per round, with a damping of its own. A point leaves when it has converged or no step helps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thalweg.errors import ConfigError, ShapeError
from thalweg.objective import Objective
from thalweg.probes.many import hessians
from thalweg.training.critical import _BETTER, _HOPELESS, _LEAST, _START, _WORSE

# Dampings that are tried at once where the first step did not help. Chosen by us: the hopeless ones are reached in
# three rounds, and a round costs the same for few points and for a few times as many.
_TRIES = 8

Status = Literal["converged", "stalled", "not finite"]


@dataclass(frozen=True)
class CriticalPoints:
    """Points before and after polishing, one per row; see `CriticalPoint` for one of them.

    Args:
        thetas: the polished points, float64, shape (points, params): the best ones met.
        raw_thetas: the points that were given, float64.
        values: R at the polished points.
        raw_values: R at the given points; NaN or infinite only where status is "not finite".
        gradient_l1: ‖∇R‖₁ at the polished points.
        raw_gradient_l1: ‖∇R‖₁ at the given points.
        distances: ‖theta - raw_theta‖₂.
        steps: accepted steps.
        status: "converged", "stalled" or "not finite", for each point.
    """

    thetas: Float[Tensor, "points params"]
    raw_thetas: Float[Tensor, "points params"]
    values: Float[Tensor, " points"]
    raw_values: Float[Tensor, " points"]
    gradient_l1: Float[Tensor, " points"]
    raw_gradient_l1: Float[Tensor, " points"]
    distances: Float[Tensor, " points"]
    steps: Int[Tensor, " points"]
    status: tuple[Status, ...]

    def __len__(self) -> int:
        return len(self.status)

    @property
    def is_converged(self) -> Tensor:
        """Whether each point is critical within the bound; shape (points,)."""
        return torch.tensor([s == "converged" for s in self.status], dtype=torch.bool)

    def select(self, points: Sequence[int] | Tensor) -> "CriticalPoints":
        """Keep some of the points, by number or by a mask.

        Args:
            points: numbers, or a boolean for each point.
        """
        index = torch.as_tensor(points)
        index = torch.nonzero(index).flatten() if index.dtype == torch.bool else index.long()
        names = ("thetas", "raw_thetas", "values", "raw_values", "gradient_l1", "raw_gradient_l1", "distances")
        kept = {name: getattr(self, name)[index] for name in (*names, "steps")}
        return CriticalPoints(**kept, status=tuple(self.status[i] for i in index.tolist()))


def polish_all(
    objective: Objective,
    thetas: Float[Tensor, "points params"],
    *,
    gradient_l1: float = 1e-12,
    max_steps: int = 200,
) -> CriticalPoints:
    """Bring many points to critical points nearby, saddles and degenerate ones included, in float64.

    The Levenberg–Marquardt method of `polish`, all points in one program: point by point the steps are the same,
    up to rounding. Meant for networks of up to a few hundred parameters.

    Args:
        objective: the landscape, in any dtype; the computation is in float64.
        thetas: the points, shape (points, params).
        gradient_l1: stop a point at ‖∇R‖₁ ≤ this. Default as in `polish`.
        max_steps: accepted steps of a point before giving it up. Default as in `polish`.

    Returns:
        The best points met beside the raw ones.

    Raises:
        ShapeError: the points do not fit the module, or are no rows of a matrix.
        ConfigError: the bound or the number of steps is negative, or the bound is NaN.

    **Source:** as `polish`: the empirical critical points of Zhang et al. 2021 (arXiv 2105.14573), Fig. 4, are met
    by training alone; the polish is ours.

    Example:
        >>> x = torch.linspace(-1, 1, 3, dtype=torch.float64).unsqueeze(1)
        >>> objective = Objective(torch.nn.Linear(1, 1), torch.nn.MSELoss(), (x, 2 * x))
        >>> polish_all(objective, torch.randn(5, 2)).status.count("converged")
        5
    """
    if not gradient_l1 >= 0 or max_steps < 0:
        raise ConfigError(
            f"Expected a bound and a number of steps of at least 0. Got {gradient_l1} and {max_steps}. Raise them."
        )
    if thetas.ndim != 2 or thetas.shape[1] != objective.num_params:
        raise ShapeError(
            f"Expected points of shape (points, {objective.num_params}). Got {tuple(thetas.shape)}. "
            "Build them with Objective.theta(module)."
        )
    if objective.dtype != torch.float64:
        objective = objective.in_dtype(torch.float64)
    raw = thetas.detach().to(device=objective.device, dtype=torch.float64)
    if not len(raw):
        none = raw.new_zeros(0)
        return CriticalPoints(raw, raw, none, none, none, none, none, none.long(), ())
    climb = _Descent(objective, raw)
    climb.run(gradient_l1, max_steps)
    done = climb.best_l1 <= gradient_l1
    status: list[Status] = ["converged" if ok else "stalled" for ok in done.tolist()]
    for point in torch.nonzero(~climb.finite).flatten().tolist():
        status[point] = "not finite"
    return CriticalPoints(
        thetas=climb.best,
        raw_thetas=raw,
        values=climb.best_values,
        raw_values=climb.raw_values,
        gradient_l1=climb.best_l1,
        raw_gradient_l1=climb.raw_l1,
        distances=(climb.best - raw).norm(dim=1),
        steps=climb.steps,
        status=tuple(status),
    )


@dataclass
class _Descent:
    """The state of all points: where they stand, their damping, their last eigenpairs, and the best they met."""

    objective: Objective
    points: Tensor
    values: Tensor = field(init=False)
    vectors: Tensor = field(init=False)

    def __post_init__(self) -> None:
        raw, count = self.points, self.points.shape[1]
        self.raw_values, self.gradients = self.objective.value_and_gradient(raw)
        self.raw_l1 = self.gradients.abs().sum(1)
        self.best, self.best_values, self.best_l1 = raw.clone(), self.raw_values.clone(), self.raw_l1.clone()
        self.points = raw.clone()
        self.damping = torch.full_like(self.raw_l1, _START)
        self.steps = torch.zeros(len(raw), dtype=torch.long, device=raw.device)
        self.finite = torch.isfinite(self.raw_values) & torch.isfinite(self.raw_l1)
        self.values, self.vectors = raw.new_zeros(len(raw), count), raw.new_zeros(len(raw), count, count)

    def run(self, gradient_l1: float, max_steps: int) -> None:
        """Advance until no point is active: one step of every point per round."""
        going = self.finite & (self.raw_l1 > gradient_l1) & (self.steps < max_steps)
        while bool(going.any()):
            able = self._refresh(torch.nonzero(going).flatten())
            going = torch.zeros_like(going)
            going[self._step(able)] = True
            going &= (self.best_l1 > gradient_l1) & (self.steps < max_steps)

    def _refresh(self, index: Tensor) -> Tensor:
        """Take the eigenpairs where points stand; give the points that can still move."""
        matrices = hessians(self.objective, self.points[index])
        sound = torch.isfinite(matrices).flatten(1).all(1)
        self.finite[index[~sound]] = self.steps[index[~sound]] > 0
        index = index[sound]
        values, self.vectors[index] = torch.linalg.eigh(matrices[sound])
        # Eigenvalues within rounding of zero, by the rule of `inertia`, are set to zero: no step along them.
        noise = values.shape[1] * torch.finfo(values.dtype).eps * values.abs().amax(1, keepdim=True)
        self.values[index] = torch.where(values.abs() > noise, values, 0.0)
        return index[self.values[index].any(1)]

    def _step(self, index: Tensor) -> Tensor:
        """Move each point by the least damped step that lowers ‖∇R‖₂; give the points that have one."""
        moved, tries = [], 1
        while len(index):
            better = self._try(index, tries)
            moved.append(index[better])
            index = index[~better]
            index = index[self.damping[index] < _HOPELESS]
            tries = _TRIES
        return torch.cat(moved).sort().values if moved else index

    def _try(self, index: Tensor, tries: int) -> Tensor:
        """Try a few dampings of each point at once, and move it by the first that helps; say which points moved."""
        ladder = self.damping[index, None] * _WORSE ** torch.arange(tries).to(self.damping)
        values, vectors, slopes = self.values[index], self.vectors[index], self.gradients[index]
        steepest = values.abs().amax(1)[:, None, None].square()
        along = (vectors.mT @ slopes.unsqueeze(2)).mT
        weights = values.unsqueeze(1) / (values.unsqueeze(1).square() + ladder.unsqueeze(2) * steepest)
        trials = (
            self.points[index].unsqueeze(1) - torch.where(values.unsqueeze(1) != 0, weights, 0.0) * along @ vectors.mT
        )
        risks, steeps = self.objective.value_and_gradient(trials.flatten(0, 1))
        risks, steeps = risks.view(len(index), tries), steeps.view(trials.shape)
        helps = (steeps.norm(dim=2) < slopes.norm(dim=1, keepdim=True)) & torch.isfinite(risks) & (ladder < _HOPELESS)
        better: Tensor = helps.any(1)
        first = helps.long().argmax(1)
        self.damping[index[~better]] = ladder[~better, -1] * _WORSE
        row = torch.arange(len(index), device=index.device)[better]
        self._move(index[better], trials[row, first[row]], risks[row, first[row]], steeps[row, first[row]])
        self.damping[index[better]] = (ladder[row, first[row]] * _BETTER).clamp_min(_LEAST)
        return better

    def _move(self, index: Tensor, points: Tensor, values: Tensor, gradients: Tensor) -> None:
        """Put points where a step leads, and keep the best of each."""
        self.points[index], self.gradients[index] = points, gradients
        self.steps[index] += 1
        l1 = gradients.abs().sum(1)
        closer = l1 < self.best_l1[index]
        kept = index[closer]
        self.best[kept], self.best_values[kept], self.best_l1[kept] = points[closer], values[closer], l1[closer]
