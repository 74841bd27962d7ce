"""The geometry of one convolution on inputs of one size: which output reads which input through which tap."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from torch import Tensor

from thalweg.errors import ShapeError


@dataclass(frozen=True)
class Geometry:
    """A convolution and the size of what it is applied to.

    Per spatial dim, output y reads input y·stride + i·dilation - before through tap i of the kernel, if that lies
    in [0, size).

    Args:
        in_channels: channels that go in.
        out_channels: channels that come out.
        input_size: spatial size of the inputs, without padding.
        kernel_size: taps of each spatial dim.
        stride: step of each.
        padding: zeros before and after each.
        dilation: distance of the taps of each.
        groups: blocks of channels that do not read each other.

    Raises:
        ShapeError: sizes that are not positive, channels that the groups do not divide, or a kernel that is larger
            than the padded input.

    Example:
        >>> geometry = Geometry(3, 8, (5, 7), (3, 3), (2, 2), ((1, 1), (1, 1)))
        >>> geometry.output_size, geometry.local_entries, geometry.dense_entries
        ((3, 4), 1680, 10080)
    """

    in_channels: int
    out_channels: int
    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "dilation", self.dilation or (1,) * len(self.input_size))
        parts = (self.input_size, self.kernel_size, self.stride, self.padding, self.dilation)
        counts = (self.in_channels, self.out_channels, self.groups, *self.input_size, *self.kernel_size)
        counts += (*self.stride, *self.dilation, len(self.input_size))
        is_split = self.groups > 0 and not (self.in_channels % self.groups or self.out_channels % self.groups)
        if len({len(p) for p in parts}) != 1 or min(counts) < 1 or not is_split or min(self.output_size) < 1:
            raise ShapeError(
                f"Expected positive sizes, groups that divide the channels, and a kernel that fits the input. Got "
                f"{self}. Mend the layer or the size of its inputs."
            )

    @property
    def output_size(self) -> tuple[int, ...]:
        """Spatial size of the outputs."""
        rows = zip(self.input_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + sum(pad) - d * (k - 1) - 1) // s + 1 for n, k, s, pad, d in rows)

    @property
    def positions(self) -> int:
        """Number of output positions of a channel."""
        return math.prod(self.output_size)

    @property
    def pixels(self) -> int:
        """Number of input positions of a channel."""
        return math.prod(self.input_size)

    @property
    def taps(self) -> int:
        """Number of taps of a kernel."""
        return math.prod(self.kernel_size)

    @property
    def channel_pairs(self) -> int:
        """Number of pairs of an output and an input channel that a kernel joins."""
        return self.out_channels * self.in_channels // self.groups

    @property
    def dense_entries(self) -> int:
        """Number of weights of the dense form."""
        return self.out_channels * self.positions * self.in_channels * self.pixels

    @property
    def local_entries(self) -> int:
        """Number of weights that read an input pixel through a tap: those that locality leaves."""
        return self.channel_pairs * sum(box.count for box in self.boxes())

    def padded(self) -> "Geometry":
        """Give the same convolution on inputs that are padded already."""
        size = tuple(n + sum(pad) for n, pad in zip(self.input_size, self.padding, strict=True))
        return replace(self, input_size=size, padding=((0, 0),) * len(size))

    def boxes(self) -> "Iterator[Box]":
        """List the taps, in the order of the kernel's memory; those that read nothing but padding included."""
        for number, tap in enumerate(product(*(range(k) for k in self.kernel_size))):
            starts, sizes = [], []
            for place, i in enumerate(tap):
                before, stride = self.padding[place][0], self.stride[place]
                offset = i * self.dilation[place] - before
                first = max(0, -(offset // stride))  # least y with y·stride + offset >= 0
                last = min((self.input_size[place] - 1 - offset) // stride, self.output_size[place] - 1)
                starts.append(first)
                sizes.append(max(0, last - first + 1))
            pixel = [
                start * s + i * d - pad[0]
                for start, s, i, d, pad in zip(starts, self.stride, tap, self.dilation, self.padding, strict=True)
            ]
            yield Box(number, tuple(starts), tuple(pixel), tuple(sizes))


@dataclass(frozen=True)
class Box:
    """The outputs that read the input through one tap: a box of positions.

    Args:
        tap: number of the tap.
        position: the first output position.
        pixel: the input position that it reads.
        size: number of output positions along each spatial dim; an empty box has a 0.
    """

    tap: int
    position: tuple[int, ...]
    pixel: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of positions."""
        return math.prod(self.size)


def dense_ties(geometry: Geometry, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """View, tap by tap, the entries of a dense weight that one entry of the kernel was copied to.

    Within a box, row and column of the entry move by fixed steps, so that each view is strided: nothing is copied.

    Args:
        geometry: of the convolution.
        weight: of shape (out_channels · positions, in_channels · pixels), contiguous: rows and columns are channels,
            then positions.

    Yields:
        number of the tap, view of shape (groups, out / groups, in / groups, *box).
    """
    row, outs = geometry.in_channels * geometry.pixels, geometry.out_channels // geometry.groups
    ins = geometry.in_channels // geometry.groups
    row_steps = [row * step for step in _steps(geometry.output_size)]
    column_steps = _steps(geometry.input_size)
    channel_strides = (
        outs * geometry.positions * row + ins * geometry.pixels,
        geometry.positions * row,
        geometry.pixels,
    )
    for box in geometry.boxes():
        offset = sum(p * r for p, r in zip(box.position, row_steps, strict=True))
        offset += sum(p * c for p, c in zip(box.pixel, column_steps, strict=True))
        along = [r + s * c for r, s, c in zip(row_steps, geometry.stride, column_steps, strict=True)]
        yield box.tap, _view(weight, geometry, box, channel_strides, along, offset)


def local_ties(geometry: Geometry, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """View, tap by tap, the entries of a locally-connected weight that one entry of the kernel was copied to.

    Args:
        geometry: of the convolution.
        weight: of shape (*output size, out_channels, *kernel, in / groups), contiguous.

    Yields:
        number of the tap, view of shape (groups, out / groups, in / groups, *box).
    """
    outs, ins, taps = geometry.out_channels, geometry.in_channels // geometry.groups, geometry.taps
    along = [outs * ins * taps * step for step in _steps(geometry.output_size)]
    channel_strides = (outs // geometry.groups * ins * taps, ins * taps, 1)
    for box in geometry.boxes():
        offset = box.tap * ins + sum(p * a for p, a in zip(box.position, along, strict=True))
        yield box.tap, _view(weight, geometry, box, channel_strides, along, offset)


def _view(
    weight: Tensor, geometry: Geometry, box: Box, channels: tuple[int, ...], along: list[int], offset: int
) -> Tensor:
    shape = (geometry.groups, geometry.out_channels // geometry.groups, geometry.in_channels // geometry.groups)
    start = offset if box.count else 0
    return weight.as_strided((*shape, *box.size), (*channels, *along), weight.storage_offset() + start)


def _steps(sizes: tuple[int, ...]) -> list[int]:
    """Give the distance in memory of neighbours along each dim."""
    return [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
