"""Activations by name, so that a net can be built from a configuration."""

from collections.abc import Callable
from typing import Literal, get_args

from torch import nn

from thalweg.errors import ConfigError

Activation = Literal["tanh", "relu", "gelu", "sigmoid", "softplus", "silu", "identity"]

_MODULES: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "identity": nn.Identity,
}


def activation_module(name: str) -> nn.Module:
    """Build the activation of that name.

    Args:
        name: one of `Activation`.

    Returns:
        The activation as a module without parameters.

    Raises:
        ConfigError: no activation has that name.

    Example:
        >>> activation_module("tanh")
        Tanh()
    """
    if name not in _MODULES:
        raise ConfigError(
            f"Expected an activation out of {', '.join(get_args(Activation))}. Got {name!r}. Check the name."
        )
    return _MODULES[name]()
