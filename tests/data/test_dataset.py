"""A data set keeps its samples and targets together."""

import pytest
import torch
from torch.testing import assert_close

from thalweg.data import Dataset, digits, iris, three_tanh
from thalweg.errors import DataError


def test_selecting_keeps_samples_and_targets_together() -> None:
    data = digits()
    assert_close(data.select(3).inputs, data.inputs[:3])
    picked = data.select([5, 2])
    assert_close(picked.inputs, data.inputs[[5, 2]])
    assert_close(picked.targets, data.targets[[5, 2]])
    assert picked.name == "digits"


@pytest.mark.parametrize("number", [0, -1, 151])
def test_too_many_or_no_samples_are_refused(number: int) -> None:
    with pytest.raises(DataError, match="Expected between 1 and 150 samples of iris"):
        iris().select(number)


def test_one_hot_targets_name_the_class_in_the_dtype_of_the_inputs() -> None:
    data = iris(dtype=torch.float32)
    vectors = data.one_hot().targets
    assert vectors.dtype == torch.float32
    assert_close(vectors.argmax(dim=1), data.targets)
    assert_close(vectors.sum(dim=1), torch.ones(150))


def test_a_regression_has_no_one_hot_targets() -> None:
    with pytest.raises(DataError, match="Got three_tanh, a regression"):
        three_tanh().one_hot()


@pytest.mark.parametrize(("inputs", "targets"), [(0, 0), (3, 2)])
def test_inputs_and_targets_must_match(inputs: int, targets: int) -> None:
    with pytest.raises(DataError, match=f"Got {inputs} and {targets} in toy"):
        Dataset(torch.zeros(inputs, 1), torch.zeros(targets), None, "toy", "made here")
