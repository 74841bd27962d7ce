"""precision: copies of modules and data on another device and in another floating type, tensor by tensor."""

import copy
import functools
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from thalweg.errors import StructureError

Device = torch.device | str
Module = TypeVar("Module", bound=nn.Module)


def copied(module: Module, *, device: Device, dtype: torch.dtype | None = None) -> Module:
    """Copy a module, without gradients, to a device and a floating type; the original is never touched.

    Floating parameters and buffers take the type, complex ones the complex type of the same precision,
    others stay as they are. Tensors that the module keeps as plain attributes are copied as they are, cut
    off from the graph that made them (`torch.nn.utils.prune` and the old `weight_norm` leave such ones and
    recompute them on every run).

    Args:
        module: any module; ties between its parameters are kept.
        device: where the copy lives.
        dtype: floating type. Default: every tensor keeps its own.

    Returns:
        The copy, in the mode (train or eval) of the original.

    Raises:
        StructureError: a trainable parameter is complex, or the module holds what cannot be copied.

    Example:
        >>> copied(nn.Linear(2, 1), device="cpu", dtype=torch.float64).weight.dtype
        torch.float64
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.is_complex():
            raise StructureError(
                f"Expected real trainable parameters. Got {name!r} of type {parameter.dtype}. "
                "Keep it as its real view (torch.view_as_real), or set requires_grad=False."
            )
    try:
        twin = copy.deepcopy(module, {id(t): t.detach().clone() for t in _made_tensors(module)})
    except Exception as error:  # whatever a user's attribute raises
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise StructureError(
            f"Expected a module that can be copied. Got {reason}. Drop that attribute of {type(module).__name__}."
        ) from error
    for parameter in twin.parameters():
        parameter.grad = None
    twin._apply(functools.partial(_cast, device=device, dtype=dtype))  # type: ignore[no-untyped-call]
    return twin


def placed(value: Any, *, device: Device, dtype: torch.dtype) -> Any:
    """Move data to a device and a floating type, through tuples, lists (made tuples) and dicts.

    Floating tensors take the type, complex ones the complex type of the same precision; the rest is left.

    Args:
        value: a tensor, tuples, lists and dicts of them, or anything else.
        device: where to.
        dtype: floating type.

    Returns:
        The same structure; a tensor that needs no change is not copied.

    Example:
        >>> placed((torch.tensor([1.5]), torch.tensor([2])), device="cpu", dtype=torch.float64)
        (tensor([1.5000], dtype=torch.float64), tensor([2]))
    """
    if isinstance(value, Tensor):
        return _cast(value, device=device, dtype=dtype)
    if isinstance(value, tuple | list):
        return tuple(placed(v, device=device, dtype=dtype) for v in value)
    if isinstance(value, dict):
        return {k: placed(v, device=device, dtype=dtype) for k, v in value.items()}
    return value


def _cast(tensor: Tensor, *, device: Device, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.to(device=device)
    return tensor.to(device=device, dtype=dtype.to_complex() if tensor.is_complex() else dtype)


def _made_tensors(module: nn.Module) -> list[Tensor]:
    """Tensors with a graph behind them, kept as attributes, buffers or gradients: deepcopy refuses them."""
    kept = [t for m in module.modules() for t in tree_leaves(vars(m)) if isinstance(t, Tensor)]
    slopes = [t.grad for t in kept if t.is_leaf and t.grad is not None]
    return [t for t in kept + slopes if not t.is_leaf]
