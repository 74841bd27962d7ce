"""Which convolutions of a module can be lifted, to what, and how large that would be: known before it is made."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from thalweg.errors import ConfigError, StructureError
from thalweg.lifting.geometry import Geometry, dense_ties, local_ties
from thalweg.precision import copied
from thalweg.structure.comparison import placed_for
from thalweg.structure.sites import Site, execution

Kind = Literal["fc", "local", "shared"]
KINDS = ("fc", "local", "shared")

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PADS: dict[str, tuple[Callable[[Any], nn.Module], ...]] = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


@dataclass(frozen=True)
class LiftedLayer:
    """A convolution and what it is lifted to.

    Args:
        names: of the convolution in the module; more than one if it is registered more than once.
        kind: "fc", a dense linear map, or "local", a kernel for each position.
        geometry: of the map that is lifted; its inputs are padded already where the padding stays a layer of its own.
        has_bias: whether there is a bias; lifted, each output position has its own.
        padding: mode and widths, last dim first, of the padding that stays a layer of its own; None if it is folded
            into the map.
        dtype: of the weights.
    """

    names: tuple[str, ...]
    kind: Literal["fc", "local"]
    geometry: Geometry
    has_bias: bool
    padding: tuple[str, tuple[int, ...]] | None = None
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """The first name of the convolution."""
        return self.names[0]

    @property
    def inner(self) -> str:
        """Where the lifted weight lies below the convolution's name."""
        if self.kind == "fc":
            return "linear."
        return "local." if self.padding is not None else ""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the lifted weight."""
        g = self.geometry
        if self.kind == "fc":
            return (g.out_channels * g.positions, g.in_channels * g.pixels)
        return (*g.output_size, g.out_channels, *g.kernel_size, g.in_channels // g.groups)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of the lifted bias."""
        g = self.geometry
        return (g.out_channels * g.positions,) if self.kind == "fc" else (g.out_channels, *g.output_size)

    @property
    def num_params(self) -> int:
        """Number of entries of the lifted weight and bias; those that read nothing but padding included."""
        return math.prod(self.weight_shape) + self.has_bias * math.prod(self.bias_shape)

    @property
    def num_shared(self) -> int:
        """Number of entries of the convolution's weight and bias."""
        return self.geometry.channel_pairs * self.geometry.taps + self.has_bias * self.geometry.out_channels

    @property
    def num_bytes(self) -> int:
        """Bytes of the lifted weight and bias."""
        return self.num_params * self.dtype.itemsize

    def ties(self, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
        """View, tap by tap, the entries of a lifted weight that an entry of the kernel was copied to.

        Args:
            weight: contiguous, of `weight_shape`.

        Yields:
            number of the tap, view of shape (groups, out / groups, in / groups, *box of positions).
        """
        yield from (dense_ties if self.kind == "fc" else local_ties)(self.geometry, weight)

    def pad(self) -> nn.Module | None:
        """Build the padding that stays a layer of its own; None if there is none."""
        if self.padding is None:
            return None
        mode, widths = self.padding
        return _PADS[mode][len(widths) // 2 - 1](widths)


@dataclass(frozen=True)
class LiftPlan:
    """What a lift would do.

    Args:
        layers: what is lifted.
        kept: name -> why a layer that looks like a convolution stays as it is.
    """

    layers: tuple[LiftedLayer, ...]
    kept: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all lifted weights and biases."""
        return sum(layer.num_bytes for layer in self.layers)


def lift_plan(
    module: nn.Module, inputs: Any, *, to: Kind | Mapping[str, Kind] = "fc", padded: bool = False
) -> LiftPlan:
    """Say which convolutions would be lifted, to what, and how large that is; nothing large is allocated.

    A copy of the module runs once, in eval mode, to see the size of every convolution's inputs.

    Args:
        module: any module.
        inputs: one example batch: a tensor, a tuple of arguments, or a dict of keyword arguments.
        to: kind of every convolution, or pattern of its name (as in a shell: `layer1.*`) -> kind, the first that
            fits; a convolution that no pattern names stays shared.
        padded: keep zero padding as a layer of its own before a dense map, as the paper's code does, in place of
            folding it into the map.

    Returns:
        The plan. Under one kind for all, layers that cannot be lifted are kept, with the reason.

    Raises:
        ConfigError: an unknown kind, or none.
        StructureError: nothing to lift; a pattern names no convolution, or one that cannot be lifted; the module does
            not run.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
        >>> [(layer.name, layer.num_params) for layer in lift_plan(net, torch.zeros(1, 1, 4, 4)).layers]
        [('0', 544)]
    """
    chosen = {"*": to} if isinstance(to, str) else dict(to)
    if not chosen:
        raise ConfigError(
            f"Expected a kind of {', '.join(KINDS)}, or patterns with one each. Got none. Name a layer."
        )
    if next(module.parameters(), None) is None:
        raise StructureError(
            f"Expected a convolution that can be lifted. Got {type(module).__name__} without parameters. Pass a net."
        )
    for kind in chosen.values():
        if kind not in KINDS:
            raise ConfigError(f"Expected a kind of {', '.join(KINDS)}. Got {kind!r}. Choose one of them.")
    twin = copied(module, device="cpu").eval()
    sizes, reasons = _observed(twin, inputs)
    layers, used = [], set[str]()
    kept: dict[str, str] = dict(reasons)
    for names, layer in _convolutions(twin).items():
        pattern = next((p for p in chosen if any(fnmatchcase(name, p) for name in names)), None)
        used |= {pattern} if pattern is not None else set()
        kind = chosen[pattern] if pattern is not None else "shared"
        reason = reasons.get(names[0]) or _obstacle(layer, sizes.get(names[0], []))
        reason = reason or _hooked(module.get_submodule(names[0]))
        if kind == "shared":
            kept.pop(names[0], None)
        elif reason is None:
            layers.append(_lifted_layer(names, layer, kind, sizes[names[0]][0], padded=padded))
        elif isinstance(to, str):
            kept[names[0]] = reason
        else:
            raise StructureError(
                f"Expected {names[0]!r} to be a convolution that can be lifted. Got one that cannot: {reason}. Leave "
                "it out, or name it as shared."
            )
    _require_some(layers, kept, chosen, used, list(_convolutions(twin)))
    return LiftPlan(tuple(layers), kept)


def _convolutions(module: nn.Module) -> dict[tuple[str, ...], nn.Module]:
    """List the convolutions by their names."""
    found: dict[int, tuple[list[str], nn.Module]] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, _ConvNd):
            found.setdefault(id(layer), ([], layer))[0].append(name)
    return {tuple(names): layer for names, layer in found.values()}


def _observed(module: nn.Module, inputs: Any) -> tuple[dict[str, list[tuple[int, ...]]], dict[str, str]]:
    """Run a module once: the sizes of what each convolution is applied to, and why some cannot be lifted."""
    sizes: dict[str, list[tuple[int, ...]]] = {}
    counts: dict[str, int] = {}
    reasons: dict[str, str] = {}
    handles = []
    layers = _convolutions(module)

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], _: dict[str, Any]) -> None:
            counts[name] = counts.get(name, 0) + 1
            if not args:
                reasons[name] = "it is called with its inputs as a keyword"
                return
            size = tuple(args[0].shape[-len(_kernel(layer)) :])
            if size not in sizes.setdefault(name, []):
                sizes[name].append(size)

        return hook

    for names, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(note(names[0]), with_kwargs=True))
    arguments = placed_for(module, inputs)
    try:
        with torch.no_grad():
            sites = execution(module, arguments).sites
    except Exception as error:  # whatever a user's forward raises
        raise StructureError(
            f"Expected the module to run on the example. Got {type(error).__name__}: {error}. Check the example."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    reasons |= _uses(sites, layers, counts)
    return sizes, reasons | _ties(module, layers)


def _uses(
    sites: Sequence[Site], layers: Mapping[tuple[str, ...], nn.Module], counts: Mapping[str, int]
) -> dict[str, str]:
    """Say which weights are used otherwise than by calls of their convolution, of which there were so many."""
    owners = {f"{name}.weight" if name else "weight": names[0] for names in layers for name in names}
    reasons = {}
    for site in sites:
        name = owners.get(site.weight)
        if site.kernel_dims and name is None:
            reasons[site.weight] = "it is called as a function; make it an nn.Conv1d, nn.Conv2d or nn.Conv3d"
        elif name is not None and site.calls > counts.get(name, 0):
            is_called = counts.get(name, 0) > 0
            reasons[name] = f"its weight is {'also ' if is_called else ''}used by code, not by calling the layer"
    return reasons


def _ties(module: nn.Module, layers: Mapping[tuple[str, ...], nn.Module]) -> dict[str, str]:
    """Say which convolutions share a parameter with another layer."""
    users: dict[int, dict[int, str]] = {}
    for name, layer in module.named_modules():
        for parameter in layer._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), {})[id(layer)] = name
    reasons = {}
    for names, layer in layers.items():
        for kind, parameter in layer._parameters.items():
            others = [n for key, n in users.get(id(parameter), {}).items() if key != id(layer)]
            if others:
                reasons[names[0]] = f"it shares its {kind} with {others[0]!r}"
    return reasons


def _kernel(layer: nn.Module) -> tuple[int, ...]:
    return tuple(layer.kernel_size) if isinstance(layer, _ConvNd) else ()


def _obstacle(layer: nn.Module, sizes: Sequence[tuple[int, ...]]) -> str | None:
    """Say why a convolution cannot be lifted; None if it can."""
    plain: Any = next((kind for kind in _PLAIN if isinstance(layer, kind)), None)
    if plain is None:
        return f"{type(layer).__name__} is no nn.Conv1d, nn.Conv2d or nn.Conv3d"
    own: Any = type(layer)
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    faults = {
        f"{own.__name__} computes something else than {plain.__name__}": own.forward is not plain.forward
        or own._conv_forward is not plain._conv_forward
        or "forward" in vars(layer),
        "its weight is made from other parameters; remove the parametrization": weight is None,
        "its bias is made from other parameters; remove the parametrization": bias is None and layer.bias is not None,
        "its weight has no floating type": weight is not None and not weight.dtype.is_floating_point,
        "the example does not reach it": not sizes,
        f"it is applied to inputs of several sizes: {', '.join(map(str, sizes))}": len(sizes) > 1,
    }
    return next((reason for reason, is_so in faults.items() if is_so), None)


def _hooked(layer: nn.Module) -> str | None:
    """Say that a layer, or a parameter of it, has hooks; a copy has not all of them."""
    own = (
        *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks"),
        *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    )
    has_hooks = any(getattr(layer, name, None) for name in own) or any(
        getattr(p, name, None)
        for p in layer._parameters.values()
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
    )
    return "it has hooks, which would be lost" if has_hooks else None


def _lifted_layer(
    names: tuple[str, ...], layer: Any, kind: Kind, size: tuple[int, ...], *, padded: bool
) -> LiftedLayer:
    geometry = Geometry(
        layer.in_channels,
        layer.out_channels,
        size,
        tuple(layer.kernel_size),
        tuple(layer.stride),
        _paddings(layer),
        tuple(layer.dilation),
        layer.groups,
    )
    is_kept = any(map(sum, geometry.padding)) and (layer.padding_mode != "zeros" or (padded and kind == "fc"))
    padding = None
    if is_kept:
        padding = (layer.padding_mode, tuple(n for pair in geometry.padding[::-1] for n in pair))
        geometry = geometry.padded()
    return LiftedLayer(
        names,
        "local" if kind == "local" else "fc",
        geometry,
        layer.bias is not None,
        padding,
        layer.weight.dtype,
    )


def _paddings(layer: Any) -> tuple[tuple[int, int], ...]:
    """Give the padding before and after each dim; of "same" the odd one is after, as torch has it."""
    if layer.padding == "valid":
        return ((0, 0),) * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple((n // 2, n - n // 2) for n in totals)
    return tuple((n, n) for n in layer.padding)


def _require_some(
    layers: Sequence[LiftedLayer],
    kept: Mapping[str, str],
    chosen: Mapping[str, Kind],
    used: set[str],
    names: Sequence[tuple[str, ...]],
) -> None:
    unused = [p for p in chosen if p not in used and p != "*"]
    if unused:
        there = ", ".join(name for group in names for name in group) or "none"
        if any(fnmatchcase(name, unused[0]) for group in names for name in group):
            raise StructureError(
                f"Expected {unused[0]!r} before the patterns that take the same layers. Got it after them. The first "
                "that fits counts: write it first."
            )
        raise StructureError(f"Expected the name of a convolution. Got {unused[0]!r}. There are: {there}.")
    if not layers and set(chosen.values()) != {"shared"}:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
        raise StructureError(
            f"Expected a convolution that can be lifted. Got none{f' ({reasons})' if reasons else ''}. Only "
            "nn.Conv1d, nn.Conv2d and nn.Conv3d can."
        )
