"""Paths: exact ends, joints that are asserted, composition, the grid, places and lengths."""

import math
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thalweg.errors import ShapeError
from thalweg.paths.leg import Blend, BlendLeg, blend_leg
from thalweg.paths.path import Path
from thalweg.paths.straight import linear
from thalweg.space import Space

SPACE = Space(("a", "b"), ((2, 3), (4,)))


def point(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw theta."""
    return torch.randn(10, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def through(*seeds: int, durations: tuple[float, ...] = (), dtype: torch.dtype = torch.float32) -> Path:
    """Go straight from point to point."""
    points = [SPACE.parameters(point(seed, dtype)) for seed in seeds]
    legs = tuple(blend_leg(f"{k}", a, b) for k, (a, b) in enumerate(pairwise(points)))
    return Path(SPACE, legs, durations)


@settings(max_examples=25, deadline=None)
@given(durations=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_ends_and_joints_are_the_points_to_the_bit(durations: list[float]) -> None:
    path = through(*range(len(durations) + 1), durations=tuple(durations))
    for seed, t in enumerate((0.0, *path.ends)):
        assert torch.equal(path.at(t), point(seed))
        assert torch.equal(path.reversed().at((0.0, *path.reversed().ends)[len(durations) - seed]), point(seed))


def test_legs_that_do_not_meet_are_refused_with_the_gap() -> None:
    a, b, c = (SPACE.parameters(point(seed)) for seed in range(3))
    off = {**b, "b": b["b"] + 0.25}
    with pytest.raises(ShapeError, match=r"leg 1 to end where leg 2 begins. Got 'b', which differs by 0.25"):
        Path(SPACE, (blend_leg("x", a, b), blend_leg("y", off, c)))


@pytest.mark.parametrize("durations", [(1.0,), (1.0, 0.0), (1.0, -1.0)])
def test_durations_must_fit(durations: tuple[float, ...]) -> None:
    with pytest.raises(ShapeError, match="positive duration"):
        through(0, 1, 2, durations=durations)
    with pytest.raises(ShapeError, match="at least one leg"):
        Path(SPACE, ())


def test_a_place_is_a_leg_and_a_share_of_it() -> None:
    path = through(0, 1, 2, durations=(1.0, 3.0))
    assert path.place(0.0) == (0, 0.0)
    assert path.place(0.25) == (0, 1.0)
    assert path.place(0.625) == (1, 0.5)
    assert path.place(1.0) == (1, 1.0)
    for t in (-0.1, 1.1, math.nan):
        with pytest.raises(ShapeError, match="t in \\[0, 1\\]"):
            path.place(t)


def test_a_composition_is_one_path_after_the_other() -> None:
    first, second = through(0, 1, 2), through(2, 3)
    path = first.then(second, share=0.25)
    for t in (0.0, 0.1, 0.4, 0.8, 1.0):
        torch.testing.assert_close(path.at(0.25 * t), first.at(t))
        torch.testing.assert_close(path.at(0.25 + 0.75 * t), second.at(t))
    assert torch.equal(path.at(0.25), point(2))
    with pytest.raises(ShapeError, match="one network"):
        first.then(linear(Space.of(nn.Linear(1, 1)), torch.zeros(2), torch.ones(2)))
    with pytest.raises(ShapeError, match="Put a leg between"):
        second.then(first)


def test_reversal_exchanges_the_buffers_too() -> None:
    a, b = {"m": torch.zeros(1)}, {"m": torch.ones(1)}
    path = linear(SPACE, point(0), point(1), start_buffers=a, end_buffers=b)
    assert path.reversed().start_buffers is b
    assert path.reversed().end_buffers is a
    for t in (0.0, 0.3, 1.0):
        torch.testing.assert_close(path.reversed().at(1 - t), path.at(t))


@settings(max_examples=20, deadline=None)
@given(legs=st.integers(1, 7), points=st.integers(2, 80))
def test_a_grid_has_every_joint_and_as_many_points_on_each_leg(legs: int, points: int) -> None:
    path = through(*range(legs + 1))
    grid = path.grid(points)
    assert list(grid) == sorted(set(grid))
    assert {0.0, *path.ends} <= set(grid)
    within = (len(grid) - 1 - legs) / legs
    assert within == max(1, round((points - 1) / legs) - 1)
    assert [path.place(t)[0] for t in grid[1:]] == sorted(list(range(legs)) * (int(within) + 1))


def test_points_are_rows() -> None:
    path = through(0, 1)
    found = path(torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(found[0], point(0))
    assert torch.equal(found[1], path.at(0.5))


class Spiral:
    """A leg that is no blend."""

    label = "spiral"

    def parameters(self, s: float) -> Mapping[str, Tensor]:
        """Turn once about 0."""
        flat = torch.zeros(10, dtype=torch.float64)
        flat[0], flat[1] = math.cos(2 * math.pi * s), math.sin(2 * math.pi * s)
        return SPACE.parameters(flat)

    def moving(self) -> None:
        """Give none."""


def test_lengths_are_those_of_many_chords() -> None:
    a, b, c = (SPACE.parameters(point(seed, torch.float64)) for seed in range(3))
    blends = {"a": Blend("arc", (a["a"], b["a"], c["a"])), "b": Blend("quadratic", (a["b"], c["b"], b["b"]))}
    curved = Path(SPACE, (BlendLeg("x", {}, blends),))
    fine = torch.stack([curved.at(k / 4096) for k in range(4097)])
    brute = float((fine[1:] - fine[:-1]).norm(dim=1).sum())
    assert abs(curved.length() - brute) < 5e-4 * brute
    straight = through(0, 1, 2, dtype=torch.float64)
    sides = sum(float((point(k + 1, torch.float64) - point(k, torch.float64)).norm()) for k in range(2))
    assert abs(straight.length() - sides) < 1e-12
    assert abs(Path(SPACE, (Spiral(),)).length() - 2 * math.pi) < 1e-2
