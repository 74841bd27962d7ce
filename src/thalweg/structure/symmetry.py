"""The symmetries of a view: permute the units of a group, rescale them, or flip their signs."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from thalweg.structure.tree import FloatArray, IntArray, gather, spread, unit_of
from thalweg.structure.view import View


def random_permutations(view: View, generator: torch.Generator) -> dict[str, IntArray]:
    """Draw a permutation that moves every unit (one random cycle) for every group.

    A uniform draw leaves small groups as they are too often to prove anything.

    Args:
        view: the groups.
        generator: of the draws.

    Returns:
        Group -> for every new place the old unit that goes there, as `permute` takes it.
    """
    drawn = {}
    for group in view.groups:
        order = torch.randperm(group.size, generator=generator).numpy()
        drawn[group.name] = np.empty_like(order)
        drawn[group.name][order] = np.roll(order, 1)
    return drawn


def permute(view: View, state: Mapping[str, Tensor], permutations: Mapping[str, IntArray]) -> dict[str, Tensor]:
    """Reorder the units of groups in every parameter and buffer.

    f(permute(theta)) = f(theta) for every permutation of every group: the defining property of a view.

    Args:
        view: the groups.
        state: parameters and buffers by name.
        permutations: group -> for every new place the old unit that goes there.

    Returns:
        A new state; tensors that no permutation touches are the same objects.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> view = View.of_spec(net, {"hidden": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]})
        >>> swapped = permute(view, dict(net.named_parameters()), {"hidden": np.array([1, 0])})
        >>> bool(swapped["0.bias"][0] == net[0].bias[1])
        True
    """
    result = dict(state)
    for name, trees in view.axes.items():
        if name not in result:
            continue
        for dim, tree in enumerate(trees):
            index = gather(tree, permutations)
            if not np.array_equal(index, np.arange(len(index))):
                tensor = result[name]
                result[name] = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
    return result


def rescale(view: View, state: Mapping[str, Tensor], factors: Mapping[str, FloatArray]) -> dict[str, Tensor]:
    """Scale what makes each unit by c > 0 and what reads it by 1/c; exact for homogeneous groups.

    Source:
        Trivial transforms of the Embedding Principle (zhang2021embedding, appendix A.1), for any module.

    Args:
        view: the groups.
        state: parameters and buffers by name.
        factors: homogeneous group -> one factor c > 0 for every unit.

    Returns:
        A new state.
    """
    result = dict(state)
    for group in view.groups:
        if group.name not in factors:
            continue
        up = factors[group.name]
        for member in group.members:
            if member.role == "consumer":
                scale = spread(view.axes[member.tensor][member.dim], {group.name: 1 / up})
            elif (member.tensor, member.dim) in group.scaled:
                scale = spread(view.axes[member.tensor][member.dim], {group.name: up})
            else:
                continue
            if member.tensor in result:
                result[member.tensor] = scaled_along(result[member.tensor], member.dim, scale)
    return result


def flip(view: View, state: Mapping[str, Tensor], signs: Mapping[str, FloatArray]) -> dict[str, Tensor]:
    """Multiply what makes each unit by s = ±1, and what reads it by s; exact for the groups of `odd_groups`.

    σ(-z) = -σ(z) for tanh, sine, erf, the identity: a unit and its outgoing weights may change sign together.

    Args:
        view: the groups.
        state: parameters and buffers by name.
        signs: group -> +1 or -1 for every unit.

    Returns:
        A new state; tensors that no sign touches are the same objects.

    Source:
        Trivial transforms of the Embedding Principle (zhang2021embedding, appendix A.1) are permutations and
        scalings; the sign symmetry of odd activations is added here, for any module.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> view = View.of_spec(net, {"hidden": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]})
        >>> flipped = flip(view, dict(net.named_parameters()), {"hidden": np.array([1.0, -1.0])})
        >>> bool(flipped["0.bias"][1] == -net[0].bias[1])
        True
    """
    result = dict(state)
    for name, trees in view.axes.items():
        if name not in result:
            continue
        for dim, tree in enumerate(trees):
            scale = spread(tree, signs)
            if bool((scale != 1).any()):
                result[name] = scaled_along(result[name], dim, scale)
    return result


def scaled_along(tensor: Tensor, dim: int, scale: FloatArray) -> Tensor:
    """Multiply a tensor by a vector along one dim."""
    return tensor * factors_along(tensor, dim, scale)


def factors_along(tensor: Tensor, dim: int, scale: FloatArray) -> Tensor:
    """Give a vector the shape, dtype and device to multiply a tensor along one dim."""
    factors = torch.from_numpy(scale).to(dtype=tensor.dtype, device=tensor.device)
    return factors.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])


def unit_positions(view: View, tensor: str, dim: int, group: str) -> IntArray:
    """Give every position along a dim the unit of the group it belongs to, -1 for none."""
    return unit_of(view.axes[tensor][dim], group)
