"""Backbone: where a network is cut, and which of the layers behind the cut read what lies before it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from thalweg.errors import ConfigError, StructureError
from thalweg.paths.pair import State
from thalweg.structure.sites import Execution, Site, SiteCall, run_with


@dataclass(frozen=True)
class Cut:
    """A network cut before one of its linear maps.

    Args:
        own: the linear maps behind the cut, in the order of execution.
        shared: parameters and buffers that are used before the cut, or never.
    """

    own: tuple[Site, ...]
    shared: frozenset[str]

    @property
    def weights(self) -> frozenset[str]:
        """Weights of the linear maps behind the cut."""
        return frozenset(site.weight for site in self.own)


def cut_before(module: nn.Module, run: Execution, own_layers: int) -> Cut:
    """Cut a network so that its last layers lie behind the cut.

    Args:
        module: the network.
        run: what it executes.
        own_layers: how many linear maps lie behind the cut. What is used after the first of them lies there too.

    Returns:
        The cut.

    Raises:
        ConfigError: there are not so many, or none would be left before the cut.
        StructureError: a weight is used on both sides.
    """
    total = len(run.sites)
    if not 1 <= own_layers < total:
        raise ConfigError(
            f"Expected from 1 to {total - 1} own layers of {total} linear maps. Got {own_layers}. "
            "Leave one at least to the backbone."
        )
    before, own = run.sites[: total - own_layers], run.sites[total - own_layers :]
    place = {name: k for k, name in enumerate(run.order)}
    last = max(place[site.weight] for site in before)
    tied = [site.weight for site in own if place[site.weight] < last]
    if tied:
        raise StructureError(
            f"Expected layers whose weights are theirs alone. Got {', '.join(tied)}, used before layer "
            f"{own[0].weight} too. Take another number of own layers, or untie them."
        )
    behind = set(run.order[place[own[0].weight] :])
    names = [n for n, _ in (*module.named_parameters(), *module.named_buffers())]
    return Cut(own, frozenset(n for n in names if n not in behind))


def mixed(cut: Cut, backbone: State, member: State) -> dict[str, Tensor]:
    """Give a network that is the backbone before the cut and a member behind it."""
    return {**member, **{name: backbone[name] for name in cut.shared if name in backbone}}


def readers(module: nn.Module, cut: Cut, backbone: State, member: State, inputs: Any) -> tuple[Site, ...]:
    """Find the layers behind the cut that read the backbone's features, directly or past other layers.

    The network is run as `mixed`, with every layer behind the cut giving what it gives in the member. What a layer
    then takes is what it takes in the member, bit for bit, unless it reads the backbone. So skip connections are
    found as well, whatever they are made of.

    Args:
        module: the network, in eval mode.
        cut: where it is cut.
        backbone: the network whose features are used.
        member: the network that goes on from there.
        inputs: a few samples.

    Returns:
        The layers that must be fitted, in the order of execution; none if both compute the same features.

    Raises:
        StructureError: features reach the outputs past all layers behind the cut, or a layer that reads them
            runs more than once.
    """
    taken: dict[tuple[str, int], Tensor] = {}
    given: dict[tuple[str, int], Tensor] = {}
    own, calls = cut.weights, {site.weight: site for site in cut.own}

    def record(call: SiteCall) -> Tensor | None:
        if call.site.weight not in own:
            return None
        key = (call.site.weight, call.site.calls)
        result = call.apply(call.weight, call.bias)
        taken[key], given[key] = call.inputs.clone(), result.clone()
        return result

    found: dict[str, None] = {}

    def replay(call: SiteCall) -> Tensor | None:
        if call.site.weight not in own:
            return None
        key = (call.site.weight, call.site.calls)
        if not torch.equal(call.inputs, taken[key]):
            found.setdefault(call.site.weight)
        return given[key].clone()

    wanted = run_with(module, member, inputs, record)
    reached = run_with(module, mixed(cut, backbone, member), inputs, replay)
    if not _is_same(wanted, reached):
        raise StructureError(
            f"Expected a cut that all features pass through. Got {cut.own[0].weight}, past which features reach the "
            "outputs without a linear map. Take another number of own layers."
        )
    several = [name for name in found if calls[name].calls > 1]
    if several:
        raise StructureError(
            f"Expected layers that run once. Got {', '.join(several)}, which read the backbone and run "
            f"{calls[several[0]].calls} times. Take another number of own layers."
        )
    return tuple(site for site in cut.own if site.weight in found)


def _is_same(one: Any, two: Any) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(two), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
