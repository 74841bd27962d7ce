"""lift: a convolutional network as a relaxed one, dense or locally connected, that computes the same."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.errors import MemoryLimitError, StructureError
from thalweg.lifting.layers import Kind, LiftedLayer, LiftPlan, lift_plan
from thalweg.lifting.lifting import Lifting
from thalweg.lifting.local import LocallyConnected
from thalweg.lifting.memory import available_memory, worded_bytes
from thalweg.precision import copied
from thalweg.space import Space
from thalweg.structure.comparison import output_change

_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative change of the outputs that rounding may cause, as for `embed`; more means that a layer hides something."""


@dataclass(frozen=True)
class Lifted:
    """A network carried into a less constrained one.

    Args:
        module: a copy of the module in which every lifted convolution is replaced, at the lifted point.
        lifting: the map; `lifting.apply` carries other points, `lifting.project` brings them back.
        plan: what was lifted, and what was kept and why.
        error: max|f_lifted - f| / max|f| on the example inputs, in the module's own precision.
    """

    module: nn.Module
    lifting: Lifting
    plan: LiftPlan
    error: float


def lift(
    module: nn.Module,
    inputs: Any,
    *,
    to: Kind | Mapping[str, Kind] = "fc",
    padded: bool = False,
    max_memory: int | None = None,
) -> Lifted:
    """Carry a convolutional network exactly into the space of dense or locally-connected ones.

    Output channel o at position y reads channel c at input position u through the tap i with
    u = y·stride + i·dilation - padding, if there is one; the lifted weight is K[o, c, i] there and 0 elsewhere; the
    bias of a position is that of its channel. Every `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` is replaced in place:

    - "fc": `nn.Sequential([pad,] flatten, linear, unflatten)`, plain layers of torch;
    - "local": a `LocallyConnected` layer (after its padding, where that is not zeros);
    - "shared": the convolution itself.

    All else stays: code of `forward`, skip connections, pooling, dropout, BatchNorm (whose statistics are per channel
    still), so that training goes on from where it was.

    Args:
        module: any module; it is not touched.
        inputs: one example batch: a tensor, a tuple of arguments, or a dict of keyword arguments. The lifted module
            takes images of its size only.
        to: kind of every convolution, or pattern of its name -> kind; see `lift_plan`.
        padded: keep zero padding as a layer of its own before a dense map, as the paper's code does, whose map then
            has weights that read constant zeros. Default: fold it into the map; the same function, fewer weights.
        max_memory: bytes that the lifted weights may take. Default: what the device has free.

    Returns:
        The lifted module with the map and the change of the outputs.

    Raises:
        ConfigError: an unknown kind.
        StructureError: nothing to lift, a named layer that cannot be lifted, or a module that runs no more.
        MemoryLimitError: the lifted weights would take more; nothing was allocated.

    **Source:** dascoli2019finding (arXiv 1906.06766), section 3 and supplement A: its map is "fc" with `padded=True`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
        >>> images = torch.randn(5, 1, 8, 8)
        >>> lifted = lift(net, images)
        >>> lifted.module[0].linear.weight.shape, lifted.error < 1e-5
        (torch.Size([18, 64]), True)
        >>> lift(net, images, to="local").module[0]
        LocallyConnected(1, 2, kernel_size=(3, 3), input_size=(8, 8), stride=(2, 2), padding=((0, 0), (0, 0)), \
dilation=(1, 1), groups=1, bias=True)
    """
    plan = lift_plan(module, inputs, to=to, padded=padded)
    device = next(module.parameters()).device
    require_memory(plan, available_memory(device) if max_memory is None else max_memory)
    result, lifting = build_lifted(module, plan)
    with _full_precision(device):
        error = output_change(result, module, inputs, "lifted")
    dtype = next(module.parameters()).dtype
    if not error <= _SAME.get(dtype, 1e-1):
        raise StructureError(
            f"Expected the lifted module to compute the same outputs. Got a relative change of {error:.1e}. A "
            "convolution is reached by another way than its name (a list, a stored method): keep it as 'shared', "
            "or register the list as an nn.ModuleList."
        )
    return Lifted(result, lifting, plan, error)


def build_lifted(module: nn.Module, plan: LiftPlan) -> tuple[nn.Module, Lifting]:
    """Replace the planned convolutions in a copy of a module, without looking at what it computes.

    Args:
        module: the convolutional network.
        plan: what `lift_plan` found for it.

    Returns:
        The lifted module, in the mode of the original, and the map.
    """
    device = next(module.parameters()).device
    space, state = _space(module), dict(module.named_parameters())
    result = copied(module, device=device)
    lifting = Lifting(plan.layers, space, space, _unread(plan.layers, state))
    with torch.no_grad():
        for layer in plan.layers:
            convolution = module.get_submodule(layer.name)
            new = _module_of(layer, device)
            lifted = lifting.lazily({k: v for k, v in state.items() if k in _tensors_of(layer)})
            prefix = f"{layer.name}." if layer.name else ""
            for name in lifted:
                kind = name.rpartition(".")[2]
                value = nn.Parameter(lifted[name], requires_grad=state[f"{prefix}{kind}"].requires_grad)
                new.get_submodule(layer.inner.removesuffix(".")).register_parameter(kind, value)
            new.train(convolution.training)
            for parameter in result.get_submodule(layer.name).parameters():
                parameter.fill_(math.nan)  # whoever still reaches the convolution in the copy is found out
            for own in layer.names:
                if own:
                    result.set_submodule(own, new)
                else:
                    result = new
    return result, Lifting(plan.layers, space, _space(result), lifting.unread)


def _space(module: nn.Module) -> Space:
    """Give the coordinates of a module; none where all of it is frozen."""
    return Space.of(module) if any(p.requires_grad for p in module.parameters()) else Space((), ())


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Let convolutions on a GPU compute in their own type, as dense layers do, while outputs are compared."""
    if device.type != "cuda":
        return nullcontext()
    flags: AbstractContextManager[Any] = torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, allow_tf32=False
    )
    return flags


def require_memory(plan: LiftPlan, limit: int | None) -> None:
    """See that lifted weights fit, before any is made.

    Args:
        plan: what would be lifted.
        limit: bytes; None if there is none known.

    Raises:
        MemoryLimitError: they take more.
    """
    if limit is None or plan.num_bytes <= limit:
        return
    largest = max(plan.layers, key=lambda layer: layer.num_bytes)
    raise MemoryLimitError(
        f"Expected at most {limit:,} bytes ({worded_bytes(limit)}) of lifted weights. Got {plan.num_bytes:,} bytes "
        f"({worded_bytes(plan.num_bytes)}), of which {largest.name!r}, {largest.num_params:,} parameters, takes "
        f"{largest.num_bytes:,} ({worded_bytes(largest.num_bytes)}). Lift it to 'local', keep it 'shared', use "
        "smaller images, or allow more."
    )


def _tensors_of(layer: LiftedLayer) -> tuple[str, str]:
    prefix = f"{layer.name}." if layer.name else ""
    return f"{prefix}weight", f"{prefix}bias"


def _module_of(layer: LiftedLayer, device: torch.device) -> nn.Module:
    """Build what replaces a convolution, with parameters that take no memory yet."""
    geometry, pad = layer.geometry, layer.pad()
    if layer.kind == "local":
        local = LocallyConnected(
            geometry.in_channels,
            geometry.out_channels,
            geometry.kernel_size,
            geometry.input_size,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
            bias=layer.has_bias,
            device="meta",
        )
        return local if pad is None else nn.Sequential(OrderedDict(pad=pad, local=local))
    rows, columns = layer.weight_shape
    parts: dict[str, nn.Module] = {} if pad is None else {"pad": pad}
    parts["flatten"] = nn.Flatten(-1 - len(geometry.input_size))
    parts["linear"] = nn.Linear(columns, rows, bias=layer.has_bias, device="meta")
    parts["unflatten"] = nn.Unflatten(-1, (geometry.out_channels, *geometry.output_size))
    return nn.Sequential(OrderedDict(parts))


def _unread(layers: tuple[LiftedLayer, ...], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the kernels that have taps which read nothing but padding."""
    return {
        _tensors_of(layer)[0]: state[_tensors_of(layer)[0]].detach().clone()
        for layer in layers
        if not all(box.count for box in layer.geometry.boxes())
    }
