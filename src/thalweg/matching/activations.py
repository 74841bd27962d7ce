"""How alike units of two networks act: correlations of their activations on the same inputs."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.matching.transport import correlations
from thalweg.precision import copied, placed
from thalweg.structure import Group, View
from thalweg.structure.places import Place, places_of, seen_at
from thalweg.structure.sites import execution
from thalweg.structure.symmetry import unit_positions
from thalweg.structure.tree import IntArray, gather, groups_of

Similarity = Callable[[Group, Mapping[str, IntArray], Collection[str]], Tensor | None]


def activation_similarity(
    view: View, a: Mapping[str, Tensor], b: Mapping[str, Tensor], module: nn.Module, inputs: Any
) -> Similarity:
    """Run two networks on the same inputs and give a function that compares the units of a group.

    Activations are what the maps that read the units take, or, where no linear map reads them, what those that make
    them give. All other dims, and the several positions of a unit, are samples.

    Args:
        view: the groups.
        a: the first network, parameters and buffers by name.
        b: the second.
        module: the architecture; it is copied and run in eval mode.
        inputs: one batch.

    Returns:
        (group, permutations of b, settled groups) -> correlation of every unit of a with every one of the permuted
        b, averaged over the places; None where no linear map makes or reads the units. Positions along groups that
        are not settled are sorted.

    **Source:** Li et al. 2015 (arXiv 1511.07543); Ainsworth et al. 2022 (arXiv 2209.04836), section 3.1.
    """
    reference = next(t for t in a.values() if t.is_floating_point())
    module = copied(module, device=reference.device, dtype=reference.dtype).eval()
    inputs = placed(inputs, device=reference.device, dtype=reference.dtype)
    run = execution(module, inputs)
    places = {g.name: places_of(g, run) for g in view.groups}
    everywhere = {place for found in places.values() for place in found}
    ours, theirs = (seen_at(module, state, inputs, everywhere) for state in (a, b))

    def similarity(group: Group, permutations: Mapping[str, IntArray], settled: Collection[str]) -> Tensor | None:
        found = []
        for place in places[group.name]:
            order = torch.from_numpy(gather(view.axes[place.weight][place.dim], permutations))
            moved = theirs[place].index_select(place.axis, order.to(reference.device))
            found.append(correlations(*(_rows(view, group, place, x, settled) for x in (ours[place], moved))))
        return torch.stack(found).mean(0) if found else None

    return similarity


def _rows(view: View, group: Group, place: Place, values: Tensor, settled: Collection[str]) -> Tensor:
    """One row per unit, one column per sample."""
    tree = view.axes[place.weight][place.dim]
    units = torch.from_numpy(unit_positions(view, place.weight, place.dim, group.name))
    order = torch.argsort(units, stable=True)
    order = order[units[order] >= 0].to(values.device)
    rows = (
        values.movedim(place.axis, 0)[order].to("cpu", torch.float64).reshape(group.size, -1, *_rest(values, place))
    )
    if set(groups_of(tree)) - {group.name} - set(settled):
        rows = rows.sort(dim=1).values
    return rows.flatten(1)


def _rest(values: Tensor, place: Place) -> list[int]:
    axis = values.ndim + place.axis
    return [size for dim, size in enumerate(values.shape) if dim != axis]
