"""Augmentation of a whole batch of images by tensor operations: random crops and mirror images."""

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn import functional

from thalweg.errors import ConfigError, DataError


def crop_and_flip(
    images: Shaped[Tensor, "batch channels height width"],
    generator: torch.Generator,
    padding: int = 4,
    *,
    flip: bool = True,
) -> Shaped[Tensor, "batch channels height width"]:
    """Shift every image by up to `padding` pixels each way, and mirror it left to right with probability 1/2.

    Each image is padded and cut at a place of its own; all places are equally likely.

    Args:
        images: on any device.
        generator: where the randomness comes from, on the CPU.
        padding: pixels added at each side. Default: the usual one for CIFAR-10.
        flip: mirror. Leave it out for digits.

    Returns:
        Images of the same shape, device and dtype.

    Raises:
        ConfigError: the padding is negative.
        DataError: the images have not four dims.

    Source:
        anokhin2020lowloss (arXiv 2008.00741) trains on CIFAR-10 with torchvision's RandomHorizontalFlip and
        RandomCrop(32, padding=4) before it normalises. Here zeros are padded to the images as they come: black if
        they are in [0, 1], the mean colour if they are normalised.

    Example:
        >>> images = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> torch.equal(crop_and_flip(images, torch.Generator(), padding=0, flip=False), images)
        True
    """
    if padding < 0:
        raise ConfigError(f"Expected a padding that is not negative. Got {padding}. Choose one such as 4.")
    if images.ndim != 4:
        raise DataError(
            f"Expected images of shape (batch, channels, height, width). Got {tuple(images.shape)}. "
            "Leave out the augmentation."
        )
    count, _, height, width = images.shape
    places = torch.randint(2 * padding + 1, (2, count), generator=generator).to(images.device)
    windows = functional.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    cut = windows[torch.arange(count, device=images.device), :, places[0], places[1]]
    if not flip:
        return cut
    is_mirrored = torch.randint(2, (count, 1, 1, 1), generator=generator).to(images.device) == 1
    return torch.where(is_mirrored, cut.flip(-1), cut)
