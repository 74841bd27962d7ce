"""two_layer: the Hessian of a two-layer network by its closed form.

The module may be any whose trainable parameters are those of two `nn.Linear` layers, the second of which
reads an elementwise function of what the first one writes: o = V σ(W x + b) + c. Whatever comes after o (a
softmax, a squeeze) is counted to the loss. Nothing is read from the source of the module: layers,
activations and losses are met by running it once per batch, and derivatives of σ and of the loss are
autograd's.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.batching import Batch
from thalweg.errors import StructureError
from thalweg.kernels import plain_kernels
from thalweg.objective import Objective

# Bytes of the Jacobian held at once. Chosen by us: with H itself, of 68 MB at 2,913 parameters, the peak
# stays far below 1 GB, and larger pieces are no faster.
_JACOBIAN_BYTES = 64 * 2**20
# The symmetric product is cut into this many stripes; only blocks on and above the diagonal are computed. At
# 2,913 parameters 8 stripes took 0.19 s, 4 and 16 took 0.22 s, the full product 0.26 s.
_STRIPES = 8
# Hidden units whose weighted inputs are held at once. Chosen by us: the allocator recycles small
# temporaries, but returns large ones to the system, which then costs a page fault for every 4 kB on every
# call.
_UNITS = 8


@dataclass(frozen=True)
class Layers:
    """The two layers and the names that their parameters have in theta.

    Args:
        first: the layer that reads the inputs.
        second: the layer that writes the outputs.
        names: of W, b, V, c; None for one that is absent or frozen.
    """

    first: nn.Linear
    second: nn.Linear
    names: tuple[str | None, str | None, str | None, str | None]


@dataclass(frozen=True)
class _Sensitivities:
    """What one batch contributes, sample by sample: x̃, σ, σ', σ'', and ∂ℓ/∂o, ∂²ℓ/∂o² times its weight."""

    inputs: Tensor
    feature: Tensor
    slope: Tensor
    bend: Tensor
    pull: Tensor
    curvature: Tensor


def is_two_layer(objective: Objective) -> bool:
    """Tell whether the trainable parameters are those of two linear layers, without running the module.

    Args:
        objective: the landscape.

    Returns:
        True if `two_layer_hessian` may apply; whether the module computes what it assumes is checked there.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False))
        >>> is_two_layer(Objective(net, nn.MSELoss(), (torch.ones(5, 2, 2), torch.ones(5, 2))))
        True
    """
    return layers_of(objective) is not None


def two_layer_hessian(objective: Objective, theta: Float[Tensor, " params"]) -> Float[Tensor, "params params"]:
    """Assemble the Hessian of a two-layer network.

    H = Σ_s J_sᵀ L''_s J_s + Σ_s Σ_j (∂ℓ/∂o_j) ∂²o_j, with J_s the Jacobian of the outputs, L''_s the Hessian
    of sample s's loss in its outputs. The second sum couples only the parameters of one hidden unit: a block
    x̃x̃ᵀ σ''_i Σ_j(∂ℓ/∂o_j)V_ji on (W_i, b_i), and x̃ σ'_i ∂ℓ/∂o_j between (W_i, b_i) and V_ji.

    Args:
        objective: the landscape.
        theta: the point, shape (params,).

    Returns:
        H, shape (params, params), exactly symmetric. It is the Hessian only if the activation is elementwise
        and the loss a sum over samples; `hessian` checks that against a Hessian–vector product.

    Raises:
        StructureError: the module is not two linear layers, or does not run as such.
        ShapeError: theta does not fit the module.
    """
    layers = layers_of(objective)
    if layers is None:
        raise StructureError(
            "Expected a module whose trainable parameters are those of two nn.Linear layers. "
            f"Got {type(objective.module).__name__}. Use method='blockwise'."
        )
    theta = theta.detach().to(device=objective.device, dtype=objective.dtype)
    layers = in_order_of_execution(objective, theta, layers)
    total, weights = theta.new_zeros(len(theta), len(theta)), 0.0
    outgoing = _outgoing(objective, theta, layers)
    for weight, batch in objective.weighted_batches():
        batch_parts = _sensitivities(objective, theta, layers, batch, weight)
        rows = max(1, _JACOBIAN_BYTES // (batch_parts.pull.shape[1] * len(theta) * theta.element_size()))
        for parts in _chunks(batch_parts, rows):
            _add_gauss_newton(total, parts, outgoing, objective, layers)
            _add_residual(total, parts, outgoing, objective, layers)
        weights += weight
    if objective.reduction != "sum":
        total.div_(weights)
    return _mirrored(total)


def layers_of(objective: Objective) -> Layers | None:
    """Give the two linear layers whose parameters are all that trains; None if there are not two."""
    modules = {name: m for name, m in objective.module.named_modules() if isinstance(m, nn.Linear)}
    if len(modules) != 2:
        return None
    (first_name, first), (second_name, second) = modules.items()
    named = [
        (f"{name}.{kind}" if name else kind) for name in (first_name, second_name) for kind in ("weight", "bias")
    ]
    kept = tuple(name if name in objective.space.names else None for name in named)
    tied = first.weight is second.weight
    if tied or {name for name in kept if name} != set(objective.space.names):
        return None
    return Layers(first, second, (kept[0], kept[1], kept[2], kept[3]))


def in_order_of_execution(objective: Objective, theta: Tensor, layers: Layers) -> Layers:
    """Give the layers in the order in which the module runs them, which need not be that of their names."""
    ran: list[nn.Module] = []
    handles = [layer.register_forward_hook(lambda m, *_: ran.append(m)) for layer in (layers.first, layers.second)]
    try:
        with torch.no_grad():
            objective.apply(theta, next(objective.batches())[0])
    finally:
        for handle in handles:
            handle.remove()
    if ran[:1] == [layers.second]:
        return Layers(layers.second, layers.first, layers.names[2:] + layers.names[:2])
    return layers


def _outgoing(objective: Objective, theta: Tensor, layers: Layers) -> Tensor:
    name = layers.names[2]
    return layers.second.weight.detach() if name is None else objective.space.parameters(theta)[name]


@contextlib.contextmanager
def watched(layer: nn.Linear, seen: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Append (what a layer reads, what it writes) to `seen` whenever it runs."""

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0], output))

    handle = layer.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _sensitivities(
    objective: Objective, theta: Tensor, layers: Layers, batch: Batch, weight: float
) -> _Sensitivities:
    point = theta.clone().requires_grad_()
    below: list[tuple[Tensor, Tensor]] = []
    above: list[tuple[Tensor, Tensor]] = []
    with watched(layers.first, below), watched(layers.second, above), plain_kernels():
        loss = objective.batch_loss(point, *batch)
    if len(below) != 1 or len(above) != 1 or below[0][0].ndim != 2:
        raise StructureError(
            "Expected each linear layer to run once, on inputs (samples, features). "
            f"Got {len(below)} and {len(above)} runs. Use method='blockwise'."
        )
    (inputs, before), (feature, outputs) = below[0], above[0]
    slope = _derivative(feature.sum(), before)
    bend = _derivative(slope.sum(), before)
    pull = _derivative(loss * weight, outputs)
    curvature = [_derivative(pull[:, j].sum(), outputs).detach() for j in range(pull.shape[1])]
    bias = layers.first.bias is not None
    padded = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1) if bias else inputs
    return _Sensitivities(
        inputs=padded.detach(),
        feature=feature.detach(),
        slope=slope.detach(),
        bend=bend.detach(),
        pull=pull.detach(),
        curvature=torch.stack(curvature, 1),
    )


def _derivative(value: Tensor, source: Tensor) -> Tensor:
    """∂value/∂source with a graph; zeros where value does not depend on source."""
    if not value.requires_grad:
        return torch.zeros_like(source)
    (slope,) = torch.autograd.grad(value, source, create_graph=True, materialize_grads=True)
    return slope


def _chunks(parts: _Sensitivities, rows: int) -> Iterator[_Sensitivities]:
    for start in range(0, len(parts.inputs), rows):
        yield _Sensitivities(*(t[start : start + rows] for t in vars(parts).values()))


def _add_gauss_newton(
    total: Tensor, parts: _Sensitivities, outgoing: Tensor, objective: Objective, layers: Layers
) -> None:
    """Add Σ_s J_sᵀ L''_s J_s on and above the diagonal, in stripes."""
    jacobian = _jacobian(parts, outgoing, objective, layers)
    num_outputs, num_params = jacobian.shape[1:]
    flat = jacobian.view(-1, num_params)
    for start, stop in _stripes(num_params):
        stripe = jacobian[:, :, start:stop]
        bent = stripe * parts.curvature if num_outputs == 1 else torch.bmm(parts.curvature, stripe)
        total[start:stop, start:].addmm_(bent.reshape(-1, stop - start).T, flat[:, start:])


def _jacobian(parts: _Sensitivities, outgoing: Tensor, objective: Objective, layers: Layers) -> Tensor:
    """∂o_j/∂θ for every sample, in theta's own order: (samples, outputs, params)."""
    samples, num_outputs = parts.pull.shape
    jacobian = parts.inputs.new_empty(samples, num_outputs, objective.num_params)
    reach = outgoing * parts.slope.unsqueeze(1)  # (samples, outputs, hidden): V_ji σ'_i
    weight, bias, out_weight, out_bias = layers.names
    fan_in = layers.first.in_features
    if weight:
        block = torch.unflatten(jacobian[:, :, objective.space.slice_of(weight)], 2, (-1, fan_in))
        torch.mul(reach.unsqueeze(3), parts.inputs[:, None, None, :fan_in], out=block)
    if bias:
        jacobian[:, :, objective.space.slice_of(bias)] = reach
    if out_weight:
        block = torch.unflatten(jacobian[:, :, objective.space.slice_of(out_weight)], 2, (num_outputs, -1)).zero_()
        block.diagonal(dim1=1, dim2=2).copy_(parts.feature.unsqueeze(2))
    if out_bias:
        block = jacobian[:, :, objective.space.slice_of(out_bias)].zero_()
        block.diagonal(dim1=1, dim2=2).fill_(1.0)
    return jacobian


def _add_residual(
    total: Tensor, parts: _Sensitivities, outgoing: Tensor, objective: Objective, layers: Layers
) -> None:
    """Add Σ_s Σ_j (∂ℓ/∂o_j) ∂²o_j: one block per hidden unit."""
    weight, bias, out_weight, _ = layers.names
    fan_in = layers.first.in_features
    slices = objective.space.slice_of
    force = parts.bend * (parts.pull @ outgoing)  # (samples, hidden)
    gram = torch.cat(  # (hidden, fan_in+1, fan_in+1)
        [torch.matmul(parts.inputs.T, f.T.unsqueeze(2) * parts.inputs) for f in torch.split(force, _UNITS, 1)]
    )
    mixed = torch.einsum("sj,si,sl->jil", parts.pull, parts.slope, parts.inputs)  # (outputs, hidden, fan_in+1)
    hidden = len(gram)
    inner = [(name, columns) for name, columns in ((weight, slice(fan_in)), (bias, slice(fan_in, None))) if name]
    for row, (name, columns) in enumerate(inner):
        for other, other_columns in inner[row:]:
            block = _block(total, slices(name), slices(other))
            block = torch.unflatten(torch.unflatten(block, 1, (hidden, -1)), 0, (hidden, -1))
            block.diagonal(dim1=0, dim2=2).add_(gram[:, columns, other_columns].permute(1, 2, 0))
        if out_weight:
            block = _block(total, slices(name), slices(out_weight))
            block = torch.unflatten(torch.unflatten(block, 1, (-1, hidden)), 0, (hidden, -1))
            block.diagonal(dim1=0, dim2=3).add_(mixed[:, :, columns].permute(2, 0, 1))


def _block(total: Tensor, rows: slice, columns: slice) -> Tensor:
    """A view of the block on or above the diagonal that couples two stretches of theta, rows first."""
    return total[rows, columns] if rows.start <= columns.start else total[columns, rows].T


def _stripes(num_params: int) -> Iterator[tuple[int, int]]:
    count = min(_STRIPES, num_params)
    return itertools.pairwise(round(i * num_params / count) for i in range(count + 1))


def _mirrored(total: Tensor) -> Tensor:
    """Copy what is above the diagonal below it, stripe by stripe (no second matrix)."""
    for start, stop in _stripes(len(total)):
        corner = total[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total
