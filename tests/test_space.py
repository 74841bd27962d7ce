import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from thalweg.errors import ShapeError
from thalweg.space import Space


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@settings(max_examples=20, deadline=None)
@given(widths=st.lists(st.integers(1, 5), min_size=2, max_size=4), seed=st.integers(0, 100))
def test_writing_theta_and_reading_it_gives_theta(widths: list[int], seed: int) -> None:
    net = mlp(*widths)
    space = Space.of(net)
    theta = torch.randn(space.num_params, generator=torch.Generator().manual_seed(seed))
    space.write(theta, net)
    assert_close(space.theta(net), theta, rtol=0, atol=0)
    assert_close(space.theta(net.state_dict()), theta, rtol=0, atol=0)


@settings(max_examples=20, deadline=None)
@given(batch=st.lists(st.integers(1, 3), max_size=2))
def test_blocks_of_a_batch_are_the_blocks_of_each_theta(batch: list[int]) -> None:
    space = Space.of(mlp(2, 3, 1))
    thetas = torch.randn(*batch, space.num_params, generator=torch.Generator().manual_seed(0))
    together = space.parameters(thetas)
    flat = thetas.reshape(-1, space.num_params)
    for name, block in together.items():
        each = torch.stack([space.parameters(theta)[name] for theta in flat])
        assert_close(block.reshape(each.shape), each, rtol=0, atol=0)


def test_blocks_are_views_at_their_slices() -> None:
    space = Space.of(mlp(2, 3, 1))
    theta = torch.arange(float(space.num_params))
    for name, block in space.parameters(theta).items():
        assert_close(block.reshape(-1), theta[space.slice_of(name)])
        assert block.untyped_storage().data_ptr() == theta.untyped_storage().data_ptr()


def test_theta_is_a_copy() -> None:
    net = mlp(2, 1)
    space = Space.of(net)
    space.theta(net).zero_()
    assert float(space.theta(net).abs().sum()) > 0


def test_a_single_parameter_is_copied_too() -> None:
    net = nn.Linear(2, 1, bias=False)
    space = Space.of(net)
    space.theta(net).zero_()
    assert float(net.weight.detach().abs().sum()) > 0


def test_a_tied_parameter_stands_once_and_a_frozen_one_never() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    net[1].bias.requires_grad_(False)
    assert Space.of(net).names == ("0.weight",)


def test_buffers_are_no_coordinates() -> None:
    assert Space.of(nn.BatchNorm1d(2)).names == ("weight", "bias")


def test_no_trainable_parameter_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"Expected a module with trainable parameters. Got Tanh with none"):
        Space.of(nn.Tanh())


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"Expected one of weight, bias. Got 'gain'"):
        Space.of(nn.Linear(1, 1)).slice_of("gain")


def test_a_missing_name_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"Expected a parameter 'bias'. Got 1 others"):
        Space.of(nn.Linear(1, 1)).theta({"weight": torch.ones(1, 1)})


def test_a_parameter_of_another_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"Expected 'weight' of shape \(1, 1\). Got \(1, 2\)"):
        Space.of(nn.Linear(1, 1)).theta(nn.Linear(2, 1))


def test_a_theta_of_another_length_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"Expected theta with 2 parameters on its last axis. Got shape \(3,\)"):
        Space.of(nn.Linear(1, 1)).parameters(torch.zeros(3))


def test_a_module_that_does_not_fit_is_refused_and_left_as_it_was() -> None:
    other = nn.Sequential(nn.Linear(1, 2), nn.Linear(3, 1))
    space = Space.of(nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1)))
    before = Space.of(other).theta(other)
    with pytest.raises(ShapeError, match=r"Expected a module with '1.weight' of shape \(1, 2\)"):
        space.write(torch.zeros(space.num_params), other)
    assert_close(Space.of(other).theta(other), before, rtol=0, atol=0)
