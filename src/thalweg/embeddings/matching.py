"""matching: which unit of one point is which unit of another, an assignment problem."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from thalweg.embeddings.reduction import _incoming, _rows
from thalweg.errors import ShapeError
from thalweg.structure import Group, View, flip, permute, rescale
from thalweg.structure.tree import FloatArray, IntArray, groups_of

_SWEEPS = 10
"""Most rounds of `match` over all groups. Chosen by us: one round settles two layers, two or three deep networks."""

_FLOOR = 1e-2
"""Least size of a parameter relative to the largest one, when differences are measured. Chosen by us: a bias that is
zero at a critical point is not compared with its own rounding."""


@dataclass(frozen=True, eq=False)
class Match:
    """Which unit of one point is which unit of another, at equal widths.

    Args:
        permutations: group -> for every unit of the first point, the unit of the second.
        signs: group -> the sign of that unit relative to the first point's.
        residual: largest difference that is left, relative to the largest entry of its parameter (and at least a
            hundredth of the largest entry of all).
    """

    permutations: Mapping[str, IntArray]
    signs: Mapping[str, FloatArray]
    residual: float


def match(view: View, one: Mapping[str, Tensor], two: Mapping[str, Tensor], *, odd: Iterable[str] = ()) -> Match:
    """Find the permutation and the signs of the units under which two points of equal widths are closest.

    Group by group in forward order, each by a linear assignment of what makes and reads the units, along what is
    settled already; repeated over all groups until nothing changes. Where units may be rescaled, both points are
    first brought to units of equal size.

    Args:
        view: the groups.
        one: the first point, parameters by name.
        two: the second point.
        odd: the groups whose units may change sign, see `odd_groups`.

    Returns:
        The match; exact for one hidden layer, and for deeper networks wherever the points are equal up to
        symmetry and units can be told apart by their layer's settled weights.

    Raises:
        ShapeError: the points have other parameters or shapes.

    **Source:** ours; the assignment, layer by layer, is that of weight matching (Ainsworth et al. 2022, arXiv
    2209.04836, algorithm 1), started from the inputs in place of a random order.

    Example:
        >>> from torch import nn
        >>> from thalweg.structure import trace
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> view, state = trace(net, torch.zeros(3, 1)), dict(net.named_parameters())
        >>> swapped = permute(view, state, {"0": np.array([1, 0])})
        >>> match(view, state, swapped).permutations["0"]
        array([1, 0])
    """
    _require_alike(one, two)
    odd = frozenset(odd)
    one, moved = (_balanced(view, {n: t.detach() for n, t in state.items()}) for state in (one, two))
    permutations = {g.name: np.arange(g.size) for g in view.groups}
    signs = {g.name: np.ones(g.size) for g in view.groups}
    settled: set[str] = set()
    for _ in range(_SWEEPS):
        changed = False
        for group in view.groups:
            name = group.name
            order, turn = _assigned(view, group, one, moved, settled, signed=name in odd)
            changed |= not np.array_equal(order, np.arange(group.size)) or bool((turn != 1).any())
            moved = flip(view, permute(view, moved, {name: order}), {name: turn})
            permutations[name] = permutations[name][order]
            signs[name] = signs[name][order] * turn
            settled.add(name)
        if not changed or len(view.groups) == 1:
            break
    return Match(permutations, signs, _residual(one, moved))


def _assigned(
    view: View,
    group: Group,
    one: Mapping[str, Tensor],
    two: Mapping[str, Tensor],
    settled: set[str],
    *,
    signed: bool,
) -> tuple[IntArray, FloatArray]:
    """For every unit of the first point, the unit of the second that fits, and the sign with which it does."""
    ours, theirs, sizes = [np.zeros((group.size, 1))], [np.zeros((group.size, 1))], _sizes(one, two)
    for member in group.members:
        others = {g for tree in view.axes[member.tensor] for g in groups_of(tree)} - {group.name}
        if member.tensor in one and others <= settled:
            rows = _rows(view, group, member.tensor, member.dim, one[member.tensor])
            scale = sizes[member.tensor]
            ours.append(rows / scale)
            theirs.append(_rows(view, group, member.tensor, member.dim, two[member.tensor]) / scale)
    mine, yours = np.concatenate(ours, axis=1), np.concatenate(theirs, axis=1)
    cost = ((mine[:, None] - yours[None]) ** 2).sum(axis=2)
    turns = np.ones_like(cost)
    if signed:
        flipped = ((mine[:, None] + yours[None]) ** 2).sum(axis=2)
        turns = np.where(flipped < cost, -1.0, 1.0)
        cost = np.minimum(cost, flipped)
    order = np.asarray(linear_sum_assignment(cost)[1], dtype=np.int64)
    return order, turns[np.arange(group.size), order]


def _balanced(view: View, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scale units that may be rescaled so that what makes them has norm 1."""
    result = dict(state)
    for group in view.groups:
        if group.is_homogeneous:
            sizes = np.linalg.norm(_incoming(view, group, result)[0], axis=1)
            result = rescale(view, result, {group.name: 1 / np.where(sizes > 0, sizes, 1.0)})
    return result


def _sizes(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest entry of each parameter of two points, at least a fraction of the largest of all; never zero."""
    own = {n: float(torch.maximum(one[n].abs().max(), two[n].abs().max())) for n in one}
    least = _FLOOR * max(own.values()) or 1.0
    return {name: max(size, least) for name, size in own.items()}


def _residual(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Largest difference, relative to the size of its parameter."""
    sizes = _sizes(one, two)
    return max(float((one[name] - two[name]).abs().max()) / size for name, size in sizes.items())


def _require_alike(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    ours = {n: tuple(t.shape) for n, t in one.items()}
    theirs = {n: tuple(t.shape) for n, t in two.items()}
    if ours != theirs:
        raise ShapeError(
            f"Expected two points of the same network. Got parameters {ours} and {theirs}. "
            "Bring both to their minimal forms first, and see that these are equally wide."
        )
