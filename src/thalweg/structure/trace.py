"""Trace real execution: every tensor that a forward pass touches gets axes, by one rule for each operation."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from thalweg.errors import StructureError
from thalweg.kernels import plain_kernels
from thalweg.precision import copied
from thalweg.structure.axes import COUPLED, Axis, Leaf, flag, freeze, leaves, product, resolve, terms


class Site(NamedTuple):
    """A dim of a parameter or buffer, and how a tensor made of it depends on it.

    Args:
        tensor: dotted name.
        dim: which dim.
        mode: "linear"; "copied" if it multiplies another weight, which takes the share (a mask, a scale);
            "nonlinear" if a share of it is not a share of the tensor.
    """

    tensor: str
    dim: int
    mode: Literal["linear", "copied", "nonlinear"] = "linear"

    @property
    def place(self) -> tuple[str, int]:
        """Tensor and dim."""
        return self.tensor, self.dim


Inputs = tuple[Any, ...] | dict[str, Any]
"""What a forward pass takes: positional arguments, or keyword arguments."""


@dataclass
class Info:
    """What is known of one tensor: its axes, and where its dims come from.

    Attributes:
        axes: one for each dim.
        sites: for each dim the dims of parameters that it is a view of; all empty for an activation.
        is_weight: made of parameters and constants only.
        makers: sites whose entries scale this tensor linearly (the homogeneity of a ReLU network).
    """

    axes: list[Axis]
    sites: list[frozenset[Site]]
    is_weight: bool = False
    makers: frozenset[Site] = frozenset()

    @property
    def all_sites(self) -> frozenset[Site]:
        """Every site of the tensor."""
        return frozenset().union(*self.sites)

    @property
    def is_parameter(self) -> bool:
        """Made of parameters, not of constants alone."""
        return self.is_weight and bool(self.all_sites)


class Call:
    """One operation as a rule sees it: arguments, result, and the algebra to say what it means.

    A rule of your own reads `call.args`, looks up `call.info(tensor)`, unifies or freezes axes
    (`thalweg.structure.axes`) and ends with `call.define(call.out, axes)`.

    Args:
        tracer: what is known of all tensors so far.
        function: the operation; `name` is what it is called, without the namespace aten.
        args: its positional arguments.
        kwargs: its named arguments.
        out: what it returned.
    """

    def __init__(
        self, tracer: "Tracer", function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        self.tracer = tracer
        self.function = function
        self.name: str = function._schema.name.removeprefix("aten::")
        self.args = list(args)
        self.kwargs = dict(kwargs)
        self.out = out

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Give an argument by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def info(self, tensor: Tensor) -> Info:
        """Give what is known of a tensor; one never seen before has frozen axes."""
        return self.tracer.info(tensor)

    def tensors(self) -> list[Tensor]:
        """List the tensor arguments, nested ones included."""
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    def outputs(self) -> list[Tensor]:
        """List the tensors that the operation returned."""
        return [t for t in tree_leaves(self.out) if isinstance(t, Tensor)]

    def define(
        self,
        tensor: Tensor,
        axes: Sequence[Axis],
        *,
        sites: Sequence[frozenset[Site]] | None = None,
        is_weight: bool = False,
        makers: frozenset[Site] = frozenset(),
    ) -> None:
        """Say what a result's axes are."""
        if [a.size for a in axes] != list(tensor.shape):
            raise AssertionError(f"rule of {self.name}: {[a.size for a in axes]} for {tuple(tensor.shape)}")
        known = list(sites) if sites is not None else [frozenset[Site]()] * len(axes)
        self.tracer.infos[id(tensor)] = Info(list(axes), known, is_weight, makers)
        self.tracer.alive.append(tensor)

    def use(self, info: Info, consumed: Sequence[int] = ()) -> None:
        """Note that a weight meets an activation: the dims in `consumed` are contracted, the others produce."""
        if not info.is_weight:
            return
        for dim, sites in enumerate(info.sites):
            for site in sites:
                role = "consumer" if dim in consumed and site.mode == "linear" else "producer"
                self.tracer.roles.setdefault(site.place, set()).add(role)
                self.tracer.first_use.setdefault(site.tensor, len(self.tracer.first_use))
                if dim in consumed and site.mode == "nonlinear":
                    flag(info.axes[dim], COUPLED)

    def unknown(self) -> None:
        """Freeze everything that the operation touches; its name is reported if that cost anything."""
        reason = f"operation {self.name}"
        touched = [a for t in self.tensors() for a in self.info(t).axes]
        if any(leaf.frozen is None and leaf.size > 1 for axis in touched for leaf in leaves(axis)):
            self.tracer.frozen_by[self.name] += 1
        for axis in touched:
            freeze(axis, reason)
        for t in self.tensors():
            self.use(self.info(t))
        for t in self.outputs():
            self.define(t, [Leaf(n, reason) for n in t.shape])


Rule = Callable[[Call], None]


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies a rule to every aten operation of a forward pass."""

    def __init__(self, rules: Mapping[str, Rule], pointwise: Rule, constant: Rule) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rules = rules
        self.pointwise = pointwise
        self.constant = constant
        self.infos: dict[int, Info] = {}
        self.alive: list[Tensor] = []
        self.roles: dict[tuple[str, int], set[str]] = {}
        self.first_use: dict[str, int] = {}
        self.normalised: set[Site] = set()
        self.averaged: list[Axis] = []
        self.trainable: set[str] = set()
        self.makers_of: dict[int, tuple[Leaf, set[Site]]] = {}
        self.frozen_by: Counter[str] = Counter()

    def info(self, tensor: Tensor) -> Info:
        """Give what is known of a tensor."""
        if id(tensor) not in self.infos:
            axes: list[Axis] = [Leaf(n, "constant") for n in tensor.shape]
            self.infos[id(tensor)] = Info(axes, [frozenset()] * tensor.ndim, is_weight=True)
            self.alive.append(tensor)
        return self.infos[id(tensor)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        call = Call(self, func, args, kwargs or {}, out)
        name = call.name
        if (rule := self.rules.get(name) or self.rules.get(name.rstrip("_"))) is not None:
            rule(call)
        elif torch.Tag.pointwise in func.tags:
            self.pointwise(call)
        elif not call.tensors():
            self.constant(call)
        else:
            call.unknown()
        for tensor in call.outputs():
            self._remember_makers(self.info(tensor))
        return out

    def _remember_makers(self, info: Info) -> None:
        if info.makers and not info.is_weight:
            for axis in info.axes:
                for leaf in leaves(axis):
                    self.makers_of.setdefault(id(leaf), (leaf, set()))[1].update(info.makers)


@dataclass
class Trace:
    """The outcome of a trace: an axis for each dim of each parameter and buffer, and how each is used."""

    axes: dict[str, list[Axis]]
    roles: dict[tuple[str, int], set[str]]
    order: dict[str, int]
    frozen_by: Counter[str]
    makers: dict[int, set[Site]] = field(repr=False)
    normalised: set[Site] = field(repr=False)


def arguments_of(inputs: Any) -> Inputs:
    """Give an example batch as arguments: a tuple is positional, a dict is by keyword, all else is the only one."""
    return inputs if isinstance(inputs, tuple | dict) else (inputs,)


def call(module: nn.Module, inputs: Inputs) -> Any:
    """Run a module on a tuple of positional arguments, or on a dict of keyword arguments."""
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def prepared(module: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """Copy a module and its inputs to the CPU in float64 and eval mode (in its own dtype where it insists).

    Raises:
        StructureError: the module does not run on the example inputs, cannot be copied, or has a complex
            trainable parameter.
    """
    with torch.no_grad(), plain_kernels():
        reasons = []
        for dtype in (torch.float64, None):
            twin = copied(module, device="cpu", dtype=dtype).eval()
            own = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
            placed: Inputs = tree_map_only(Tensor, functools.partial(_placed, dtype=own), inputs)
            try:
                call(twin, placed)
            except Exception as error:  # whatever a user's forward raises
                reasons.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            else:
                return twin, placed
    raise StructureError(
        f"Expected a module that runs on the example inputs {_shapes(inputs)}. Got {reasons[-1]}. "
        "Pass inputs of the right shape and type."
    )


def _placed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.cpu().to(dtype) if tensor.is_floating_point() else tensor.cpu()


def trace_axes(
    module: nn.Module, inputs: Inputs, rules: Mapping[str, Rule], pointwise: Rule, constant: Rule
) -> Trace:
    """Run a prepared module once and infer the axes of its parameters and buffers."""
    tracer = Tracer(rules, pointwise, constant)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tracer.trainable = {name for name, _ in module.named_parameters()}
    for name, tensor in state.items():
        tracer.infos[id(tensor)] = Info(
            [Leaf(n) for n in tensor.shape],
            [frozenset({Site(name, d)}) for d in range(tensor.ndim)],
            is_weight=True,
        )
    for tensor in tree_leaves(inputs):
        if isinstance(tensor, Tensor):
            tracer.infos[id(tensor)] = Info([Leaf(n, "input") for n in tensor.shape], [frozenset()] * tensor.ndim)
    with torch.no_grad(), plain_kernels(), tracer:
        outputs = call(module, inputs)
    for tensor in output_tensors(outputs):
        for axis in tracer.info(tensor).axes:
            freeze(axis, "output")
    axes = {name: [_settled(a) for a in tracer.infos[id(tensor)].axes] for name, tensor in state.items()}
    for axis in [a for name in axes if name not in tracer.first_use for a in axes[name]]:
        freeze(axis, "unused")
    for axis in tracer.averaged:
        # One average over several groups: no single one may grow by itself.
        if len({tuple(id(leaf) for leaf in leaves(term)) for term in terms(axis)}) > 1:
            flag(axis, COUPLED)
    return Trace(axes, tracer.roles, tracer.first_use, tracer.frozen_by, _settled_makers(tracer), tracer.normalised)


def _settled_makers(tracer: Tracer) -> dict[int, set[Site]]:
    makers: dict[int, set[Site]] = {}
    for leaf, sites in tracer.makers_of.values():
        for settled in leaves(leaf):
            makers.setdefault(id(settled), set()).update(sites)
    return makers


def output_tensors(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors in any nest of sequences, mappings, dataclasses and plain objects, as models return them."""
    seen: set[int] = set()

    def walk(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, str | bytes | int | float | complex | type(None)) or id(value) in seen:
            return
        else:
            seen.add(id(value))
            for part in _parts(value):
                yield from walk(part)

    yield from walk(outputs)


def _parts(value: Any) -> list[Any]:
    """What a container or an object holds."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, nn.Module) or callable(value):
        return []
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    held = list(getattr(value, "__dict__", {}).values())
    return held + [getattr(value, name) for name in slots if isinstance(name, str) and hasattr(value, name)]


def _settled(axis: Axis) -> Axis:
    axis = resolve(axis)
    return axis if isinstance(axis, Leaf) or axis.size > 1 else product([])


def _shapes(inputs: Inputs) -> str:
    shapes = [str(tuple(t.shape)) for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    return ", ".join(shapes) or repr(inputs)
