"""Units as rows: what makes each unit of a group, what reads it, or both, as one vector per unit."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.errors import ShapeError, StructureError
from thalweg.structure import Group, Member, View
from thalweg.structure.symmetry import unit_positions

Part = Literal["incoming", "outgoing", "butterfly"]

_ROLES: dict[str, tuple[str, ...]] = {
    "incoming": ("producer", "both"),
    "outgoing": ("consumer", "both"),
    "butterfly": ("producer", "consumer", "both"),
}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def is_statistic(name: str) -> bool:
    """Say whether a tensor of a state is a running statistic of data, which no unit is recognised by."""
    return name.rpartition(".")[2] in _STATISTICS


def part_members(group: Group, state: Mapping[str, Tensor], part: Part) -> tuple[Member, ...]:
    """List the members that a part of a unit is made of, in the order in which `unit_rows` joins them.

    Args:
        group: whose units.
        state: parameters and buffers; members that it lacks are left out, and so are running statistics.
        part: "incoming" (producers), "outgoing" (consumers) or "butterfly" (both).

    Returns:
        Producers first, then consumers, as the group lists them; a member that is both stands with the first.
    """
    own = [m for m in group.members if m.role in _ROLES[part] and m.tensor in state and not is_statistic(m.tensor)]
    return tuple(sorted(own, key=lambda m: m.role == "consumer"))


def member_rows(view: View, group: Group, member: Member, tensor: Tensor) -> Float[Tensor, "units features"]:
    """Collect what lies at each unit's positions along one member, in float64.

    Args:
        view: the groups.
        group: whose units.
        member: which tensor, along which dim.
        tensor: the tensor.

    Returns:
        One row per unit: its positions in ascending order, and all other dims of the tensor at each.

    Raises:
        StructureError: units of unequal numbers of positions, or a complex tensor.
        ShapeError: the tensor is not as long along the dim as the view says.
    """
    order = _order(view, group, member, tensor)
    values = tensor.detach().movedim(member.dim, 0).to(torch.float64)
    return values[order].reshape(group.size, -1)


def unit_rows(view: View, group: Group, state: Mapping[str, Tensor], part: Part) -> Float[Tensor, "units features"]:
    """Give each unit of a group as one row: what makes it, what reads it, or both.

    Args:
        view: the groups.
        group: whose units.
        state: parameters and buffers by name; members that it lacks are left out.
        part: "incoming": weights, biases, scales and shifts of norms that make a unit (running statistics are
            data, not weights, and left out); "outgoing": the weights that read it; "butterfly": both.

    Returns:
        The rows, in float64; a unit of several positions (a channel that is flattened, a head) has all of them.

    Raises:
        StructureError: units of unequal numbers of positions, or a complex tensor.
        ShapeError: the state does not fit the view.

    **Source:** butterflies of neurons: Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 3.2, for two-layer
    nets; here for every group of a view, with all that makes and reads a unit.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 4))
        >>> view = View.of_spec(net, {"hidden": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]})
        >>> tuple(unit_rows(view, view.groups[0], dict(net.named_parameters()), "butterfly").shape)
        (2, 8)
    """
    rows = [member_rows(view, group, m, state[m.tensor]) for m in part_members(group, state, part)]
    return torch.cat(rows, dim=1) if rows else torch.zeros(group.size, 0, dtype=torch.float64)


def with_unit_rows(
    view: View, group: Group, state: Mapping[str, Tensor], part: Part, rows: Float[Tensor, "units features"]
) -> dict[str, Tensor]:
    """Put rows of units back to where `unit_rows` took them from.

    Of a weight from a group to itself some entries belong to two units, as outgoing of one and incoming of the
    other; in a butterfly the row of the unit that reads them (the later one) is kept.

    Args:
        view: the groups.
        group: whose units.
        state: parameters and buffers by name.
        part: what the rows are, as in `unit_rows`.
        rows: one row per unit.

    Returns:
        A new state, in the types of the old one. Entries that belong to no unit stay; tensors without any are the
        same objects.

    Raises:
        ShapeError: rows of another shape than `unit_rows` gives, or a state that does not fit the view.
        StructureError: units of unequal numbers of positions, or a complex tensor.

    **Source:** the inverse of `unit_rows`.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> view = View.of_spec(net, {"hidden": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]})
        >>> state = dict(net.named_parameters())
        >>> ones = with_unit_rows(view, view.groups[0], state, "outgoing", torch.ones(2, 1, dtype=torch.float64))
        >>> ones["2.weight"].tolist(), ones["0.weight"] is state["0.weight"]
        ([[1.0, 1.0]], True)
    """
    members = part_members(group, state, part)
    widths = [state[m.tensor].numel() // max(state[m.tensor].shape[m.dim], 1) for m in members]
    orders = [_order(view, group, m, state[m.tensor]) for m in members]
    widths = [w * len(o) // group.size for w, o in zip(widths, orders, strict=True)]
    if tuple(rows.shape) != (group.size, sum(widths)):
        raise ShapeError(
            f"Expected rows of shape {(group.size, sum(widths))} for {part!r} of {group.name!r}. "
            f"Got {tuple(rows.shape)}. Make them with unit_rows."
        )
    result = dict(state)
    for member, order, piece in zip(members, orders, torch.split(rows, widths, dim=1), strict=True):
        old = result[member.tensor].detach()
        new = old.movedim(member.dim, 0).clone()
        new[order] = piece.reshape(len(order), *new.shape[1:]).to(new)
        result[member.tensor] = new.movedim(0, member.dim).contiguous()
    return result


def _order(view: View, group: Group, member: Member, tensor: Tensor) -> Tensor:
    """Positions along a member's dim, sorted by unit; all units have equally many."""
    if tensor.is_complex():
        raise StructureError(
            f"Expected real tensors along {group.name!r}. Got {member.tensor!r} of type {tensor.dtype}. "
            "Keep it as its real view (torch.view_as_real)."
        )
    units = torch.from_numpy(unit_positions(view, member.tensor, member.dim, group.name))
    if member.dim >= tensor.ndim or tensor.shape[member.dim] != len(units):
        raise ShapeError(
            f"Expected {member.tensor!r} to have {len(units)} positions along dim {member.dim}. "
            f"Got shape {tuple(tensor.shape)}. Pass a state of the network that was traced."
        )
    counts = torch.bincount(units[units >= 0], minlength=group.size)
    if counts.min() != counts.max() or len(counts) != group.size:
        raise StructureError(
            f"Expected every unit of {group.name!r} to have equally many positions along dim {member.dim} of "
            f"{member.tensor!r}. Got {counts.min()} to {counts.max()}. Mend the view, or leave this group out."
        )
    order = torch.argsort(units, stable=True)
    return order[units[order] >= 0].to(tensor.device)
