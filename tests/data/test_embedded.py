"""The bundled data are what they are known to be."""

import pytest
import torch
from torch.testing import assert_close

from thalweg.data import diabetes, digits, iris


def test_iris_has_its_known_first_flower_and_classes() -> None:
    data = iris(standardize=False)
    assert data.inputs[0].tolist() == [5.1, 3.5, 1.4, 0.2]
    assert torch.bincount(data.targets).tolist() == [50, 50, 50]
    assert "centimetres" in data.source


def test_iris_is_standardised_by_default() -> None:
    inputs = iris().inputs
    assert_close(inputs.mean(dim=0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(inputs.square().mean(dim=0), torch.ones(4, dtype=torch.float64))


def test_digits_lie_between_zero_and_one() -> None:
    data = digits()
    assert data.inputs.shape == (1797, 1, 8, 8)
    assert (data.inputs.min().item(), data.inputs.max().item()) == (0.0, 1.0)
    assert data.targets[:10].tolist() == list(range(10))
    assert data.num_classes == 10


@pytest.mark.parametrize("load", [iris, digits])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_the_one_asked_for(load, dtype: torch.dtype) -> None:
    data = load(dtype=dtype)
    assert data.inputs.dtype == dtype
    assert data.targets.dtype == torch.int64


def test_diabetes_is_standardised() -> None:
    data = diabetes()
    assert data.inputs.shape == (442, 10)
    assert data.targets.shape == (442, 1)
    for columns in (data.inputs, data.targets):
        torch.testing.assert_close(columns.mean(dim=0), torch.zeros(columns.shape[1], dtype=torch.float64))
        torch.testing.assert_close(
            columns.var(dim=0, correction=0), torch.ones(columns.shape[1], dtype=torch.float64)
        )
