"""Legs and blends: exact ends, exact coefficients, reversal."""

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thalweg.errors import ShapeError
from thalweg.paths.leg import Blend, BlendLeg, LazyLeg, Leg, Reversed, blend_leg

KINDS = ("linear", "arc", "quadratic", "knots")
TIMES = (0.0, 0.2, 0.7, 1.0)


def blend(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Blend:
    """Draw a blend of a kind."""
    generator = torch.Generator().manual_seed(seed)
    count = {"linear": 2, "knots": 4}.get(kind, 3)
    terms = tuple(torch.randn(3, 2, generator=generator, dtype=dtype) for _ in range(count))
    return Blend(kind, terms, TIMES if kind == "knots" else ())  # type: ignore[arg-type]


def by_formula(b: Blend, s: float) -> Tensor:
    """Compute a blend as its docstring has it."""
    x = b.terms
    if b.kind == "linear":
        return (1 - s) * x[0] + s * x[1]
    if b.kind == "arc":
        return x[2] + math.cos(math.pi * s / 2) * (x[0] - x[2]) + math.sin(math.pi * s / 2) * (x[1] - x[2])
    if b.kind == "quadratic":
        return (1 - s) ** 2 * x[0] + 2 * s * (1 - s) * x[1] + s**2 * x[2]
    k = next(k for k in range(3) if s <= b.times[k + 1])
    share = (s - b.times[k]) / (b.times[k + 1] - b.times[k])
    return (1 - share) * x[k] + share * x[k + 1]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(s=st.floats(0, 1))
def test_a_blend_is_its_formula(kind: str, s: float) -> None:
    b = blend(kind)
    torch.testing.assert_close(b.at(s), by_formula(b, s), rtol=0, atol=1e-13)
    assert abs(sum(b.coefficients(s)) - 1) < 1e-14
    torch.testing.assert_close(b.reversed().at(1 - s), b.at(s), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_a_blend_are_its_points(kind: str, dtype: torch.dtype) -> None:
    b = blend(kind, dtype=dtype)
    for s, end in zip((0.0, 1.0), b.ends, strict=True):
        assert b.at(s) is end
        assert b.reversed().at(1 - s) is end


def test_knots_are_reached_exactly() -> None:
    b = blend("knots")
    for time, term in zip(b.times, b.terms, strict=True):
        assert b.at(time) is term


def test_wrong_terms_are_refused() -> None:
    x = torch.zeros(2)
    with pytest.raises(ShapeError, match="Expected 3 terms of one shape for 'arc'"):
        Blend("arc", (x, x))
    with pytest.raises(ShapeError, match="Expected 2 terms of one shape"):
        Blend("linear", (x, torch.zeros(3)))
    for times in ((0.0, 0.5), (0.0, 0.0, 1.0), (0.1, 0.2, 1.0)):
        with pytest.raises(ShapeError, match=r"knots at ascending times|terms of one shape"):
            Blend("knots", (x,) * len(times), times)


def test_what_is_equal_at_both_ends_rests() -> None:
    same, a, b, centre = torch.ones(2), torch.zeros(3), torch.ones(3), torch.full((3,), 5.0)
    leg = blend_leg("x", {"s": same, "w": a}, {"s": same.clone(), "w": b}, centres={"w": centre, "s": same})
    assert set(leg.fixed) == {"s"}
    assert leg.blends["w"].kind == "arc"
    assert leg.parameters(0.0)["w"] is a
    assert leg.parameters(1.0)["w"] is b


class Counted:
    """A point that counts how often it is made."""

    def __init__(self, value: float) -> None:
        self.value, self.count = value, 0

    def parameters(self) -> Mapping[str, Tensor]:
        """Make it."""
        self.count += 1
        return {"w": torch.full((2,), self.value, dtype=torch.float64)}


def test_a_lazy_leg_makes_its_ends_when_they_are_looked_at() -> None:
    a, b = Counted(0.0), Counted(1.0)
    leg = LazyLeg("x", a, b)
    assert (a.count, b.count) == (0, 0)
    assert float(leg.parameters(0.0)["w"][0]) == 0.0
    assert (a.count, b.count) == (1, 0)
    assert float(leg.parameters(0.25)["w"][0]) == 0.25
    assert float(leg.reversed().parameters(0.25)["w"][0]) == 0.75


@pytest.mark.parametrize("kind", KINDS)
def test_any_leg_runs_backwards(kind: str) -> None:
    leg = BlendLeg("x", {}, {"w": blend(kind)})
    for turned in (leg.reversed(), Reversed(leg)):
        assert isinstance(turned, Leg)
        moving = turned.moving()
        assert moving is not None
        for s in (0.0, 0.3, 0.7, 1.0):
            torch.testing.assert_close(turned.parameters(s)["w"], leg.parameters(1 - s)["w"], rtol=0, atol=1e-13)
            torch.testing.assert_close(moving["w"].at(s), leg.parameters(1 - s)["w"], rtol=0, atol=1e-13)
    assert Reversed(leg).reversed() is leg
