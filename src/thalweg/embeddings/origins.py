"""origins: bring critical points of a network to the width at which they arise, in many networks at once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.embeddings.minimal import Minimal, minimal_form
from thalweg.embeddings.surgery import module_of_sizes
from thalweg.objective import Objective
from thalweg.structure import View, odd_groups, trace
from thalweg.training.polishing import polish_all

Widths = tuple[int, ...]

TOLERANCES = (1e-2, 1e-4, 1e-6)
"""Tolerances at which units are merged, coarse first. Chosen by us: the coarsest at which the narrow point, polished,
computes the same is taken, so that a copy of small share, which a polish leaves far off, is still seen as one."""


@dataclass(frozen=True)
class Network:
    """One network of a family that differs in widths: its landscape in float64 and what its coordinates mean.

    Args:
        objective: the landscape.
        view: its groups.
        odd: the groups whose units may change sign.
        name: how tables call it.
    """

    objective: Objective
    view: View
    odd: tuple[str, ...]
    name: str

    @classmethod
    def of(cls, objective: Objective, name: str = "") -> "Network":
        """Trace the module of an objective; the name defaults to its widths.

        Raises:
            StructureError: the module cannot be traced.
        """
        if objective.dtype != torch.float64:
            objective = objective.in_dtype(torch.float64)
        inputs = next(iter(objective.batches()))[0]
        view = trace(objective.module, inputs)
        odd = odd_groups(view, objective.module, inputs)
        return cls(objective, view, odd, name or "width " + "-".join(str(g.size) for g in view.groups))

    @property
    def widths(self) -> Widths:
        """Sizes of the groups, in the order of the view."""
        return tuple(g.size for g in self.view.groups)

    def state(self, theta: Float[Tensor, " params"]) -> dict[str, Tensor]:
        """Give the parameters at a point by name."""
        return self.objective.space.parameters(theta)

    def minimal(self, theta: Float[Tensor, " params"], tolerance: float) -> Minimal:
        """Give the minimal form of a point."""
        return minimal_form(self.view, self.state(theta), odd=self.odd, tolerance=tolerance)

    def narrowed(self, widths: Widths) -> "Network":
        """Build the same network at other widths, with the same loss and data."""
        sizes = {g.name: w for g, w in zip(self.view.groups, widths, strict=True)}
        old = self.objective
        module = module_of_sizes(old.module, self.view, sizes)
        return Network.of(
            Objective(
                *(module, old.loss, list(old.batches())),
                reduction=old.reduction,
                batch_weight=old._batch_weight,
                mode=old.mode,
                dtype=torch.float64,
            )
        )


class Family:
    """Networks that differ in widths only; those that are asked for and not there are built.

    Args:
        networks: the networks to begin with.
    """

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = {n.widths: n for n in networks}

    def __iter__(self) -> Iterator[Network]:
        return iter(self._networks.values())

    def of_widths(self, widths: Widths) -> Network:
        """Give the network of these widths."""
        if widths not in self._networks:
            self._networks[widths] = next(iter(self)).narrowed(widths)
        return self._networks[widths]


@dataclass(frozen=True)
class Origin:
    """Where a critical point comes from.

    Args:
        widths: the widths of its minimal form.
        theta: the point there, polished.
        change: largest change of an output from the wide point to this one, relative to the largest output.
    """

    widths: Widths
    theta: Float[Tensor, " params"]
    change: float


def outputs_of(objective: Objective, thetas: Float[Tensor, "points params"]) -> Float[Tensor, "points outputs"]:
    """Compute all outputs on all data at many points, flattened."""
    if not len(thetas):
        return thetas.new_zeros(0, 0)
    try:
        with torch.no_grad():
            pieces = [
                torch.func.vmap(lambda theta, x=inputs: objective.apply(theta, x))(thetas).flatten(1)
                for inputs, _ in objective.batches()
            ]
        return torch.cat(pieces, 1)
    except RuntimeError:  # data-dependent control flow, or an operation without a batching rule
        return torch.stack([objective.outputs(theta).flatten() for theta in thetas])


def origins(
    network: Network, thetas: Float[Tensor, "points params"], family: Family, *, same_function: float, scale: float
) -> list[Origin]:
    """Reduce critical points to the narrowest network in which they are critical points with the same outputs.

    At each tolerance, coarse first, points are brought to their minimal form, and that is polished in the network
    of its widths. It counts if the polish converges and no output on the data has changed.

    Args:
        network: where the points are critical.
        thetas: the points.
        family: the narrower networks.
        same_function: largest change of an output, relative to the scale.
        scale: the size of the outputs.

    Returns:
        One origin for each point; the point itself where nothing can be merged.
    """
    outputs = outputs_of(network.objective, thetas)
    found: dict[int, Origin] = {}
    for tolerance in TOLERANCES:
        reduced: dict[Widths, dict[int, Tensor]] = {}
        for point in [p for p in range(len(thetas)) if p not in found]:
            form = network.minimal(thetas[point], tolerance)
            if form.is_same:
                found[point] = Origin(network.widths, thetas[point], 0.0)
            else:
                narrow = family.of_widths(tuple(form.widths.values()))
                theta = narrow.objective.space.theta(form.state)
                reduced.setdefault(narrow.widths, {})[point] = theta
        for widths, candidates in reduced.items():
            narrow, points = family.of_widths(widths), list(candidates)
            polished = polish_all(narrow.objective, torch.stack(list(candidates.values())))
            changes = (outputs_of(narrow.objective, polished.thetas) - outputs[points]).abs().amax(1) / scale
            for row, point in enumerate(points):
                if polished.status[row] == "converged" and float(changes[row]) <= same_function:
                    found[point] = Origin(widths, polished.thetas[row], float(changes[row]))
    for point in range(len(thetas)):
        found.setdefault(point, Origin(network.widths, thetas[point], 0.0))
    return [found[point] for point in range(len(thetas))]


def widths_by_group(network: Network) -> Mapping[str, int]:
    """Give group -> size."""
    return {g.name: g.size for g in network.view.groups}
