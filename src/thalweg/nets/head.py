"""The fully connected end of a convolutional network."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from thalweg.nets.activation import Activation, activation_module
from thalweg.nets.widths import checked_widths


def linear_head(widths: Sequence[int], activation: Activation, *, dropout: float | None = None) -> nn.Sequential:
    """Chain linear layers, an activation after each but the last.

    Args:
        widths: widths of all layers, input and output included.
        activation: after every layer but the last.
        dropout: share of each layer's inputs that training drops; None leaves the dropout layers out.

    Raises:
        ConfigError: fewer than two widths, one that is not positive, or an unknown activation.

    Example:
        >>> linear_head((4, 3, 2), "relu")
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    *hidden, last = pairwise(checked_widths("widths of the linear layers", widths, at_least=2))
    layers: list[nn.Module] = []
    for old, new in hidden:
        layers += [*_dropout(dropout), nn.Linear(old, new), activation_module(activation)]
    return nn.Sequential(*layers, *_dropout(dropout), nn.Linear(*last))


def _dropout(share: float | None) -> list[nn.Module]:
    return [] if share is None else [nn.Dropout(share)]
