"""A part of a network: some of its nodes, with the weights, biases and statistics that they have."""

import copy
from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor, nn
from torch import bool as bool_

from thalweg.errors import ShapeError, StructureError
from thalweg.teacher_student.chain import BatchNorm, Chain, LinearMap, chain


def subnetwork(student: nn.Module, kept: Sequence[Int[Tensor, " _"]]) -> nn.Sequential:
    """Build the network of some of a chain's nodes; all others are removed, with the weights that read them.

    Args:
        student: a chain; it is not changed.
        kept: for each hidden layer the numbers of the nodes to keep, each once, in the order that they will have.

    Returns:
        A network of the same layers, narrower, in the student's mode.

    Raises:
        StructureError: the network is no chain, has convolutions with groups, or a layer twice.
        ShapeError: there are not as many lists as hidden layers, or one is empty, repeats a node or names none.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> subnetwork(net, [torch.tensor([4, 1])])[0].weight.shape
        torch.Size([2, 3])
    """
    _require_nodes(chain(student), kept)
    new = chain(copy.deepcopy(student))
    before: tuple[Tensor, int] | None = None  # the nodes that are left of those there were
    for layer, nodes in zip(new.layers, kept, strict=True):
        width, own = layer.width, nodes.to(layer.linear.weight.device)
        if before is not None:
            _keep_inputs(layer.linear, *before)
        _keep_rows(layer.linear, own)
        if layer.norm is not None:
            _keep_rows(layer.norm, own)
            layer.norm.num_features = len(own)
        before = own, width
    if before is not None:
        _keep_inputs(new.head, *before)
    return new.module


def _keep_rows(layer: LinearMap | BatchNorm, nodes: Tensor) -> None:
    """Keep the entries of some nodes in every parameter and buffer that has them along its first dim."""
    for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
        if tensor.ndim:
            _replace(layer, name, tensor.detach()[nodes])
    if isinstance(layer, nn.Linear):
        layer.out_features = len(nodes)
    elif not isinstance(layer, BatchNorm):
        layer.out_channels = len(nodes)


def _keep_inputs(layer: LinearMap, nodes: Tensor, width: int) -> None:
    """Keep the columns that read some of the nodes before; after a Flatten a node has several."""
    weight = layer.weight.detach()
    by_node = weight.reshape(len(weight), width, -1)[:, nodes]
    _replace(layer, "weight", by_node.reshape(len(weight), -1, *weight.shape[2:]).contiguous())
    if isinstance(layer, nn.Linear):
        layer.in_features = layer.weight.shape[1]
    else:
        layer.in_channels = layer.weight.shape[1]


def _replace(layer: nn.Module, name: str, tensor: Tensor) -> None:
    old = getattr(layer, name)
    setattr(
        layer,
        name,
        nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor,
    )


def _require_nodes(read: Chain, kept: Sequence[Tensor]) -> None:
    if len(kept) != len(read.layers):
        raise ShapeError(
            f"Expected nodes for each of {len(read.layers)} hidden layers. Got {len(kept)} lists. Pass one a layer."
        )
    if len({id(layer.linear) for layer in read.layers}) < len(read.layers):
        raise StructureError(
            "Expected layers of their own. Got one twice. Copy it, so that each can lose other nodes."
        )
    for layer in read.layers:
        if getattr(layer.linear, "groups", 1) > 1:
            raise StructureError(
                f"Expected convolutions without groups. Got {layer.linear.groups} in {layer.name!r}, each of which "
                "reads nodes of its own. Build the network without groups."
            )
    for layer, nodes in zip(read.layers, kept, strict=True):
        numbers = nodes.tolist()
        if (
            nodes.dtype == bool_
            or not numbers
            or len(set(numbers)) < len(numbers)
            or min(numbers) < 0
            or max(numbers) >= layer.width
        ):
            raise ShapeError(
                f"Expected different nodes out of {layer.width} for {layer.name!r}. Got {numbers}. Check the numbers."
            )
