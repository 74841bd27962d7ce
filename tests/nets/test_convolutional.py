"""Convolutional nets: sizes, published counts of parameters, and what the widths mean."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from thalweg.errors import ConfigError
from thalweg.nets import CNN, VGG, LeNet, ResNet, conv2fc1, resnet20, vgg16
from thalweg.nets.norm import norm_2d
from thalweg.nets.resnet import ResidualBlock


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_vgg16_has_the_published_layers() -> None:
    net = vgg16(dropout=0.5)
    convolutions = [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]
    linears = [(m.in_features, m.out_features) for m in net.modules() if isinstance(m, nn.Linear)]
    assert convolutions == [64, 64, 128, 128, 256, 256, 256] + [512] * 6
    assert linears == [(512, 512), (512, 10)]
    assert count(net) == 14_982_474


def test_vgg_norm_replaces_the_biases_of_the_convolutions() -> None:
    net = VGG(((4,), (6,)), hidden=(), image_size=8, norm="batch")
    assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 2
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_lenet_is_the_published_net() -> None:
    assert LeNet()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert LeNet(image_size=32, in_channels=3)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert count(LeNet()) == 61_706


def test_a_cnn_computes_its_stages_in_order() -> None:
    net = CNN((3, 5), hidden=(7,), image_size=12, norm="batch").eval()
    names = [type(m).__name__ for m in net.features]
    assert names == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"] * 2
    assert net.head[0].in_features == 5 * 3 * 3
    assert net(torch.zeros(2, 1, 12, 12)).shape == (2, 10)


def test_resnet20_has_the_published_size_with_projections() -> None:
    published_without_shortcuts = 269_722
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert count(resnet20()) == published_without_shortcuts + projections


def test_a_residual_block_adds_its_two_branches() -> None:
    block = ResidualBlock(2, 5, 3, stride=2, projection=True).eval()
    x = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    assert_close(block(x), torch.relu(block.residual(x) + block.shortcut(x)))
    assert_close(ResidualBlock(2, 4, 2).shortcut(x), x)


def test_every_width_of_a_resnet_can_grow_alone() -> None:
    base = {"stem": 4, "channels": (4, 6), "hidden": ((5, 3), (7,)), "projections": (False, True)}
    for change in (
        {"hidden": ((8, 3), (7,))},
        {"hidden": ((5, 4), (7,))},
        {"channels": (4, 9)},
        {"stem": 5, "channels": (5, 6)},
    ):
        wide = ResNet(**(base | change))
        assert list(wide.state_dict()) == list(ResNet(**base).state_dict())
        assert wide(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_a_forced_projection_survives_equal_widths() -> None:
    narrow = ResNet(stem=4, channels=(6,), hidden=((5,),))
    wide = ResNet(stem=8, channels=(8,), hidden=((5,),), projections=(True,))
    assert list(wide.state_dict()) == list(narrow.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CNN((2, 2, 2, 2), image_size=8), "Expected images of at least 16 pixels for 4 stages"),
        (lambda: VGG(image_size=16), "Expected images of at least 32 pixels for 5 stages"),
        (lambda: conv2fc1(image_size=6), "Expected images of at least 7 pixels. Got image_size=6"),
        (lambda: conv2fc1(0.0), "Expected a positive width_multiplier. Got 0.0"),
        (lambda: VGG(()), "Expected images of at least 1 pixels for 0 stages"),
        (lambda: LeNet((1, 2, 3)), "Expected two channels and images of at least 12 pixels"),
        (lambda: CNN((3, 0)), "Expected channels as positive whole numbers"),
        (lambda: norm_2d("layer", 3), "Expected a norm out of batch, none. Got 'layer'"),
        (lambda: ResNet(channels=(4, 5)), "with one entry per stage. Got 2, 3 and 2"),
        (lambda: ResNet(projections=(False, False, True)), "Expected a projection between 16 and 32"),
        (lambda: ResidualBlock(2, 2, 3), "Expected a projection between 2 and 3 channels at stride 1"),
    ],
)
def test_wrong_arguments_are_refused_by_name(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_conv2fc1_is_the_published_net() -> None:
    net = conv2fc1()
    assert [tuple(p.shape) for p in net.parameters()] == [
        *((32, 3, 5, 5), (32,)),
        *((64, 32, 5, 5), (64,)),
        *((10, 64 * 49), (10,)),
    ]
    assert count(net) == 85_066
    sizes = [net.features[: n + 1](torch.zeros(1, 3, 32, 32)).shape[-1] for n in range(6)]
    assert sizes == [32, 32, 15, 15, 15, 7]
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_conv2fc1_starts_as_its_source_does() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        net = conv2fc1()
    second = net.features[3]
    # the standard error of a standard deviation of n normal numbers is 1/sqrt(2n) of it
    expected = (2 / (25 * 64)) ** 0.5
    assert float(second.weight.detach().std()) == pytest.approx(expected, rel=5 / (2 * second.weight.numel()) ** 0.5)
    assert not second.bias.any()


def test_conv2fc1_takes_other_sizes() -> None:
    net = conv2fc1(0.25, image_size=28, in_channels=1, num_classes=3)
    assert net.features[3].out_channels == 16
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 3)
    assert conv2fc1(1 / 64, image_size=7)(torch.zeros(1, 3, 7, 7)).shape == (1, 10)
