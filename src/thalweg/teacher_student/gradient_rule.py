"""Theorem 1 against autograd: the gradient at every node and sample, from the activations of teacher and student."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.errors import DataError, MemoryLimitError
from thalweg.precision import copied, placed
from thalweg.teacher_student.chain import BatchNorm, Chain, Trace, chain, require_pair, require_statistics
from thalweg.teacher_student.factors import Factor, affine, factors, held, normed_values, pulled

_MEMORY = 10**9
_BYTES = 8


@dataclass(frozen=True)
class RuleError:
    """How far theorem 1's gradient is from autograd's in one hidden layer: largest difference over largest gradient.

    Args:
        name: of the layer's linear map.
        at_nodes: of the bracket Σ β* f° - Σ β f, the gradient at what the next layer reads.
        after_gate: at the linear map's outputs, behind the gate and BatchNorm's Jacobian.
    """

    name: str
    at_nodes: float
    after_gate: float


def gradient_rule(
    teacher: nn.Module,
    student: nn.Module,
    inputs: Float[Tensor, "samples *features"],
    *,
    batch_statistics: bool = False,
    memory: int = _MEMORY,
) -> tuple[RuleError, ...]:
    """Compare theorem 1's gradient with autograd's, in float64, at every node of every hidden layer and sample.

    The objective is J = ½ Σ_x ‖f_c(x) - f_c°(x)‖², gradients are negative ones, and β*(x), β(x) are formed as
    matrices. Biases enter as a node that is always 1. In training BatchNorm's Jacobian couples samples, and
    the rule becomes g_k(x_i) = f'_k(x_i) Σ_j [Σ_k° β*_kk°(x_i, x_j) f_k°(x_j) - Σ_k' β_kk'(x_i, x_j) f_k'(x_j)],
    where β(x_i, x_j) goes back from the outputs at x_j through Lemma 1's Jacobians to x_i, and forwards through the
    affine map that BatchNorm is at the batch's mean and variance.

    Args:
        teacher: a chain, see `chain`; its BatchNorm always has the running statistics.
        student: a chain of the same depth.
        inputs: samples, the whole batch if BatchNorm takes its statistics from it.
        batch_statistics: whether the student's BatchNorm does.
        memory: bytes that the largest arrays may take together. Default chosen by us.

    Returns:
        One entry for each hidden layer, from the input. A difference is reported as it is where all gradients are 0;
        NaN where there is a NaN.

    Raises:
        StructureError: a network is no chain, or has no running statistics where it needs them.
        ShapeError: they cannot be teacher and student.
        MemoryLimitError: the matrices of one sample, or of the batch, take more.
        DataError: there are no samples, or one where BatchNorm takes its statistics from the batch.

    Source:
        tian2019luck (arXiv 1905.13405), theorem 1 with equation 3, and Lemma 1 for BatchNorm. Departures: biases;
        σ² = var + ε, with which Lemma 1's projection is one only at ε → 0; nodes of convolutions are channels at
        positions.

    Example:
        >>> made = torch.Generator().manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> teacher = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> (layer,) = gradient_rule(teacher, net, torch.randn(10, 3, generator=made))
        >>> layer.at_nodes < 1e-12 and layer.after_gate < 1e-12
        True
    """
    place = inputs.device
    theirs, ours = (chain(copied(net, device=place, dtype=torch.float64)) for net in (teacher, student))
    require_pair(theirs, ours)
    if not len(inputs):
        raise DataError("Expected samples. Got none. Pass inputs.")
    require_statistics(theirs, *([] if batch_statistics else [ours]))
    x: Tensor = placed(inputs, device=place, dtype=torch.float64)
    size = _samples_at_once(theirs, ours, x, batch_statistics, memory)
    found = [_Largest() for _ in ours.layers]
    with torch.no_grad():
        for piece in torch.split(x, size):
            truths = autograd_gradients(theirs, ours, piece, batch_statistics)
            trace = ours.trace(piece, batch_statistics=batch_statistics)
            brackets = (_coupled if batch_statistics else _separate)(theirs, ours, theirs.trace(piece), trace)
            for at, bracket in zip(reversed(range(len(found))), brackets, strict=True):
                shaped = bracket.reshape(trace.activations[at].shape)
                behind = _behind(ours, trace, at, shaped.unsqueeze(0), batch_statistics).squeeze(0)
                found[at].see(shaped, behind, *truths[at])
    return tuple(largest.error(layer.name) for largest, layer in zip(found, ours.layers, strict=True))


@dataclass
class _Largest:
    """Largest differences and gradients seen, at the nodes and after the gate."""

    differences: tuple[float, float] = (0.0, 0.0)
    gradients: tuple[float, float] = (0.0, 0.0)

    def see(self, bracket: Tensor, behind: Tensor, at_nodes: Tensor, after_gate: Tensor) -> None:
        gaps = float((bracket - at_nodes).abs().max()), float((behind - after_gate).abs().max())
        sizes = float(at_nodes.abs().max()), float(after_gate.abs().max())
        self.differences = _larger(self.differences[0], gaps[0]), _larger(self.differences[1], gaps[1])
        self.gradients = _larger(self.gradients[0], sizes[0]), _larger(self.gradients[1], sizes[1])

    def error(self, name: str) -> RuleError:
        shares = [gap / (size or 1.0) for gap, size in zip(self.differences, self.gradients, strict=True)]
        return RuleError(name, *shares)


def _larger(one: float, two: float) -> float:
    """The larger of two numbers; NaN if one is, which `max` may pass over."""
    return math.nan if math.isnan(one) or math.isnan(two) else max(one, two)


def autograd_gradients(
    theirs: Chain, ours: Chain, x: Tensor, batch_statistics: bool
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Give -∂J/∂f and -∂J/∂z of each hidden layer by autograd, J = ½ Σ ‖f_c - f_c°‖² over the samples."""
    with torch.no_grad():
        labels = theirs.trace(x).outputs
    with torch.enable_grad():
        trace = ours.trace(x.detach().requires_grad_(True), batch_statistics=batch_statistics)
        objective = (trace.outputs - labels).square().sum() / 2
        found = torch.autograd.grad(objective, [*trace.activations, *trace.preactivations])
    depth = len(ours.layers)
    return tuple((-found[at], -found[depth + at]) for at in range(depth))


def _separate(theirs: Chain, ours: Chain, teacher: Trace, student: Trace) -> Iterator[Tensor]:
    """Give Σ β* f° - Σ β f of each layer from the top, a matrix for each sample."""
    pairs = zip(factors(theirs, teacher), factors(ours, student), strict=True)
    tops = zip(reversed(teacher.activations), reversed(student.activations), strict=True)
    for (star, own), (f_star, f) in zip(pairs, tops, strict=True):
        back = own.a.flatten(2).expand(-1, len(f), -1)
        total = back.new_zeros(back.shape[1:])
        for factor, values, sign in ((star, f_star, 1.0), (own, f, -1.0)):
            forward, nodes = _with_constant(factor, values)
            beta = torch.einsum("cik,cim->ikm", back, forward)
            total += sign * torch.einsum("ikm,im->ik", beta, nodes)
        yield total


def _coupled(theirs: Chain, ours: Chain, teacher: Trace, student: Trace) -> Iterator[Tensor]:
    """Give the same where BatchNorm couples the samples: β(x_i, x_j) is a matrix for each pair of samples."""
    pairs = zip(factors(theirs, teacher), factors(ours, student, batch_statistics=True), strict=True)
    tops = zip(reversed(teacher.activations), reversed(student.activations), _operators(ours, student), strict=True)
    for (star, own), (f_star, f, operator) in zip(pairs, tops, strict=True):
        total = operator.new_zeros(operator.shape[2:])
        for factor, values, sign in ((star, f_star, 1.0), (own, f, -1.0)):
            forward, nodes = _with_constant(factor, values)
            for i in range(len(f)):
                beta = torch.einsum("cjk,cjm->jkm", operator[:, :, i], forward)
                total[i] += sign * torch.einsum("jkm,jm->k", beta, nodes)
        yield total


def _with_constant(factor: Factor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Put the constant node last: [A, b] of (outputs, samples, nodes + 1), and [f, 1]."""
    shared = (factor.a.shape[0], len(values))
    forward = torch.cat([factor.a.flatten(2).expand(*shared, -1), factor.b.expand(shared).unsqueeze(-1)], -1)
    return forward, torch.cat([values.flatten(1), values.new_ones(len(values), 1)], 1)


def _operators(ours: Chain, trace: Trace) -> Iterator[Tensor]:
    """Carry the outputs' gradients of each sample j back to the nodes of each sample i: (outputs, j, i, nodes)."""
    samples = len(trace.outputs)
    one = torch.eye(samples, dtype=trace.outputs.dtype, device=trace.outputs.device)
    weight = ours.head.weight.detach()
    carried = weight[:, None, None] * one[None, :, :, None]
    shape = carried.shape[:2]
    carried = carried.flatten(0, 1)
    for at in reversed(range(len(ours.layers))):
        carried = carried.reshape(len(carried), *trace.activations[at].shape)
        yield carried.reshape(*shape, samples, -1)
        if at:
            layer, reads = ours.layers[at], trace.activations[at - 1].shape[1:]
            at_map = _behind(ours, trace, at, carried, True)
            carried = pulled(layer.linear, at_map, torch.Size([reads.numel()]) if layer.flattens else reads)


def _behind(ours: Chain, trace: Trace, at: int, cotangents: Tensor, batch_statistics: bool) -> Tensor:
    """Carry gradients (rows, batch, nodes, …) at a layer's nodes behind its gate and BatchNorm, by formula."""
    layer, gate = ours.layers[at], trace.gates[at]
    if layer.norm is None or not batch_statistics:
        return cotangents * held(layer, trace, at, batch_statistics)[0]
    values = normed_values(layer, trace, at)
    if layer.norm_place == "before_relu":
        return _norm_jacobian(layer.norm, values, cotangents * gate)
    return _norm_jacobian(layer.norm, values, cotangents) * gate


def _norm_jacobian(norm: BatchNorm, values: Tensor, cotangents: Tensor) -> Tensor:
    """Lemma 1: (c₀/σ) (I - 11ᵀ/N - f̂f̂ᵀ/N) over the N samples and positions, f̂ = (f - μ)/σ, σ² = var + ε."""
    along = [dim for dim in range(values.ndim) if dim != 1]
    scale, _ = affine(norm, values, True)
    mean = values.mean(along, keepdim=True)
    hat = (values - mean) * (values.var(along, correction=0, keepdim=True) + norm.eps).rsqrt()
    behind = [dim + 1 for dim in along]
    centred = cotangents - cotangents.mean(behind, keepdim=True)
    projected = centred - hat * (cotangents * hat).mean(behind, keepdim=True)
    return projected * scale.reshape(1, -1, *(1 for _ in values.shape[2:]))


def _samples_at_once(theirs: Chain, ours: Chain, x: Tensor, batch_statistics: bool, memory: int) -> int:
    """How many samples' matrices fit; all of them where BatchNorm couples them."""
    outputs, samples = ours.head.out_features, len(x)
    normed = [layer.linear for layer in ours.layers if layer.norm is not None]
    if batch_statistics and samples == 1 and any(isinstance(linear, nn.Linear) for linear in normed):
        raise DataError("Expected two samples or more, of which BatchNorm takes statistics. Got one. Pass a batch.")
    wide, other = (max(f[0].numel() for f in read.trace(x[:2]).activations) for read in (ours, theirs))
    if batch_statistics:
        needed = _BYTES * samples * (3 * outputs * samples * wide + wide * (max(wide, other) + 1))
        at_once = samples if needed <= memory else 0
    else:
        needed = _BYTES * (4 * outputs * (wide + other) + wide * (max(wide, other) + 1))
        at_once = memory // needed
    if at_once < 1:
        raise MemoryLimitError(
            f"Expected {needed:,} bytes or more for β as matrices. Got memory={memory:,}. Take smaller networks"
            f"{' or fewer samples' if batch_statistics else ''}, or allow more."
        )
    return at_once
