"""How a lifted checkpoint is loaded in plain PyTorch, in lines of Python."""

import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.cli.references import keywords_of

if TYPE_CHECKING:
    from torch import nn

    from thalweg.lifting import LiftedLayer, LiftPlan


@dataclass(frozen=True)
class Built:
    """How a user's module is built.

    Args:
        model: `module:name` or `file.py:name`.
        net: in its place, a name in thalweg.nets.
        arguments: words `key=value` for the factory.
        widths: of groups that the checkpoint has in place of the factory's.
    """

    model: str | None
    net: str | None
    arguments: Sequence[str] | None
    widths: Mapping[str, int]


def loading_lines(module: "nn.Module", plan: "LiftPlan", built: Built, file: Path) -> list[str]:
    """Write the lines that load a lifted checkpoint: one for each lifted layer, no thalweg but `LocallyConnected`.

    Args:
        module: the convolutional module.
        plan: what is lifted.
        built: how the module is built.
        file: the lifted checkpoint.

    Returns:
        Lines of Python, which run where the user's module can be imported; of a checkpoint with other widths than
        the factory makes, with dots where the user builds one that has them.
    """
    import torch

    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    only = dtypes.pop() if len(dtypes) == 1 else None
    imports, made = _built(module, built)
    uses_local = any(layer.kind == "local" for layer in plan.layers)
    is_plain = file.suffix != ".safetensors"
    lines = ["from collections import OrderedDict", ""]
    lines += ["import torch"] * (is_plain or only != torch.float32)
    lines += ["from safetensors.torch import load_file"] * (not is_plain)
    lines += ["from torch import nn", ""]
    lines += ["from thalweg.lifting import LocallyConnected"] * uses_local
    lines += [*imports, "", *made]
    for layer in plan.layers:
        places = [_place(module, name) for name in layer.names]
        lines.append(f"{' = '.join(places)} = {_layer(layer)}")
        lines += _frozen(module, layer, places[0])
    if only not in (None, torch.float32):
        lines.append(f"net = net.to({only})")
    state = f"torch.load({str(file)!r}, weights_only=True)" if is_plain else f"load_file({str(file)!r})"
    return [*lines, f"net.load_state_dict({state}, strict=True)", "net.eval()"]


def _built(module: "nn.Module", built: Built) -> tuple[list[str], list[str]]:
    """Give what imports the factory, and what calls it, or says that the user has to."""
    place, _, name = (built.model or f"thalweg.nets:{built.net}").rpartition(":")
    note = ""
    if place.endswith(".py"):
        path = Path(place)
        note = f"  # {place}" if path.parent != Path() else ""
        place = path.stem
    words = keywords_of(built.arguments or [], "--arg")
    given = ", ".join(f"{key}={value!r}" for key, value in words.items())
    call = name if _is_module(built, name) else f"{name}({given})"
    imports = [f"from {place} import {name}{note}"]
    if not built.widths or _is_wide(module, built):
        return imports, [f"net = {call}"]
    widths = ", ".join(f"{key}={value}" for key, value in built.widths.items())
    first = f"# {call} has other widths: build your module with these first ({widths}), in place of the dots; then:"
    return imports, [first, "net = ..."]


def _is_wide(module: "nn.Module", built: Built) -> bool:
    """Say whether what the user names makes the widths that a resized checkpoint has."""
    from torch import Tensor
    from torch.nn.parameter import is_lazy

    from thalweg.cli.network import build_module

    own = build_module(built.model, built.net, built.arguments).state_dict()
    state = module.state_dict()
    tensors = [name for name, value in own.items() if isinstance(value, Tensor) and not is_lazy(value)]
    return all(name in state and own[name].shape == state[name].shape for name in tensors)


def _is_module(built: Built, name: str) -> bool:
    """Say whether what --model names is a module already."""
    from torch import nn

    from thalweg.cli.references import find_object

    return built.model is not None and not built.arguments and isinstance(find_object(built.model), nn.Module)


def _place(module: "nn.Module", name: str) -> str:
    """Write where a layer lies, as code that can be assigned to."""
    from torch import nn

    words, owner = "net", module
    for part in filter(None, name.split(".")):
        if isinstance(owner, nn.Sequential | nn.ModuleList) and part.isdigit():
            words += f"[{list(owner._modules).index(part)}]"
        elif isinstance(owner, nn.ModuleDict) or not part.isidentifier() or keyword.iskeyword(part):
            words += f"._modules[{part!r}]"
        else:
            words += f".{part}"
        owner = owner.get_submodule(part)
    return words


def _frozen(module: "nn.Module", layer: "LiftedLayer", place: str) -> list[str]:
    """Write what freezes of a lifted layer what is frozen of the convolution."""
    own = {k: p for k, p in module.get_submodule(layer.name)._parameters.items() if p is not None}
    frozen = [kind for kind, parameter in own.items() if not parameter.requires_grad]
    if len(frozen) == len(own):
        return [f"{place}.requires_grad_(False)"]
    return [f"{place}.{layer.inner}{kind}.requires_grad_(False)" for kind in frozen]


def _layer(layer: "LiftedLayer") -> str:
    """Write what makes a lifted layer; its values are loaded afterwards."""
    import torch

    g, pad = layer.geometry, layer.pad()
    typed = "" if layer.dtype == torch.float32 else f", dtype={layer.dtype}"
    padding: Any = getattr(pad, "padding", None)
    parts = "" if pad is None else f"pad=nn.{type(pad).__name__}({padding}), "
    if layer.kind == "local":
        facts = f"{g.in_channels}, {g.out_channels}, {g.kernel_size}, {g.input_size}, stride={g.stride}"
        facts += f", padding={g.padding}, dilation={g.dilation}, groups={g.groups}, bias={layer.has_bias}{typed}"
        made = f"LocallyConnected({facts})"
        return made if pad is None else f"nn.Sequential(OrderedDict({parts}local={made}))"
    rows, columns = layer.weight_shape
    bias = "" if layer.has_bias else ", bias=False"
    return (
        f"nn.Sequential(OrderedDict({parts}flatten=nn.Flatten({-1 - len(g.input_size)}), "
        f"linear=nn.Linear({columns}, {rows}{bias}{typed}), "
        f"unflatten=nn.Unflatten(-1, {(g.out_channels, *g.output_size)})))"
    )
