"""repair: give the channels of a merged network the mean and the deviation that they have in both networks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.paths.pair import State
from thalweg.structure.sites import Execution, Site, SiteCall, run_with


@dataclass(frozen=True)
class Repaired:
    """A network whose pre-activations were rescaled and shifted.

    Args:
        state: parameters and buffers, the correction folded into weights and biases.
        corrected: weights of the linear maps that were rescaled.
        unshifted: those among them without a bias, whose means stay as they are.
        left: linear maps that were left alone: they run more than once, or have a bias that is no parameter.
    """

    state: Mapping[str, Tensor]
    corrected: tuple[str, ...]
    unshifted: tuple[str, ...]
    left: tuple[str, ...]


class _Moments:
    """Mean and standard deviation of each channel of a layer's results, over samples and positions."""

    def __init__(self, values: Tensor, kernel_dims: int) -> None:
        channel = values.ndim - 1 - kernel_dims
        others = [dim for dim in range(values.ndim) if dim != channel]
        found = torch.std_mean(values.double(), others, correction=0)
        self.deviation, self.mean = found


def repaired(
    module: nn.Module, run: Execution, state: State, ends: Sequence[State], at: float, inputs: Any
) -> Repaired:
    """Correct a merged network, layer after layer in one forward pass; the last linear map stays.

    Of every channel of a pre-activation z: z ← (z - μ)·σ*/σ + μ*, where μ* and σ* are (1-t)·A + t·B of the means and
    deviations in both networks. A channel that does not vary keeps its scale.

    Args:
        module: the architecture, in eval mode.
        run: its linear maps.
        state: the merged network.
        ends: A, and B with its units in A's order.
        at: t, where it was merged.
        inputs: one batch.

    Returns:
        The corrected network, a plain state.

    **Source:** REPAIR, Jordan et al. 2022 (arXiv 2211.08403), equation 3 and section 5. Departure: folded into
    weights and biases, so that no layer is added; a layer without a bias is rescaled only.
    """
    sites = {s.weight: s for s in run.sites[:-1] if s.calls == 1 and not s.has_foreign_bias}
    left = tuple(s.weight for s in run.sites[:-1] if s.weight not in sites)
    aims = [_moments(module, end, inputs, sites) for end in ends]
    found: dict[str, Tensor] = {}

    def handler(call: SiteCall) -> Tensor | None:
        name = call.site.weight
        if name not in sites:
            return None
        now = _Moments(call.apply(call.weight, call.bias), call.site.kernel_dims)
        one, two = (aim[name] for aim in aims)
        deviation = torch.lerp(one.deviation, two.deviation, at)
        scale = torch.where(now.deviation > 0, deviation / now.deviation.clamp(min=1e-30), torch.ones_like(deviation))
        weight = call.weight * scale.reshape(-1, *[1] * (call.weight.ndim - 1))
        found[name] = weight.to(call.weight)
        if call.site.bias is None or call.bias is None:
            return call.apply(found[name], None)
        bias = (call.bias - now.mean) * scale + torch.lerp(one.mean, two.mean, at)
        found[call.site.bias] = bias.to(call.bias)
        return call.apply(found[name], found[call.site.bias])

    run_with(module, state, inputs, handler)
    unshifted = tuple(name for name, site in sites.items() if site.bias is None)
    return Repaired({**state, **found}, tuple(sites), unshifted, left)


def _moments(module: nn.Module, state: State, inputs: Any, sites: Mapping[str, Site]) -> dict[str, _Moments]:
    found: dict[str, _Moments] = {}

    def handler(call: SiteCall) -> Tensor | None:
        if call.site.weight not in sites:
            return None
        result = call.apply(call.weight, call.bias)
        found[call.site.weight] = _Moments(result, call.site.kernel_dims)
        return result

    run_with(module, state, inputs, handler)
    return found
