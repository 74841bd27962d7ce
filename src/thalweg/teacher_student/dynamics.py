"""The dynamics of theorems 4 and 5, step by step, with the rates at which they contract."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.errors import ConfigError, NumericalError, ShapeError
from thalweg.teacher_student.gaussian import angles_between
from thalweg.teacher_student.overlaps import Overlaps

_FLOOR = 1e-12  # below, sines and norms near 1 are rounding


@dataclass(frozen=True)
class Course:
    """A course of nodes towards their teachers.

    Args:
        steps: at which it was recorded, 0 first.
        angles: θ_j(t) between w_j and w*_j, of the nodes that have a teacher.
        weights: the last W, one node a row.
        fan_out_errors: ‖v_j - v*_j‖ of these nodes; None where there is no upper layer.
        fan_out_norms: ‖v_j‖ of all nodes.
        fan_out: the last V.
    """

    steps: tuple[int, ...]
    angles: Float[Tensor, "times teachers"]
    weights: Float[Tensor, "nodes d"]
    fan_out_errors: Float[Tensor, "times teachers"] | None = None
    fan_out_norms: Float[Tensor, "times nodes"] | None = None
    fan_out: Float[Tensor, "nodes outputs"] | None = None

    @property
    def unlucky_norms(self) -> Float[Tensor, "times others"] | None:
        """‖v_j‖ of the nodes without a teacher: theorem 5's V_r."""
        return None if self.fan_out_norms is None else self.fan_out_norms[:, self.angles.shape[1] :]


def matched_course(
    teacher: Float[Tensor, "nodes d"],
    start: Float[Tensor, "starts features"],
    overlaps: Overlaps,
    *,
    step: float,
    steps: int,
    record_every: int = 1,
) -> Course:
    """Simulate theorem 4: as many students as teachers, ẇ_j = P⊥(W* h*_j - W h_j) with β = 1.

    Args:
        teacher: W*, one node a row.
        start: W at the start, near the teacher; both are normalised.
        overlaps: where ψ_d comes from: H = D.
        step: η.
        steps: number of steps.
        record_every: steps from one record to the next.

    Returns:
        The course.

    Raises:
        ShapeError: teacher and start differ in shape.
        ConfigError: a number is not positive.
        NumericalError: the course does not stay finite, or a row of W is zero.

    Source:
        tian2019luck (arXiv 1905.13405), theorem 4. Explicit Euler, as its proof has it; rows are normalised after
        each step, since the flow conserves norms and a step does not. That can only make angles smaller.

    Example:
        >>> from thalweg.teacher_student.overlaps import GAUSSIAN
        >>> teacher = torch.eye(2, dtype=torch.float64)
        >>> start = torch.tensor([[1.0, 0.2], [0.2, 1.0]], dtype=torch.float64)
        >>> course = matched_course(teacher, start, GAUSSIAN, step=0.1, steps=200, record_every=100)
        >>> bool(course.angles[-1].max() < 0.01 * course.angles[0].max())
        True
    """
    if teacher.shape != start.shape:
        raise ShapeError(
            f"Expected students of the teacher's shape {tuple(teacher.shape)}. Got {tuple(start.shape)}. "
            "Theorem 4 has as many students as teachers; use modulated_course for more."
        )
    _require_positive(step, steps, record_every)
    target, w = _unit(teacher), _unit(start)
    times, angles = [0], [angles_between(w, target)]
    for number in range(1, steps + 1):
        pull = overlaps.gates(w, target) @ target - overlaps.gates(w, w) @ w
        w = _unit(w + step * _across(w, pull))
        if number % record_every == 0 or number == steps:
            times.append(number)
            angles.append(angles_between(w, target))
            _require_finite(number, w)
    return Course(tuple(times), torch.stack(angles), w)


def modulated_course(
    teacher: tuple[Float[Tensor, "teachers d"], Float[Tensor, "teacher_fans outputs"]],
    start: tuple[Float[Tensor, "nodes features"], Float[Tensor, "fans fan_out"]],
    overlaps: Overlaps,
    *,
    step: float,
    steps: int,
    record_every: int = 1,
) -> Course:
    """Simulate theorem 5: more students than teachers, Ẇ = P⊥(W* H* - W H) and V̇ = L* V* - L V.

    Args:
        teacher: W* and V*, one node a row.
        start: W and V at the start; the first nodes are the u-set, near the teacher in turn, the rest is the r-set.
        overlaps: where ψ_d and ψ_l come from: h_jj' = d_jj' v_jᵀv_j', h*_jj' = d*_jj' v_jᵀv*_j'.
        step: η, of both layers.
        steps: number of steps.
        record_every: steps from one record to the next.

    Returns:
        The course.

    Raises:
        ShapeError: shapes do not fit.
        ConfigError: a number is not positive.
        NumericalError: the course does not stay finite, or a row of W is zero.

    Source:
        tian2019luck (arXiv 1905.13405), theorem 5, with the projection of lemma 6 (the theorem's text leaves it
        out) and normalised rows as in `matched_course`.

    Example:
        >>> from thalweg.teacher_student.overlaps import sample_overlaps, simplex_clones
        >>> w, x = simplex_clones(3, 3, torch.Generator().manual_seed(0))
        >>> v = torch.eye(3, dtype=torch.float64)
        >>> course = modulated_course((w[:2], v[:2]), (w, v), sample_overlaps(x), step=0.1, steps=100)
        >>> bool(course.unlucky_norms[-1].max() < 0.1)
        True
    """
    (w_star, v_star), (w, v) = teacher, start
    rows = len(w) >= len(w_star), len(v) == len(w), len(v_star) == len(w_star)
    if not all(rows) or v.shape[1:] != v_star.shape[1:] or w.shape[1:] != w_star.shape[1:]:
        raise ShapeError(
            "Expected at least as many students as teachers, a row of V for each row of W, and equal columns. Got "
            f"{[tuple(t.shape) for t in (w_star, v_star, w, v)]} for W*, V*, W, V. Check the shapes."
        )
    _require_positive(step, steps, record_every)
    w_star, w = _unit(w_star), _unit(w)
    times, found = [0], [_state(w, v, w_star, v_star)]
    for number in range(1, steps + 1):
        own, theirs = overlaps.gates(w, w) * (v @ v.T), overlaps.gates(w, w_star) * (v @ v_star.T)
        pull = _across(w, theirs @ w_star - own @ w)
        v = v + step * (overlaps.activations(w, w_star) @ v_star - overlaps.activations(w, w) @ v)
        w = _unit(w + step * pull)
        if number % record_every == 0 or number == steps:
            times.append(number)
            found.append(_state(w, v, w_star, v_star))
            _require_finite(number, w, v)
    angles, errors, norms = (torch.stack(part) for part in zip(*found, strict=True))
    return Course(tuple(times), angles, w, errors, norms, v)


def fitted_rate(steps: Sequence[int], values: Float[Tensor, " times"], *, floor: float = _FLOOR) -> float:
    """Fit the factor by which a value falls per step, over the second half of its fall in decades.

    Args:
        steps: at which it was recorded.
        values: the value, of size 1 or so.
        floor: where rounding begins; what comes after the value first gets there is left out. Default: float64.

    Returns:
        The factor: below 1 if it falls.

    Raises:
        ShapeError: there are not as many steps as values.
        NumericalError: fewer than 3 values lie in that part.

    Source:
        ours: the last decades before rounding, where a rate no longer depends on the start.

    Example:
        >>> round(fitted_rate(range(100), 0.9 ** torch.arange(100.0)), 6)
        0.9
    """
    if len(steps) != len(values):
        raise ShapeError(f"Expected a step for each value. Got {len(steps)} and {len(values)}. Pass those recorded.")
    logs = torch.where(values > 0, values, torch.zeros_like(values)).double().log()
    low = (values <= floor).nonzero()
    end = int(low[0]) if len(low) else len(values)
    kept = logs[:end]
    middle = (kept[0] + kept.min()) / 2 if end else math.nan
    late = (kept <= middle).nonzero().flatten()
    first = int(late[0]) if len(late) else end
    y = kept[first:]
    if len(y) < 3 or not bool(y.isfinite().all()):
        raise NumericalError(
            f"Expected at least 3 finite values above {floor:g} in the second half of the fall. Got {len(y)}. "
            "Record more often, or use a smaller step."
        )
    x = torch.tensor(list(steps)[first:end], dtype=torch.float64)
    x = x - x.mean()
    return float(((x * y).sum() / x.square().sum()).exp())


def _state(w: Tensor, v: Tensor, w_star: Tensor, v_star: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m = len(w_star)
    return angles_between(w[:m], w_star), (v[:m] - v_star).norm(dim=1), v.norm(dim=1)


def _across(w: Tensor, pull: Tensor) -> Tensor:
    """Project each row of the pull onto what is orthogonal to the same row of w, of norm 1."""
    return pull - (pull * w).sum(1, keepdim=True) * w


def _unit(w: Tensor) -> Tensor:
    unit: Tensor = w / w.norm(dim=1, keepdim=True)
    return unit


def _require_finite(number: int, *weights: Tensor) -> None:
    if not all(bool(part.isfinite().all()) for part in weights):
        raise NumericalError(
            f"Expected weights that stay finite. Got NaN or infinity by step {number}. Use a smaller step, and no "
            "row of W that is zero."
        )


def _require_positive(step: float, steps: int, record_every: int) -> None:
    if not (step > 0 and math.isfinite(step) and steps >= 1 and record_every >= 1):
        raise ConfigError(
            f"Expected a positive step, number of steps and of steps between records. Got {step}, {steps}, "
            f"{record_every}. Change them."
        )
