"""Where the activations of a group of units are seen in a forward pass, and how they are read off there."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.structure.sites import Execution, captured
from thalweg.structure.symmetry import unit_positions
from thalweg.structure.tree import groups_of
from thalweg.structure.view import Group, View


@dataclass(frozen=True)
class Place:
    """Where a group's activations are seen: what a linear map takes (dim 1 of its weight) or gives (dim 0).

    Args:
        weight: of the map.
        dim: of the weight, along which the units lie.
        axis: of the activations, along which the units lie, counted from the end.
    """

    weight: str
    dim: int
    axis: int


def places_of(group: Group, run: Execution) -> tuple[Place, ...]:
    """Find where the units are read; where no linear map reads them, where they are made.

    Args:
        group: whose units.
        run: the linear maps of a forward pass.

    Returns:
        The places, in the order of the group's members; none where no linear map reads or makes the units.
    """
    reads, makes = [], []
    for member in group.members:
        site = run.site(member.tensor)
        if site is None:
            continue
        place = Place(site.weight, member.dim, -1 - site.kernel_dims)
        if member.dim == 1 and member.role != "producer" and site.groups == 1:
            reads.append(place)
        elif member.dim == 0 and member.role != "consumer":
            makes.append(place)
    return tuple(reads or makes)


def seen_at(
    module: nn.Module, state: Mapping[str, Tensor], inputs: Any, places: Collection[Place]
) -> dict[Place, Tensor]:
    """Run a module once and give the activations at some places; of maps applied several times, the last.

    Args:
        module: any module; it is not changed.
        state: parameters and buffers by name.
        inputs: a batch.
        places: where.

    Returns:
        Place -> activations as the module has them.
    """
    wanted = [{p.weight for p in places if p.dim == dim} for dim in (1, 0)]
    taken, given = captured(module, state, inputs, reads=wanted[0], makes=wanted[1])
    return {place: (taken if place.dim == 1 else given)[place.weight] for place in places}


@dataclass(frozen=True)
class Seen:
    """The activations of a group's units at one place.

    Args:
        values: (batch, units, *positions).
        is_grid: the positions are a feature map or a sequence, of which neighbours may be averaged; not what a
            flattened map or the entries of a head make of them.
    """

    values: Float[Tensor, "batch units *positions"]
    is_grid: bool


def of_units(view: View, group: Group, place: Place, values: Tensor) -> Seen:
    """Read the units of a group off the activations at a place.

    A unit that lies at several entries (the positions of a flattened map, the entries of a head) keeps them as one
    more dim of positions. Entries along other groups have no order of their own and are sorted.

    Args:
        view: the groups.
        group: whose units.
        place: where.
        values: the activations there.

    Returns:
        One column for each unit.
    """
    units = torch.from_numpy(unit_positions(view, place.weight, place.dim, group.name))
    order = torch.argsort(units, stable=True)
    order = order[units[order] >= 0].to(values.device)
    lying = values.movedim(place.axis, 0).index_select(0, order)
    lying = lying.reshape(group.size, -1, *lying.shape[1:])
    if set(groups_of(view.axes[place.weight][place.dim])) - {group.name}:
        lying = lying.sort(dim=1).values
    if lying.ndim == 2:  # no batch at all
        lying = lying.unsqueeze(2)
    is_single = lying.shape[1] == 1
    whole = lying.squeeze(1).movedim(0, 1) if is_single else lying.permute(2, 0, *range(3, lying.ndim), 1)
    return Seen(whole, is_single)
