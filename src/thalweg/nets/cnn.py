"""Small convolutional networks: convolution, activation and pooling, then fully connected layers."""

import math
from collections import OrderedDict
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from thalweg.errors import ConfigError
from thalweg.nets.activation import Activation, activation_module
from thalweg.nets.head import linear_head
from thalweg.nets.norm import Norm, norm_2d
from thalweg.nets.widths import checked_widths

_CONV2FC1_CHANNELS, _CONV2FC1_KERNEL = (32, 64), 5


class CNN(nn.Module):
    """Stages of 3×3 convolution [– BatchNorm] – activation – 2×2 max pooling, then linear layers.

    Args:
        channels: channels of each stage.
        hidden: widths of the hidden linear layers.
        in_channels: channels of the images.
        image_size: height and width of the images.
        num_classes: number of outputs.
        activation: after every layer but the last.
        norm: "batch" or "none", after every convolution.

    Raises:
        ConfigError: a width that is not positive, images too small for the stages, or an unknown name.

    Example:
        >>> import torch
        >>> net = CNN((4, 6), hidden=(10,), image_size=8)
        >>> tuple(net(torch.zeros(2, 1, 8, 8)).shape)
        (2, 10)
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32),
        hidden: Sequence[int] = (64,),
        *,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
        activation: Activation = "relu",
        norm: Norm = "none",
    ) -> None:
        super().__init__()
        channels = checked_widths("channels", channels, at_least=1)
        size = image_size // 2 ** len(channels)
        if size < 1:
            raise ConfigError(
                f"Expected images of at least {2 ** len(channels)} pixels for {len(channels)} stages. "
                f"Got image_size={image_size}. Use fewer stages or larger images."
            )
        stages: list[nn.Module] = []
        for old, new in zip((in_channels, *channels), channels, strict=False):
            stages += [nn.Conv2d(old, new, 3, padding=1, bias=norm == "none"), *norm_2d(norm, new)]
            stages += [activation_module(activation), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*stages)
        self.head = linear_head((channels[-1] * size * size, *hidden, num_classes), activation)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Compute the logits."""
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits


class LeNet(nn.Module):
    """LeNet-5 with explicit widths: 5×5 convolutions, average pooling, sigmoid-like activations.

    Args:
        channels: channels of the two convolutions.
        hidden: widths of the two hidden linear layers.
        in_channels: channels of the images.
        image_size: height and width of the images, at least 12.
        num_classes: number of outputs.
        activation: after every layer but the last.

    Raises:
        ConfigError: not two channels, a width that is not positive, images too small, or an unknown name.

    Example:
        >>> sum(p.numel() for p in LeNet().parameters())
        61706
    """

    def __init__(
        self,
        channels: Sequence[int] = (6, 16),
        hidden: Sequence[int] = (120, 84),
        *,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
        activation: Activation = "tanh",
    ) -> None:
        super().__init__()
        channels = checked_widths("channels", channels)
        if len(channels) != 2 or image_size < 12:
            raise ConfigError(
                "Expected two channels and images of at least 12 pixels. "
                f"Got channels={channels}, image_size={image_size}. Use CNN for other shapes."
            )
        first, second = channels
        size = (image_size // 2 - 4) // 2
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, first, 5, padding=2),
            activation_module(activation),
            nn.AvgPool2d(2),
            nn.Conv2d(first, second, 5),
            activation_module(activation),
            nn.AvgPool2d(2),
        )
        self.head = linear_head((second * size * size, *hidden, num_classes), activation)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Compute the logits."""
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits


def conv2fc1(
    width_multiplier: float = 1.0, *, image_size: int = 32, in_channels: int = 3, num_classes: int = 10
) -> nn.Sequential:
    """Build two stages of 5×5 convolution – ReLU – 3×3 max pooling of stride 2, then one linear layer.

    Weights of convolutions start from N(0, 2/(k²·out)), k the kernel's size, their biases from zero, and the linear
    layer as torch's. 32×32 images shrink to 15×15 and 7×7, so that 64·49 = 3,136 features enter the linear layer:
    85,066 parameters.

    Args:
        width_multiplier: factor on 32 and 64 channels, rounded, at least 1 channel.
        image_size: height and width of the images, at least 7.
        in_channels: channels of the images.
        num_classes: number of outputs.

    Returns:
        The net, drawn from torch's global generator like every layer of torch.

    Raises:
        ConfigError: images too small, or a width multiplier that is not positive.

    Source:
        The code of anokhin2020lowloss (arXiv 2008.00741), from the networks of garipov2018loss (arXiv
        1802.10026). Zero biases are those of the latter.

    Example:
        >>> sum(p.numel() for p in conv2fc1().parameters())
        85066
    """
    if not (math.isfinite(width_multiplier) and width_multiplier > 0):
        raise ConfigError(f"Expected a positive width_multiplier. Got {width_multiplier}. Choose one such as 0.5.")
    channels = [max(1, round(width * width_multiplier)) for width in _CONV2FC1_CHANNELS]
    stages: list[nn.Module] = []
    size = image_size
    for old, new in zip((in_channels, *channels), channels, strict=False):
        stages += [_convolution(old, new), nn.ReLU(), nn.MaxPool2d(3, 2)]
        size = (size - 3) // 2 + 1
    if size < 1:
        raise ConfigError(f"Expected images of at least 7 pixels. Got image_size={image_size}. Use larger images.")
    head = nn.Linear(channels[-1] * size * size, num_classes)
    return nn.Sequential(OrderedDict(features=nn.Sequential(*stages), flatten=nn.Flatten(), head=head))


def _convolution(old: int, new: int) -> nn.Conv2d:
    layer = nn.Conv2d(old, new, _CONV2FC1_KERNEL, padding=_CONV2FC1_KERNEL // 2)
    nn.init.normal_(layer.weight, std=math.sqrt(2.0 / (_CONV2FC1_KERNEL**2 * new)))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
