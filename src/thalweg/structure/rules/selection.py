"""Operations that pick positions: slices, splits, look-ups; what is picked by position is told apart."""

from thalweg.structure.axes import Axis, Leaf, cut, freeze
from thalweg.structure.trace import Call, Info, Rule, Site


def _define_like(call: Call, out: object, info: Info, dim: int, axis: Axis | None) -> None:
    """Define a result that has the argument's axes, but for one that is replaced (or dropped, if None)."""
    middle = [] if axis is None else [axis]
    site = [] if axis is None else [info.sites[dim]]
    call.define(
        out,  # type: ignore[arg-type]
        [*info.axes[:dim], *middle, *info.axes[dim + 1 :]],
        sites=[*info.sites[:dim], *site, *info.sites[dim + 1 :]],
        is_weight=info.is_weight,
        makers=info.makers,
    )


def slice_(call: Call) -> None:
    """Cut the axis at the ends of the slice; a step picks single positions and freezes."""
    info = call.info(call.args[0])
    dim = call.arg(1, "dim", 0) % len(info.axes)
    axis, size, kept = info.axes[dim], info.axes[dim].size, call.out.shape[dim]
    start, _, step = slice(call.arg(2, "start"), call.arg(3, "end"), call.arg(4, "step", 1)).indices(size)
    if kept == size:
        piece = axis
    elif step != 1 or kept == 0:
        freeze(axis, "slice with a step")
        piece = Leaf(kept, "slice with a step")
    else:
        sizes = [start, kept, size - start - kept]
        piece = cut(axis, [s for s in sizes if s])[1 if start else 0]
    _define_like(call, call.out, info, dim, piece)


def select(call: Call) -> None:
    """Pick one position; the others stay interchangeable."""
    info = call.info(call.args[0])
    dim = call.arg(1, "dim", 0) % len(info.axes)
    axis = info.axes[dim]
    index = call.arg(2, "index", 0) % axis.size
    cut(axis, [s for s in (index, 1, axis.size - index - 1) if s])
    _define_like(call, call.out, info, dim, None)


def unbind(call: Call) -> None:
    """Pick every position."""
    info = call.info(call.args[0])
    dim = call.arg(1, "dim", 0) % len(info.axes)
    cut(info.axes[dim], [1] * info.axes[dim].size)
    for out in call.outputs():
        _define_like(call, out, info, dim, None)


def split(call: Call) -> None:
    """Cut the axis into the pieces that were returned."""
    info = call.info(call.args[0])
    dim = call.arg(2, "dim", 0) % len(info.axes)
    outs = call.outputs()
    for out, piece in zip(outs, cut(info.axes[dim], [o.shape[dim] for o in outs]), strict=True):
        _define_like(call, out, info, dim, piece)


def ordered(call: Call) -> None:
    """Use the order along one dim (cumulative sums, sorting, flips, rolls): freeze it, keep the others."""
    info = call.info(call.args[0])
    dims = call.arg(2 if call.name == "roll" else 1, "dims" if call.name in ("roll", "flip") else "dim", -1)
    if call.name == "topk":
        dims = call.arg(2, "dim", -1)
    if call.name in ("sort", "argsort") and not isinstance(dims, int):
        dims = -1
    listed = {d % len(info.axes) for d in ([dims] if isinstance(dims, int) else dims)}
    if any(leaf_is_free(info.axes[d]) for d in listed):
        call.tracer.frozen_by[call.name] += 1
    for d in listed:
        freeze(info.axes[d], f"operation {call.name}")
    call.use(info)
    for out in call.outputs():
        axes = [Leaf(out.shape[d], call.name) if d in listed else a for d, a in enumerate(info.axes)]
        call.define(out, axes)


def leaf_is_free(axis: Axis) -> bool:
    """Say whether anything along the axis is still interchangeable."""
    from thalweg.structure.axes import leaves

    return any(leaf.frozen is None and leaf.size > 1 for leaf in leaves(axis))


def embedding(call: Call) -> None:
    """Look rows up by number: the rows are told apart, the columns are units."""
    weight, indices = call.info(call.args[0]), call.info(call.args[1])
    freeze(weight.axes[0], "looked up by number")
    call.use(weight)
    call.define(call.out, [*indices.axes, weight.axes[1]], makers=weight.all_sites)


def index(call: Call) -> None:
    """Index dims by tensors of positions: those dims are told apart, the others stay."""
    info = call.info(call.args[0])
    picked = [d for d, i in enumerate(call.args[1]) if i is not None]
    new = call.out.ndim - (len(info.axes) - len(picked))
    if picked != list(range(picked[0], picked[-1] + 1)) or new < 0:
        call.unknown()
        return
    for d in picked:
        freeze(info.axes[d], "indexed by position")
    first, last = picked[0], picked[-1] + 1
    fresh: list[Axis] = [Leaf(n, "indexed by position") for n in call.out.shape[first : first + new]]
    call.define(
        call.out,
        [*info.axes[:first], *fresh, *info.axes[last:]],
        sites=[*info.sites[:first], *[frozenset[Site]()] * new, *info.sites[last:]],
        is_weight=info.is_weight,
    )


def index_select(call: Call) -> None:
    """Pick positions of one dim by a tensor."""
    info = call.info(call.args[0])
    dim = call.args[1] % len(info.axes)
    freeze(info.axes[dim], "indexed by position")
    _define_like(call, call.out, info, dim, Leaf(call.out.shape[dim], "indexed by position"))


SELECTIONS: dict[str, Rule] = {
    "slice": slice_,
    "select": select,
    "unbind": unbind,
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"), split),
    **dict.fromkeys(("cumsum", "cumprod", "sort", "argsort", "topk", "flip", "roll", "logcumsumexp"), ordered),
    "embedding": embedding,
    "index": index,
    "index_select": index_select,
}
