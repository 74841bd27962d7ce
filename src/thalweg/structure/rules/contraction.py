"""Operations that sum over an axis of two operands: matrix products and convolutions.

A weight's contracted dim consumes units (their outgoing weights); its other dims produce units.
"""

from collections.abc import Sequence

from torch import Tensor

from thalweg.structure.axes import (
    BILINEAR,
    COUPLED,
    INHOMOGENEOUS,
    Axis,
    Leaf,
    flag,
    freeze,
    product,
    reshape,
    resolve,
    unify,
)
from thalweg.structure.trace import Call, Info, Rule, Site


def _contract(call: Call, one: Info, two: Info, dims: tuple[int, int]) -> None:
    """Unify the contracted axes and note who consumes whom."""
    unify(one.axes[dims[0]], two.axes[dims[1]])
    if not one.is_parameter and not two.is_parameter:  # query–key; or a sum, where one is a constant
        flag(one.axes[dims[0]], COUPLED if one.is_weight or two.is_weight else BILINEAR)
        flag(one.axes[dims[0]], INHOMOGENEOUS)
        return
    if one.is_parameter and two.is_parameter:  # a product of weights: the first consumes what the second produces
        call.use(Info(one.axes, one.sites, is_weight=True), consumed=[dims[0]])
        call.use(Info(two.axes, two.sites, is_weight=True))
        return
    call.use(one, consumed=[dims[0]])
    call.use(two, consumed=[dims[1]])


def _makers(*operands: tuple[Info, int]) -> frozenset[Site]:
    """Sites that scale a product linearly: the free dims of the weights."""
    found: set[Site] = set()
    for info, contracted in operands:
        if info.is_weight:
            found |= set().union(*(s for d, s in enumerate(info.sites) if d != contracted))
        elif not any(other.is_weight for other, _ in operands):
            found |= info.makers
    return frozenset(found)


def _add_bias(call: Call, bias: Tensor, axes: Sequence[Axis]) -> frozenset[Site]:
    """Unify a broadcast addend with the result; give the sites that scale it."""
    info = call.info(bias)
    for d, axis in enumerate(reversed(info.axes)):
        if axis.size == axes[len(axes) - 1 - d].size:
            unify(axis, axes[len(axes) - 1 - d])
    call.use(info)
    return info.all_sites if info.is_weight else info.makers


def _matmul(call: Call, one: Tensor, two: Tensor, bias: Tensor | None) -> None:
    """(…, i, k) times (…, k, j)."""
    left, right = call.info(one), call.info(two)
    for a, b in zip(left.axes[:-2], right.axes[:-2], strict=True):
        unify(a, b)
        if not left.is_weight or not right.is_weight:
            flag(a, INHOMOGENEOUS)
    contracted = len(left.axes) - 1, len(right.axes) - 2
    _contract(call, left, right, contracted)
    axes = [*left.axes[:-2], left.axes[-2], right.axes[-1]]
    makers = _makers((left, contracted[0]), (right, contracted[1]))
    if left.is_weight and right.is_weight and bias is None:
        call.define(call.out, axes, sites=[*left.sites[:-1], right.sites[-1]], is_weight=True)
        return
    if bias is not None:
        makers |= _add_bias(call, bias, axes)
    call.define(call.out, axes, makers=makers)


def mm(call: Call) -> None:
    """Matrix product, batched or not."""
    _matmul(call, call.args[0], call.args[1], None)


def addmm(call: Call) -> None:
    """Matrix product plus a broadcast addend."""
    _matmul(call, call.args[1], call.args[2], call.args[0])


def mv(call: Call) -> None:
    """Matrix times vector; vector times vector, where one of them is an activation."""
    left, right = call.info(call.args[0]), call.info(call.args[1])
    contracted = len(left.axes) - 1
    _contract(call, left, right, (contracted, 0))
    if left.is_weight and right.is_weight:
        call.define(call.out, left.axes[:-1], sites=left.sites[:-1], is_weight=True)
        return
    call.define(call.out, left.axes[:-1], makers=_makers((left, contracted), (right, 0)))


def dot(call: Call) -> None:
    """Vector times vector; between weights a norm of theirs, which couples their units (spectral_norm)."""
    left, right = call.info(call.args[0]), call.info(call.args[1])
    if not (left.is_weight and right.is_weight):
        mv(call)
        return
    _contract(call, left, right, (0, 0))
    flag(left.axes[0], COUPLED)
    # No weight itself: what is divided by it is no parameter any more, and its units are read by the norm too.
    call.define(call.out, [])


def addmv(call: Call) -> None:
    """Matrix times vector plus an addend."""
    left, right = call.info(call.args[1]), call.info(call.args[2])
    _contract(call, left, right, (1, 0))
    makers = _makers((left, 1), (right, 0)) | _add_bias(call, call.args[0], left.axes[:-1])
    call.define(call.out, left.axes[:-1], makers=makers)


def linear(call: Call) -> None:
    """Contract inputs (…, i) with a weight (o, i) and add a bias (o)."""
    inputs, weight = call.info(call.args[0]), call.info(call.args[1])
    contracted = len(inputs.axes) - 1
    _contract(call, inputs, weight, (contracted, 1))
    axes = [*inputs.axes[:-1], weight.axes[0]]
    makers = _makers((inputs, contracted), (weight, 1))
    bias = call.arg(2, "bias")
    if bias is not None:
        makers |= _add_bias(call, bias, axes)
    call.define(call.out, axes, makers=makers)


def convolution(call: Call) -> None:
    """Convolve: channels are contracted group by group; positions in space and in the kernel stay fixed."""
    inputs, weight = call.info(call.args[0]), call.info(call.args[1])
    transposed, groups = bool(call.args[6]), int(call.args[8])
    for axis in [*inputs.axes[2:], *weight.axes[2:]]:
        freeze(axis, "space")
    if groups == 1:
        consumed = 0 if transposed else 1
        unify(inputs.axes[1], weight.axes[consumed])
        channels: Axis = weight.axes[1 - consumed]
    else:
        found = _grouped(inputs, weight, groups, transposed)
        if found is None:
            call.unknown()
            return
        channels, consumed = found
    if inputs.is_weight and not weight.is_weight:
        flag(inputs.axes[1], BILINEAR)
    call.use(weight, consumed=[consumed] if consumed >= 0 else [])
    makers = frozenset[Site]().union(*(s for d, s in enumerate(weight.sites) if d != consumed))
    bias = call.args[2]
    if bias is not None:
        unify(call.info(bias).axes[0], channels)
        call.use(call.info(bias))
        makers |= call.info(bias).all_sites
    fresh: list[Axis] = [Leaf(n, "space") for n in call.out.shape[2:]]
    call.define(call.out, [inputs.axes[0], channels, *fresh], makers=makers)


def _grouped(inputs: Info, weight: Info, groups: int, transposed: bool) -> tuple[Axis, int] | None:
    """Give the result's channels and the weight's contracted dim (-1: none, a depthwise filter)."""
    into = reshape([inputs.axes[1]], [groups, inputs.axes[1].size // groups])
    rows = reshape([weight.axes[0]], [groups, weight.axes[0].size // groups])
    if into is None or rows is None:
        return None
    unify(into[0][0], rows[0][0])
    flag(rows[0][0], INHOMOGENEOUS)
    if transposed:
        # The weight is (groups × inner in, inner out, …): one dim both names the group and is contracted.
        unify(into[0][1], rows[0][1])
        if rows[0][1].size > 1:
            freeze(rows[0][1], "grouped transposed convolution")
        return product([rows[0][0], weight.axes[1]]), -1
    unify(into[0][1], weight.axes[1])
    return resolve(weight.axes[0]), 1 if weight.axes[1].size > 1 else -1


CONTRACTIONS: dict[str, Rule] = {
    **dict.fromkeys(("mm", "bmm"), mm),
    **dict.fromkeys(("addmm", "baddbmm"), addmm),
    "mv": mv,
    **dict.fromkeys(("dot", "vdot"), dot),
    "addmv": addmv,
    "linear": linear,
    "convolution": convolution,
}
