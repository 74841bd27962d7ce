"""AlexNet for 32×32 images: five convolutions and three linear layers, all widths scaled together."""

import math
from collections import OrderedDict

from torch import nn

from thalweg.errors import ConfigError
from thalweg.nets.vanilla_cnn import Stage, stacked
from thalweg.nets.widths import checked_widths

_HIDDEN = 512


def alexnet(
    width_multiplier: float = 1.0,
    *,
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 100,
    dropout: float = 0.5,
) -> nn.Sequential:
    """Build AlexNet for small images: 64-192-384-256-256 channels, then linear layers 512-512-classes.

    A ReLU follows every layer but the last, a 3×3 max pooling of stride 2 the first, second and fifth convolution.
    32×32 images shrink to 17×17, 8×8, 3×3 and a single pixel. A pooling that would leave less than a pixel is left
    out: the last one below 28 pixels, the second below 12, the first below 4.

    Args:
        width_multiplier: factor on every width, rounded, at least 1 channel.
        image_size: height and width of the images.
        in_channels: channels of the images.
        num_classes: number of outputs. Default: CIFAR-100, as the paper.
        dropout: share of the inputs of the two hidden linear layers that training drops. Default: torch's `Dropout`.

    Returns:
        The net, in torch's default initialisation, drawn from torch's global generator like every layer of torch.

    Raises:
        ConfigError: images without a pixel, a width or width multiplier that is not positive, or a dropout outside
            of [0, 1].

    Source:
        dascoli2019finding (arXiv 1906.06766), from its code, where the padding is a layer of its own. Leaving out
        poolings is ours: the code takes no images below 28 pixels.

    Example:
        >>> sum(p.numel() for p in alexnet().parameters())
        2895076
    """
    if not (math.isfinite(width_multiplier) and width_multiplier > 0):
        raise ConfigError(f"Expected a positive width_multiplier. Got {width_multiplier}. Choose one such as 0.5.")
    if not 0 <= dropout <= 1:
        raise ConfigError(f"Expected a dropout between 0 and 1. Got {dropout}. Choose one such as 0.5.")
    in_channels, num_classes = checked_widths("in_channels and num_classes", (in_channels, num_classes))

    def scaled(width: int) -> int:
        return max(1, round(width * width_multiplier))

    stages = (
        Stage(scaled(64), 4, 2, 2, True),
        Stage(scaled(192), 5, 1, 2, True),
        Stage(scaled(384), 3, 1, 1, False),
        Stage(scaled(256), 3, 1, 1, False),
        Stage(scaled(256), 3, 1, 1, True),
    )
    layers, features = stacked(stages, in_channels, image_size)
    hidden = scaled(_HIDDEN)
    head: OrderedDict[str, nn.Module] = OrderedDict(
        flatten=nn.Flatten(),
        dropout6=nn.Dropout(dropout),
        linear6=nn.Linear(features, hidden),
        relu6=nn.ReLU(),
        dropout7=nn.Dropout(dropout),
        linear7=nn.Linear(hidden, hidden),
        relu7=nn.ReLU(),
        head=nn.Linear(hidden, num_classes),
    )
    return nn.Sequential(OrderedDict(**layers, **head))
