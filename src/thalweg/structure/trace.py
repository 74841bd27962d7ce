"""Trace real execution: every tensor that a forward pass touches gets axes, by one rule for each operation."""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from thalweg.errors import StructureError
from thalweg.kernels import plain_kernels
from thalweg.structure.axes import Axis, Leaf, freeze, leaves, product, resolve

Site = tuple[str, int]
"""A dim of a parameter or buffer: (name, dim)."""


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
        name: the aten operation, without its namespace.
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
                role = "consumer" if dim in consumed else "producer"
                self.tracer.roles.setdefault(site, set()).add(role)
                self.tracer.first_use.setdefault(site[0], len(self.tracer.first_use))

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
        self.roles: dict[Site, set[str]] = {}
        self.first_use: dict[str, int] = {}
        self.normalised: set[Site] = set()
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
    roles: dict[Site, set[str]]
    order: dict[str, int]
    frozen_by: Counter[str]
    makers: dict[int, set[Site]] = field(repr=False)
    normalised: set[Site] = field(repr=False)


def prepared(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """Copy a module and its inputs to the CPU in float64 and eval mode (in its own dtype where it insists).

    Raises:
        StructureError: the module does not run on the example inputs.
    """
    with torch.no_grad(), plain_kernels():
        reasons = []
        for dtype in (torch.float64, None):
            twin = copy.deepcopy(module).to(device="cpu").eval()
            twin = twin if dtype is None else twin.to(dtype)
            own = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
            placed: tuple[Any, ...] = tree_map_only(Tensor, functools.partial(_placed, dtype=own), inputs)
            try:
                twin(*placed)
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
    module: nn.Module, inputs: tuple[Any, ...], rules: Mapping[str, Rule], pointwise: Rule, constant: Rule
) -> Trace:
    """Run a prepared module once and infer the axes of its parameters and buffers."""
    tracer = Tracer(rules, pointwise, constant)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in state.items():
        tracer.infos[id(tensor)] = Info(
            [Leaf(n) for n in tensor.shape],
            [frozenset({(name, d)}) for d in range(tensor.ndim)],
            is_weight=True,
        )
    for tensor in tree_leaves(inputs):
        if isinstance(tensor, Tensor):
            tracer.infos[id(tensor)] = Info([Leaf(n, "input") for n in tensor.shape], [frozenset()] * tensor.ndim)
    with torch.no_grad(), plain_kernels(), tracer:
        outputs = module(*inputs)
    for tensor in output_tensors(outputs):
        for axis in tracer.info(tensor).axes:
            freeze(axis, "output")
    axes = {name: [_settled(a) for a in tracer.infos[id(tensor)].axes] for name, tensor in state.items()}
    for axis in [a for name in axes if name not in tracer.first_use for a in axes[name]]:
        freeze(axis, "unused")
    return Trace(axes, tracer.roles, tracer.first_use, tracer.frozen_by, _settled_makers(tracer), tracer.normalised)


def _settled_makers(tracer: Tracer) -> dict[int, set[Site]]:
    makers: dict[int, set[Site]] = {}
    for leaf, sites in tracer.makers_of.values():
        for settled in leaves(leaf):
            makers.setdefault(id(settled), set()).update(sites)
    return makers


def output_tensors(outputs: Any) -> Iterator[Tensor]:
    """Tensors in any nest of tuples, lists, dicts and dataclasses such as model outputs."""
    found = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
    if not found and hasattr(outputs, "__dict__"):
        found = [t for t in tree_leaves(vars(outputs)) if isinstance(t, Tensor)]
    yield from found


def _settled(axis: Axis) -> Axis:
    axis = resolve(axis)
    return axis if isinstance(axis, Leaf) or axis.size > 1 else product([])


def _shapes(inputs: tuple[Any, ...]) -> str:
    shapes = [str(tuple(t.shape)) for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    return ", ".join(shapes) or repr(inputs)
