"""Operations that only lay the same numbers out anew: views, transposes, broadcasts, concatenations."""

from collections.abc import Sequence

from torch import Tensor

from thalweg.structure.axes import (
    INHOMOGENEOUS,
    Axis,
    Leaf,
    concatenation,
    cut,
    flag,
    freeze,
    product,
    reshape,
    unify,
)
from thalweg.structure.trace import Call, Info, Rule, Site


def same(call: Call) -> None:
    """Keep the axes: clone, cast, detach."""
    info = call.info(call.args[0])
    for out in call.outputs():
        call.define(out, info.axes, sites=info.sites, is_weight=info.is_weight, makers=info.makers)


def _forget_single(info: Info) -> None:
    """Fix axes of size one: a new shape cannot say where one unit went."""
    for axis in info.axes:
        if axis.size == 1:
            freeze(axis, "single, reshaped")


def view(call: Call) -> None:
    """Regroup row-major axes; factors that mix freeze everything."""
    info = call.info(call.args[0])
    _forget_single(info)
    found = reshape(info.axes, list(call.out.shape))
    if found is None:
        call.unknown()
        return
    axes, sources = found
    sites = [frozenset[Site]().union(*(info.sites[d] for d in source)) for source in sources]
    call.define(call.out, axes, sites=sites, is_weight=info.is_weight, makers=info.makers)


def _picked(call: Call, order: Sequence[int]) -> None:
    info = call.info(call.args[0])
    call.define(
        call.out,
        [info.axes[d] for d in order],
        sites=[info.sites[d] for d in order],
        is_weight=info.is_weight,
        makers=info.makers,
    )


def permute(call: Call) -> None:
    """Reorder the dims."""
    dims = len(call.info(call.args[0]).axes)
    _picked(call, [d % dims for d in call.args[1]])


def transpose(call: Call) -> None:
    """Swap two dims."""
    order = list(range(len(call.info(call.args[0]).axes)))
    if len(order) > 1:
        one, two = (call.arg(1, "dim0", 0), call.arg(2, "dim1", 1)) if call.name != "t" else (0, 1)
        order[one], order[two] = order[two], order[one]
    _picked(call, order)


def squeeze(call: Call) -> None:
    """Add or drop dims of size one."""
    info = call.info(call.args[0])
    _forget_single(info)
    kept = [(a, s) for a, s in zip(info.axes, info.sites, strict=True) if a.size != 1]
    axes: list[Axis] = []
    sites: list[frozenset[Site]] = []
    for size in call.out.shape:
        axis, site = kept.pop(0) if size != 1 else (Leaf(1), frozenset[Site]())
        axes.append(axis)
        sites.append(site)
    call.define(call.out, axes, sites=sites, is_weight=info.is_weight, makers=info.makers)


def expand(call: Call) -> None:
    """Broadcast: along a new axis all values are equal, so its positions are interchangeable."""
    info = call.info(call.args[0])
    new = call.out.ndim - len(info.axes)
    _forget_single(info)
    axes: list[Axis] = [Leaf(n) for n in call.out.shape[:new]]
    for size, axis in zip(call.out.shape[new:], info.axes, strict=True):
        axes.append(axis if axis.size == size else Leaf(size))
    sites = [frozenset[Site]()] * new + info.sites
    call.define(call.out, axes, sites=sites, is_weight=info.is_weight, makers=info.makers)


def repeat(call: Call) -> None:
    """Tile: the copies of an axis are interchangeable."""
    info = call.info(call.args[0])
    counts = list(call.args[1])
    new = len(counts) - len(info.axes)
    old: list[Axis] = [Leaf(1)] * new + info.axes
    axes = [product([Leaf(c), a]) for c, a in zip(counts, old, strict=True)]
    sites = [frozenset[Site]()] * new + info.sites
    call.define(call.out, axes, sites=sites, is_weight=info.is_weight, makers=info.makers)


def _merged(infos: Sequence[Info], dim: int) -> tuple[bool, frozenset[Site], list[frozenset[Site]]]:
    is_weight = all(i.is_weight for i in infos)
    makers = frozenset[Site]().union(*(i.makers for i in infos))
    sites = [frozenset[Site]().union(*(i.sites[d] for i in infos)) for d in range(dim)]
    return is_weight, makers, sites


def _met(call: Call, infos: Sequence[Info]) -> None:
    """Weights that meet activations as they are (a class token, say) produce."""
    if not all(i.is_weight for i in infos):
        for info in infos:
            call.use(info)
            if info.is_weight and info.all_sites:
                for axis in info.axes:
                    flag(axis, INHOMOGENEOUS)


def cat(call: Call) -> None:
    """Concatenate: a sum of axes along the dim, all others are the same."""
    tensors: list[Tensor] = [t for t in call.args[0] if t.ndim > 1 or t.numel() > 0]
    infos = [call.info(t) for t in tensors]
    dims = call.out.ndim
    dim = call.arg(1, "dim", 0) % dims
    for info in infos[1:]:
        for d in range(dims):
            if d != dim:
                unify(infos[0].axes[d], info.axes[d])
    axes = list(infos[0].axes)
    axes[dim] = concatenation([i.axes[dim] for i in infos])
    is_weight, makers, sites = _merged(infos, dims)
    _met(call, infos)
    call.define(call.out, axes, sites=sites if is_weight else None, is_weight=is_weight, makers=makers)


def stack(call: Call) -> None:
    """Stack along a new axis whose positions differ."""
    infos = [call.info(t) for t in call.args[0]]
    dims = len(infos[0].axes)
    dim = call.arg(1, "dim", 0) % (dims + 1)
    for info in infos[1:]:
        for one, two in zip(infos[0].axes, info.axes, strict=True):
            unify(one, two)
    is_weight, makers, sites = _merged(infos, dims)
    axes = [*infos[0].axes[:dim], Leaf(len(infos), "stacked"), *infos[0].axes[dim:]]
    known = [*sites[:dim], frozenset[Site](), *sites[dim:]]
    _met(call, infos)
    call.define(call.out, axes, sites=known if is_weight else None, is_weight=is_weight, makers=makers)


def pad(call: Call) -> None:
    """Pad with a constant: the new positions are interchangeable with each other."""
    info = call.info(call.args[0])
    axes = list(info.axes)
    widths = call.args[1]
    for k in range(len(widths) // 2):
        before, after = widths[2 * k : 2 * k + 2]
        dim = len(axes) - 1 - k
        axis = axes[dim]
        if min(before, after) < 0:
            axis = _cropped(axis, max(-before, 0), max(-after, 0))
        axes[dim] = concatenation([Leaf(max(before, 0)), axis, Leaf(max(after, 0))])
        if call.arg(2, "value", 0) != 0:
            flag(axes[dim], INHOMOGENEOUS)
    call.define(call.out, axes, sites=info.sites, is_weight=info.is_weight, makers=info.makers)


def _cropped(axis: Axis, before: int, after: int) -> Axis:
    sizes = [before, axis.size - before - after, after]
    pieces = cut(axis, [s for s in sizes if s])
    return pieces[1 if before else 0]


SHAPES: dict[str, Rule] = {
    **dict.fromkeys(
        ("clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "lift_fresh_copy", "lift"), same
    ),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "flatten"), view),
    "permute": permute,
    **dict.fromkeys(("transpose", "t"), transpose),
    **dict.fromkeys(("squeeze", "unsqueeze"), squeeze),
    "expand": expand,
    "repeat": repeat,
    **dict.fromkeys(("cat", "concat"), cat),
    "stack": stack,
    "constant_pad_nd": pad,
}
