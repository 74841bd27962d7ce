"""Operations that take a statistic over an axis: normalisations, softmax, reductions, pooling.

Units under a common statistic may be permuted, but not duplicated at will: an average is unchanged when every
unit is duplicated equally often (flag "averaged"), anything else is not (flag "coupled").
"""

from collections.abc import Sequence

from torch import Tensor

from thalweg.structure.axes import (
    AVERAGED,
    COUPLED,
    INHOMOGENEOUS,
    NOT_ZERO_PRESERVING,
    Axis,
    Leaf,
    flag,
    freeze,
    reshape,
    unify,
)
from thalweg.structure.trace import Call, Info, Rule, Site


def _affine(call: Call, tensors: Sequence[Tensor | None], axis: Axis) -> frozenset[Site]:
    """Unify per-channel vectors (scale, shift, running statistics) with the channels."""
    sites: set[Site] = set()
    for tensor in tensors:
        if tensor is not None:
            info = call.info(tensor)
            unify(info.axes[0], axis)
            call.use(info)
            sites |= info.all_sites
    return frozenset(sites)


def _average(call: Call, info: Info, axis: Axis) -> None:
    """Note an average over an axis; one over a weight's own axis changes with the shares and couples."""
    flag(axis, COUPLED if info.is_parameter else AVERAGED)
    call.tracer.averaged.append(axis)


def batch_norm(call: Call) -> None:
    """Normalise each channel by its own statistics: channels stay independent of one another."""
    info = call.info(call.args[0])
    weight, bias, *running = [call.arg(k, "") for k in range(1, 5)]
    if not all(isinstance(r, Tensor) or r is None for r in running):
        running = []  # a variant that takes no running statistics
    makers = _affine(call, [weight, bias], info.axes[1])
    _affine(call, running, info.axes[1])
    call.tracer.normalised |= info.makers | frozenset(
        s for r in running if r is not None for s in call.info(r).all_sites
    )
    if not makers:
        flag(info.axes[1], INHOMOGENEOUS)
    outs = call.outputs()
    call.define(outs[0], info.axes, makers=makers)
    for out in outs[1:]:
        call.define(
            out,
            [info.axes[1] if out.shape == (info.axes[1].size,) else Leaf(n, "statistics") for n in out.shape],
        )


def layer_norm(call: Call) -> None:
    """Normalise over the last dims: their units share one mean and one variance."""
    info = call.info(call.args[0])
    count = len(call.args[1])
    normalised = info.axes[-count:]
    for axis in normalised:
        _average(call, info, axis)
        for name in (INHOMOGENEOUS, NOT_ZERO_PRESERVING):
            flag(axis, name)
    for tensor in (call.arg(2, "weight"), call.arg(3, "bias")):
        if isinstance(tensor, Tensor):
            for mine, theirs in zip(call.info(tensor).axes, normalised, strict=True):
                unify(mine, theirs)
            call.use(call.info(tensor))
    outs = call.outputs()
    call.define(outs[0], info.axes)
    for out in outs[1:]:
        call.define(out, [*info.axes[: out.ndim - count], *[Leaf(n) for n in out.shape[out.ndim - count :]]])


def group_norm(call: Call) -> None:
    """Normalise over each group of channels: whole groups are free, the channels inside share statistics."""
    info = call.info(call.args[0])
    groups = int(call.args[6])
    found = reshape([info.axes[1]], [groups, info.axes[1].size // groups])
    if found is None:
        call.unknown()
        return
    flag(info.axes[1], INHOMOGENEOUS)
    _average(call, info, found[0][1])
    flag(found[0][1], NOT_ZERO_PRESERVING)
    _affine(call, [call.args[1], call.args[2]], info.axes[1])
    outs = call.outputs()
    call.define(outs[0], info.axes)
    for out in outs[1:]:
        call.define(out, [info.axes[0], found[0][0]])


def softmax(call: Call) -> None:
    """Normalise by a sum over one dim."""
    info = call.info(call.args[0])
    axis = info.axes[call.arg(1, "dim", -1)]
    for name in (COUPLED, INHOMOGENEOUS, NOT_ZERO_PRESERVING):
        flag(axis, name)
    for other in info.axes:
        flag(other, INHOMOGENEOUS)
        flag(other, NOT_ZERO_PRESERVING)
    call.define(call.out, info.axes)


def weight_norm(call: Call) -> None:
    """Scale rows, w = g·v/‖v‖: their norms couple what lies along the other dims."""
    info, scale = call.info(call.args[0]), call.info(call.args[1])
    dim = call.arg(2, "dim", 0) % len(info.axes)
    sites = list(info.sites)
    for d, axis in enumerate(info.axes):
        flag(axis, INHOMOGENEOUS)
        if d == dim:
            unify(axis, scale.axes[d])
            sites[d] |= scale.sites[d]
        else:
            flag(axis, COUPLED)
    outs = call.outputs()
    call.define(outs[0], info.axes, sites=sites, is_weight=True)
    for out in outs[1:]:
        call.define(out, scale.axes, sites=scale.sites, is_weight=True)


def _dims(value: object, count: int) -> set[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        return {value % count} if count else set()
    if isinstance(value, list | tuple) and value:
        return {d % count for d in value}
    return set(range(count))


def reduction(call: Call) -> None:
    """Reduce over some dims: their units share the result."""
    info = call.info(call.args[0])
    position = 2 if call.name in ("linalg_vector_norm", "norm") else 1
    dims = _dims(call.arg(position, "dim"), len(info.axes))
    for d in dims:
        if call.name == "mean":
            _average(call, info, info.axes[d])
        else:
            flag(info.axes[d], COUPLED)
        flag(info.axes[d], INHOMOGENEOUS)
        if call.name in ("argmax", "argmin"):
            freeze(info.axes[d], f"operation {call.name}")
    if not info.is_weight and call.name not in ("mean", "sum"):
        for axis in info.axes:
            flag(axis, INHOMOGENEOUS)
    for out in call.outputs():
        _define_reduced(call, out, info, dims)


def _define_reduced(call: Call, out: Tensor, info: Info, dims: set[int]) -> None:
    keeps = out.ndim == len(info.axes)
    axes: list[Axis] = []
    sites: list[frozenset[Site]] = []
    for d, axis in enumerate(info.axes):
        if d not in dims:
            axes.append(axis)
            sites.append(info.sites[d])
        elif keeps:
            axes.append(Leaf(1))
            sites.append(frozenset())
    makers = info.makers if call.name in ("mean", "sum") else frozenset[Site]()
    call.define(out, axes, sites=sites, is_weight=info.is_weight, makers=makers)


def spatial(call: Call) -> None:
    """Pool, pad or resample over the last dims; batch and channels pass through."""
    info = call.info(call.args[0])
    count = next(n for n in (1, 2, 3) if f"{n}d" in call.name)
    for axis in info.axes[-count:]:
        freeze(axis, "space")
    kept = info.axes[:-count]
    for out in call.outputs():
        fresh: list[Axis] = [Leaf(n, "space") for n in out.shape[out.ndim - count :]]
        call.define(out, [*kept, *fresh], makers=info.makers)


def scalar(call: Call) -> None:
    """Read a number out (`.item()`): what was reduced to it is flagged where it was reduced."""
    for tensor in call.tensors():
        for axis in call.info(tensor).axes:
            freeze(axis, "read by the program")


_POOLS = [
    f"{kind}{n}d{tail}"
    for n in (1, 2, 3)
    for kind, tail in (
        ("max_pool", "_with_indices"),
        ("avg_pool", ""),
        ("_adaptive_avg_pool", ""),
        ("adaptive_avg_pool", ""),
        ("adaptive_max_pool", ""),
        ("reflection_pad", ""),
        ("replication_pad", ""),
        ("upsample_nearest", ""),
        ("upsample_bilinear", ""),
        ("upsample_linear", ""),
        ("upsample_trilinear", ""),
        ("_upsample_nearest_exact", ""),
    )
]

NORMALISATIONS: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "_batch_norm_with_update",
            "_batch_norm_no_update",
            "batch_norm",
        ),
        batch_norm,
    ),
    "native_layer_norm": layer_norm,
    "_fused_rms_norm": layer_norm,
    "native_group_norm": group_norm,
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax"), softmax),
    "_weight_norm_interface": weight_norm,
    **dict.fromkeys(
        "mean sum amax amin max min var std var_mean std_mean prod logsumexp any all "
        "linalg_vector_norm norm argmax argmin".split(),
        reduction,
    ),
    **dict.fromkeys(_POOLS, spatial),
    "_local_scalar_dense": scalar,
}
