"""Theorem 2 and its assumptions: how well expectations separate, and how much a teacher's nodes overlap."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.errors import DataError, StructureError
from thalweg.precision import copied, placed
from thalweg.teacher_student.chain import Chain, chain
from thalweg.teacher_student.correlation import pieces
from thalweg.teacher_student.modulation import Modulation, Quantity, modulation

_AT_ONCE = 1024
_MEMORY = 256 * 10**6


@dataclass(frozen=True)
class Separation:
    """Theorem 2 in one linear layer.

    Args:
        name: of the layer.
        residual: ‖Ẇ - (L* W* H* - L W H)‖ / ‖Ẇ‖, biases included; 0 if assumption 1 holds.
        gradient: ‖Ẇ‖, Ẇ = -∂J/∂W by autograd.
    """

    name: str
    residual: float
    gradient: float


def separation_residual(
    teacher: nn.Module, student: nn.Module, inputs: Float[Tensor, "samples *features"], *, memory: int = _MEMORY
) -> tuple[Separation, ...]:
    """Compare autograd's gradient with theorem 2's, which holds if the expectations of β, D and L separate.

    J = ½ E‖f_c(x) - f_c°(x)‖² over the samples, in float64. A node that is always 1 carries the biases, in L and in
    H; L of the lowest layer is E[x xᵀ], H of the head is the identity (there theorem 2 needs no assumption).

    Args:
        teacher: a chain of linear layers without BatchNorm, see `chain`.
        student: another of the same depth.
        inputs: samples.
        memory: bytes, see `modulation`.

    Returns:
        One entry for each linear layer from the input, the head last. Where a gradient is 0 the residual is the
        difference as it is.

    Raises:
        StructureError: a network is no such chain.
        ShapeError: they cannot be teacher and student.
        MemoryLimitError: one sample and one output take more.
        DataError: there are no samples.

    Source:
        tian2019luck (arXiv 1905.13405), theorem 2, equation 6. Departure: biases.

    Example:
        >>> made = torch.Generator().manual_seed(0)
        >>> student = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> teacher = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [found.residual < 1e-12 for found in separation_residual(teacher, student, torch.ones(1, 3))]
        [True, True]
    """
    place = inputs.device
    theirs, ours = (chain(copied(net, device=place, dtype=torch.float64)) for net in (teacher, student))
    _require_plain(theirs)
    _require_plain(ours)
    x = placed(inputs, device=place, dtype=torch.float64)
    wanted: tuple[Quantity, ...] = ("beta_star", "beta", "d_star", "d", "l_star", "l")
    found = modulation(theirs.module, ours.module, x, wanted=wanted, constant=True, memory=memory)
    with torch.no_grad():
        flat = torch.cat([x.flatten(1), x.new_ones(len(x), 1)], 1)
        second = flat.T @ flat / len(flat)
        below = [(second, second), *((layer.l_star, layer.l) for layer in found)]
        entries = []
        for at, (name, gradient) in enumerate(_gradients(theirs, ours, x)):
            predicted = _predicted(theirs, ours, at, found, below[at])
            size = float(gradient.norm())
            entries.append(Separation(name, float((gradient - predicted).norm()) / (size or 1.0), size))
    return tuple(entries)


def _predicted(
    theirs: Chain, ours: Chain, at: int, found: tuple[Modulation, ...], below: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """L* W* H* - L W H of one layer, transposed as torch keeps its weights: (made, read + 1)."""
    l_star, own = below
    weights = [_augmented(_linears(read)[at], with_constant=at < len(found)) for read in (theirs, ours)]
    if l_star is None or own is None:
        raise DataError("Expected L. Got none. Ask for it.")
    if at == len(found):
        return weights[0] @ l_star.T - weights[1] @ own.T
    h_star, h = found[at].h_star[:-1], found[at].h[:-1]
    return h_star @ weights[0] @ l_star.T - h @ weights[1] @ own.T


def _augmented(linear: nn.Linear, *, with_constant: bool) -> Tensor:
    """[W, b], and under it the row by which the constant node makes the next one."""
    weight = linear.weight.detach()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
    whole = torch.cat([weight, bias.unsqueeze(1)], 1)
    if not with_constant:
        return whole
    last = torch.zeros_like(whole[:1])
    last[0, -1] = 1.0
    return torch.cat([whole, last])


def _gradients(theirs: Chain, ours: Chain, x: Tensor) -> list[tuple[str, Tensor]]:
    """-∂J/∂[W, b] of each linear layer by autograd, mean over the samples."""
    linears = _linears(ours)
    sums = [torch.zeros_like(_augmented(linear, with_constant=False)) for linear in linears]
    for piece in torch.split(x, _AT_ONCE):
        with torch.no_grad():
            labels = theirs.trace(piece).outputs
        with torch.enable_grad():
            for linear in linears:
                linear.requires_grad_(True)
            trace = ours.trace(piece)
            objective = (trace.outputs - labels).square().sum() / 2
            nodes = [*trace.preactivations, trace.outputs]
            cotangents = torch.autograd.grad(objective, nodes, retain_graph=True)
            weights = torch.autograd.grad(objective, [linear.weight for linear in linears])
        for total, weight, cotangent in zip(sums, weights, cotangents, strict=True):
            total.sub_(torch.cat([weight, cotangent.sum(0).unsqueeze(1)], 1), alpha=1 / len(x))
    names = [*(layer.name for layer in ours.layers), _name_of(ours.module, ours.head)]
    return list(zip(names, sums, strict=True))


def _name_of(module: nn.Module, wanted: nn.Module) -> str:
    names: dict[int, str] = {id(child): name for name, child in module.named_modules()}
    return names[id(wanted)]


def _linears(read: Chain) -> list[nn.Linear]:
    return [*(layer.linear for layer in read.layers if isinstance(layer.linear, nn.Linear)), read.head]


def _require_plain(read: Chain) -> None:
    for layer in read.layers:
        if not isinstance(layer.linear, nn.Linear) or layer.norm is not None:
            raise StructureError(
                f"Expected linear layers without BatchNorm. Got {type(layer.linear).__name__} {layer.name!r}"
                f"{'' if layer.norm is None else ' with one'}. Theorem 2 is about no others; theorem 1 is: "
                "gradient_rule."
            )


@dataclass(frozen=True)
class Overlap:
    """The least ε of assumption 3 in one layer of a teacher.

    Args:
        name: of the layer's linear map.
        epsilon_d: the largest d_ij / min(d_ii, d_jj) of two nodes i ≠ j.
        epsilon_l: the largest |l_ij| / min(l_ii, l_jj).
    """

    name: str
    epsilon_d: float
    epsilon_l: float


def overlap(
    teacher: nn.Module, inputs: "Float[Tensor, 'samples *features'] | Iterable[Tensor]"
) -> tuple[Overlap, ...]:
    """Measure assumption 3: how much the nodes of a teacher overlap, in gates and in activations.

    Args:
        teacher: a chain, see `chain`.
        inputs: all samples, or batches of them.

    Returns:
        One entry for each hidden layer; 0 where it has one node. Nodes that never fire are left out.

    Raises:
        StructureError: the network is no chain.
        DataError: there are no samples.

    Source:
        tian2019luck (arXiv 1905.13405), assumption 3, equation 9: d_ij ≤ ε d_ii "(or ε d_jj)". We take the smaller of
        both, so that it holds for either; absolute values matter after BatchNorm only.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]])), net[0].bias.data.zero_()
        >>> overlap(net, torch.linspace(-1.0, 1.0, 10).unsqueeze(1))[0].epsilon_d
        0.0
    """
    found = modulation(teacher, teacher, pieces(inputs, _AT_ONCE), wanted=("d", "l"))
    return tuple(Overlap(layer.name, _epsilon(layer.d, layer.d), _epsilon(layer.l, layer.d)) for layer in found)


def _epsilon(moments: Tensor | None, gates: Tensor | None) -> float:
    if moments is None or gates is None:
        raise DataError("Expected D and L. Got none. Ask for them.")
    alive = (gates.diagonal() > 0) & (moments.diagonal() != 0)  # BatchNorm gives a dead node a constant
    moments = moments[alive][:, alive]
    own = moments.diagonal()
    if len(own) < 2:
        return 0.0
    shares = moments.abs() / torch.minimum(own.unsqueeze(0), own.unsqueeze(1))
    return float(shares.fill_diagonal_(0.0).max())
