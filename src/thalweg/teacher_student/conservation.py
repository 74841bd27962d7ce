"""Theorem 3: under BatchNorm the gradient of a node's weights is orthogonal to them, so their norm is conserved."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.errors import ConfigError, NumericalError, ShapeError, StructureError
from thalweg.teacher_student.chain import Chain, Layer, NormPlace, chain

_DEAD = 1e3  # roundings: below, relative to the largest in the layer, a gradient is noise


@dataclass(frozen=True)
class Radial:
    """How much of the gradient of each node's weights is along them.

    Args:
        name: of the layer.
        norm_place: where its BatchNorm stands.
        weights: |w·∂w| / (‖w‖‖∂w‖) of each node, the bias left out.
        with_bias: the same of (w, b) together; equal to `weights` in a layer without biases.
        is_biased: whether it has biases that are trained or not zero.
        num_dead: nodes without any gradient, whose share is given as 0.
    """

    name: str
    norm_place: NormPlace
    weights: Float[Tensor, " nodes"]
    with_bias: Float[Tensor, " nodes"]
    is_biased: bool
    num_dead: int

    @property
    def conserved(self) -> Float[Tensor, " nodes"]:
        """The shares of what the theorem is about.

        Scaling what goes into the BatchNorm changes nothing. Behind a ReLU that takes scaling the bias along; in
        front of it the mean takes the bias away, and the weights alone are free to scale.
        """
        return self.with_bias if self.norm_place == "after_relu" and self.is_biased else self.weights


def radial_gradients(
    module: nn.Module,
    loss: Callable[[Float[Tensor, "batch outputs"]], Float[Tensor, ""]],
    inputs: Float[Tensor, "batch *features"],
) -> tuple[Radial, ...]:
    """Measure theorem 3 at a point: the part of each node's gradient that would change the norm of its weights.

    Args:
        module: a chain; neither it nor its running statistics are changed.
        loss: of the outputs of the whole batch.
        inputs: one batch: its statistics are BatchNorm's.

    Returns:
        For each layer with a BatchNorm the shares of its nodes.

    Raises:
        StructureError: the network is no chain, or has no BatchNorm.
        ShapeError: a BatchNorm has a single value for each node, as of one sample.

    Source:
        tian2019luck (arXiv 1905.13405), theorem 3 and equation 17. The paper has neither biases nor ε: with
        Linear → ReLU → BN and a bias it is (w, b) that is conserved, and ε beside the variance s² leaves a part
        of order ε / (s² + ε). Nodes count as dead below 1000 roundings of the layer's largest gradient: one that is
        active on a single sample has none but rounding.

    Example:
        >>> from thalweg.nets import relu_mlp, teacher_init_
        >>> net = relu_mlp((8,), num_inputs=5, num_outputs=3, norm="after_relu", eps=1e-30).double()
        >>> net = teacher_init_(net, torch.Generator().manual_seed(0))
        >>> x = torch.randn(32, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        >>> (layer,) = radial_gradients(net, lambda y: y.square().sum(), x)
        >>> bool(layer.conserved.max() < 1e-12), bool(layer.weights.max() > 1e-3)
        (True, True)
    """
    read = chain(module)
    normed = [layer for layer in read.layers if layer.norm is not None]
    if not normed:
        raise StructureError("Expected a network with BatchNorm. Got one without. Build it with norm='after_relu'.")
    parts = [part for layer in normed for part in _parts(layer)]
    frozen = [part for part in parts if not part.requires_grad]
    try:
        for part in frozen:
            part.requires_grad_(True)
        with torch.enable_grad():
            value = loss(_outputs(read, inputs))
            gradients = dict(zip(parts, torch.autograd.grad(value, parts), strict=True))
    finally:
        for part in frozen:
            part.requires_grad_(False)
    return tuple(_radial(layer, gradients, frozen) for layer in normed)


def _outputs(read: Chain, inputs: Tensor) -> Tensor:
    try:
        return read.trace(inputs, batch_statistics=True).outputs
    except ShapeError:
        raise
    except ValueError as error:  # torch's, of a BatchNorm without a variance
        raise ShapeError(
            f"Expected a batch that BatchNorm can take a variance of. Got {tuple(inputs.shape)}. Pass more samples."
        ) from error


def _parts(layer: Layer) -> list[Tensor]:
    linear = layer.linear
    return [linear.weight] if linear.bias is None else [linear.weight, linear.bias]


def _radial(layer: Layer, gradients: dict[Tensor, Tensor], frozen: Sequence[Tensor]) -> Radial:
    point = [part.detach().flatten(1) if part.ndim > 1 else part.detach().unsqueeze(1) for part in _parts(layer)]
    slope = [gradients[part].reshape(len(part), -1) for part in _parts(layer)]
    bias = layer.linear.bias
    is_biased = bias is not None and not (any(bias is part for part in frozen) and not bool(bias.any()))
    weights, dead = _share(point[0], slope[0])
    both, _ = _share(torch.cat(point, 1), torch.cat(slope, 1))
    return Radial(layer.name, layer.norm_place, weights, both, is_biased, int(dead.sum()))


def _share(point: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Divide |w·∂w| by ‖w‖‖∂w‖, row by row; 0 where there is no gradient."""
    size = point.norm(dim=1) * slope.norm(dim=1)
    dead = size <= _DEAD * torch.finfo(size.dtype).eps * size.max()
    share = (point * slope).sum(1).abs() / torch.where(dead, torch.ones_like(size), size)
    return torch.where(dead, torch.zeros_like(share), share), dead


def without_biases_(module: nn.Module) -> nn.Module:
    """Set the biases of a chain's hidden layers to zero and freeze them, in place: the paper's networks.

    Args:
        module: a chain.

    Returns:
        The same module.

    Raises:
        StructureError: the network is no chain.

    Source:
        tian2019luck (arXiv 1905.13405), section 2: nodes have no biases there; its experiments have.

    Example:
        >>> net = without_biases_(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
        >>> net[0].bias.requires_grad, net[2].bias.requires_grad
        (False, True)
    """
    for layer in chain(module).layers:
        if layer.linear.bias is not None:
            layer.linear.bias.requires_grad_(False).zero_()
    return module


@dataclass(frozen=True)
class Drift:
    """How far norms of weights drift in a fixed time, for several step sizes.

    Args:
        step_sizes: η, in the order that they were given.
        drifts: mean over nodes of | ‖w(T)‖² / ‖w(0)‖² - 1 |, for each.
        exponent: slope of log drift over log η: 1 where the flow conserves norms, 0 where it does not.
    """

    step_sizes: tuple[float, ...]
    drifts: tuple[float, ...]
    exponent: float


def norm_drift(
    module: nn.Module,
    loss: Callable[[Float[Tensor, "batch outputs"]], Float[Tensor, ""]],
    inputs: Float[Tensor, "batch *features"],
    *,
    step_sizes: Sequence[float],
    time: float,
) -> Drift:
    """Train from one start for a fixed time with several step sizes, and see how far the norms of weights drift.

    As w ⟂ ∂w, a step makes ‖w‖² larger by η²‖∂w‖²: in a fixed time the drift is O(η), and the flow has none.

    Args:
        module: a chain, which is not changed. Frozen parameters stay. Without BatchNorm all hidden layers count,
            and the drift is that of the flow.
        loss: of the outputs.
        inputs: one batch, used at every step.
        step_sizes: at least 2; each divides the time.
        time: T; T/η steps of gradient descent are taken.

    Returns:
        The drifts and their exponent.

    Raises:
        StructureError: the network is no chain, or all its parameters are frozen.
        ShapeError: a BatchNorm has a single value for each node, as of one sample.
        ConfigError: fewer than 2 step sizes, or one that is not positive or does not divide the time.
        NumericalError: a training diverged, norms did not move at all, or a node's were 0.

    Source:
        tian2019luck (arXiv 1905.13405), theorem 3; the drift of finite steps is ours.

    Example:
        >>> from thalweg.nets import relu_mlp, teacher_init_
        >>> net = relu_mlp((8,), num_inputs=5, num_outputs=3, norm="before_relu", eps=1e-30).double()
        >>> net = teacher_init_(net, torch.Generator().manual_seed(0))
        >>> x = torch.randn(32, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        >>> drift = norm_drift(net, lambda y: y.square().mean(), x, step_sizes=(0.1, 0.05, 0.025), time=0.5)
        >>> 0.85 < drift.exponent < 1.15
        True
    """
    chain(module)
    if not any(p.requires_grad for p in module.parameters()):
        raise StructureError("Expected parameters to train. Got frozen ones alone. Set requires_grad of some.")
    sizes = tuple(step_sizes)
    counts = [round(time / size) if size > 0 and math.isfinite(time) else 0 for size in sizes]
    off = any(count < 1 or abs(count * size - time) > 1e-9 * time for count, size in zip(counts, sizes, strict=True))
    if len(set(sizes)) < 2 or off:
        raise ConfigError(
            f"Expected 2 or more different positive step sizes that divide the time {time:g}. Got "
            f"{', '.join(f'{size:g}' for size in sizes) or 'none'}. Halve one of them repeatedly."
        )
    drifts = tuple(_drift(module, loss, inputs, size, n) for size, n in zip(sizes, counts, strict=True))
    if not all(math.isfinite(drift) and drift > 0 for drift in drifts):
        raise NumericalError(
            f"Expected norms that move and stay finite. Got drifts {', '.join(f'{drift:g}' for drift in drifts)}. "
            "Use smaller steps, a batch on which the network has a gradient, and no node whose weights are all zero."
        )
    x = torch.tensor(sizes, dtype=torch.float64).log()
    y = torch.tensor(drifts, dtype=torch.float64).log()
    x = x - x.mean()
    return Drift(sizes, drifts, float((x * y).sum() / x.square().sum()))


def _drift(module: nn.Module, loss: Callable[[Tensor], Tensor], inputs: Tensor, size: float, steps: int) -> float:
    copied = copy.deepcopy(module)
    read = chain(copied)
    parameters = [p for p in copied.parameters() if p.requires_grad]
    start = _squares(read)
    with torch.enable_grad():
        for _ in range(steps):
            value = loss(_outputs(read, inputs))
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter.sub_(size * gradient)
    return float((_squares(read) / start - 1).abs().mean())


def _squares(read: Chain) -> Tensor:
    """Give the squared norms that BatchNorm conserves, of the layers that have one; of all layers if none has."""
    normed = [layer for layer in read.layers if layer.norm is not None]
    found = []
    for layer in normed or read.layers:
        square = layer.linear.weight.detach().cpu().flatten(1).double().square().sum(1)
        if layer.norm_place == "after_relu" and layer.linear.bias is not None:
            square = square + layer.linear.bias.detach().cpu().double().square()
        found.append(square)
    return torch.cat(found)
