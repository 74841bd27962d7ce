"""Sites: the linear maps that a forward pass applies, by the weight that each applies, in the order of execution.

A site is one call of `linear` or of a convolution with a named parameter as its weight, however the module makes the
call: as an `nn.Linear` or functionally. What the call takes and gives can be read, and replaced. The maps inside
torch's `multi_head_attention_forward` are part of one operation and no sites.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from thalweg.kernels import plain_kernels

_LINEAR = torch.nn.functional.linear
_CONVOLUTIONS = {
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
    torch.nn.functional.conv1d: 1,
    torch.nn.functional.conv2d: 2,
    torch.nn.functional.conv3d: 3,
}
_OPTIONS = ("stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Site:
    """A linear map of a module.

    Args:
        weight: name of the parameter that is the weight, of shape (out, in / groups, *kernel).
        bias: name of the parameter that is its bias; None without one.
        kernel_dims: 0 for a linear layer, 1 to 3 for a convolution.
        options: stride, padding, dilation and groups of a convolution, as the call gave them.
        calls: how often one forward pass uses the weight, in this map or in any other operation.
        has_foreign_bias: a bias is added that is not this map's alone: no parameter, or one that other maps use.
    """

    weight: str
    bias: str | None
    kernel_dims: int
    options: tuple[tuple[str, Any], ...] = ()
    calls: int = 1
    has_foreign_bias: bool = False

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for a linear layer."""
        return int(dict(self.options).get("groups", 1))


@dataclass
class SiteCall:
    """One application of a site, as a handler sees it.

    Args:
        site: which one.
        inputs: what the map is applied to.
        weight: the weight that the forward pass has.
        bias: the bias that it has, or None.
    """

    site: Site
    inputs: Tensor
    weight: Tensor
    bias: Tensor | None
    _function: Callable[..., Tensor] = field(repr=False)

    def apply(self, weight: Tensor, bias: Tensor | None, inputs: Tensor | None = None) -> Tensor:
        """Apply the same map with another weight and bias."""
        taken = self.inputs if inputs is None else inputs
        return self._function(taken, weight, bias, **dict(self.site.options))


Handler = Callable[[SiteCall], Tensor | None]
"""Sees every application of a site; what it returns replaces the result, None leaves it."""


class _Interception(TorchFunctionMode):
    """Tells a handler of every linear map whose weight is one of the named parameters."""

    def __init__(self, parameters: Mapping[str, Tensor], handler: Handler | None) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in parameters.items()}
        self._handler = handler
        self.found: dict[str, Site] = {}
        self.order: dict[str, None] = {}
        self.uses: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = self._call(func, args, kwargs) if func is _LINEAR or func in _CONVOLUTIONS else None
        self._note(args, kwargs)
        if call is not None and self._handler is not None:
            replaced = self._handler(call)
            if replaced is not None:
                return replaced
        result = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # not a shape, a dtype, …
            for name in {self._names[id(t)] for t in tree_leaves((args, kwargs)) if id(t) in self._names}:
                self.uses[name] = self.uses.get(name, 0) + 1
        return result

    def settled(self) -> tuple[Site, ...]:
        """Give the sites, knowing every use of their weights and biases."""
        found = []
        for site in self.found.values():
            shared = site.bias is not None and self.uses.get(site.bias, 1) > 1
            calls = max(site.calls, self.uses.get(site.weight, 1))
            site = replace(site, calls=calls)  # noqa: PLW2901 - the same site, settled
            found.append(replace(site, bias=None, has_foreign_bias=True) if shared else site)
        return tuple(found)

    def _note(self, args: Any, kwargs: Any) -> None:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) in self._names:
                self.order.setdefault(self._names[id(leaf)])

    def _call(self, func: Any, args: Any, kwargs: Any) -> SiteCall | None:
        given = dict(zip(("input", "weight", "bias", *_OPTIONS), args, strict=False)) | dict(kwargs)
        weight, bias = given["weight"], given.get("bias")
        name = self._names.get(id(weight))
        if name is None:
            return None
        options = tuple((key, given[key]) for key in _OPTIONS if key in given)
        known = self.found.get(name)
        own = self._names.get(id(bias)) if bias is not None else None
        site = Site(
            weight=name,
            bias=own,
            kernel_dims=0 if func is _LINEAR else _CONVOLUTIONS[func],
            options=options,
            calls=known.calls + 1 if known else 1,
            has_foreign_bias=bias is not None and own is None,
        )
        self.found[name] = site
        return SiteCall(site, given["input"], weight, bias, func)


@dataclass(frozen=True)
class Execution:
    """What a forward pass applies, in order.

    Args:
        sites: the linear maps, by the first application of each.
        order: every parameter and buffer that is used, by first use.
    """

    sites: tuple[Site, ...]
    order: tuple[str, ...]

    def site(self, weight: str) -> Site | None:
        """Find the site of a weight; None if the weight is applied in another way."""
        return next((s for s in self.sites if s.weight == weight), None)

    def restricted(self, names: Collection[str]) -> "Execution":
        """Give the same where only some parameters may change: other biases count as foreign.

        Args:
            names: the parameters that may change.
        """
        sites = [
            s if s.bias is None or s.bias in names else replace(s, bias=None, has_foreign_bias=True)
            for s in self.sites
        ]
        return replace(self, sites=tuple(sites))


def execution(module: nn.Module, inputs: Any) -> Execution:
    """Run a module once, in the mode in which it is, and list the linear maps that it applies.

    Args:
        module: any module; it is not changed.
        inputs: a batch: a tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        Sites and order of use.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1))
        >>> [site.weight for site in execution(net, torch.zeros(3, 2)).sites]
        ['0.weight', '2.weight']
    """
    state: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    mode = _run(module, state, inputs, None)[1]
    return Execution(mode.settled(), tuple(mode.order))


def run_with(module: nn.Module, state: Mapping[str, Tensor], inputs: Any, handler: Handler) -> Any:
    """Run a module with given parameters and buffers, without a graph; a handler sees, and may replace, each site.

    Args:
        module: any module; neither it nor the state is changed.
        state: parameters and buffers by name; those not named are the module's own.
        inputs: a batch.
        handler: called at each application of a site, in the order of execution. `call.site.calls` counts the
            applications of this site so far.

    Returns:
        The module's outputs.
    """
    full = {**dict(module.named_parameters()), **dict(module.named_buffers()), **state}
    return _run(module, full, inputs, handler)[0]


def captured(
    module: nn.Module,
    state: Mapping[str, Tensor],
    inputs: Any,
    *,
    reads: Collection[str] = (),
    makes: Collection[str] = (),
) -> tuple[dict[str, Float[Tensor, "..."]], dict[str, Float[Tensor, "..."]]]:
    """Read what sites take and what they give in one forward pass.

    Args:
        module: any module.
        state: parameters and buffers by name.
        inputs: a batch.
        reads: weights whose inputs are wanted.
        makes: weights whose results (pre-activations, bias included) are wanted.

    Returns:
        weight -> inputs, weight -> results. Of a site that is applied more than once, the last application counts.
    """
    taken: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}

    def handler(call: SiteCall) -> Tensor | None:
        if call.site.weight in reads:
            taken[call.site.weight] = call.inputs.clone()
        if call.site.weight not in makes:
            return None
        result = call.apply(call.weight, call.bias)
        given[call.site.weight] = result.clone()
        return result

    run_with(module, state, inputs, handler)
    return taken, given


def _run(
    module: nn.Module, state: Mapping[str, Tensor], inputs: Any, handler: Handler | None
) -> tuple[Any, _Interception]:
    buffers = {name for name, _ in module.named_buffers()}
    own = {name: t.clone() if name in buffers else t.detach() for name, t in state.items()}
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    mode = _Interception(own, handler)
    with torch.no_grad(), plain_kernels(), mode:
        outputs = functional_call(module, own, args if isinstance(args, tuple) else (args,), kwargs)
    return outputs, mode
