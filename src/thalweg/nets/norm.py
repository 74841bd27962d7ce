"""Normalisation of feature maps, by name."""

from typing import Literal, get_args

from torch import nn

from thalweg.errors import ConfigError

Norm = Literal["batch", "none"]


def norm_2d(name: str, channels: int) -> list[nn.Module]:
    """Return the layers that normalise feature maps: one BatchNorm, or none at all.

    Raises:
        ConfigError: no norm has that name.

    Example:
        >>> norm_2d("none", 8)
        []
    """
    if name not in get_args(Norm):
        raise ConfigError(f"Expected a norm out of {', '.join(get_args(Norm))}. Got {name!r}. Check the name.")
    return [nn.BatchNorm2d(channels)] if name == "batch" else []
