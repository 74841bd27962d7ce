"""Synthetic data follow their formula."""

import math

import pytest
import torch
from torch.testing import assert_close

from thalweg.data import gaussian, three_tanh
from thalweg.errors import DataError


def test_three_tanh_is_its_formula_point_by_point() -> None:
    data = three_tanh()
    for k, (x, y) in enumerate(zip(data.inputs[:, 0].tolist(), data.targets[:, 0].tolist(), strict=True)):
        assert x == pytest.approx(-15 + 30 * k / 49, abs=1e-13)
        assert y == pytest.approx(math.tanh(x - 7) + math.tanh(x) + math.tanh(x + 7), abs=1e-14)
    assert len(data) == 50


def test_three_tanh_has_the_loss_at_zero_that_the_paper_plots() -> None:
    assert three_tanh().targets.square().mean().item() == pytest.approx(5.1453, abs=5e-5)


def test_single_precision_is_the_rounded_double() -> None:
    assert_close(three_tanh(dtype=torch.float32).targets, three_tanh().targets.float(), rtol=0, atol=0)


def test_gaussian_inputs_have_the_asked_spread_and_come_from_the_generator() -> None:
    first = gaussian(4000, 20, torch.Generator().manual_seed(0), std=10.0)
    again = gaussian(4000, 20, torch.Generator().manual_seed(0), std=10.0)
    assert_close(first, again, rtol=0, atol=0)
    assert first.std().item() == pytest.approx(10.0, rel=0.01)
    assert abs(first.mean().item()) < 0.15


def test_no_points_are_refused() -> None:
    with pytest.raises(DataError, match="Expected at least one point"):
        three_tanh(0)
    with pytest.raises(DataError, match="Expected at least one sample"):
        gaussian(0, 3, torch.Generator())
