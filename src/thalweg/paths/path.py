"""A path between two points of a landscape: t in [0, 1] -> theta, in legs that meet exactly."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.errors import ShapeError
from thalweg.paths.leg import Blend, LazyLeg, Leg, Reversed
from thalweg.space import Space

_CHORDS = 64
"""Chords of a curved leg whose lengths are summed. Chosen by us: a quarter circle is 2.5e-5 too short."""


@dataclass(frozen=True)
class Path:
    """A continuous path of legs; each ends, bit for bit, where the next begins.

    `path(times)` gives the points, so a path may be passed wherever a function of t is wanted.

    Args:
        space: the coordinates.
        legs: the stretches, in order.
        durations: the share of [0, 1] that each takes. Default: equal shares.
        start_buffers: buffers of the network at t = 0 (BatchNorm's statistics), by name.
        end_buffers: those at t = 1.

    Raises:
        ShapeError: no leg, durations that do not fit, or two legs that do not meet.

    Example:
        >>> from torch import nn
        >>> from thalweg.paths import linear
        >>> space = Space.of(nn.Linear(1, 1))
        >>> path = linear(space, torch.tensor([0.0, 0.0]), torch.tensor([1.0, 2.0]))
        >>> path(torch.tensor([0.0, 0.5]))
        tensor([[0.0000, 0.0000],
                [0.5000, 1.0000]])
    """

    space: Space
    legs: tuple[Leg, ...]
    durations: tuple[float, ...] = ()
    start_buffers: Mapping[str, Tensor] = field(default_factory=dict)
    end_buffers: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shares = self.durations or (1.0,) * len(self.legs)
        if not self.legs or len(shares) != len(self.legs) or min(shares) <= 0:
            raise ShapeError(
                f"Expected at least one leg, and a positive duration for each. Got {len(self.legs)} legs and "
                f"durations {self.durations}. Leave the durations out for equal ones."
            )
        total = sum(shares)
        object.__setattr__(self, "durations", tuple(share / total for share in shares))
        for place, (before, after) in enumerate(pairwise(self.legs)):
            if isinstance(before, LazyLeg) and isinstance(after, LazyLeg) and before.end is after.start:
                continue
            _require_joined(place, before.parameters(1.0), after.parameters(0.0))

    @property
    def ends(self) -> tuple[float, ...]:
        """The t at which each leg ends; the last is 1."""
        ends = torch.tensor(self.durations, dtype=torch.float64).cumsum(0).tolist()
        return (*ends[:-1], 1.0)

    @property
    def intervals(self) -> tuple[tuple[float, float], ...]:
        """The t at which each leg begins and ends."""
        return tuple(pairwise((0.0, *self.ends)))

    def place(self, t: float) -> tuple[int, float]:
        """Give the leg at t, and s in [0, 1] along it; a joint counts as the end of the leg before.

        Raises:
            ShapeError: t is outside [0, 1].
        """
        if not 0 <= t <= 1:
            raise ShapeError(f"Expected t in [0, 1]. Got {t}. A path begins at 0 and ends at 1.")
        ends = self.ends
        leg = bisect_left(ends, t)
        start = ends[leg - 1] if leg else 0.0
        return leg, 1.0 if t == ends[leg] else (t - start) / (ends[leg] - start)

    def parameters(self, t: float) -> Mapping[str, Tensor]:
        """Give the named parameters at t; do not write into them."""
        leg, s = self.place(t)
        return self.legs[leg].parameters(s)

    def at(self, t: float) -> Float[Tensor, " params"]:
        """Give theta at t.

        Raises:
            ShapeError: t is outside [0, 1].
        """
        return self.space.theta(self.parameters(t))

    def __call__(self, times: Float[Tensor, " times"]) -> Float[Tensor, "times params"]:
        """Give theta at several t."""
        return torch.stack([self.at(float(t)) for t in times])

    def then(self, other: "Path", share: float = 0.5) -> "Path":
        """Go on along another path, which begins where this one ends.

        Args:
            other: the path to go on with.
            share: of [0, 1] that this path takes.

        Raises:
            ShapeError: they do not meet, or are of other networks.
        """
        if other.space != self.space:
            raise ShapeError("Expected paths of one network. Got two spaces. Connect nets of one architecture.")
        durations = [share * d for d in self.durations] + [(1 - share) * d for d in other.durations]
        return Path(self.space, (*self.legs, *other.legs), tuple(durations), self.start_buffers, other.end_buffers)

    def reversed(self) -> "Path":
        """Give t -> at(1 - t)."""
        legs = tuple(_reversed(leg) for leg in self.legs[::-1])
        return Path(self.space, legs, self.durations[::-1], self.end_buffers, self.start_buffers)

    def length(self) -> float:
        """Compute the Euclidean length in weight space; a curved leg as 64 chords of it."""
        return float(sum(_length(leg) for leg in self.legs))

    def grid(self, points: int) -> tuple[float, ...]:
        """Spread at least so many t over the path: both ends of every leg, and equally many within each.

        Args:
            points: how many, about; never fewer than one within each leg.

        Returns:
            t, ascending, from 0 to 1.
        """
        within = max(1, round((points - 1) / len(self.legs)) - 1)
        times = [0.0]
        for start, end in self.intervals:
            times += [start + (end - start) * k / (within + 1) for k in range(1, within + 1)]
            times.append(end)
        return tuple(times)


def _reversed(leg: Leg) -> Leg:
    own = getattr(leg, "reversed", None)
    turned: Leg = own() if own is not None else Reversed(leg)
    return turned


def _require_joined(place: int, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    for name, value in before.items():
        other = after.get(name)
        if other is None or other.shape != value.shape or not bool((value == other).all()):
            gap = float((value - other).abs().max()) if other is not None and other.shape == value.shape else None
            raise ShapeError(
                f"Expected leg {place + 1} to end where leg {place + 2} begins. Got {name!r}, which differs"
                f"{'' if gap is None else f' by {gap:.2g}'}. Put a leg between them."
            )


def _length(leg: Leg) -> float:
    blends = leg.moving()
    if blends is None:
        points = [_flat(leg.parameters(k / _CHORDS)) for k in range(_CHORDS + 1)]
        return sum(float((b - a).norm()) for a, b in pairwise(points))
    if all(blend.kind == "linear" for blend in blends.values()):
        squares = [float((b.terms[1] - b.terms[0]).double().square().sum()) for b in blends.values()]
        return math.sqrt(sum(squares))
    steps: dict[float, None] = dict.fromkeys(k / _CHORDS for k in range(_CHORDS + 1))
    steps |= dict.fromkeys(t for blend in blends.values() for t in blend.times)
    times = sorted(steps)
    total = torch.zeros(len(times) - 1, dtype=torch.float64)
    for blend in blends.values():
        total += _squared_chords(blend, times)
    return float(total.clamp(min=0).sqrt().sum())


def _squared_chords(blend: Blend, times: Sequence[float]) -> Tensor:
    """‖X(s') - X(s)‖² = Δcᵀ G Δc, with the Gram matrix G of the terms less the first: Σ Δc = 0."""
    first, *rest = (term.double().reshape(-1) for term in blend.terms)
    rows = torch.stack([term - first for term in rest])
    shares = torch.tensor([blend.coefficients(s)[1:] for s in times], dtype=torch.float64)
    steps = shares[1:] - shares[:-1]
    squares: Tensor = ((steps @ (rows @ rows.T).cpu()) * steps).sum(1)
    return squares


def _flat(parameters: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([p.double().reshape(-1) for p in parameters.values()])
