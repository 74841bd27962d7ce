"""The product of a locally-connected layer: every position's kernel times its patch, patches made a few at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.lifting.geometry import Geometry

# Bytes of patches that are made at once. On a CPU they then stay in its cache, and the allocator gives the same pages
# again: fresh pages cost more than the product (64 channels, 5×5 taps, batch 250: 0.22 s against 0.03 s to gather).
_AT_ONCE = {"cpu": 2**22}
_AT_ONCE_ELSEWHERE = 2**28

# Multiplications of one position from which on its kernel is copied to leave out what reads padding. Chosen by us:
# 64 channels, 5×5 taps, batch 250 then take 0.30 s for outputs and both gradients in place of 0.33 s.
_WORTH_CUTTING = 2**22

_Map = Literal["outputs", "inputs", "weight"]


@dataclass
class Patches:
    """The products of a geometry's patches and kernels.

    All three are derivatives of T(x, W, y) = Σ_{n, l, o, t, c} y[n, o, l] · W[l, o, t, c] · x[n, c, pixel(l, t)] by
    one of its arguments, so that they are each other's derivatives too: differentiable any number of times, with
    patches that are gathered again in place of kept.

    Args:
        geometry: of the layer.
    """

    geometry: Geometry
    _placed: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)
    _runs: tuple[tuple[slice, tuple[slice, ...]], ...] = field(default=(), repr=False)

    def reads(self, device: torch.device) -> Tensor:
        """Say which input position each output position reads through each tap; `pixels` stands for padding.

        Kept for plain tensors alone: one that a tracer made has no values.
        """
        if device in self._placed:
            return self._placed[device]
        placed = _reads(self.geometry).to(device)
        if type(placed) is Tensor and not placed.is_meta:
            self._placed[device] = placed
        return placed

    def runs(self) -> tuple[tuple[slice, tuple[slice, ...]], ...]:
        """List runs of consecutive positions that read the input through the same taps, with these along each dim.

        Assigned whole, so that threads that come here together all have all of it.
        """
        if not self._runs:
            found = []
            read = (_reads(self.geometry) < self.geometry.pixels).reshape(-1, *self.geometry.kernel_size)
            changes = (read[1:] != read[:-1]).flatten(1).any(1).nonzero().flatten() + 1
            starts = [0, *changes.tolist()]
            for start, stop in zip(starts, [*starts[1:], len(read)], strict=True):
                places = read[start].nonzero()
                if len(places):  # else nothing but padding: the product is 0
                    ends = zip(places.amin(0).tolist(), places.amax(0).tolist(), strict=True)
                    found.append((slice(start, stop), tuple(slice(low, high + 1) for low, high in ends)))
            self._runs = tuple(found)
        return self._runs

    def outputs(
        self, inputs: Float[Tensor, "batch channels pixels"], weight: Float[Tensor, "positions out taps ins"]
    ) -> Float[Tensor, "batch out positions"]:
        """Compute y[n, o, l] = Σ_{t, c} W[l, o, t, c] · x[n, c, pixel(l, t)].

        Args:
            inputs: a batch.
            weight: of every position; what reads padding is multiplied by 0.

        Returns:
            The products, differentiable and under `torch.func`'s transforms.
        """
        return _applied("outputs", inputs, weight, self)


def _applied(which: _Map, first: Tensor, second: Tensor, patches: Patches) -> Tensor:
    if _is_transformed(first, second):
        return _plain(which, first, second, patches)
    found: Tensor = _Product.apply(which, first, second, patches)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    """One of the three maps."""

    @staticmethod
    def forward(ctx: Any, which: _Map, first: Tensor, second: Tensor, patches: Patches) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.which, ctx.patches = which, patches
        with torch.autocast(first.device.type, enabled=False):  # the types are settled
            return {"outputs": _outputs, "inputs": _inputs, "weight": _weight}[which](first, second, patches)

    @staticmethod
    def backward(ctx: Any, *outward: Any) -> tuple[Tensor | None, ...]:
        (slope,) = outward
        first, second = ctx.saved_tensors
        _, wants_first, wants_second, _ = ctx.needs_input_grad
        # by the first argument, by the second
        maps: dict[_Map, tuple[tuple[_Map, Tensor, Tensor], tuple[_Map, Tensor, Tensor]]] = {
            "outputs": (("inputs", slope, second), ("weight", slope, first)),  # of x, W
            "inputs": (("outputs", slope, second), ("weight", first, slope)),  # of y, W
            "weight": (("outputs", second, slope), ("inputs", first, slope)),  # of y, x
        }
        by_first, by_second = maps[ctx.which]
        return (
            None,
            _applied(*by_first, ctx.patches) if wants_first else None,
            _applied(*by_second, ctx.patches) if wants_second else None,
            None,
        )


def _outputs(inputs: Tensor, weight: Tensor, patches: Patches) -> Tensor:
    geometry, batch = patches.geometry, len(inputs)
    rows, kernels = _rows(inputs, geometry), _kernels(weight, geometry)
    found = inputs.new_zeros(geometry.positions, geometry.groups, batch, kernels.shape[2])
    for piece in _pieces(patches, rows, kernels.shape[2]):
        taken = _turned(_gathered(rows, piece, kernels.shape[-1], batch))
        torch.bmm(taken, _chosen(kernels, piece).mT, out=_merged(found[piece.positions]))
    return _columns(found)


def _inputs(slope: Tensor, weight: Tensor, patches: Patches) -> Tensor:
    geometry, batch = patches.geometry, len(slope)
    own, kernels = _slopes(slope, geometry), _kernels(weight, geometry)
    rows = slope.new_zeros((geometry.pixels + 1) * geometry.groups, geometry.in_channels // geometry.groups * batch)
    for piece in _pieces(patches, rows, kernels.shape[2]):
        slopes, theirs = _merged(own[piece.positions]), _chosen(kernels, piece)
        grown = torch.bmm(slopes, theirs) if batch == 1 else torch.bmm(theirs.mT, slopes.mT)
        rows.index_add_(0, piece.rows, grown.reshape(len(piece.rows), rows.shape[1]))
    return _channels(rows.view(geometry.pixels + 1, geometry.in_channels, batch)[:-1])


def _weight(slope: Tensor, inputs: Tensor, patches: Patches) -> Tensor:
    geometry, batch = patches.geometry, len(inputs)
    own, rows = _slopes(slope, geometry), _rows(inputs, geometry)
    outs, ins = geometry.out_channels, geometry.in_channels // geometry.groups
    found = slope.new_zeros(geometry.positions, outs, geometry.taps, ins)
    kernels = _kernels(found, geometry)
    for piece in _pieces(patches, rows, kernels.shape[2]):
        slopes, taken = _merged(own[piece.positions]), _turned(_gathered(rows, piece, kernels.shape[-1], batch))
        if piece.taps is None:
            torch.bmm(slopes.mT, taken, out=_chosen(kernels, piece))
        else:
            part = _cut(kernels[piece.positions], piece.taps)
            part.copy_(torch.bmm(slopes.mT, taken).view(part.shape))
    return found


def _plain(which: _Map, first: Tensor, second: Tensor, patches: Patches) -> Tensor:
    """Compute the same by operations that every transform sees through; all patches at once."""
    geometry, batch = patches.geometry, len(first)
    index = _index(patches.reads(first.device), geometry)
    lines, columns = geometry.positions * geometry.groups, geometry.taps * (geometry.in_channels // geometry.groups)
    outs = geometry.out_channels // geometry.groups
    if which == "inputs":
        own, kernels = _merged(_slopes(first, geometry)), second.reshape(lines, outs, columns)
        spread = torch.bmm(kernels.mT, own.mT).reshape(len(index), columns // geometry.taps * batch)
        rows = torch.zeros_like(spread[:1]).expand((geometry.pixels + 1) * geometry.groups, -1)
        rows = rows.index_add(0, index, spread)
        return _channels(rows.reshape(geometry.pixels + 1, geometry.in_channels, batch)[:-1])
    inputs = first if which == "outputs" else second
    taken = _rows(inputs, geometry).index_select(0, index).reshape(lines, columns, batch)
    if which == "outputs":
        found = torch.bmm(taken.mT, second.reshape(lines, outs, columns).mT)
        return _columns(found.reshape(geometry.positions, geometry.groups, batch, outs))
    grown = torch.bmm(_merged(_slopes(first, geometry)).mT, taken.mT)
    return grown.reshape(geometry.positions, geometry.out_channels, geometry.taps, columns // geometry.taps)


def _merged(tensor: Tensor) -> Tensor:
    """Merge the first two dims; `flatten` has no rule for batched backward passes."""
    return tensor.reshape(tensor.shape[0] * tensor.shape[1], *tensor.shape[2:])


def _turned(tensor: Tensor) -> Tensor:
    """Transpose matrices; a single column becomes a row in memory too, which BLAS multiplies ten times faster."""
    return tensor.view(len(tensor), 1, tensor.shape[1]) if tensor.shape[2] == 1 else tensor.mT


def _rows(inputs: Tensor, geometry: Geometry) -> Tensor:
    """Lay inputs out as rows, one for each position and group, each (in / groups, batch); the last position is 0.

    The batch is the innermost dim, so that a patch is gathered in long rows. In two steps, as torch transposes
    matrices faster than tensors.
    """
    batch, ins = len(inputs), geometry.in_channels // geometry.groups
    turned = inputs.reshape(batch, geometry.in_channels * geometry.pixels).t().contiguous()
    turned = turned.reshape(geometry.in_channels, geometry.pixels, batch)
    rows = torch.cat([turned.transpose(0, 1), torch.zeros_like(turned[:, :1]).transpose(0, 1)])
    return rows.reshape((geometry.pixels + 1) * geometry.groups, ins * batch)


def _channels(rows: Tensor) -> Tensor:
    """Turn (pixels, channels, batch) into (batch, channels, pixels)."""
    return _merged(rows.transpose(0, 1)).t().contiguous().reshape(rows.shape[2], rows.shape[1], rows.shape[0])


def _slopes(slope: Tensor, geometry: Geometry) -> Tensor:
    """Lay what has the form of outputs out as (positions, groups, batch, out / groups)."""
    batch, outs = len(slope), geometry.out_channels // geometry.groups
    turned = slope.reshape(batch * geometry.out_channels, geometry.positions).t().contiguous()
    return turned.reshape(geometry.positions, batch, geometry.groups, outs).transpose(1, 2)


def _columns(found: Tensor) -> Tensor:
    """Turn (positions, groups, batch, out / groups) into (batch, out, positions)."""
    positions, groups, batch, outs = found.shape
    turned = found.transpose(1, 2).reshape(positions, batch * groups * outs).t().contiguous()
    return turned.reshape(batch, groups * outs, positions)


def _kernels(weight: Tensor, geometry: Geometry) -> Tensor:
    """View a weight as (positions, groups, out / groups, *kernel, in / groups)."""
    outs, ins = geometry.out_channels // geometry.groups, geometry.in_channels // geometry.groups
    return weight.reshape(geometry.positions, geometry.groups, outs, *geometry.kernel_size, ins)


@dataclass(frozen=True)
class _Piece:
    """Consecutive positions whose patches are gathered at once.

    Args:
        positions: their numbers.
        taps: along each dim of the kernel, those that do not read padding; None: all are read, padding as 0.
        num_taps: number of taps that are read.
        rows: the rows that they read, in the order positions, groups, taps.
    """

    positions: slice
    taps: tuple[slice, ...] | None
    num_taps: int
    rows: Tensor


def _pieces(patches: Patches, rows: Tensor, outs: int) -> Iterator[_Piece]:
    """Cut the positions so that the patches of one piece take a few megabytes.

    Where one position's product is large, taps that read padding are left out: its kernel is copied for that.
    """
    reads, geometry = patches.reads(rows.device), patches.geometry
    most = _AT_ONCE.get(rows.device.type, _AT_ONCE_ELSEWHERE)
    row = rows.shape[1] * rows.element_size()
    count = max(1, most // max(1, row * geometry.groups * geometry.taps))
    is_cut = rows.device.type == "cpu" and rows.shape[1] * geometry.taps * outs >= _WORTH_CUTTING
    for run, taps in patches.runs() if is_cut else ((slice(0, geometry.positions), None),):
        for start in range(run.start, run.stop, count):
            stretch = slice(start, min(start + count, run.stop))
            own = reads[stretch]
            if taps is not None:
                own = own.reshape(len(own), *geometry.kernel_size)[slice(None), *taps].reshape(len(own), -1)
            yield _Piece(stretch, taps, own.shape[1], _index(own, geometry))


def _gathered(rows: Tensor, piece: _Piece, ins: int, batch: int) -> Tensor:
    """Gather patches: (positions · groups, taps · in / groups, batch)."""
    taken = rows.index_select(0, piece.rows)
    return taken.view(len(piece.rows) // piece.num_taps, piece.num_taps * ins, batch)


def _cut(kernels: Tensor, taps: tuple[slice, ...]) -> Tensor:
    """View the taps that do not read padding."""
    place: tuple[Any, ...] = (..., *taps, slice(None))
    return kernels[place]


def _chosen(kernels: Tensor, piece: _Piece) -> Tensor:
    """Select kernels: (positions · groups, out / groups, taps · in / groups); a view, but where taps are left out."""
    own = kernels[piece.positions]
    if piece.taps is not None:
        own = _cut(own, piece.taps)
    return _merged(own).flatten(2)


def _index(reads: Tensor, geometry: Geometry) -> Tensor:
    """Number the rows that positions read, in the order positions, groups, taps."""
    if geometry.groups == 1:
        return reads.reshape(-1)
    groups = torch.arange(geometry.groups, device=reads.device)
    return (reads[:, None] * geometry.groups + groups[:, None]).reshape(-1)


def _reads(geometry: Geometry) -> Tensor:
    reads = torch.full((*geometry.output_size, geometry.taps), geometry.pixels)
    pixels = torch.arange(geometry.pixels).reshape(geometry.input_size)
    for box in geometry.boxes():
        to = tuple(slice(p, p + n) for p, n in zip(box.position, box.size, strict=True))
        of = tuple(
            slice(p, p + n * s, s) if n else slice(0)
            for p, n, s in zip(box.pixel, box.size, geometry.stride, strict=True)
        )
        reads[..., box.tap][to] = pixels[of]
    return reads.reshape(geometry.positions, geometry.taps)


def _is_transformed(*tensors: Tensor) -> bool:
    """Say whether plain operations alone will do.

    So it is under a compiler or a tracer, a transform, forward derivatives or a batched backward pass, and for
    tensors of another class.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if any(type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta for t in tensors):
        return True
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    is_active = getattr(torch._C, "_are_functorch_transforms_active", None)
    is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)
    return bool(is_active is not None and is_active()) or bool(
        is_batched is not None and any(map(is_batched, tensors))
    )
