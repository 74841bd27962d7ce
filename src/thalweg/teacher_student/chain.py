"""A chain: a ReLU network read as its layers, so that gates, nodes and maps of each can be told apart."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from thalweg.errors import ShapeError, StructureError

LinearMap = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
NormPlace = Literal["none", "after_relu", "before_relu"]

_SILENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class Layer:
    """A hidden layer: a linear map, a ReLU, and maybe a BatchNorm before or after it.

    Args:
        name: of the linear map in the module.
        linear: the map; its outputs (the first dim of its weight) are the nodes.
        norm: the BatchNorm, or None.
        norm_place: where it stands.
        flattens: whether what the map reads is flattened before.
    """

    name: str
    linear: LinearMap
    norm: BatchNorm | None
    norm_place: NormPlace
    flattens: bool

    @property
    def width(self) -> int:
        """Number of nodes."""
        return len(self.linear.weight)


@dataclass(frozen=True)
class Trace:
    """What a forward pass of a chain computes, layer by layer.

    Args:
        inputs: x, (batch, …).
        preactivations: z_l, what the linear maps give, (batch, nodes, *positions).
        gates: f'_l, where the ReLUs let through; of the same shape.
        activations: f_l, what the next layer reads: after ReLU and BatchNorm.
        outputs: (batch, outputs).
    """

    inputs: Float[Tensor, "batch *features"]
    preactivations: tuple[Float[Tensor, "batch _ ..."], ...]
    gates: tuple[Bool[Tensor, "batch _ ..."], ...]
    activations: tuple[Float[Tensor, "batch _ ..."], ...]
    outputs: Float[Tensor, "batch outputs"]


@dataclass(frozen=True)
class Chain:
    """A ReLU network as its layers.

    Args:
        module: the network; parameters are read from it at each use.
        layers: the hidden layers, from the input.
        head: the linear layer of outputs.
        head_flattens: whether what the head reads is flattened before.
    """

    module: nn.Sequential
    layers: tuple[Layer, ...]
    head: nn.Linear
    head_flattens: bool

    @property
    def widths(self) -> tuple[int, ...]:
        """Nodes of each hidden layer."""
        return tuple(layer.width for layer in self.layers)

    def trace(self, x: Float[Tensor, "batch *features"], *, batch_statistics: bool = False) -> Trace:
        """Run the network; neither it nor its running statistics are changed.

        Args:
            x: inputs.
            batch_statistics: whether BatchNorm takes mean and variance of this batch, as in training, or the
                running ones, whatever the module's mode.

        Returns:
            Everything that is computed.

        Raises:
            ShapeError: a linear layer reads more than one axis of features, so that its nodes do not lie along dim 1.
        """
        h = x
        pre, gates, activations = [], [], []
        for layer in self.layers:
            z = applied(layer.linear, h.flatten(1) if layer.flattens else h)
            before = normalised(layer.norm, z, batch_statistics) if layer.norm_place == "before_relu" else z
            gate = before > 0
            h = functional.relu(before)
            if layer.norm_place == "after_relu":
                h = normalised(layer.norm, h, batch_statistics)
            pre.append(z)
            gates.append(gate)
            activations.append(h)
        outputs = applied(self.head, h.flatten(1) if self.head_flattens else h)
        return Trace(x, tuple(pre), tuple(gates), tuple(activations), outputs)


def applied(linear: LinearMap, x: Tensor) -> Tensor:
    """Apply a linear map.

    Raises:
        ShapeError: it is a linear layer, and there are more axes than samples and features.
    """
    if isinstance(linear, nn.Linear) and x.ndim != 2:
        raise ShapeError(
            f"Expected (samples, {linear.in_features}) at a linear layer of a chain. Got {tuple(x.shape)}. Put an "
            "nn.Flatten before it, or use thalweg match, which takes positions as samples."
        )
    found: Tensor = linear(x)
    return found


def normalised(norm: BatchNorm | None, z: Tensor, batch_statistics: bool) -> Tensor:
    """Apply a BatchNorm with the batch's statistics or the running ones, without updating those."""
    if norm is None:
        return z
    takes_batch = batch_statistics or norm.running_mean is None
    kept = (None, None) if takes_batch else (norm.running_mean, norm.running_var)
    return functional.batch_norm(z, *kept, norm.weight, norm.bias, training=takes_batch, eps=norm.eps)


def require_statistics(*networks: Chain) -> None:
    """See that every BatchNorm has running statistics: with a batch's own, results depend on how data are cut.

    Raises:
        StructureError: one has none.
    """
    for read in networks:
        for layer in read.layers:
            if layer.norm is not None and layer.norm.running_mean is None:
                raise StructureError(
                    f"Expected a BatchNorm with running statistics. Got one without after {layer.name!r}. "
                    "Build it with track_running_stats=True."
                )


def chain(module: nn.Module) -> Chain:
    """Read a network as a chain of ReLU layers.

    Args:
        module: an `nn.Sequential`, nested ones included, of linear maps (Linear, Conv1d to 3d), each but the last
            followed by a ReLU, with a BatchNorm before it, after it or not at all; Flatten where maps change from
            convolutions to linear ones; Identity and Dropout are passed over (dropout never drops here).

    Returns:
        The chain. It holds the module's own layers: when they change, it does.

    Raises:
        StructureError: the network is of another kind.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 2))
        >>> [(layer.name, layer.norm_place) for layer in chain(net).layers]
        [('0', 'after_relu')]
    """
    if not isinstance(module, nn.Sequential):
        raise StructureError(
            f"Expected an nn.Sequential of linear maps and ReLUs. Got {type(module).__name__}. Build one of the same "
            "layers; correlations of any two networks: thalweg match."
        )
    leaves = [(name, leaf) for name, leaf in _leaves(module) if not isinstance(leaf, _SILENT)]
    layers, flattens = [], False
    place = 0
    while place < len(leaves) - 1:
        name, leaf = leaves[place]
        if isinstance(leaf, nn.Flatten) and (leaf.start_dim, leaf.end_dim) == (1, -1):
            flattens, place = True, place + 1
            continue
        kinds = [_kind(other) for _, other in leaves[place : place + 3]]
        if kinds[:3] == ["linear", "norm", "relu"]:
            found, norm, length = "before_relu", leaves[place + 1][1], 3
        elif kinds[:3] == ["linear", "relu", "norm"]:
            found, norm, length = "after_relu", leaves[place + 2][1], 3
        elif kinds[:2] == ["linear", "relu"]:
            found, norm, length = "none", None, 2
        else:
            raise _unread(leaves, place)
        layers.append(Layer(name, leaf, norm, found, flattens))  # type: ignore[arg-type]
        flattens, place = False, place + length
    if place != len(leaves) - 1 or not isinstance(leaves[-1][1], nn.Linear) or not layers:
        raise _unread(leaves, min(place, len(leaves) - 1))
    return Chain(module, tuple(layers), leaves[-1][1], flattens)


def _leaves(module: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module._modules.items():  # named_children passes over what comes a second time
        if isinstance(child, nn.Sequential):
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "linear"
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return "norm"
    return "relu" if isinstance(module, nn.ReLU) else type(module).__name__


def _unread(leaves: Sequence[tuple[str, nn.Module]], place: int) -> StructureError:
    if not leaves:
        return StructureError("Expected linear maps and ReLUs. Got no layers. Pass the network itself.")
    name, leaf = leaves[place]
    return StructureError(
        "Expected linear maps, each followed by a ReLU with a BatchNorm before it, after it or not at all, and a "
        f"Linear at the end. Got {type(leaf).__name__} {name!r} there. Take a network of these layers."
    )


def require_pair(teacher: Chain, student: Chain) -> None:
    """See that two chains can be teacher and student: as many layers, as many outputs.

    Raises:
        ShapeError: they cannot.
    """
    if len(teacher.layers) != len(student.layers) or teacher.head.out_features != student.head.out_features:
        raise ShapeError(
            f"Expected a teacher and a student with as many hidden layers and outputs. Got {len(teacher.layers)} "
            f"and {len(student.layers)} hidden layers, {teacher.head.out_features} and {student.head.out_features} "
            "outputs. Build the student of the teacher's depth."
        )
