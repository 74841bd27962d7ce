"""Curves of low loss that are trained: a polygon or a Bezier curve whose inner bends move, its ends rest."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.batching import Batch
from thalweg.errors import ConfigError, ShapeError
from thalweg.objective import Objective
from thalweg.paths.descent import Descent, training_batches
from thalweg.paths.leg import Blend, BlendLeg, Leg, blend_leg
from thalweg.paths.path import Path

Schedule = Callable[[float], float]
"""The share of the training that is done, in [0, 1), -> the factor of the learning rate."""
CurveKind = Literal["polygon", "bezier"]
Progress = Callable[[int, float], None]

_PIECE = 2**16
"""Numbers of a weight that are updated together. Chosen by us: four arrays of them stay in a cache of 1 MB."""
_LEAST_SCALE = 1e-6
"""Momentum is brought back to scale 1 below this. Chosen by us: rounding does not depend on it."""


@dataclass(frozen=True)
class Curve:
    """A trained curve.

    Args:
        path: the curve; a polygon has a leg for each edge.
        bends: the points that define it, both ends included.
        losses: mean loss of the mini-batches of each epoch, at the t that were drawn, without the weight decay.
        status: "finished", or "diverged" (NaN or infinity): then the bends are those of the best epoch before,
            the start if there was none.
        seconds: wall time.
    """

    path: Path
    bends: Float[Tensor, "bends params"]
    losses: tuple[float, ...]
    status: Literal["finished", "diverged"]
    seconds: float


def hold_then_fall(share: float) -> float:
    """Hold the learning rate for half of the training, then let it fall to 1 % at nine tenths, and keep it there.

    Args:
        share: of the training that is done.

    Returns:
        Factor of the learning rate.

    **Source:** Garipov et al. 2018 (arXiv 1802.10026), as their code has it.

    Example:
        >>> [round(hold_then_fall(s), 3) for s in (0.0, 0.5, 0.7, 0.9, 1.0)]
        [1.0, 1.0, 0.505, 0.01, 0.01]
    """
    return 1.0 - 0.99 * min(max((share - 0.5) / 0.4, 0.0), 1.0)


def train_curve(  # noqa: PLR0913 - one training; each keyword is one of its settings
    objective: Objective,
    a: Float[Tensor, " params"],
    b: Float[Tensor, " params"],
    *,
    generator: torch.Generator,
    kind: CurveKind = "polygon",
    bends: int = 3,
    epochs: int = 60,
    steps: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    schedule: Schedule = hold_then_fall,
    start: Float[Tensor, " params"] | Sequence[Float[Tensor, " params"]] | None = None,
    start_buffers: Mapping[str, Tensor] | None = None,
    end_buffers: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Curve:
    """Train θ(t) = Σ_j c_j(t)·θ_j to minimise E_t[R(θ(t)) + ½·λ·‖θ(t)‖²]; θ_0 = A and the last bend = B rest.

    Every mini-batch draws t ~ U(0, 1). The gradient g is taken once, at θ(t); bend j is moved along c_j(t)·g with
    its own momentum. So a step costs what a step of plain SGD does, for any module and any number of bends.
    The network is in train mode (BatchNorm takes the batch's statistics); the objective's own stays as it is.

    Args:
        objective: the landscape, with the training data.
        a: the start.
        b: the end.
        generator: of the order of the data and of t, on the CPU. Dropout draws from torch's own.
        kind: "polygon", or "bezier": quadratic, three control points.
        bends: points that define the curve, both ends included: 3 is one free point.
        epochs: passes over the data. Default: MNIST in Anokhin & Yarotsky (200 for CIFAR-10).
        steps: stop after so many mini-batches; then the schedule runs over them and not over the epochs.
        batch_size: samples of a mini-batch. Default and the three next: Anokhin & Yarotsky.
        learning_rate: η, before the schedule.
        momentum: of each bend.
        weight_decay: λ, on the point of the curve and not on the bends.
        schedule: factor of η for the share of epochs that is done.
        start: the free bend, or all free bends, at the start. Default: evenly on the straight line.
        start_buffers: buffers of the network at the start, by name.
        end_buffers: those at the end.
        progress: called as `progress(epoch, loss)`.

    Returns:
        The curve.

    Raises:
        ConfigError: a wrong kind, number of bends, or setting.
        ShapeError: a point does not fit the module, or `start` is not one point for each free bend.
        DataError: the data cannot be cut into mini-batches.

    **Source:** Garipov et al. 2018 (arXiv 1802.10026), section 3 and their code: SGD without Nesterov, λ acts on
    θ(t), uniform t. Departure: no twin of the architecture, and no graph through the combination.

    Example:
        >>> from torch import nn
        >>> x = torch.linspace(-1, 1, 8).unsqueeze(1)
        >>> objective = Objective(nn.Linear(1, 1), nn.MSELoss(), (x, 2 * x))
        >>> a, b = torch.tensor([2.0, 1.0]), torch.tensor([2.0, -1.0])
        >>> curve = train_curve(objective, a, b, epochs=5, generator=torch.Generator().manual_seed(0))
        >>> len(curve.path.legs), curve.status
        (2, 'finished')
    """
    _require_settings(kind, bends, epochs, steps, batch_size, learning_rate, momentum, weight_decay)
    begun = time.perf_counter()
    moving = _Bends(_first_points(objective, a, b, bends, start), kind, momentum, Descent(objective))
    losses: list[float] = []
    best, kept = math.inf, moving.copied()
    last = kept
    status: Literal["finished", "diverged"] = "finished"
    done = 0
    for epoch in range(epochs) if steps is None else count():
        total, first = 0.0, done
        for batch in training_batches(objective, batch_size, generator):
            share = epoch / epochs if steps is None else done / steps
            t = float(torch.rand((), generator=generator, dtype=torch.float64))
            total += moving.step(batch, t, learning_rate * schedule(share), weight_decay)
            done += 1
            if done == steps or not math.isfinite(total):
                break
        losses.append(total / (done - first))
        if progress is not None:
            progress(epoch + 1, losses[-1])
        now = moving.copied()
        if not (math.isfinite(losses[-1]) and all(bool(torch.isfinite(point).all()) for point in now)):
            status = "diverged"
            break
        last = now
        if losses[-1] <= best:
            best, kept = losses[-1], now
        if done == steps:
            break
    final = torch.stack(kept if status == "diverged" else last)
    path = _path(objective, kind, final, start_buffers, end_buffers)
    return Curve(path, final, tuple(losses), status, time.perf_counter() - begun)


class _Bends:
    """The points of a curve and the momentum of those that are free.

    The momentum of bend j is kept as v_j = m_j·u_j, so that v ← m·v + c·g is one pass, u += (c/m_j)·g, after
    m_j ← m·m_j. A bend that a step does not touch (c_j = 0) drifts by its momentum alone, θ_j ← θ_j - η·v_j: a
    number, which waits until the bend is looked at. Passes go piece by piece, so that a piece stays in the cache.
    """

    def __init__(self, points: list[Tensor], kind: CurveKind, momentum: float, descent: Descent) -> None:
        self._points, self._kind, self._momentum, self._descent = points, kind, momentum, descent
        self._free = range(1, len(points) - 1)
        self._velocity = {j: torch.zeros_like(points[j]) for j in self._free}
        self._scale = dict.fromkeys(self._free, 1.0)
        self._drift = dict.fromkeys(self._free, 0.0)
        sizes = [len(piece) for view in descent.views for piece in _pieces(view)]
        self._point_pieces = [torch.split(point, sizes) for point in points]
        self._velocity_pieces = {j: torch.split(velocity, sizes) for j, velocity in self._velocity.items()}
        self._theta_pieces = torch.split(descent.theta, sizes)

    def step(self, batch: Batch, t: float, rate: float, weight_decay: float) -> float:
        """Take the gradient at t and move the bends; give the loss. Nothing moves if it is not finite."""
        shares = _shares(self._kind, len(self._points), t)
        self._place(shares)
        loss, slopes = self._descent.slope(batch)
        if math.isfinite(loss):
            self._move([piece for slope in slopes for piece in _pieces(slope)], shares, rate, weight_decay)
        return loss

    def copied(self) -> list[Tensor]:
        """Give the points as they are now; the ends are those that were given."""
        for j in self._free:
            self._points[j].add_(self._velocity[j], alpha=-self._drift[j])
            self._drift[j] = 0.0
        return [p.clone() if j in self._free else p for j, p in enumerate(self._points)]

    def _place(self, shares: Sequence[float]) -> None:
        """Write Σ_j c_j·θ_j into theta, as one weighted mean after another: the c_j sum to 1."""
        first, *rest = (j for j, share in enumerate(shares) if share != 0)
        weights = [shares[j] / sum(shares[: j + 1]) for j in rest]
        late = [j for j in (first, *rest) if self._drift.get(j)]
        for k, theta in enumerate(self._theta_pieces):
            for j in late:
                self._point_pieces[j][k].add_(self._velocity_pieces[j][k], alpha=-self._drift[j])
            mean = self._point_pieces[first][k]
            for j, weight in zip(rest, weights, strict=True):
                mean = torch.lerp(mean, self._point_pieces[j][k], weight, out=theta)
            if not rest:
                theta.copy_(mean)
        for j in late:
            self._drift[j] = 0.0

    def _move(self, slope: Sequence[Tensor], shares: Sequence[float], rate: float, weight_decay: float) -> None:
        for j in self._free:
            self._age(j)
            if shares[j] == 0:
                self._drift[j] += rate * self._scale[j]
        touched = [j for j in self._free if shares[j] != 0]
        for k, (piece, theta) in enumerate(zip(slope, self._theta_pieces, strict=True)):
            piece.add_(theta, alpha=weight_decay)
            for j in touched:
                velocity = self._velocity_pieces[j][k].add_(piece, alpha=shares[j] / self._scale[j])
                self._point_pieces[j][k].add_(velocity, alpha=-rate * self._scale[j])

    def _age(self, j: int) -> None:
        """Let the momentum of a bend decay by one step."""
        self._scale[j] *= self._momentum
        if self._scale[j] < _LEAST_SCALE:
            self._points[j].add_(self._velocity[j], alpha=-self._drift[j])
            self._velocity[j].mul_(self._scale[j])
            self._drift[j], self._scale[j] = 0.0, 1.0


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.reshape(-1), _PIECE)


def _shares(kind: CurveKind, bends: int, t: float) -> tuple[float, ...]:
    """Give c_j(t)."""
    if kind == "bezier":
        return (1 - t) ** 2, 2 * t * (1 - t), t**2
    low = min(int(t * (bends - 1)), bends - 2)
    share = t * (bends - 1) - low
    return tuple(1 - share if j == low else share if j == low + 1 else 0.0 for j in range(bends))


def _path(
    objective: Objective,
    kind: CurveKind,
    bends: Float[Tensor, "bends params"],
    start_buffers: Mapping[str, Tensor] | None,
    end_buffers: Mapping[str, Tensor] | None,
) -> Path:
    points = [objective.space.parameters(bend) for bend in bends]
    legs: tuple[Leg, ...]
    if kind == "bezier":
        first, middle, last = points
        blends = {name: Blend("quadratic", (first[name], middle[name], last[name])) for name in first}
        legs = (BlendLeg("a Bezier curve", {}, blends),)
    else:
        edges = len(points) - 1
        legs = tuple(blend_leg(f"edge {k + 1} of {edges}", *edge) for k, edge in enumerate(pairwise(points)))
    return Path(objective.space, legs, (), start_buffers or {}, end_buffers or {})


def _first_points(
    objective: Objective, a: Tensor, b: Tensor, bends: int, start: Tensor | Sequence[Tensor] | None
) -> list[Tensor]:
    ends = [_point(objective, end) for end in (a, b)]
    if start is None:
        inner = [torch.lerp(ends[0], ends[1], (k + 1) / (bends - 1)) for k in range(bends - 2)]
    else:
        inner = [_point(objective, p).clone() for p in ([start] if isinstance(start, Tensor) else start)]
    if len(inner) != bends - 2:
        raise ShapeError(
            f"Expected {bends - 2} free bends to start from. Got {len(inner)}. Leave them out for the straight line."
        )
    return [ends[0], *inner, ends[1]]


def _point(objective: Objective, theta: Tensor) -> Tensor:
    objective.space.parameters(theta)
    return theta.detach().to(device=objective.device, dtype=objective.dtype)


def _require_settings(
    kind: str,
    bends: int,
    epochs: int,
    steps: int | None,
    batch_size: int,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> None:
    if kind not in ("polygon", "bezier") or bends < 3 or (kind == "bezier" and bends != 3):
        raise ConfigError(
            f"Expected a 'polygon' of 3 or more bends, or a 'bezier' of 3. Got {kind!r} with {bends}. "
            "Count both ends as bends."
        )
    if min(epochs, 1 if steps is None else steps, batch_size) < 1:
        raise ConfigError(
            f"Expected at least one epoch, step and sample. Got epochs={epochs}, steps={steps}, "
            f"batch_size={batch_size}. Choose positive numbers."
        )
    if not (0 < learning_rate < math.inf and 0 <= momentum < 1 and 0 <= weight_decay < math.inf):
        raise ConfigError(
            f"Expected learning_rate > 0, momentum in [0, 1) and weight_decay ≥ 0. Got {learning_rate}, {momentum} "
            f"and {weight_decay}. The defaults are those of the paper."
        )
