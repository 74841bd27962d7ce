"""The pieces of a lift in depth: where an activation is affine, and the layer that acts as the identity there."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from thalweg.errors import ConfigError, StructureError

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Affine = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
"""Activations by name; any other one is given as a module."""

_ONSETS = (0.0, 10.0, 40.0)
"""From where an activation may be affine: ReLU, leaky ReLU, ELU from 0, GELU to rounding from 9 (1 - Φ(9) = 1e-19),
SiLU from 37 (e^-37 = 1e-16), softplus from 20 (where PyTorch returns its argument)."""

_GRID = 257
"""Points of a range at which an activation is tried, chosen by us; the outputs are compared besides."""

_ROUNDINGS = 16
"""How many roundings an activation may be off its affine part and still count as affine, chosen by us."""


@dataclass(frozen=True, eq=False)
class Expansion:
    """An activation about a point: σ(shift + ε h) ≈ values + slopes · ε h for every unit.

    Args:
        epsilon: ε.
        shift: where every unit is expanded.
        values: σ(shift).
        slopes: σ'(shift).
        is_affine: the expansion is σ itself on the range of the data, to rounding.
    """

    epsilon: float
    shift: Float[Tensor, " units"]
    values: Float[Tensor, " units"]
    slopes: Float[Tensor, " units"]
    is_affine: bool

    @property
    def needs_bias(self) -> bool:
        """The expansion has a constant part, which the old layer's bias must take away."""
        return bool(self.shift.any()) or bool(self.values.any())


@dataclass(frozen=True, eq=False)
class Span:
    """The range of every input unit of a layer over the data.

    Args:
        low: least value of each unit.
        high: greatest value.
    """

    low: Float[Tensor, " units"]
    high: Float[Tensor, " units"]

    @property
    def size(self) -> Float[Tensor, " units"]:
        """Largest absolute value of each unit; 1 for one that is always zero."""
        size = torch.maximum(self.low.abs(), self.high.abs())
        return torch.where(size > 0, size, torch.ones_like(size))


def activation_of(activation: str | nn.Module, like: Tensor) -> nn.Module:
    """Give an activation by its name, or a user's own, on the device and in the type of a weight.

    Raises:
        ConfigError: an unknown name.
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"Expected an activation among {', '.join(ACTIVATIONS)}, or a module. Got {activation!r}. Choose one."
            )
        return ACTIVATIONS[activation]()
    return copy.deepcopy(activation).to(device=like.device, dtype=like.dtype)


def expand(
    sigma: nn.Module, span: Span, shift: Float[Tensor, " units"], epsilon: float, *, is_padded: bool
) -> Expansion:
    """Expand an activation about a point and see whether it is affine on the whole range.

    Args:
        sigma: the activation; it acts on each entry by itself.
        span: range of every unit.
        shift: where every unit is expanded.
        epsilon: ε.
        is_padded: zeros occur beside the data (padded places with a bias).

    Returns:
        The expansion.
    """
    values, slopes = _with_slope(sigma, shift[None])
    low, high = (span.low.clamp(max=0), span.high.clamp(min=0)) if is_padded else (span.low, span.high)
    steps = torch.linspace(0, 1, _GRID, dtype=shift.dtype, device=shift.device)[:, None]
    moved = epsilon * (low + steps * (high - low))
    found, found_slopes = _with_slope(sigma, shift + moved)
    eps = _ROUNDINGS * torch.finfo(shift.dtype).eps
    close = (found - values - slopes * moved).abs() <= eps * (shift + moved).abs().amax(dim=0) * slopes.abs()
    straight = (found_slopes - slopes).abs() <= eps * slopes.abs()
    return Expansion(epsilon, shift, values[0], slopes[0], bool((close & straight & (slopes != 0)).all()))


def _with_slope(sigma: nn.Module, points: Tensor) -> tuple[Tensor, Tensor]:
    """σ and σ' at points of shape (points, units)."""
    with torch.enable_grad():
        points = points.detach().clone().requires_grad_()
        values = sigma(points)
        (slopes,) = torch.autograd.grad(values.sum(), points)
    return values.detach(), slopes


def affine_range(sigma: nn.Module, span: Span, margin: float, *, has_bias: bool, is_padded: bool) -> Expansion | None:
    """Find a shift that puts the whole range where the activation is affine, to rounding.

    Args:
        sigma: the activation.
        span: range of every unit.
        margin: how far from the end of the affine part the range stays, in units of each unit's size.
        has_bias: the layer has a bias; without one, data that are positive anyway are left where they are.
        is_padded: zeros occur beside the data.

    Returns:
        The expansion with ε = 1, or None for an activation such as tanh, which is affine nowhere.
    """
    if not has_bias and bool((span.low > 0).all()):
        # Expanded at the far end, since at 0 itself σ' is a matter of convention; then read as a line through 0.
        end = expand(sigma, Span(span.low - span.high, torch.zeros_like(span.high)), span.high, 1.0, is_padded=False)
        rounding = _ROUNDINGS * torch.finfo(end.values.dtype).eps * end.values.abs()
        if end.is_affine and bool(((end.values - end.slopes * span.high).abs() <= rounding).all()):
            zero = torch.zeros_like(span.high)
            return Expansion(1.0, zero, zero, end.slopes, is_affine=True)
    for onset in _ONSETS:
        shift = onset + margin * span.size - span.low.clamp(max=0)
        found = expand(sigma, span, shift, 1.0, is_padded=is_padded)
        if found.is_affine:
            return found
    return None


def require_affine_layer(layer: nn.Module, name: str) -> Affine:
    """See that a layer is one that can be deepened.

    Raises:
        StructureError: another kind, a weight that is a function of others, or padding that cannot be moved.
    """
    if type(layer) not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        raise StructureError(
            f"Expected {name!r} to be an nn.Linear or an nn.Conv1d, 2d, 3d. Got {type(layer).__name__}. "
            "Name such a layer, or remove its parametrisation first."
        )
    found = cast("Affine", layer)
    if found._parameters.get("weight") is None:
        raise StructureError(
            f"Expected {name!r} to have a weight of its own. Got one made of other tensors. "
            "Remove its pruning or weight norm first."
        )
    if found.bias is not None and found.bias.requires_grad != found.weight.requires_grad:
        raise StructureError(
            f"Expected weight and bias of {name!r} both trainable or both frozen. Got one of each. Free both."
        )
    if not isinstance(found, nn.Linear):
        padding_of(found, name)
    return found


def padding_of(layer: Convolution, name: str) -> tuple[int, ...]:
    """Give the padding of a convolution as numbers.

    Raises:
        StructureError: "same" padding with another width on either side.
    """
    if not isinstance(layer.padding, str):
        return tuple(layer.padding)
    spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "valid":
        return (0,) * len(spans)
    if any(s % 2 for s in spans):
        raise StructureError(
            f"Expected {name!r} to be padded alike on both sides. Got 'same' with a kernel of {layer.kernel_size}. "
            "Pad in a layer of its own."
        )
    return tuple(s // 2 for s in spans)


def inserted_layer(layer: Affine, name: str, *, bias: bool) -> Affine:
    """Build the new layer: in place of the old one's inputs and padding, as many units out as in; not yet filled."""
    empty: Callable[..., Affine] = skip_init  # draws nothing at random
    place: dict[str, Any] = {"bias": bias, "device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        new: Affine = empty(nn.Linear, layer.in_features, layer.in_features, **place)
    else:
        # As many groups as the old layer: only units that meet in it may mix, or criticality would be lost.
        place |= {"groups": layer.groups, "padding": padding_of(layer, name), "padding_mode": layer.padding_mode}
        one: Any = (1,) * len(layer.kernel_size)
        new = empty(type(layer), layer.in_channels, layer.in_channels, one, **place)
    return new.requires_grad_(layer.weight.requires_grad)


def without_padding(layer: Affine) -> None:
    """Take away a convolution's padding, in place: the layer before it pads."""
    if not isinstance(layer, nn.Linear):
        layer.padding, layer.padding_mode = (0,) * len(layer.kernel_size), "zeros"
        layer._reversed_padding_repeated_twice = [0] * (2 * len(layer.kernel_size))


def fill(new: Affine, old: Affine, layer: Affine, expansion: Expansion) -> None:
    """Write the weights: new = (ε·identity, shift); old = W / (ε slopes), its bias less what the values add.

    Args:
        new: the inserted layer, to be filled.
        old: the layer behind it, to be filled.
        layer: the layer as it was.
        expansion: of the activation between the two.
    """
    with torch.no_grad():
        new.weight.zero_()
        groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        units = new.weight.shape[0]
        inner = torch.arange(units, device=new.weight.device) % (units // groups)
        new.weight[torch.arange(units, device=new.weight.device), inner] = expansion.epsilon
        old.weight.copy_(layer.weight / along_inputs(expansion.epsilon * expansion.slopes, layer))
        if new.bias is not None:
            new.bias.copy_(expansion.shift)
        if old.bias is not None and layer.bias is not None:
            constant = old.weight * along_inputs(expansion.values, layer)
            old.bias.copy_(layer.bias - constant.flatten(1).sum(dim=1))


def along_inputs(values: Float[Tensor, " units"], layer: Affine) -> Tensor:
    """Spread a number for each input unit over a weight, shape (out, in of a group, 1, …) or (1, in)."""
    if isinstance(layer, nn.Linear):
        return values[None]
    each = values.reshape(layer.groups, -1).repeat_interleave(layer.out_channels // layer.groups, dim=0)
    return each.reshape(*each.shape, *[1] * len(layer.kernel_size))


def backed(layer: Affine, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Carry gradients of a layer back through its weight: Wᵀ ∂R/∂W, and the sum of W over what each unit feeds.

    Args:
        layer: the layer, with its weight.
        slopes: ∂R/∂W.

    Returns:
        (units, units of a group): Wᵀ ∂R/∂W summed over outputs and kernel; and W as (groups, out, in of a group),
        summed over the kernel, to be multiplied by ∂R/∂b.
    """
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    weight, slope = (t.detach().reshape(groups, t.shape[0] // groups, t.shape[1], -1) for t in (layer.weight, slopes))
    return torch.einsum("goik,gojk->gij", weight, slope).flatten(0, 1), weight.sum(dim=-1)


def tolerance_of(dtype: torch.dtype) -> float:
    """√eps of a type: with σ'' = 0, truncation ε² against rounding eps/ε reaches eps^(2/3): this is met with room."""
    return math.sqrt(torch.finfo(dtype).eps)


def require_inert(sigma: nn.Module, span: Span, expansion: Expansion) -> None:
    """See that trainable parameters of an activation do nothing on the range of the data (PReLU where positive).

    Raises:
        StructureError: they do: the gradient along them would not vanish at a critical point.
    """
    parameters = [p for p in sigma.parameters() if p.requires_grad]
    if not parameters:
        return
    with torch.enable_grad():
        ends = torch.stack([expansion.shift + expansion.epsilon * h for h in (span.low, span.high)])
        slopes = torch.autograd.grad(sigma(ends).sum(), parameters, allow_unused=True)
    if any(s is not None and bool(s.any()) for s in slopes):
        raise StructureError(
            f"Expected an activation whose trainable parameters do nothing on the data. Got {type(sigma).__name__}, "
            "which would not be critical along them. Freeze them (requires_grad_(False))."
        )
