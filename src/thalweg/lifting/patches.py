"""The product of a locally-connected layer: every position's kernel times its patch, patches made a few at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thalweg.lifting.geometry import Geometry

# Bytes of patches that are made at once. On a CPU they then stay in its cache, and the allocator gives the same pages
# again: fresh pages cost more than the product (64 channels, 5×5 taps, batch 250: 0.22 s against 0.03 s to gather).
_AT_ONCE = {"cpu": 2**22}
_AT_ONCE_ELSEWHERE = 2**28

_Map = Literal["outputs", "inputs", "weight"]


@dataclass
class Patches:
    """The products of a geometry's patches and kernels.

    All three are the derivatives of T(x, W, y) = Σ_{n, l, o, t, c} y[n, o, l] · W[l, o, t, c] · x[n, c, pixel(l, t)] by
    one of its arguments, so that they are each other's derivatives too: differentiable any number of times, with
    patches that are gathered again in place of kept.

    Args:
        geometry: of the layer.
    """

    geometry: Geometry
    _placed: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def reads(self, device: torch.device) -> Int[Tensor, "positions taps"]:
        """Say which input position each output position reads through each tap; `pixels` stands for padding."""
        if device not in self._placed:
            self._placed[device] = _reads(self.geometry).to(device)
        return self._placed[device]

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
    if _is_transformed():
        return _plain(which, first, second, patches)
    found: Tensor = _Product.apply(which, first, second, patches)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    """One of the three maps."""

    @staticmethod
    def forward(ctx: Any, which: _Map, first: Tensor, second: Tensor, patches: Patches) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.which, ctx.patches = which, patches
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
    geometry = patches.geometry
    rows, kernels = _rows(inputs, geometry), _kernels(weight, geometry)
    found = inputs.new_empty(geometry.positions, geometry.groups, kernels.shape[2], len(inputs))
    for stretch, taken in _gathered(rows, patches):
        torch.bmm(kernels[stretch].flatten(0, 1), taken, out=found[stretch].flatten(0, 1))
    return _columns(found.flatten(1, 2))


def _inputs(slope: Tensor, weight: Tensor, patches: Patches) -> Tensor:
    geometry, batch = patches.geometry, len(slope)
    own, kernels = _slopes(slope, geometry), _kernels(weight, geometry)
    rows = slope.new_zeros((geometry.pixels + 1) * geometry.groups, geometry.in_channels // geometry.groups * batch)
    for stretch, index in _stretches(patches, rows):
        spread = torch.bmm(kernels[stretch].flatten(0, 1).transpose(1, 2), own[stretch].flatten(0, 1))
        rows.index_add_(0, index, spread.view(len(index), -1))
    return _columns(rows.view(geometry.pixels + 1, geometry.in_channels, batch)[:-1])


def _weight(slope: Tensor, inputs: Tensor, patches: Patches) -> Tensor:
    geometry = patches.geometry
    own, rows = _slopes(slope, geometry), _rows(inputs, geometry)
    outs, ins = geometry.out_channels, geometry.in_channels // geometry.groups
    found = slope.new_empty(geometry.positions, outs, geometry.taps, ins)
    kernels = _kernels(found, geometry)
    for stretch, taken in _gathered(rows, patches):
        torch.bmm(own[stretch].flatten(0, 1), taken.transpose(1, 2), out=kernels[stretch].flatten(0, 1))
    return found


def _plain(which: _Map, first: Tensor, second: Tensor, patches: Patches) -> Tensor:
    """Compute the same by operations that every transform sees through; all patches at once."""
    geometry, batch = patches.geometry, len(first)
    index = _index(patches.reads(first.device), geometry)
    if which == "inputs":
        own, kernels = _slopes(first, geometry).flatten(0, 1), _kernels(second, geometry).flatten(0, 1)
        spread = torch.bmm(kernels.transpose(1, 2), own).reshape(len(index), -1)
        rows = torch.zeros_like(spread[:1]).expand((geometry.pixels + 1) * geometry.groups, -1)
        rows = rows.index_add(0, index, spread)
        return _columns(rows.reshape(geometry.pixels + 1, geometry.in_channels, batch)[:-1])
    inputs = first if which == "outputs" else second
    taken = _rows(inputs, geometry).index_select(0, index).reshape(geometry.positions * geometry.groups, -1, batch)
    if which == "outputs":
        found = torch.bmm(_kernels(second, geometry).flatten(0, 1), taken)
        return _columns(found.reshape(geometry.positions, geometry.out_channels, batch))
    grown = torch.bmm(_slopes(first, geometry).flatten(0, 1), taken.transpose(1, 2))
    return grown.reshape(geometry.positions, geometry.out_channels, geometry.taps, -1)


def _rows(inputs: Tensor, geometry: Geometry) -> Tensor:
    """Lay inputs out as rows, one for each position and group, each (in / groups, batch); the last position is 0.

    The batch is the innermost dim, so that a patch is gathered in long rows. In two steps, as torch transposes
    matrices faster than tensors.
    """
    turned = inputs.reshape(len(inputs), -1).t().contiguous().view(geometry.in_channels, geometry.pixels, len(inputs))
    rows = torch.cat([turned.transpose(0, 1), torch.zeros_like(turned[:, :1]).transpose(0, 1)])
    return rows.reshape((geometry.pixels + 1) * geometry.groups, -1)


def _slopes(slope: Tensor, geometry: Geometry) -> Tensor:
    """Lay what has the form of outputs out as (positions, groups, out / groups, batch)."""
    turned = slope.reshape(len(slope), -1).t().contiguous().view(geometry.out_channels, geometry.positions, len(slope))
    return turned.transpose(0, 1).reshape(geometry.positions, geometry.groups, -1, len(slope))


def _columns(rows: Tensor) -> Tensor:
    """Turn (positions, channels, batch) into (batch, channels, positions)."""
    turned = rows.transpose(0, 1).reshape(-1, rows.shape[2])
    return turned.t().contiguous().view(rows.shape[2], rows.shape[1], rows.shape[0])


def _kernels(weight: Tensor, geometry: Geometry) -> Tensor:
    """View a weight as (positions, groups, out / groups, taps · in / groups)."""
    return weight.reshape(geometry.positions, geometry.groups, geometry.out_channels // geometry.groups, -1)


def _stretches(patches: Patches, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cut the positions so that the patches of one stretch take a few megabytes; give the rows that they read."""
    reads, geometry = patches.reads(rows.device), patches.geometry
    most = _AT_ONCE.get(rows.device.type, _AT_ONCE_ELSEWHERE)
    row = rows[0].numel() * rows.element_size()
    count = max(1, most // max(1, row * geometry.groups * geometry.taps))
    for start in range(0, geometry.positions, count):
        stretch = slice(start, min(start + count, geometry.positions))
        yield stretch, _index(reads[stretch], geometry)


def _gathered(rows: Tensor, patches: Patches) -> Iterator[tuple[slice, Tensor]]:
    """Gather patches: (positions · groups, taps · in / groups, batch); the memory is used again for the next."""
    geometry = patches.geometry
    batch = rows.shape[1] * geometry.groups // geometry.in_channels
    kept = None
    for stretch, index in _stretches(patches, rows):
        if kept is None:
            kept = rows.new_empty(len(index), rows.shape[1])
        taken = torch.index_select(rows, 0, index, out=kept[: len(index)])
        shape = ((stretch.stop - stretch.start) * geometry.groups, -1, batch)
        yield stretch, taken.view(shape[0], geometry.taps * (geometry.in_channels // geometry.groups), batch)


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


def _is_transformed() -> bool:
    """Say whether a transform of `torch.func` is at work, which sees through plain operations only."""
    is_active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(is_active is not None and is_active())
