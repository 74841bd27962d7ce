"""The networks of lab 2: published sizes, maps at every image size, and what scales them."""

import pytest
import torch
from torch import nn

from thalweg.errors import ConfigError
from thalweg.nets import alexnet, vanilla_cnn


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def maps(net: nn.Sequential, image_size: int, kinds: type | tuple[type, ...]) -> list[int]:
    """Heights of what layers of some kinds give."""
    found, images = [], torch.zeros(1, 3, image_size, image_size)
    for layer in net:
        images = layer(images)
        if isinstance(layer, kinds):
            found.append(images.shape[-1])
    return found


def test_vanilla_cnn_is_the_published_net() -> None:
    net = vanilla_cnn()
    assert [name for name, _ in net.named_children()] == [
        *("conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "conv3", "relu3", "pool3", "flatten", "head"),
    ]
    assert maps(net, 32, (nn.Conv2d, nn.MaxPool2d)) == [17, 8, 8, 3, 3, 1]
    shapes = [(64, 3, 4, 4), (64,), (64, 64, 5, 5), (64,), (64, 64, 3, 3), (64,), (10, 64), (10,)]
    assert [tuple(p.shape) for p in net.parameters()] == shapes
    assert count(net) == 143_178


def test_alexnet_is_the_published_net() -> None:
    net = alexnet().eval()
    assert maps(net, 32, (nn.Conv2d, nn.MaxPool2d)) == [17, 8, 8, 3, 3, 3, 3, 1]
    convolutions = [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in net if isinstance(m, nn.Conv2d)]
    assert convolutions == [(3, 64, 4), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3)]
    linears = [(m.in_features, m.out_features) for m in net if isinstance(m, nn.Linear)]
    assert linears == [(256, 512), (512, 512), (512, 100)]
    kinds = [type(m).__name__ for m in net]
    assert kinds[-8:] == ["Flatten", "Dropout", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Linear"]
    assert count(net) == 2_895_076


def test_every_image_size_is_taken() -> None:
    for image_size in range(1, 65):
        images = torch.zeros(2, 1, image_size, image_size)
        cnn = vanilla_cnn(2, image_size=image_size, in_channels=1, num_classes=3)
        assert cnn(images).shape == (2, 3)
        deep = alexnet(1 / 64, image_size=image_size, in_channels=1, num_classes=4).eval()
        assert deep(images).shape == (2, 4)
        for net in (cnn, deep):
            pools = sum(isinstance(layer, nn.MaxPool2d) for layer in net)
            assert pools == sum(image_size >= least for least in (4, 12, 28)), image_size


def test_the_smaller_variant_has_as_many_parameters() -> None:
    net = vanilla_cnn(image_size=16)
    assert maps(net, 16, (nn.Conv2d, nn.MaxPool2d)) == [9, 4, 4, 1, 1]
    assert count(net) == count(vanilla_cnn()) == 143_178


def test_widths_scale_together_and_dropout_is_a_share() -> None:
    half = alexnet(0.5, dropout=0.25)
    assert [m.out_channels for m in half if isinstance(m, nn.Conv2d)] == [32, 96, 192, 128, 128]
    assert [m.out_features for m in half if isinstance(m, nn.Linear)] == [256, 256, 100]
    assert [m.p for m in half if isinstance(m, nn.Dropout)] == [0.25, 0.25]
    assert vanilla_cnn(5).head.in_features == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vanilla_cnn(image_size=0), "Expected images of at least one pixel. Got image_size=0"),
        (lambda: vanilla_cnn(0), "Expected widths as positive whole numbers"),
        (lambda: alexnet(image_size=-3), "Expected images of at least one pixel. Got image_size=-3"),
        (lambda: alexnet(0.0), "Expected a positive width_multiplier. Got 0.0"),
        (lambda: alexnet(dropout=1.5), "Expected a dropout between 0 and 1. Got 1.5"),
        (lambda: alexnet(num_classes=0), "Expected in_channels and num_classes as positive whole numbers"),
    ],
)
def test_wrong_arguments_are_refused_by_name(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
