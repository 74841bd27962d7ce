"""Which units may change their sign is measured, not read off the module."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from thalweg.structure import View, flip, odd_groups, trace

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def net(activation: nn.Module, width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), activation, nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 2)).double()


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (nn.Tanh(), ("0", "2")),
        (nn.Softsign(), ("0", "2")),
        (nn.Identity(), ("0", "2")),
        (nn.Hardtanh(), ("0", "2")),
        (nn.ReLU(), ("2",)),
        (nn.GELU(), ("2",)),
        (nn.Sigmoid(), ("2",)),
    ],
)
def test_odd_activations_are_told_from_others(activation: nn.Module, expected: tuple[str, ...]) -> None:
    module = net(activation)
    assert odd_groups(trace(module, X), module, X) == expected


def test_a_zero_head_hides_nothing() -> None:
    module = net(nn.ReLU())
    nn.init.zeros_(module[4].weight)
    assert odd_groups(trace(module, X), module, X) == ("2",)


def test_the_only_unit_of_a_layer_is_found_odd() -> None:
    module = net(nn.Tanh(), width=1)
    assert "0" in odd_groups(trace(module, X), module, X)


def test_normalised_units_are_not_found() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    assert odd_groups(trace(module, X), module, X) == ()


@settings(max_examples=10)
@given(seed=st.integers(0, 999))
def test_flipping_keeps_the_function_and_undoes_itself(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module = net(nn.Tanh())
    view = trace(module, X)
    state = {n: p.detach() for n, p in module.named_parameters()}
    signs = {g.name: np.where(torch.rand(g.size, generator=generator).numpy() < 0.5, -1.0, 1.0) for g in view.groups}
    flipped = flip(view, state, signs)
    torch.testing.assert_close(torch.func.functional_call(module, flipped, X), module(X), rtol=1e-13, atol=1e-14)
    for name, value in flip(view, flipped, signs).items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_what_no_sign_touches_is_the_same_object() -> None:
    module = net(nn.Tanh())
    view = trace(module, X)
    state = dict(module.named_parameters())
    flipped = flip(view, state, {"0": np.array([1.0, -1.0, 1.0, 1.0])})
    assert flipped["4.weight"] is state["4.weight"]
    assert flipped["0.weight"] is not state["0.weight"]
    assert isinstance(view, View)
