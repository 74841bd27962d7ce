"""VanillaCNN: three convolutions and one linear layer, whose fully connected version can be trained."""

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from thalweg.errors import ConfigError
from thalweg.nets.widths import checked_widths

_POOLED, _POOL_STRIDE = 3, 2


@dataclass(frozen=True)
class Stage:
    """One convolution with its ReLU, and a 3×3 max pooling of stride 2 after it or none.

    Args:
        channels: that it gives.
        kernel: height and width of the filters.
        stride: of the filters.
        padding: zeros on every side.
        pooled: whether a pooling follows.
    """

    channels: int
    kernel: int
    stride: int
    padding: int
    pooled: bool


def vanilla_cnn(
    width: int = 64, *, image_size: int = 32, in_channels: int = 3, num_classes: int = 10
) -> nn.Sequential:
    """Build three stages of convolution – ReLU – 3×3 max pooling of stride 2, then one linear layer.

    The kernels are 4 (stride 2), 5 and 3, padded by 2, 2 and 1 inside of the convolutions. 32×32 images shrink to
    17×17, 8×8, 3×3 and a single pixel. A pooling that would leave less than a pixel is left out: the third one below
    28 pixels, the second below 12, the first below 4.

    Args:
        width: channels of every convolution. Default: the paper's code.
        image_size: height and width of the images.
        in_channels: channels of the images.
        num_classes: number of outputs.

    Returns:
        The net, in torch's default initialisation, drawn from torch's global generator like every layer of torch.

    Raises:
        ConfigError: images without a pixel, or a width that is not positive.

    Source:
        dascoli2019finding (arXiv 1906.06766), from its code, where the padding is a layer of its own. Leaving out
        poolings is ours: the code takes no images below 28 pixels.

    Example:
        >>> [sum(p.numel() for p in vanilla_cnn(image_size=size).parameters()) for size in (32, 16)]
        [143178, 143178]
    """
    width, in_channels, num_classes = checked_widths("widths", (width, in_channels, num_classes))
    stages = (Stage(width, 4, 2, 2, True), Stage(width, 5, 1, 2, True), Stage(width, 3, 1, 1, True))
    layers, features = stacked(stages, in_channels, image_size)
    return nn.Sequential(OrderedDict(**layers, flatten=nn.Flatten(), head=nn.Linear(features, num_classes)))


def stacked(
    stages: tuple[Stage, ...], in_channels: int, image_size: int
) -> tuple["OrderedDict[str, nn.Module]", int]:
    """Build stages of a network for square images, the n-th as conv<n>, relu<n> and pool<n>.

    Args:
        stages: of which a pooling that would leave less than one pixel is left out.
        in_channels: channels of the images.
        image_size: height and width of the images.

    Returns:
        Name -> layer, and the number of features that the last one gives.

    Raises:
        ConfigError: no pixel reaches the end.

    Example:
        >>> layers, features = stacked((Stage(5, 3, 1, 1, True), Stage(7, 3, 1, 1, True)), 3, 6)
        >>> list(layers), features
        (['conv1', 'relu1', 'pool1', 'conv2', 'relu2'], 28)
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, size = in_channels, image_size
    for place, stage in enumerate(stages, 1):
        layers[f"conv{place}"] = nn.Conv2d(channels, stage.channels, stage.kernel, stage.stride, stage.padding)
        layers[f"relu{place}"] = nn.ReLU()
        channels, size = stage.channels, (size + 2 * stage.padding - stage.kernel) // stage.stride + 1
        if stage.pooled and size >= _POOLED:
            layers[f"pool{place}"] = nn.MaxPool2d(_POOLED, _POOL_STRIDE)
            size = (size - _POOLED) // _POOL_STRIDE + 1
    if min(image_size, size) < 1:
        raise ConfigError(f"Expected images of at least one pixel. Got image_size={image_size}. Use larger images.")
    return layers, channels * size * size
