"""Data made by a formula: the 1-D task of the embedding principle, and Gaussian inputs."""

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.data.dataset import Dataset
from thalweg.errors import DataError


def three_tanh(num_points: int = 50, *, dtype: torch.dtype = torch.float64) -> Dataset:
    """Make the 1-D task y = tanh(x - 7) + tanh(x) + tanh(x + 7) on [-15, 15], evenly spaced.

    A two-layer tanh net of width 3 without output bias represents it exactly.

    Args:
        num_points: number of points. The paper takes 50.
        dtype: of inputs and targets. Default chosen by us: theory checks run in float64.

    Returns:
        inputs of shape (num_points, 1), targets of shape (num_points, 1).

    Raises:
        DataError: fewer than one point.

    Source:
        zhang2021embedding (arXiv 2105.14573), figures 1, 3(a) and 4; the formula was recovered from the
        plotted points (the text does not give it).

    Example:
        >>> round(three_tanh().targets.square().mean().item(), 4)
        5.1453
    """
    if num_points < 1:
        raise DataError(f"Expected at least one point. Got {num_points}. Raise num_points.")
    x = torch.linspace(-15, 15, num_points, dtype=torch.float64).unsqueeze(1)
    y = torch.tanh(x - 7) + torch.tanh(x) + torch.tanh(x + 7)
    source = f"{num_points} points of tanh(x - 7) + tanh(x) + tanh(x + 7) on [-15, 15]"
    return Dataset(x.to(dtype), y.to(dtype), None, "three_tanh", source)


def gaussian(
    num_samples: int,
    num_features: int | tuple[int, ...],
    generator: torch.Generator,
    *,
    std: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "samples ..."]:
    """Draw inputs from N(0, std²), all entries independent, on the generator's device.

    Args:
        num_samples: number of inputs.
        num_features: width of an input, or its shape.
        generator: where the randomness comes from.
        std: standard deviation of every entry. tian2019luck (arXiv 1905.13405) needs 10 to reach every
            corner of its teachers; the default is ours.
        dtype: of the inputs.

    Returns:
        shape (num_samples, num_features), or (num_samples, *num_features).

    Raises:
        DataError: there are no samples.

    Example:
        >>> tuple(gaussian(5, (1, 4, 4), torch.Generator().manual_seed(0)).shape)
        (5, 1, 4, 4)
    """
    if num_samples < 1:
        raise DataError(f"Expected at least one sample. Got {num_samples}. Raise num_samples.")
    shape = (num_features,) if isinstance(num_features, int) else num_features
    return std * torch.randn(num_samples, *shape, generator=generator, dtype=dtype, device=generator.device)
