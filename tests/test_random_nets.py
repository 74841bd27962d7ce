"""Random networks are reproducible, connected and of many kinds."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.random_nets import RandomNet, random_net


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(0, 2**31))
def test_a_seed_gives_one_finite_network(seed: int) -> None:
    (module, inputs), (twin, twin_inputs) = random_net(seed), random_net(seed)
    outputs = module(*inputs)
    assert torch.isfinite(outputs).all()
    assert_close(outputs, twin(*twin_inputs), rtol=0, atol=0)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(0, 2**31))
def test_every_parameter_reaches_the_output(seed: int) -> None:
    module, inputs = random_net(seed)
    slopes = torch.autograd.grad(
        module.double()(inputs[0].double()).square().sum(), list(module.parameters()), allow_unused=True
    )
    assert all(slope is not None for slope in slopes)


def test_a_hundred_seeds_show_every_kind_of_node() -> None:
    nets = [random_net(seed)[0] for seed in range(100)]
    kinds = {node.kind for net in nets if isinstance(net, RandomNet) for node in net.nodes}
    layers = {type(m).__name__ for net in nets for m in net.modules()}
    assert kinds >= {"add", "mul", "cat", "pool", "tanh", "relu", "gelu", "sigmoid"}
    assert layers >= {"Linear", "Conv2d", "BatchNorm1d", "BatchNorm2d", "LayerNorm", "GroupNorm"}
