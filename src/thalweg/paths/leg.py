"""Legs: the stretches of a path, s in [0, 1] -> parameters, and the blends that most of them are made of."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from thalweg.errors import ShapeError

Kind = Literal["linear", "arc", "quadratic", "knots"]

_TERMS = {"linear": 2, "arc": 3, "quadratic": 3}


@dataclass(frozen=True)
class Blend:
    """A tensor that moves as s -> Σ_j c_j(s)·X_j.

    - "linear": (1-s)·X_0 + s·X_1
    - "arc": μ + cos(πs/2)·(X_0 - μ) + sin(πs/2)·(X_1 - μ), terms (X_0, X_1, μ)
    - "quadratic": (1-s)²·X_0 + 2s(1-s)·X_1 + s²·X_2, a Bezier curve
    - "knots": piecewise linear through X_j at `times[j]`

    At s = 0 and 1 it gives the first and the last point themselves, bit for bit.

    Args:
        kind: which one.
        terms: the X_j, of one shape.
        times: for "knots", when each is reached: ascending, from 0 to 1.

    Raises:
        ShapeError: a wrong number of terms or times, or terms of unlike shapes.

    **Source:** linear and arc: Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 3.1; quadratic: Garipov et al.
    2018 (arXiv 1802.10026), section 3.
    """

    kind: Kind
    terms: tuple[Tensor, ...]
    times: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        wanted = _TERMS.get(self.kind, len(self.times))
        if len(self.terms) != wanted or len({t.shape for t in self.terms}) != 1:
            raise ShapeError(
                f"Expected {wanted} terms of one shape for {self.kind!r}. "
                f"Got shapes {[tuple(t.shape) for t in self.terms]}. Check what is blended."
            )
        rises = all(a < b for a, b in zip(self.times, self.times[1:], strict=False))
        if self.kind == "knots" and not (rises and len(self.times) > 1 and (self.times[0], self.times[-1]) == (0, 1)):
            raise ShapeError(f"Expected knots at ascending times from 0 to 1. Got {self.times}. Sort them.")

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The points at s = 0 and s = 1."""
        return self.terms[0], self.terms[1 if self.kind == "arc" else -1]

    def coefficients(self, s: float) -> tuple[float, ...]:
        """Give c_j(s); at the ends they are exactly 0 and 1."""
        if self.kind == "knots":
            place = min(max(bisect_right(self.times, s) - 1, 0), len(self.times) - 2)
            low, high = self.times[place], self.times[place + 1]
            share = (s - low) / (high - low)
            return tuple(
                1 - share if j == place else share if j == place + 1 else 0.0 for j in range(len(self.times))
            )
        if self.kind == "arc":
            if s in (0.0, 1.0):
                return 1 - s, s, 0.0
            cosine, sine = math.cos(math.pi * s / 2), math.sin(math.pi * s / 2)
            return cosine, sine, 1 - cosine - sine
        if self.kind == "quadratic":
            return (1 - s) ** 2, 2 * s * (1 - s), s**2
        return 1 - s, s

    def at(self, s: float) -> Tensor:
        """Give the tensor at s; one of the terms itself where its coefficient is 1 and no other counts."""
        counting = [(c, x) for c, x in zip(self.coefficients(s), self.terms, strict=True) if c != 0]
        if len(counting) == 1 and counting[0][0] == 1:
            return counting[0][1]
        (first, x), *rest = counting
        result = x * first
        for c, y in rest:
            result.add_(y, alpha=c)
        return result

    def reversed(self) -> "Blend":
        """Give s -> at(1 - s)."""
        if self.kind == "arc":
            return Blend("arc", (self.terms[1], self.terms[0], self.terms[2]))
        return Blend(self.kind, self.terms[::-1], tuple(1 - t for t in self.times[::-1]))


@runtime_checkable
class Leg(Protocol):
    """A stretch of a path; `s` runs over [0, 1].

    Your own leg has these three; `moving` may return None where the parameters are no blends.
    """

    @property
    def label(self) -> str:
        """What moves here, in a few words."""

    def parameters(self, s: float) -> Mapping[str, Tensor]:
        """Give every parameter of the space at s; do not write into them."""

    def moving(self) -> Mapping[str, Blend] | None:
        """Give the parameters that change along the leg, as blends; None if they are none."""


@dataclass(frozen=True)
class BlendLeg:
    """A leg along which some parameters are blends and the others rest.

    Args:
        label: what moves, in a few words.
        fixed: the parameters that rest.
        blends: those that move.
    """

    label: str
    fixed: Mapping[str, Tensor]
    blends: Mapping[str, Blend]

    def parameters(self, s: float) -> Mapping[str, Tensor]:
        """Give every parameter of the space at s."""
        return {**self.fixed, **{name: blend.at(s) for name, blend in self.blends.items()}}

    def moving(self) -> Mapping[str, Blend] | None:
        """Give the blends."""
        return self.blends

    def reversed(self) -> "BlendLeg":
        """Give s -> parameters(1 - s)."""
        return BlendLeg(self.label, self.fixed, {n: b.reversed() for n, b in self.blends.items()})


def blend_leg(
    label: str,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    *,
    centres: Mapping[str, Tensor] | None = None,
) -> BlendLeg:
    """Go from one point to another: along a line, or along an arc for the parameters that have a centre.

    Parameters that are equal at both ends rest.

    Args:
        label: what moves, in a few words.
        start: every parameter at s = 0.
        end: every parameter at s = 1.
        centres: μ of the arc, for the parameters that take one.

    Returns:
        The leg; its ends are `start` and `end`, bit for bit.

    Example:
        >>> import torch
        >>> leg = blend_leg("w", {"w": torch.zeros(2)}, {"w": torch.ones(2)})
        >>> leg.parameters(0.25)["w"]
        tensor([0.2500, 0.2500])
    """
    fixed: dict[str, Tensor] = {}
    blends: dict[str, Blend] = {}
    for name, first in start.items():
        last = end[name]
        if first is last or _is_same(first, last):
            fixed[name] = first
        elif centres is not None and name in centres:
            blends[name] = Blend("arc", (first, last, centres[name]))
        else:
            blends[name] = Blend("linear", (first, last))
    return BlendLeg(label, fixed, blends)


def _is_same(first: Tensor, last: Tensor) -> bool:
    """Say whether two tensors are the same to the bit; 0 and -0 are not."""
    is_equal = first.shape == last.shape and bool((first == last).all())
    return is_equal and bool((first.signbit() == last.signbit()).all())


@dataclass(frozen=True)
class LazyLeg:
    """A straight leg between two points that are made when they are looked at.

    Args:
        label: what moves, in a few words.
        start: gives the parameters at s = 0.
        end: gives those at s = 1.
    """

    label: str
    start: "Point"
    end: "Point"

    def straight(self) -> BlendLeg:
        """Make both ends."""
        return blend_leg(self.label, self.start.parameters(), self.end.parameters())

    def parameters(self, s: float) -> Mapping[str, Tensor]:
        """Give every parameter of the space at s."""
        if s in (0.0, 1.0):
            return (self.end if s else self.start).parameters()
        return self.straight().parameters(s)

    def moving(self) -> Mapping[str, Blend] | None:
        """Give the blends."""
        return self.straight().blends

    def reversed(self) -> "LazyLeg":
        """Give s -> parameters(1 - s)."""
        return LazyLeg(self.label, self.end, self.start)


@runtime_checkable
class Point(Protocol):
    """A point that is made when it is looked at."""

    def parameters(self) -> Mapping[str, Tensor]:
        """Give every parameter of the space."""


@dataclass(frozen=True)
class Reversed:
    """Any leg, run backwards.

    Args:
        leg: forwards.
    """

    leg: Leg

    @property
    def label(self) -> str:
        """What moves here."""
        return self.leg.label

    def parameters(self, s: float) -> Mapping[str, Tensor]:
        """Give every parameter of the space at s."""
        return self.leg.parameters(1 - s)

    def moving(self) -> Mapping[str, Blend] | None:
        """Give the blends, run backwards."""
        blends = self.leg.moving()
        return None if blends is None else {name: blend.reversed() for name, blend in blends.items()}

    def reversed(self) -> Leg:
        """Give the leg itself."""
        return self.leg
