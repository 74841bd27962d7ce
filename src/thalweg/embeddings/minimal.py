"""minimal: the form of a point in which no two units do the same and every unit does something."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from thalweg.embeddings.plan import NULL
from thalweg.embeddings.reduction import _incoming, _rows, find_merges
from thalweg.errors import PlanError
from thalweg.structure import Group, View, flip
from thalweg.structure.symmetry import scaled_along
from thalweg.structure.tree import FloatArray, IntArray, resized, spread

_TOLERANCE = 1e-6
"""Relative difference of units that are equal. Chosen by us: ‖∇R‖₁ ≤ 1e-12 leaves errors of 1e-12/|λ|, which is
3e-8 for the smallest eigenvalues that are not zero in figure 3(a) of the paper; units that do differ do so by more
than 1e-2."""


@dataclass(frozen=True, eq=False)
class Minimal:
    """A point with copies merged and idle units dropped.

    Args:
        view: the groups at the minimal widths.
        state: parameters by name.
        parents: group -> for every unit before, the unit after; -1 for one that was dropped.
        weights: group -> for every unit before, the factor (a sign; a size where units may be rescaled) with
            which its outgoing weights were added to those of its parent.
    """

    view: View
    state: Mapping[str, Tensor]
    parents: Mapping[str, IntArray]
    weights: Mapping[str, FloatArray]

    @property
    def widths(self) -> dict[str, int]:
        """Group -> number of units of the minimal form."""
        return {g.name: g.size for g in self.view.groups}

    @property
    def is_same(self) -> bool:
        """Whether nothing was merged or dropped: the point was minimal already."""
        return all(len(p) == self.view.group(name).size for name, p in self.parents.items())


def minimal_form(
    view: View, state: Mapping[str, Tensor], *, odd: Iterable[str] = (), tolerance: float = _TOLERANCE
) -> Minimal:
    """Merge units that do the same, up to sign where the group is odd, and drop units that do nothing.

    Repeated until nothing changes: merging one layer can make units of the next equal.

    Args:
        view: the groups.
        state: parameters by name, `space.parameters(theta)`.
        odd: the groups whose units may change sign, see `odd_groups`.
        tolerance: units are equal if what makes them differs by at most this, relative to their size; a unit
            does nothing if its outgoing weights, with and without the size of what makes it, are at most this
            fraction of the largest. Default: for polished points, chosen by us (see the constant).

    Returns:
        The minimal form.

    Raises:
        PlanError: the tolerance is not in [0, 1).

    **Source:** the reduction of Zhang et al. 2021 (arXiv 2105.14573), Sec. 3.2; signs and the repetition are ours.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from thalweg.structure import trace
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1, bias=False))
        >>> view = trace(net, torch.zeros(3, 1))
        >>> state = {n: torch.ones_like(p) for n, p in net.named_parameters()}
        >>> minimal_form(view, state).state["2.weight"]
        tensor([[2.]])
    """
    if not 0 <= tolerance < 1:
        raise PlanError(f"Expected a tolerance in [0, 1). Got {tolerance}. The default is {_TOLERANCE}.")
    odd = frozenset(odd)
    state = {name: tensor.detach() for name, tensor in state.items()}
    parents = {g.name: np.arange(g.size) for g in view.groups}
    weights = {g.name: np.ones(g.size) for g in view.groups}
    while True:
        signs = {g.name: _aligning(view, g, state, tolerance) for g in view.groups if g.name in odd}
        for name, mine in signs.items():
            weights[name] = np.where(parents[name] == NULL, weights[name], weights[name] * mine[parents[name]])
        state = _silenced(view, flip(view, state, signs), tolerance)
        reduction = find_merges(view, state, similarity=1 - tolerance**2 / 2)
        if not reduction.merges:
            return Minimal(view, state, parents, weights)
        for name, merge in reduction.merges.items():
            old = parents[name]
            weights[name] = np.where(old == NULL, weights[name], weights[name] * merge.ratios[old])
            parents[name] = np.where(old == NULL, NULL, merge.labels[old])
        state = reduction.state(state)
        view = view_of_sizes(view, {name: merge.after for name, merge in reduction.merges.items()})


def view_of_sizes(view: View, sizes: Mapping[str, int]) -> View:
    """Give the same view with groups of other sizes.

    Args:
        view: the groups.
        sizes: group -> new size; groups that are not named stay.

    Returns:
        The view of the resized module, which was not verified again.
    """
    groups = tuple(replace(g, size=sizes.get(g.name, g.size)) for g in view.groups)
    axes = {name: tuple(resized(tree, sizes) for tree in trees) for name, trees in view.axes.items()}
    return replace(view, groups=groups, axes=axes)


def _aligning(view: View, group: Group, state: Mapping[str, Tensor], tolerance: float) -> FloatArray:
    """Signs that make a unit equal to an earlier one of which it is the negative."""
    rows = np.concatenate(_incoming(view, group, state), axis=1)
    sizes = np.linalg.norm(rows, axis=1)
    signs, heads = np.ones(len(rows)), list[int]()
    for unit, row in enumerate(rows):
        bound = tolerance * sizes[unit]
        if any(np.linalg.norm(row - rows[h]) <= bound for h in heads):
            continue
        if sizes[unit] > 0 and any(np.linalg.norm(row + rows[h]) <= bound for h in heads):
            signs[unit] = -1.0
        else:
            heads.append(unit)
    return signs


def _silenced(view: View, state: Mapping[str, Tensor], tolerance: float) -> dict[str, Tensor]:
    """Set the outgoing weights of idle units to zero, so that the reduction drops them.

    Two measures must agree, for neither is right for every activation: ‖in‖·‖out‖ overrates a steep unit that is
    bounded, and min(1, ‖in‖)·‖out‖ underrates one that is not.
    """
    result = dict(state)
    for group in view.groups:
        if not group.is_duplicable or group.coupling != "none":
            continue
        made = np.linalg.norm(np.concatenate(_incoming(view, group, state), axis=1), axis=1)
        read = _outgoing(view, group, state)
        amounts = [made * read, np.minimum(made, 1) * read] if group.zero_preserving else [read]
        idle = np.all([a <= tolerance * a.max() for a in amounts], axis=0)
        if idle.any():
            result = _scaled(view, group, result, "consumer", np.where(idle, 0.0, 1.0))
    return result


def _outgoing(view: View, group: Group, state: Mapping[str, Tensor]) -> FloatArray:
    """Norm of what reads each unit."""
    consumers = [m for m in group.members if m.role == "consumer" and m.tensor in state]
    rows = [_rows(view, group, m.tensor, m.dim, state[m.tensor]) for m in consumers]
    return np.asarray(np.linalg.norm(np.concatenate([np.zeros((group.size, 1)), *rows], axis=1), axis=1))


def _scaled(
    view: View, group: Group, state: Mapping[str, Tensor], role: str, factors: FloatArray
) -> dict[str, Tensor]:
    """Multiply what makes ("producer") or reads ("consumer") each unit of a group."""
    result = dict(state)
    for member in group.members:
        if member.role == role and member.tensor in result:
            scale = spread(view.axes[member.tensor][member.dim], {group.name: factors})
            result[member.tensor] = scaled_along(result[member.tensor], member.dim, scale)
    return result
