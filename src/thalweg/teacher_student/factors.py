"""Factors: for one sample a ReLU network is linear in the nodes of each layer, and A is the matrix that says how."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional, grad

from thalweg.teacher_student.chain import BatchNorm, Chain, Layer, LinearMap, Trace, applied

_CONV_INPUT = {1: grad.conv1d_input, 2: grad.conv2d_input, 3: grad.conv3d_input}


@dataclass(frozen=True)
class Factor:
    """How the outputs depend on the nodes f of one layer, the gates of the layers above held: outputs = A f + b.

    Args:
        a: A(x); along batch of size 1 where it is the same for all samples, as under the head.
        b: what the biases above add, the constant node's column.
    """

    a: Float[Tensor, "outputs batch nodes *positions"]
    b: Float[Tensor, "outputs batch"]


def factors(
    read: Chain, trace: Trace, outputs: slice = slice(None), *, batch_statistics: bool = False
) -> Iterator[Factor]:
    """Give the factor of each hidden layer, from the top down to the first; only one is held at a time.

    Args:
        read: the network.
        trace: what it computes on some inputs.
        outputs: which of its outputs.
        batch_statistics: whether the trace took BatchNorm's mean and variance from the batch; here they are held,
            so that BatchNorm is an affine map of each node.

    Source:
        tian2019luck (arXiv 1905.13405), section 6.1: theorem 1's recursion is A_k = A_j f'_j w_jk. Departures:
        biases, and BatchNorm as the affine map that it is at held statistics.
    """
    head = read.head
    a = head.weight.detach()[outputs].unsqueeze(1)
    b = a.new_zeros(a.shape[:2]) if head.bias is None else head.bias.detach()[outputs].unsqueeze(1)
    for place in reversed(range(len(read.layers))):
        layer = read.layers[place]
        a = a.reshape(*a.shape[:2], *trace.activations[place].shape[1:])
        yield Factor(a, b)
        if place == 0:
            return
        slope, offset = held(layer, trace, place, batch_statistics)
        b = b + torch.einsum("cin,in->ci", a.flatten(2), offset.flatten(1))
        flattens = layer.flattens
        reads = trace.activations[place - 1].shape[1:]
        a = pulled(layer.linear, a * slope, torch.Size([reads.numel()]) if flattens else reads)


def held(layer: Layer, trace: Trace, place: int, batch_statistics: bool) -> tuple[Tensor, Tensor]:
    """Give slope s and offset o of each node, so that f = s (w·x) + o at this sample's gates.

    Args:
        layer: the layer.
        trace: what the network computes.
        place: the layer's number.
        batch_statistics: whether BatchNorm took those of the batch.
    """
    gate = trace.gates[place].to(trace.outputs.dtype)
    bias = layer.linear.bias
    own = gate.new_zeros(gate.shape[1]) if bias is None else bias.detach()
    if layer.norm is None:
        return gate, gate * _along(own, gate)
    scale, shift = affine(layer.norm, normed_values(layer, trace, place), batch_statistics)
    slope = gate * _along(scale, gate)
    shift = _along(shift, gate) * (gate if layer.norm_place == "before_relu" else 1.0)
    return slope, slope * _along(own, gate) + shift


def normed_values(layer: Layer, trace: Trace, place: int) -> Tensor:
    """Give what a layer's BatchNorm reads."""
    z = trace.preactivations[place]
    return z if layer.norm_place == "before_relu" else functional.relu(z)


def affine(norm: BatchNorm, values: Tensor, batch_statistics: bool) -> tuple[Tensor, Tensor]:
    """Give scale c₀/σ and shift c₁ - μ c₀/σ of each node, with σ² = var + ε.

    Args:
        norm: the BatchNorm.
        values: what it reads.
        batch_statistics: whether it takes their mean and variance, or the running ones.
    """
    if batch_statistics or norm.running_mean is None or norm.running_var is None:
        along = [dim for dim in range(values.ndim) if dim != 1]
        mean, var = values.mean(along), values.var(along, correction=0)
    else:
        mean, var = norm.running_mean, norm.running_var
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


def pulled(linear: LinearMap, cotangents: Tensor, reads: torch.Size) -> Tensor:
    """Apply the transpose of a linear map to cotangents (rows, batch, nodes, *positions) of its outputs.

    Args:
        linear: the map.
        cotangents: of its outputs.
        reads: shape of one sample that it reads.
    """
    weight = linear.weight.detach()
    if isinstance(linear, nn.Linear):
        through: Tensor = cotangents @ weight
        return through
    flat = cotangents.flatten(0, 1)
    shape = (len(flat), *reads)
    if linear.padding_mode == "zeros" and not isinstance(linear.padding, str):
        options = (linear.stride, linear.padding, linear.dilation, linear.groups)
        found = _CONV_INPUT[len(reads) - 1](shape, weight, flat, *options)  # type: ignore[no-untyped-call]
    else:
        with torch.enable_grad():
            x = flat.new_zeros(shape, requires_grad=True)
            (found,) = torch.autograd.grad(applied(linear, x), x, flat)
    back: Tensor = found.reshape(*cotangents.shape[:2], *reads)
    return back


def _along(values: Tensor, like: Tensor) -> Tensor:
    """Lay one value a node along dim 1."""
    return values.reshape(1, -1, *(1 for _ in like.shape[2:]))
