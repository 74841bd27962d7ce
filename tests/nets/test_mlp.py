"""Fully connected nets compute their formula."""

import pytest
import torch
from torch.testing import assert_close

from thalweg.errors import ConfigError
from thalweg.nets import MLP, activation_module, gaussian_init_, two_layer


def test_the_output_is_the_nested_formula() -> None:
    net = MLP((2, 5, 4, 3), "tanh").double()
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = x
    first, second, third = net.layers
    h = torch.tanh(h @ first.weight.T + first.bias)
    h = torch.tanh(h @ second.weight.T + second.bias)
    assert_close(net(x), h @ third.weight.T + third.bias, rtol=1e-12, atol=1e-14)


def test_a_two_layer_net_is_a_sum_over_its_neurons() -> None:
    net = gaussian_init_(two_layer(3), 1.0, torch.Generator().manual_seed(1)).double()
    w, b, a = (p.detach() for p in net.parameters())
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)
    expected = sum(a[0, k] * torch.tanh(w[k, 0] * x + b[k]) for k in range(3))
    assert_close(net(x.unsqueeze(1)).squeeze(1), expected, rtol=1e-12, atol=1e-14)


def test_images_are_flattened() -> None:
    assert MLP((12, 4, 2))(torch.zeros(5, 3, 2, 2)).shape == (5, 2)


def test_biases_can_be_left_out_together_or_apart() -> None:
    names = [name for name, _ in MLP((2, 3, 3, 1), bias=False, output_bias=True).named_parameters()]
    assert names == ["layers.0.weight", "layers.1.weight", "layers.2.weight", "layers.2.bias"]


@pytest.mark.parametrize("widths", [(3,), (), (3, 0, 1), (3, -2, 1), (3, 2.0, 1), (3, True, 1)])
def test_wrong_widths_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"Expected widths as positive whole numbers, at least 2"):
        MLP(widths)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Expected an activation out of tanh, relu.*Got 'tahn'"):
        activation_module("tahn")
