"""Resize a module: a copy with other tensors whose layers say the new sizes, and nothing else changed."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thalweg.errors import StructureError
from thalweg.structure import View
from thalweg.structure.tree import ProductTree, Tree, gather, resized


def resized_module(module: nn.Module, view: View, sizes: Mapping[str, int], state: Mapping[str, Tensor]) -> nn.Module:
    """Copy a module with the tensors of `state` in place of its own, and its layers' sizes set to fit.

    Layers of torch.nn say their sizes (`out_features`, `num_channels`, …), and those are set. A module of the
    user's own keeps its attributes: if its forward uses a size, the result does not run or computes something
    else, which `embed` and `reduce` find out by running it.

    Args:
        module: the module to copy.
        view: its groups.
        sizes: group -> new size.
        state: name -> new tensor, for every parameter and buffer.

    Raises:
        StructureError: a grouped layer whose number of groups cannot be told from the view.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    # Tensors stand for themselves while the module is copied: every one of them is replaced below.
    # What a hook makes of them (pruning, the old weight_norm) has a graph, and is made again in the next forward.
    made = [t for m in module.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    twin = copy.deepcopy(module, {id(t): t.detach() for t in made} | {id(t): t for t in tensors.values()})
    owners = dict(twin.named_modules())
    for name, old in tensors.items():
        value = state[name].detach()
        value = value.clone() if value.data_ptr() == old.data_ptr() else value
        placed = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        for place in _places(module, old):
            owner, _, leaf = place.rpartition(".")
            setattr(owners[owner], leaf, placed)
    for name, layer in owners.items():
        for kind, update in _UPDATES.items():
            if isinstance(layer, kind):
                update(layer, f"{name}." if name else "", view, sizes)
    return twin


def module_of_sizes(module: nn.Module, view: View, sizes: Mapping[str, int]) -> nn.Module:
    """Copy a module with groups of other sizes, to be filled: its units are repeated in turn, or cut off.

    It computes something else until weights of these sizes are loaded.

    Args:
        module: the module to copy.
        view: its groups.
        sizes: group -> new size; names that are no group of the view are left out.

    Raises:
        StructureError: a grouped layer whose number of groups cannot be told from the view.
    """
    chosen = {g.name: np.arange(sizes[g.name]) % g.size for g in view.groups if g.name in sizes}
    state = {}
    for name, tensor in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
        state[name] = tensor.detach()
        for dim, tree in enumerate(view.axes.get(name, ())):
            index = torch.from_numpy(gather(tree, chosen)).to(tensor.device)
            state[name] = state[name].index_select(dim, index)
    return resized_module(module, view, sizes, state)


@contextmanager
def fitting(module: nn.Module, view: View, sizes: Mapping[str, int]) -> Iterator[None]:
    """While a resized module runs, let its normalisation layers without tensors learn their size from what comes in.

    Such a layer (`LayerNorm(8, elementwise_affine=False)`, `GroupNorm(4, 8, affine=False)`) says a size and has no
    parameter to tell the new one. How many groups a GroupNorm has then is told by the axes that fit it.

    Args:
        module: a resized module; run it once under this context.
        view: the groups before.
        sizes: group -> new size.

    Raises:
        StructureError: by the run, where the number of groups of a GroupNorm cannot be told.
    """
    hooks = []
    for name, layer in module.named_modules():
        for kind, update in _SIZES_OF_INPUTS.items():
            if isinstance(layer, kind) and not [*layer.parameters(), *layer.buffers()]:
                fit = functools.partial(_fit, update=update, name=name, view=view, sizes=sizes)
                hooks.append(layer.register_forward_pre_hook(fit))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fit(
    layer: Any, inputs: Any, *, update: Callable[..., None], name: str, view: View, sizes: Mapping[str, int]
) -> None:
    """Set a layer's size when it is called; by keyword nothing can be told."""
    if inputs:
        update(layer, inputs[0].shape, name, view, sizes)


def _layer_norm_of(layer: nn.LayerNorm | nn.RMSNorm, shape: torch.Size, *_: object) -> None:
    if len(shape) >= len(layer.normalized_shape):
        layer.normalized_shape = tuple(shape[-len(layer.normalized_shape) :])


def _batch_norm_of(layer: Any, shape: torch.Size, *_: object) -> None:
    is_instance_norm = isinstance(layer, nn.modules.instancenorm._InstanceNorm)
    layer.num_features = shape[len(shape) - layer._get_no_batch_dim()] if is_instance_norm else shape[1]


def _group_norm_of(layer: nn.GroupNorm, shape: torch.Size, name: str, view: View, sizes: Mapping[str, int]) -> None:
    before, after = layer.num_channels, shape[1]
    if before == after:
        return
    trees = [t for trees in view.axes.values() for t in trees if t.size == before and resized(t, sizes).size == after]
    found = set()
    for tree in trees:
        with suppress(StructureError):  # an axis of the same size that is not this layer's
            found.add(_leading(tree, layer.num_groups, sizes, name))
    if len(found) != 1:
        raise StructureError(
            f"Expected one number of groups for {name!r} at {after} channels. Got {sorted(found) or 'none'}. "
            "It fixes its size and has no parameter to resize: make it affine, or give your own wide module."
        )
    layer.num_groups, layer.num_channels = found.pop(), after


_SIZES_OF_INPUTS: Mapping[type[nn.Module], Callable[..., None]] = {
    nn.modules.batchnorm._NormBase: _batch_norm_of,
    nn.LayerNorm: _layer_norm_of,
    nn.RMSNorm: _layer_norm_of,
    nn.GroupNorm: _group_norm_of,
}


def _places(module: nn.Module, tensor: Tensor) -> list[str]:
    """Every name under which a tensor stands: tied weights have several."""
    parameters = [n for n, p in module.named_parameters(remove_duplicate=False) if p is tensor]
    return parameters or [n for n, b in module.named_buffers(remove_duplicate=False) if b is tensor]


def _linear(layer: nn.Linear, *_: object) -> None:
    layer.out_features, layer.in_features = layer.weight.shape


def _embedding(layer: nn.Embedding, *_: object) -> None:
    layer.num_embeddings, layer.embedding_dim = layer.weight.shape


def _convolution(layer: nn.modules.conv._ConvNd, prefix: str, view: View, sizes: Mapping[str, int]) -> None:
    weight = layer.weight
    if layer.groups > 1:
        layer.groups = _leading(view.axes[f"{prefix}weight"][0], layer.groups, sizes, f"{prefix}weight")
    one, two = weight.shape[0], weight.shape[1] * layer.groups
    layer.in_channels, layer.out_channels = (one, two) if layer.transposed else (two, one)


def _batch_norm(layer: nn.modules.batchnorm._NormBase, *_: object) -> None:
    known = next((t for t in (layer.weight, layer.running_mean) if t is not None), None)
    if known is not None:
        layer.num_features = len(known)


def _layer_norm(layer: nn.LayerNorm | nn.RMSNorm, *_: object) -> None:
    if layer.weight is not None:
        layer.normalized_shape = tuple(layer.weight.shape)


def _group_norm(layer: nn.GroupNorm, prefix: str, view: View, sizes: Mapping[str, int]) -> None:
    if layer.affine:
        tree = view.axes[f"{prefix}weight"][0]
        layer.num_groups = _leading(tree, layer.num_groups, sizes, f"{prefix}weight")
        layer.num_channels = len(layer.weight)


def _recurrent(layer: nn.RNNBase, *_: object) -> None:
    layer.hidden_size = layer.get_parameter("weight_hh_l0").shape[1]
    layer.input_size = layer.get_parameter("weight_ih_l0").shape[1]
    layer._init_flat_weights()


def _recurrent_cell(layer: nn.RNNCellBase, *_: object) -> None:
    layer.hidden_size, layer.input_size = layer.weight_hh.shape[1], layer.weight_ih.shape[1]


_UPDATES: Mapping[type[nn.Module], Callable[..., None]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.modules.conv._ConvNd: _convolution,
    nn.modules.batchnorm._NormBase: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent_cell,
}


def _leading(tree: Tree, groups: int, sizes: Mapping[str, int], name: str) -> int:
    """Number of groups after resizing: the leading factors of the axis that make up the groups before."""
    if groups == 1:
        return 1
    if tree.size == groups:
        return resized(tree, sizes).size
    if isinstance(tree, ProductTree):
        before, after = 1, 1
        for part in tree.parts:
            before *= part.size
            after *= resized(part, sizes).size
            if before == groups:
                return after
    if resized(tree, sizes).size == tree.size:
        return groups
    raise StructureError(
        f"Expected whole groups of {name!r} to change. Got a plan that cuts across its {groups} groups. "
        "Choose widths that keep the groups."
    )
