"""How far a relaxed network is from the convolutional ones: locality and weight sharing, measured and masked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.errors import ConfigError, ShapeError
from thalweg.lifting.layers import LiftedLayer
from thalweg.lifting.lifting import Lifting, require_shape

# Entries of a weight that are copied at once. Chosen by us: 512 KB in double, which stays in the cache (the sum of
# squares of 37.8 million weights takes 0.06 s, and 0.71 s with 2**22 entries).
_AT_ONCE = 2**16


@dataclass(frozen=True)
class Deviation:
    """How far a point is from the subspace of convolutional networks.

    Args:
        lifted: δ over weights and biases of the lifted layers, ‖θ_off-local‖ / ‖θ‖; in [0, 1].
        total: δ over all parameters, the paper's; in [0, 1].
        by_layer: δ of each lifted layer, by name.
        sharing: violation of weight sharing: the variance of local weights about the mean of those that are tied,
            Σ(w - mean)² / Σw², over all lifted layers; in [0, 1], 0 if they are shared.
        sharing_by_layer: the same of each lifted layer.
        distance: Euclidean distance to the nearest convolutional network, over the norm of all parameters.
    """

    lifted: float
    total: float
    by_layer: Mapping[str, float]
    sharing: float
    sharing_by_layer: Mapping[str, float]
    distance: float


def deviation(lifting: Lifting, state: Mapping[str, Tensor]) -> Deviation:
    """Measure how far a relaxed network is from the convolutional ones.

    Local are the weights that a convolution of the same geometry would have, all biases, and all layers that are not
    lifted. With the padding kept as a layer, weights that read it through a tap are local as well, as in the paper's
    code; folded, they do not exist, so that the two forms of one net have different δ.

    Args:
        lifting: the map.
        state: name -> tensor of the lifted network. Its trainable parameters count, and all of lifted layers, frozen
            or not; in double precision.

    Returns:
        The measures.

    Raises:
        ShapeError: a parameter is missing or has another shape.

    **Source:** δ: dascoli2019finding (arXiv 1906.06766), section 4.3, over the parameters that its code masks. Weight
    sharing, which its text speaks of but does not measure, and the distance are ours.
    """
    names = lifted_names(lifting)
    firsts = [f"{layer.name}." if layer.name else "" for layer in lifting.layers]
    own = [
        f"{f}{layer.inner}{k}" for f, layer in zip(firsts, lifting.layers, strict=True) for k in ("weight", "bias")
    ]
    rows: dict[str, _Squares] = {layer.name: _Squares() for layer in lifting.layers}
    whole = 0.0
    for name in dict.fromkeys([*lifting.lifted_space.names, *(name for name in own if name in state)]):
        if name not in state:
            raise ShapeError(
                f"Expected a parameter {name!r}. Got {len(state)} others. Use a state of the lifted net."
            )
        tensor = state[name].detach()
        square = _square(tensor)
        whole += square
        if name not in names:
            continue
        layer, kind = names[name]
        require_shape(name, tensor, layer.weight_shape if kind == "weight" else layer.bias_shape)
        row = rows[layer.name]
        row.whole += square
        if kind == "weight":
            row.off_local, row.tied, row.spread = _squares(layer, tensor)
        else:
            row.spread_bias = _variation(tensor.reshape(layer.geometry.out_channels, -1).double())
    off = sum((row.off_local for row in rows.values()), 0.0)
    spread_weights = sum((row.spread for row in rows.values()), 0.0)
    away = off + spread_weights + sum((row.spread_bias for row in rows.values()), 0.0)
    return Deviation(
        lifted=_root(off, sum((row.whole for row in rows.values()), 0.0)),
        total=_root(off, whole),
        by_layer={name: _root(row.off_local, row.whole) for name, row in rows.items()},
        sharing=_ratio(spread_weights, sum((row.tied for row in rows.values()), 0.0)),
        sharing_by_layer={name: _ratio(row.spread, row.tied) for name, row in rows.items()},
        distance=_root(away, whole),
    )


def masked(
    lifting: Lifting, state: Mapping[str, Tensor], *, keep: Literal["local", "off-local"]
) -> dict[str, Tensor]:
    """Set the off-local weights of all lifted layers to 0, or the local ones.

    Args:
        lifting: the map.
        state: name -> tensor of the lifted network.
        keep: what stays. Biases and layers that are not lifted stay in any case.

    Returns:
        The state; what has no weight to mask is the same object.

    Raises:
        ConfigError: another word.
        ShapeError: a lifted weight has another shape than its layer.

    **Source:** dascoli2019finding (arXiv 1906.06766), figure 5.
    """
    if keep not in ("local", "off-local"):
        raise ConfigError(f"Expected to keep 'local' or 'off-local'. Got {keep!r}. Choose one of them.")
    names, found = lifted_names(lifting), dict(state)
    for name, tensor in state.items():
        layer, kind = names.get(name, (None, "bias"))
        if layer is None or kind == "bias":
            continue
        require_shape(name, tensor, layer.weight_shape)
        whole = tensor.detach().contiguous()
        masked_weight = torch.zeros_like(whole) if keep == "local" else whole.clone()
        for (_, own), (_, theirs) in zip(layer.ties(masked_weight), layer.ties(whole), strict=True):
            own.copy_(theirs if keep == "local" else torch.zeros_like(theirs))
        found[name] = masked_weight
    return found


def filter_image(
    lifting: Lifting, state: Mapping[str, Tensor], layer: str, channel: int, position: tuple[int, ...]
) -> Float[Tensor, "channels *size"]:
    """Give what one unit of a lifted layer reads: its weights as an image of the size of the layer's inputs.

    Args:
        lifting: the map.
        state: name -> tensor of the lifted network.
        layer: name of the convolution.
        channel: output channel of the unit.
        position: its output position.

    Returns:
        The weights, 0 where the unit has none.

    Raises:
        ShapeError: no such layer, channel or position, or its weight is missing or has another shape.

    **Source:** the filters of dascoli2019finding (arXiv 1906.06766), figures 6, 7 and 12.
    """
    own = next((found for found in lifting.layers if layer in found.names), None)
    geometry = own.geometry if own is not None else None
    if own is None or geometry is None:
        raise ShapeError(f"Expected a lifted layer of {[x.name for x in lifting.layers]}. Got {layer!r}. Name one.")
    inside = len(position) == len(geometry.output_size) and all(
        0 <= p < n for p, n in zip(position, geometry.output_size, strict=True)
    )
    if not (inside and 0 <= channel < geometry.out_channels):
        raise ShapeError(
            f"Expected a channel below {geometry.out_channels} and a position within {geometry.output_size}. Got "
            f"{channel} and {position}. Choose a unit of {layer!r}."
        )
    name = f"{layer}.{own.inner}weight" if layer else f"{own.inner}weight"
    if name not in state:
        raise ShapeError(f"Expected a parameter {name!r}. Got {len(state)} others. Use a state of the lifted net.")
    weight = state[name].detach()
    require_shape(name, weight, own.weight_shape)
    if own.kind == "fc":
        rows = weight.reshape(
            geometry.out_channels, *geometry.output_size, geometry.in_channels, *geometry.input_size
        )
        return rows[(channel, *position)].clone()
    image = weight.new_zeros(geometry.in_channels, *geometry.input_size)
    ins = geometry.in_channels // geometry.groups
    first = channel // (geometry.out_channels // geometry.groups) * ins
    kernel = weight[(*position, channel)].reshape(geometry.taps, ins)
    for box in geometry.boxes():
        steps = [p - start for p, start in zip(position, box.position, strict=True)]
        if all(0 <= step < n for step, n in zip(steps, box.size, strict=True)):
            pixel = [u + step * s for u, step, s in zip(box.pixel, steps, geometry.stride, strict=True)]
            image[first : first + ins].view(ins, -1)[:, _flat(pixel, geometry.input_size)] = kernel[box.tap]
    return image


def lifted_names(lifting: Lifting) -> dict[str, tuple[LiftedLayer, Literal["weight", "bias"]]]:
    """Say which tensors of a lifted network belong to which lifted layer; every name of a layer counts."""
    found: dict[str, tuple[LiftedLayer, Literal["weight", "bias"]]] = {}
    for layer in lifting.layers:
        for own in layer.names:
            prefix = f"{own}.{layer.inner}" if own else layer.inner
            found[f"{prefix}weight"] = layer, "weight"
            found[f"{prefix}bias"] = layer, "bias"
    return found


@dataclass
class _Squares:
    """Sums of squares of one layer."""

    whole: float = 0.0
    off_local: float = 0.0
    tied: float = 0.0
    spread: float = 0.0
    spread_bias: float = 0.0


def _squares(layer: LiftedLayer, weight: Tensor) -> tuple[float, float, float]:
    """Sum the squares of off-local weights, of local ones, and of local ones about the mean of those tied.

    The off-local ones are summed with the local ones set to 0 in a copy of a few channels at a time: a difference of
    two sums would be 0 to rounding only.
    """
    weight, geometry = weight.contiguous(), layer.geometry
    tied = spread_squares = 0.0
    for _, view in layer.ties(weight):
        if not view.numel():
            continue
        own = view.flatten(3).double()
        tied += float(own.square().sum())
        spread_squares += _variation(own)
    if layer.kind == "local":
        return 0.0, tied, spread_squares
    off = 0.0
    outs = geometry.out_channels // geometry.groups
    rows = weight.reshape(geometry.groups, outs, geometry.positions, -1)
    step = max(1, _AT_ONCE // (geometry.groups * geometry.positions * geometry.in_channels * geometry.pixels))
    for start in range(0, outs, step):
        part = rows[:, start : start + step].clone(memory_format=torch.contiguous_format)
        some = replace(layer, geometry=replace(geometry, out_channels=part.shape[1] * geometry.groups))
        for _, view in some.ties(part):
            view.zero_()
        off += _square(part)
    return off, tied, spread_squares


def _flat(place: Sequence[int], size: Sequence[int]) -> int:
    """Number a position in the order of memory."""
    number = 0
    for step, along in zip(place, size, strict=True):
        number = number * along + step
    return number


def _square(tensor: Tensor) -> float:
    """Sum the squares, in double precision, a piece at a time."""
    flat = tensor.reshape(-1)
    stretches = (flat[start : start + _AT_ONCE] for start in range(0, len(flat), _AT_ONCE))
    return sum((float(part.double().square().sum()) for part in stretches), 0.0)


def _variation(rows: Tensor) -> float:
    """Sum the squares about the mean of each row; of the differences from its first, so that equal numbers give 0."""
    away = rows - rows[..., :1]
    return float((away - away.mean(-1, keepdim=True)).square().sum())


def _root(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
