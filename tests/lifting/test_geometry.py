"""Geometry: which output reads which input, held against convolutions of unit vectors."""

import pytest
import torch
from torch import nn

from thalweg.errors import ShapeError
from thalweg.lifting.geometry import Geometry, dense_ties, local_ties

GEOMETRIES = (
    Geometry(2, 3, (5,), (3,), (2,), ((1, 1),)),
    Geometry(2, 4, (5, 7), (3, 2), (2, 1), ((1, 1), (2, 2)), (1, 2), 2),
    Geometry(1, 2, (2, 2), (5, 5), (1, 1), ((2, 2), (2, 2))),
    Geometry(2, 2, (3, 4, 3), (2, 2, 3), (1, 2, 1), ((0, 0), (1, 1), (1, 1)), (2, 1, 1)),
    Geometry(1, 1, (1, 3), (3, 1), (3, 2), ((3, 3), (0, 0))),
)


def _convolved(geometry: Geometry, kernel: torch.Tensor) -> torch.Tensor:
    """The dense matrix, row by row of the inputs' unit vectors."""
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(geometry.input_size) - 1]
    count = geometry.in_channels * geometry.pixels
    units = torch.eye(count, dtype=torch.float64).reshape(count, geometry.in_channels, *geometry.input_size)
    padding = tuple(before for before, _ in geometry.padding)
    outputs = convolve(
        units, kernel, stride=geometry.stride, padding=padding, dilation=geometry.dilation, groups=geometry.groups
    )
    return outputs.flatten(1).t()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=range(len(GEOMETRIES)))
def test_dense_ties_are_where_unit_vectors_say(geometry: Geometry) -> None:
    shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel_size)
    kernel = torch.arange(1.0, 1 + geometry.channel_pairs * geometry.taps, dtype=torch.float64).reshape(shape)
    rows, columns = geometry.out_channels * geometry.positions, geometry.in_channels * geometry.pixels
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    taps = kernel.reshape(geometry.groups, geometry.out_channels // geometry.groups, -1, geometry.taps)
    for tap, view in dense_ties(geometry, weight):
        view.copy_(taps[..., tap].reshape(*taps.shape[:3], *[1] * len(geometry.input_size)))
    torch.testing.assert_close(weight, _convolved(geometry, kernel), rtol=0, atol=0)
    assert int(weight.count_nonzero()) == geometry.local_entries
    assert weight.numel() == geometry.dense_entries


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=range(len(GEOMETRIES)))
def test_local_ties_are_disjoint_and_leave_out_padding(geometry: Geometry) -> None:
    ins = geometry.in_channels // geometry.groups
    weight = torch.zeros(*geometry.output_size, geometry.out_channels, *geometry.kernel_size, ins)
    for _, view in local_ties(geometry, weight):
        view.add_(1)
    assert int(weight.max()) == 1
    assert int(weight.sum()) == geometry.local_entries


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": 3},
        {"groups": 0},
        {"in_channels": 0, "groups": 1},
        {"input_size": (0, 4)},
        {"kernel_size": (6, 6)},
        {"stride": (0, 1)},
        {"dilation": (1,)},
        {"input_size": (), "kernel_size": (), "stride": (), "padding": ()},
    ],
    ids=str,
)
def test_what_is_no_convolution_is_refused(changes: dict) -> None:
    options = {"in_channels": 2, "out_channels": 4, "input_size": (4, 4), "kernel_size": (3, 3), "stride": (1, 1)}
    with pytest.raises(ShapeError, match="Expected positive sizes"):
        Geometry(**{**options, "padding": ((0, 0), (0, 0)), **changes})
