"""A view as a value: looking up, writing, reading, hand-written specs and their errors."""

import math

import pytest
import torch
from tests.zoo import CASES
from torch import nn

from thalweg.errors import StructureError
from thalweg.structure import View, trace, verified


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))


@pytest.mark.parametrize("name", ["mlp", "vgg", "encoder", "lstm", "gpt", "densenet"])
def test_a_view_survives_json(name: str) -> None:
    view = trace(CASES[name].build(), CASES[name].example())
    again = View.from_json(view.to_json())
    assert again.groups == view.groups
    assert dict(again.axes) == dict(view.axes)
    assert again.to_json() == view.to_json()


def test_an_unverified_view_says_so() -> None:
    view = trace(net(), torch.randn(3, 2), verify=False)
    assert math.isnan(view.error)
    assert math.isnan(View.from_json(view.to_json()).error)


def test_an_unknown_group_is_named() -> None:
    with pytest.raises(StructureError, match=r"Expected one of the groups 0\. Got 'nope'"):
        trace(net(), torch.randn(3, 2)).group("nope")


@pytest.mark.parametrize("text", ["", "[]", '{"groups": []}', '{"groups": [{"name": 1}], "axes": {}}'])
def test_text_that_is_no_view_is_refused(text: str) -> None:
    with pytest.raises(StructureError, match="Expected a view as `thalweg view --json` writes it"):
        View.from_json(text)


def test_a_spec_with_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(StructureError, match=r"Got \('9\.weight', 0\)"):
        View.of_spec(net(), {"hidden": [("9.weight", 0)]})


def test_a_spec_with_unequal_sizes_is_refused() -> None:
    with pytest.raises(StructureError, match=r"to have one size. Got sizes \[1, 4\]"):
        View.of_spec(net(), {"hidden": [("0.weight", 0), ("2.weight", 0)]})


def test_a_traced_view_equals_the_hand_written_spec() -> None:
    spec = {"0": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]}
    traced = trace(net(), torch.randn(3, 2))
    assert dict(View.of_spec(net(), spec).axes) == dict(traced.axes)
    assert verified(View.of_spec(net(), spec), net(), torch.randn(3, 2)).error <= 1e-12


def test_inputs_of_the_wrong_shape_are_refused_in_one_line() -> None:
    with pytest.raises(StructureError, match=r"runs on the example inputs \(3, 5\). Got RuntimeError") as caught:
        trace(net(), torch.randn(3, 5))
    assert "\n" not in str(caught.value)


def test_a_net_that_gives_nan_is_refused() -> None:
    with pytest.raises(StructureError, match="Expected finite outputs"):
        trace(net(), torch.full((3, 2), torch.nan))


def test_a_module_that_insists_on_float32_is_traced_in_float32() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(torch.tanh(self.one(x.float())))

    view = trace(Casting(), torch.randn(3, 2))
    assert [g.size for g in view.groups] == [4]
    assert view.error <= 1e-5


def test_half_precision_modules_are_traced_in_double() -> None:
    assert trace(net().half(), torch.randn(3, 2).half()).error <= 1e-12
