"""recognised: is this landscape that of a two-layer network for which there is a compiled loop?

Nothing is read from the source of the module or the loss: activation and loss are met by running them at random
points and comparing, and the loop's own value and gradient must then agree with the landscape's. A loss that is a
multiple of a known one (half the squared error, a sum in place of a mean) is that loss with other weights.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from thalweg.errors import ThalwegError
from thalweg.objective import Objective
from thalweg.probes.two_layer import in_order_of_execution, layers_of, watched

_ACTIVATIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu, "gelu": functional.gelu}
_AGREEMENT = 1e-10
"""How far value and gradient of the loop may lie from the landscape's, relative (chosen by us: far above the
1e-15 that is seen, far below the 1e-2 of another activation or loss)."""
_SCALES = (0.1, 1.0, 1.0, 10.0, 100.0)
"""Sizes of the points at which landscapes are compared: what only clips large values must differ somewhere."""


@dataclass(frozen=True)
class TwoLayerProblem:
    """A landscape as the compiled loop takes it.

    Args:
        offsets: where W, b, V and c begin in theta (-1: absent), and where V ends.
        hidden: number of hidden units.
        activation: its name.
        loss: "mse", "softmax_mse" or "cross_entropy".
        inputs: what the first layer reads, (inputs, samples).
        targets: (outputs, samples); classes are one-hot.
        weight: how much each sample's loss counts, (samples,).
    """

    offsets: np.ndarray
    hidden: int
    activation: str
    loss: str
    inputs: np.ndarray
    targets: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class _Seen:
    """What one random point shows: inputs, z, σ(z), outputs, targets, weights of the samples, R."""

    inputs: Tensor
    before: Tensor
    feature: Tensor
    outputs: Tensor
    targets: Tensor
    weight: Tensor
    value: float


def recognise(objective: Objective) -> TwoLayerProblem | None:
    """Give a landscape as the compiled loop takes it, or None if it is not of that kind.

    Args:
        objective: a landscape in float64 on the CPU, its data in memory.

    Returns:
        The problem, whose value agrees with the objective's at random points; None for any other landscape.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
        >>> x = torch.linspace(-1, 1, 5, dtype=torch.float64).unsqueeze(1)
        >>> recognise(Objective(net, lambda o, t: ((o - t) ** 2).mean() / 2, (x, x))).loss
        'mse'
    """
    is_plain = objective.dtype == torch.float64 and objective.device.type == "cpu" and objective.mode == "eval"
    if not (is_plain and objective.in_memory) or layers_of(objective) is None:
        return None
    try:
        seen = [_look(objective, theta) for theta in random_points(objective)]
        if any(s is None for s in seen):
            return None
        return _matched(objective, [s for s in seen if s is not None])
    except (ThalwegError, RuntimeError, ValueError, TypeError, IndexError):
        return None  # whatever a module does that is not of this kind


def random_points(objective: Objective) -> Iterator[Tensor]:
    """Draw a few points, from small to huge, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    for scale in _SCALES:
        yield scale * torch.randn(objective.num_params, generator=generator, dtype=torch.float64)


def _look(objective: Objective, theta: Tensor) -> _Seen | None:
    found = layers_of(objective)
    assert found is not None  # noqa: S101 - asked before
    layers = in_order_of_execution(objective, theta, found)
    below: list[tuple[Tensor, Tensor]] = []
    above: list[tuple[Tensor, Tensor]] = []
    targets, weights = [], []
    with watched(layers.first, below), watched(layers.second, above), torch.no_grad():
        for weight, (x, target) in objective.weighted_batches():
            objective.apply(theta, x)
            targets.append(target)
            share = 1.0 if objective.reduction == "sum" else weight / len(target)
            weights.append(torch.full((len(target),), share, dtype=torch.float64))
    if len(below) != len(targets) or any(read.ndim != 2 for read, _ in below):
        return None
    inputs, before, feature, outputs = (
        torch.cat([pair[i] for pair in runs]) for runs in (below, above) for i in (0, 1)
    )
    per_sample = torch.cat(weights)
    if objective.reduction != "sum":
        per_sample = per_sample / per_sample.sum()
    value = float(objective.value(theta))
    return _Seen(inputs, before, feature, outputs, torch.cat(targets), per_sample, value)


def _matched(objective: Objective, seen: list[_Seen]) -> TwoLayerProblem | None:
    layers = layers_of(objective)
    first = seen[0]
    activation = next(
        (n for n, f in _ACTIVATIONS.items() if all(_is_near(f(s.before), s.feature) for s in seen)), None
    )
    targets = _as_rows(first.targets, first.outputs.shape[1])
    if layers is None or activation is None or targets is None or not bool(torch.isfinite(first.inputs).all()):
        return None
    for name in ("mse", "softmax_mse", "cross_entropy"):
        plain = [plain_loss(name, s.outputs, targets, s.weight) for s in seen]
        ratios = [s.value / value if value else math.nan for s, value in zip(seen, plain, strict=True)]
        if ratios[1] > 0 and all(abs(r / ratios[1] - 1) < _AGREEMENT for r in ratios):
            break
    else:
        return None
    theta = next(random_points(objective))
    layers = in_order_of_execution(objective, theta, layers)
    begins = [-1 if n is None else objective.space.slice_of(n).start for n in layers.names]
    if begins[0] < 0 or begins[2] < 0 or layers.names[2] is None:
        return None  # a frozen weight
    frozen_bias = [(layer.bias is not None) != (begin >= 0) for layer, begin in
                   ((layers.first, begins[1]), (layers.second, begins[3]))]  # fmt: skip
    if any(frozen_bias):
        return None
    return TwoLayerProblem(
        offsets=np.array([*begins, objective.space.slice_of(layers.names[2]).stop], dtype=np.int64),
        hidden=layers.first.out_features,
        activation=activation,
        loss=name,
        inputs=np.ascontiguousarray(first.inputs.T.numpy()),
        targets=np.ascontiguousarray(targets.T.numpy()),
        weight=first.weight.numpy() * ratios[1],
    )


def plain_loss(name: str, outputs: Tensor, targets: Tensor, weight: Tensor) -> float:
    """Compute Σ_s weight_s·ℓ_s with ℓ = |o - y|², |softmax(o) - y|² or -Σ y log softmax(o).

    Args:
        name: "mse", "softmax_mse" or "cross_entropy".
        outputs: (samples, outputs).
        targets: (samples, outputs), one-hot for classes.
        weight: (samples,).

    Returns:
        The loss.
    """
    if name == "cross_entropy":
        losses = -(targets * outputs.log_softmax(1)).sum(1)
    else:
        answers = outputs if name == "mse" else outputs.softmax(1)
        losses = (answers - targets).square().sum(1)
    return float(weight @ losses)


def _as_rows(targets: Tensor, outputs: int) -> Tensor | None:
    """Give targets as (samples, outputs) numbers: classes one-hot."""
    if not targets.is_floating_point():
        is_class = targets.ndim == 1 and outputs > 1 and bool(((targets >= 0) & (targets < outputs)).all())
        return functional.one_hot(targets.long(), outputs).double() if is_class else None
    flat = targets.reshape(len(targets), -1)
    return flat if flat.shape[1] == outputs else None


def _is_near(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and float((one - two).abs().max()) <= _AGREEMENT * float(two.abs().max())
