"""A path along a map of units: the units of one group run along an arc in its latent space."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.errors import NumericalError
from thalweg.matching.units import unit_rows, with_unit_rows
from thalweg.paths.flow_model import UnitMap
from thalweg.paths.leg import Blend
from thalweg.paths.path import Path
from thalweg.space import Space
from thalweg.structure import Group, View

_ROUND_TRIP = 1e-5
"""Largest error of ν⁻¹∘ν, in standard deviations, that a path is computed with in float32; above it, in float64."""


@dataclass(frozen=True)
class FlowLeg:
    """Butterflies of one group move as ν⁻¹[cos(πs/2)·ν(X) + sin(πs/2)·ν(Y)], all other entries on a line.

    At s = 0 and 1 it gives the ends themselves. The step to the next point is as small as `error`.

    Args:
        unit_map: ν.
        view: the groups.
        start: every parameter at s = 0.
        end: those at s = 1.
    """

    unit_map: UnitMap
    view: View = field(repr=False)
    start: Mapping[str, Tensor] = field(repr=False)
    end: Mapping[str, Tensor] = field(repr=False)

    @property
    def label(self) -> str:
        """What moves here."""
        return f"units of {self.unit_map.group} through {self.unit_map.shape.kind}"

    @cached_property
    def error(self) -> float:
        """Largest |ν⁻¹(ν(X)) - X| over the units of both ends, in standard deviations."""
        return max(self._map.round_trip(rows) for rows in self._rows)

    def parameters(self, s: float) -> Mapping[str, Tensor]:
        """Give every parameter of the space at s."""
        if s in (0.0, 1.0):
            return self.end if s else self.start
        with torch.no_grad():
            rows = self._map.between(*self._latents, s)
            between = {name: torch.lerp(value, self.end[name], s) for name, value in self.start.items()}
            return with_unit_rows(self.view, self._group, between, "butterfly", rows.double())

    def moving(self) -> Mapping[str, Blend] | None:
        """Give None: the parameters are no blends."""
        return None

    def reversed(self) -> "FlowLeg":
        """Give s -> parameters(1 - s)."""
        return FlowLeg(self.unit_map, self.view, self.end, self.start)

    @cached_property
    def _group(self) -> Group:
        return self.view.group(self.unit_map.group)

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        first, last = (unit_rows(self.view, self._group, end, "butterfly") for end in (self.start, self.end))
        return first, last

    @cached_property
    def _map(self) -> UnitMap:
        off = max(self.unit_map.round_trip(rows) for rows in self._rows)
        return self.unit_map if off <= _ROUND_TRIP else self.unit_map.to(torch.float64)

    @cached_property
    def _latents(self) -> tuple[Tensor, Tensor]:
        first, last = (self._map.latent(rows) for rows in self._rows)
        return first, last


def flow_path(
    space: Space,
    view: View,
    unit_map: UnitMap,
    a: Float[Tensor, " params"],
    b: Float[Tensor, " params"],
    *,
    start_buffers: Mapping[str, Tensor] | None = None,
    end_buffers: Mapping[str, Tensor] | None = None,
) -> Path:
    """Connect two nets through a map of units that was fitted on others: ν⁻¹[cos(πt/2)·ν(X) + sin(πt/2)·ν(Y)].

    X and Y are the butterflies of the map's group. What belongs to no unit of it (the output bias, other layers)
    goes on a straight line.

    Args:
        space: the coordinates.
        view: the groups.
        unit_map: ν, fitted by `fit_flow` or `fit_bijection`, or loaded.
        a: the start.
        b: the end.
        start_buffers: buffers of the network at the start, by name.
        end_buffers: those at the end.

    Returns:
        The path, of one leg, whose `error` is that of ν⁻¹∘ν. Where float32 gives more than 1e-5, float64 is used.

    Raises:
        ShapeError: a point does not fit the space, or units are not what the map was fitted on.
        StructureError: the view has no such group.
        NumericalError: ν is not finite on these units.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 3.3. The output bias is on a line here; theirs
    is the mean over all nets.

    Example:
        >>> from torch import nn
        >>> from thalweg.paths.flow_model import identity_map
        >>> net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> view = View.of_spec(net, {"hidden": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]})
        >>> rows = unit_rows(view, view.groups[0], dict(net.named_parameters()), "butterfly")
        >>> unit_map = identity_map("hidden", rows, hidden=(8,), generator=torch.Generator().manual_seed(0))
        >>> space = Space.of(net)
        >>> a, b = torch.zeros(space.num_params), torch.ones(space.num_params)
        >>> path = flow_path(space, view, unit_map, a, b)
        >>> bool((path.at(1.0) == b).all())
        True
    """
    leg = FlowLeg(unit_map, view, space.parameters(a), space.parameters(b))
    if not leg.error < 1:
        raise NumericalError(
            f"Expected a map that can be inverted on these units. Got an error of {leg.error:.3g} standard "
            "deviations. Fit it on nets like these, or for fewer steps."
        )
    return Path(space, (leg,), (), start_buffers or {}, end_buffers or {})
