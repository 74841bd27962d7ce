"""Comparing units of two networks while other groups are, or are not yet, in one order."""

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.matching.units import Part, is_statistic, member_rows, part_members
from thalweg.structure import Group, Member, View
from thalweg.structure.tree import groups_of


def comparable_rows(
    view: View, group: Group, state: Mapping[str, Tensor], part: Part, settled: Collection[str]
) -> Float[Tensor, "units features"]:
    """Give the units as rows, entries along groups that are not settled sorted: no order of these changes the rows.

    Args:
        view: the groups.
        group: whose units.
        state: parameters and buffers by name.
        part: what of a unit, as in `unit_rows`.
        settled: groups that are in one order; with all of them the rows are those of `unit_rows`.

    Returns:
        One row per unit, float64, on the CPU.
    """
    members = part_members(group, state, part)
    rows = [_sorted_rows(view, group, m, state[m.tensor], settled).cpu() for m in members]
    return torch.cat(rows, dim=1) if rows else torch.zeros(group.size, 0, dtype=torch.float64)


def neighbours(view: View, group: Group, state: Mapping[str, Tensor]) -> frozenset[str]:
    """Name the groups that lie along the same tensors, the group itself if some tensor has it along two dims."""
    names: set[str] = set()
    for member in part_members(group, state, "butterfly"):
        for dim, tree in enumerate(view.axes[member.tensor]):
            found = list(groups_of(tree))
            if dim == member.dim:
                found.remove(group.name)
            names.update(found)
    return frozenset(names)


def squared_distance(
    one: Mapping[str, Tensor], two: Mapping[str, Tensor], names: Collection[str] | None = None
) -> float:
    """Sum the squared differences of two states in float64, running statistics left out.

    Args:
        one: parameters and buffers by name.
        two: the same.
        names: only of these. Default: all.
    """
    total = 0.0
    for name, tensor in one.items():
        if (names is None or name in names) and not is_statistic(name) and tensor.is_floating_point():
            gap = tensor.detach().to("cpu", torch.float64) - two[name].detach().to("cpu", torch.float64)
            total += float(gap.square().sum())
    return total


def _sorted_rows(view: View, group: Group, member: Member, tensor: Tensor, settled: Collection[str]) -> Tensor:
    trees = view.axes[member.tensor]
    open_groups = [set(groups_of(tree)) - set(settled) for tree in trees]
    open_groups[member.dim].discard(group.name)
    rows = member_rows(view, group, member, tensor)
    if not any(open_groups):
        return rows
    others = [d for d in range(tensor.ndim) if d != member.dim]
    shape = [tensor.shape[d] for d in others]
    blocks = rows.reshape(group.size, -1, *shape)
    loose = [1] * bool(open_groups[member.dim]) + [2 + i for i, d in enumerate(others) if open_groups[d]]
    kept = [d for d in range(blocks.ndim) if d not in loose]
    count = 1
    for d in loose:
        count *= blocks.shape[d]
    return blocks.permute(*kept, *loose).reshape(group.size, -1, count).sort(dim=-1).values.flatten(1)
