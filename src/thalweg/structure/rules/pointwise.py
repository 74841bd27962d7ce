"""Operations on each position by itself, with broadcasting; and tensors made from nothing."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from thalweg.structure.axes import INHOMOGENEOUS, NOT_ZERO_PRESERVING, Axis, Leaf, cut, flag, freeze, leaves, unify
from thalweg.structure.trace import Call, Info, Rule, Site

_RELU_LIKE = frozenset({"relu", "leaky_relu", "abs", "neg"})
_ADDITIVE = frozenset({"add", "sub", "copy"})
_ZERO_AT_ZERO = frozenset({"mul", "add", "sub", "copy", "maximum", "minimum"})


def pointwise(call: Call) -> None:
    """Unify the operands' axes position by position, aligned from the right."""
    infos = [call.info(t) for t in call.tensors()]
    for out in call.outputs():
        axes = [_aligned(infos, out, d) for d in range(out.ndim)]
        is_weight = all(i.is_weight for i in infos)
        sites = None
        if is_weight:
            combined = _combined(call, infos)
            sites = [_sites(combined, out.ndim - 1 - d) for d in range(out.ndim)]
        else:
            for info in infos:
                call.use(info)
        makers = frozenset[Site]().union(*(i.all_sites if i.is_weight else i.makers for i in infos))
        _flag_nonlinearity(call, infos, axes)
        call.define(out, axes, sites=sites, is_weight=is_weight, makers=frozenset() if is_weight else makers)


def _combined(call: Call, infos: Sequence[Info]) -> list[Info]:
    """Say how a function of weights depends on each: of a product, one factor takes a share, the others are copied.

    A sum of weights is linear in each. Anything else is linear in none, so that its units cannot be split.
    """
    name = call.name.rstrip("_")
    weights = [i for i in infos if i.is_parameter]
    if not weights:
        return list(infos)
    plain_numbers = any(isinstance(a, int | float) and not isinstance(a, bool) for a in call.args[:2])
    if (name in ("add", "sub") and len(weights) == len(infos) and not plain_numbers) or name in ("neg", "copy"):
        return list(infos)
    if name in ("mul", "div") or (name == "masked_fill" and call.arg(2, "value") == 0):
        able = [n for n, i in enumerate(infos) if i.is_parameter and (name == "mul" or n == 0)]
        taker = max(able, key=lambda n: (_is_trained(call, infos[n]), len(infos[n].axes)), default=-1)
        others = {s.place for n, i in enumerate(infos) if n != taker for s in i.all_sites}
        if not any(s.place in others for s in (infos[taker].all_sites if able else ())):
            return [i if n == taker else _with_mode(i, "copied") for n, i in enumerate(infos)]
    return [_with_mode(i, "nonlinear") for i in infos]


def _is_trained(call: Call, info: Info) -> bool:
    return any(site.tensor in call.tracer.trainable for site in info.all_sites)


def _with_mode(info: Info, mode: Literal["copied", "nonlinear"]) -> Info:
    """Weaken how a tensor depends on its sites; what is nonlinear stays so."""
    sites = [frozenset(s if s.mode == "nonlinear" else s._replace(mode=mode) for s in dim) for dim in info.sites]
    return Info(info.axes, sites, info.is_weight, info.makers)


def _aligned(infos: Sequence[Info], out: Tensor, dim: int) -> Axis:
    """Unify the axes that meet at one dim of the result."""
    behind = out.ndim - 1 - dim
    met = [i.axes[len(i.axes) - 1 - behind] for i in infos if len(i.axes) > behind]
    wide = [a for a in met if a.size == out.shape[dim]]
    for axis in met:
        if axis.size != out.shape[dim]:  # one unit against many: it cannot become two
            freeze(axis, "broadcast")
    for axis in wide[1:]:
        unify(wide[0], axis)
    return wide[0] if wide else Leaf(out.shape[dim])


def _sites(infos: Sequence[Info], behind: int) -> frozenset[Site]:
    return frozenset[Site]().union(*(i.sites[len(i.axes) - 1 - behind] for i in infos if len(i.axes) > behind))


def _flag_nonlinearity(call: Call, infos: Sequence[Info], axes: Sequence[Axis]) -> None:
    """Note what an activation function does to scaling and to zero, for the rescaling and null plans."""
    name = call.name.rstrip("_")
    everywhere = all(_carries(i, a) for i in infos for a in axes)
    scalars = [a for a in call.args[:2] if isinstance(a, int | float) and not isinstance(a, bool)]
    additive = name in _ADDITIVE and everywhere and not scalars
    scaled = name in ("mul", "div") and len(infos) == 1
    if not (name in _RELU_LIKE or additive or scaled):
        for axis in axes:
            flag(axis, INHOMOGENEOUS)
    if len(infos) == 1 and not scaled:
        keeps = _is_zero_at_zero(call)
    else:
        keeps = name == "mul" or scaled or (name in _ZERO_AT_ZERO and everywhere and not scalars)
    if not keeps:
        for axis in axes:
            flag(axis, NOT_ZERO_PRESERVING)


def _carries(info: Info, axis: Axis) -> bool:
    """Say whether an operand varies along every free leaf of an axis."""
    mine = {id(leaf) for a in info.axes for leaf in leaves(a)}
    return all(id(leaf) in mine for leaf in leaves(axis) if leaf.frozen is None and leaf.size > 1)


def _is_zero_at_zero(call: Call) -> bool:
    def zero(value: object) -> object:
        return torch.zeros((), dtype=value.dtype) if isinstance(value, Tensor) else value

    try:
        result = call.function(*[zero(a) for a in call.args], **{k: zero(v) for k, v in call.kwargs.items()})
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return isinstance(result, Tensor) and bool((result == 0).all())


def glu(call: Call) -> None:
    """One half of a dim gates the other, position by position."""
    info = call.info(call.args[0])
    dim = call.arg(1, "dim", -1) % len(info.axes)
    size = info.axes[dim].size // 2
    value, gate = cut(info.axes[dim], [size, size])
    unify(value, gate)
    axes = [*info.axes[:dim], value, *info.axes[dim + 1 :]]
    for axis in axes:
        flag(axis, INHOMOGENEOUS)
    call.define(call.out, axes)


def fill(call: Call) -> None:
    """Fill with one number: all positions are alike."""
    for out in call.outputs():
        known = call.tracer.infos.get(id(out))
        call.define(out, known.axes if known else [Leaf(n) for n in out.shape], is_weight=True)


def triangle(call: Call) -> None:
    """Keep a triangle: the last two dims are told apart."""
    info = call.info(call.args[0])
    for axis in info.axes[-2:]:
        for leaf in leaves(axis):
            leaf.frozen = leaf.frozen or call.name
    call.define(call.out, info.axes, sites=info.sites, is_weight=info.is_weight)


def constant(call: Call) -> None:
    """Make a tensor from nothing: equal values are interchangeable, anything else is not."""
    alike = call.name in _UNIFORM
    for out in call.outputs():
        call.define(out, [Leaf(n, None if alike else "constant") for n in out.shape], is_weight=True)


_UNIFORM = frozenset({"zeros", "ones", "full", "empty", "empty_strided", "scalar_tensor"})

POINTWISE: dict[str, Rule] = {
    "copy": pointwise,
    "where": pointwise,
    "masked_fill": pointwise,
    "_prelu_kernel": pointwise,
    "native_dropout": pointwise,
    "glu": glu,
    **dict.fromkeys(("hardswish", "rrelu_with_noise"), pointwise),
}

CONSTANTS: dict[str, Rule] = {
    **dict.fromkeys(
        "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided "
        "fill zero".split(),
        fill,
    ),
    **dict.fromkeys(("tril", "triu"), triangle),
}
