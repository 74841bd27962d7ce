"""The centre of an arc: the mean over the units of both networks, parameter by parameter."""

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from thalweg.structure import View
from thalweg.structure.symmetry import unit_positions


def centres(
    view: View, one: Mapping[str, Tensor], two: Mapping[str, Tensor], names: Collection[str]
) -> dict[str, Tensor]:
    """Give the centre μ of each parameter: its mean over the units of both networks, in every unit's place.

    The units are those that the parameter makes; of one that makes none, those that it reads; of one that does
    neither (an output bias), the midpoint of the two, entry by entry. Where none of the parameters makes units (the
    last layer by itself), the units that it reads stand still, and its samples are its rows, biases included: all
    outputs share the centre, which a softmax does not see.

    Args:
        view: the groups.
        one: parameters of the first network.
        two: those of the second.
        names: which parameters.

    Returns:
        name -> μ, of the parameter's shape.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 3.1: μ is the mean of the distribution of
    units, here of both networks together, as in the authors' code.
    """
    middles = {name: (one[name] + two[name]) / 2 for name in names}
    if all(role == "consumer" for name in names for role in view.members_of(name).values()):
        return {name: m.mean(dim=0, keepdim=True).expand_as(m).contiguous() for name, m in middles.items()}
    return {name: _centre(view, name, middle) for name, middle in middles.items()}


def _centre(view: View, name: str, middle: Tensor) -> Tensor:
    members = view.members_of(name)
    for role in ("producer", "both", "consumer"):
        for (dim, group), own in members.items():
            if own == role:
                return _averaged(middle, dim, unit_positions(view, name, dim, group))
    return middle


def _averaged(middle: Tensor, dim: int, units: np.ndarray) -> Tensor:
    """Average along a dim over units, each place within a unit apart; what belongs to no unit stays."""
    places = np.flatnonzero(units >= 0)
    order = places[np.argsort(units[places], kind="stable")]
    count = int(units.max()) + 1
    if len(order) % count:
        return middle
    rows = torch.from_numpy(order.reshape(count, -1)).to(middle.device)
    along = middle.movedim(dim, 0)
    result = along.clone()
    result[rows] = along[rows].mean(dim=0, keepdim=True).expand_as(along[rows])
    return result.movedim(0, dim).contiguous()
