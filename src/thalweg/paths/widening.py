"""Two networks side by side in a wider one: how much extra width it takes until a straight line has no barrier."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from thalweg.embeddings.surgery import resized_module
from thalweg.errors import ConfigError, StructureError
from thalweg.matching.units import unit_rows
from thalweg.objective import Objective
from thalweg.paths.leg import blend_leg
from thalweg.paths.pair import Pair, State, first_samples
from thalweg.paths.path import Path
from thalweg.paths.profile import profile
from thalweg.structure import View
from thalweg.structure.tree import IntArray, Tree, gather, groups_of, resized, spread

_SEARCHED = 6
"""Halvings of the share: found to 1/64 of the width. Chosen by us."""


@dataclass(frozen=True)
class Widened:
    """Both networks in a wider one, and the straight line between them.

    Args:
        objective: the landscape of the wide network.
        path: from A in the wide network to B in it; both compute what they did, exactly.
        extra: group -> units added.
    """

    objective: Objective
    path: Path
    extra: Mapping[str, int]


@dataclass(frozen=True)
class ConnectivityWidth:
    """The least extra width at which two networks are linearly connected.

    Args:
        share: of the units of every group that has to be added; 1 is always enough under a convex loss.
        extra: group -> units added at that share.
        barrier: of the straight line there.
        tolerance: the barrier that counts as none.
        tried: (share, barrier), ascending.
    """

    share: float
    extra: Mapping[str, int]
    barrier: float
    tolerance: float
    tried: tuple[tuple[float, float], ...]


def widened(pair: Pair, share: float = 1.0, *, target: State | None = None) -> Widened:
    """Put A and B into one network with more units, so that they differ in as few shared units as wanted.

    Of n units of a group, round(share·n) of B's, those farthest from their partners in A, get places of their own;
    A's partners of these keep theirs. At t = 0 nothing of A reads B's own units, at t = 1 the reverse. With share 1
    the two networks run side by side, only the last layer moves, and R(t) ≤ (1-t)·R(A) + t·R(B) for a convex loss.

    Args:
        pair: the networks.
        share: in [0, 1]; 0 is the straight line in the network itself.
        target: B with its units in A's order. Default: B as it is.

    Returns:
        The wide landscape and the straight path in it.

    Raises:
        ConfigError: a share outside [0, 1].
        StructureError: no group can be widened, or the module computes something else in the wider form.

    **Source:** ours; the side-by-side path is an observation on the null embedding of Zhang et al. 2021 (arXiv
    2111.15527).
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"Expected a share in [0, 1]. Got {share}. 1 doubles every group.")
    target = pair.b if target is None else target
    view, own = pair.view, _own_units(pair, target, share)
    parents = {name: np.concatenate([np.arange(view.group(name).size), units]) for name, units in own.items()}
    start, end = (_mixed(pair, target, own, parents, at_end=at_end) for at_end in (False, True))
    sizes = {name: len(index) for name, index in parents.items()}
    module = resized_module(pair.objective.module, view, sizes, start)
    base = pair.objective
    wide = Objective(
        *(module, base.loss, base._data),
        reduction=base.reduction,
        batch_weight=base._batch_weight,
        mode=base.mode,
        dtype=base.dtype,
        device=base.device,
    )
    names = wide.space.names
    leg = blend_leg("the wider network", {n: start[n] for n in names}, {n: end[n] for n in names})
    buffers = [{n: s[n] for n in base._buffers if n in s} for s in (start, end)]
    path = Path(wide.space, (leg,), (), buffers[0], buffers[1])
    _require_the_same(pair, target, wide, path)
    return Widened(wide, path, {name: len(units) for name, units in own.items()})


def connectivity_width(
    pair: Pair, *, target: State | None = None, tolerance: float = 0.01, points: int = 11
) -> ConnectivityWidth:
    """Search the least share of extra units at which the straight line between two networks has no barrier.

    Args:
        pair: the networks.
        target: B with its units in A's order (`align`, `permute`). Default: B as it is.
        tolerance: the barrier of the training loss that counts as none. Default chosen by us.
        points: of each profile.

    Returns:
        The share, found by bisection to 1/64.

    Raises:
        StructureError: no group can be widened.

    **Source:** ours.
    """
    barriers: dict[float, float] = {}

    def barrier(share: float) -> float:
        if share not in barriers:
            found = widened(pair, share, target=target)
            barriers[share] = profile(found.path, found.objective, points=points, refine=False).barrier
        return barriers[share]

    low, high = 0.0, 1.0
    if barrier(0.0) <= tolerance:
        high = 0.0
    else:
        barrier(1.0)
        for _ in range(_SEARCHED):
            middle = (low + high) / 2
            low, high = (low, middle) if barrier(middle) <= tolerance else (middle, high)
    extra = {name: len(units) for name, units in _own_units(pair, pair.b if target is None else target, high).items()}
    return ConnectivityWidth(high, extra, barriers[high], tolerance, tuple(sorted(barriers.items())))


def _own_units(pair: Pair, target: State, share: float) -> dict[str, IntArray]:
    """The units of B that get places of their own, group by group: those farthest from A's."""
    found = {}
    for group in pair.view.groups:
        if not group.is_duplicable or group.coupling != "none":
            continue
        ours, theirs = (unit_rows(pair.view, group, state, "butterfly") for state in (pair.a, target))
        far = (ours - theirs).square().sum(1).argsort(descending=True, stable=True)
        found[group.name] = np.sort(far[: round(share * group.size)].cpu().numpy()).astype(np.int64)
    if not found:
        raise StructureError(
            "Expected a group whose units can be added one by one. Got none. See `thalweg view` for what holds them."
        )
    return found


def _mixed(
    pair: Pair, target: State, own: Mapping[str, IntArray], parents: Mapping[str, IntArray], *, at_end: bool
) -> dict[str, Tensor]:
    """One network in the wide one: each entry is A's or B's; 0 where A reads B's own units, or B what only A has."""
    view, state = pair.view, {}
    added = {n: np.r_[np.zeros(view.group(n).size), np.ones(len(units))] for n, units in own.items()}
    only_a = {
        n: np.r_[np.isin(np.arange(view.group(n).size), u), np.zeros(len(u))].astype(float) for n, u in own.items()
    }
    for name, value in pair.a.items():
        axes = view.axes.get(name, ())
        first, second = value, target[name]
        for dim, tree in enumerate(axes):
            index = torch.from_numpy(gather(tree, parents)).to(value.device)
            first, second = first.index_select(dim, index), second.index_select(dim, index)
        roles = view.members_of(name)
        makes = [(dim, g) for (dim, g), role in roles.items() if role == "producer" and g in own]
        reads = [(dim, g) for (dim, g), role in roles.items() if role == "consumer" and g in own]
        if not value.is_floating_point():
            state[name] = second if at_end else first
            continue
        is_a = 1 - _any(view, name, first, makes, added) if not at_end else _any(view, name, first, makes, only_a)
        first = first * (1 - _any(view, name, first, reads, added))
        second = second * (1 - _any(view, name, second, reads, only_a))
        state[name] = torch.where(is_a > 0, first, second)
    return state


def _any(
    view: View, name: str, like: Tensor, members: list[tuple[int, str]], marks: Mapping[str, np.ndarray]
) -> Tensor:
    """1 where an entry belongs to a marked unit of one of the groups, else 0."""
    unmarked = torch.ones_like(like)
    for dim, group in members:
        tree = view.axes[name][dim]
        others = {g: np.ones(len(marks[g])) for g in groups_of(tree) if g in marks and g != group}
        along = spread(_sized(tree, marks), {**others, group: 1 - marks[group]})
        shape = [-1 if d == dim else 1 for d in range(like.ndim)]
        unmarked = unmarked * torch.from_numpy(along).to(like).reshape(shape)
    return 1 - unmarked


def _sized(tree: Tree, marks: Mapping[str, np.ndarray]) -> Tree:
    return resized(tree, {group: len(mark) for group, mark in marks.items()})


def _require_the_same(pair: Pair, target: State, wide: Objective, path: Path) -> None:
    """Hold both ends against the networks themselves on a batch."""
    inputs = first_samples(next(iter(wide.batches()))[0], 16)
    tolerance = 1e3 * torch.finfo(wide.dtype).eps
    for t, state, buffers in ((0.0, pair.a, path.start_buffers), (1.0, target, path.end_buffers)):
        with torch.no_grad():
            ours = _floats(_called(wide.module, {**path.parameters(t), **buffers}, inputs))
            theirs = _floats(_called(pair.objective.module, state, inputs))
        change = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
        if not change <= tolerance:
            raise StructureError(
                f"Expected the wider network to compute the same. Got a change of {change:.1e} at t = {t:g}. "
                "Its code fixes a size; there is no connectivity width to measure."
            )


def _called(module: nn.Module, state: State, inputs: Any) -> Any:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    arguments = args if isinstance(args, tuple) else (args,)
    return torch.func.functional_call(module, {n: t.clone() for n, t in state.items()}, arguments, kwargs)


def _floats(outputs: Any) -> Tensor:
    """Join what a module gives into one vector."""
    found = [t.reshape(-1) for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.cat(found)
