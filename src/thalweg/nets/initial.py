"""Initial points drawn from a generator: PyTorch's own distributions, and the paper's Gaussian."""

import math

import torch
from torch import Tensor, nn

from thalweg.errors import ConfigError

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def gaussian_init_(module: nn.Module, variance: float, generator: torch.Generator) -> nn.Module:
    """Draw every parameter, biases included, from N(0, variance), in place.

    Args:
        module: the module to overwrite.
        variance: variance of every entry. The paper takes m⁻³ (1-D data) and m⁻⁶ (Iris, MNIST) at width m.
        generator: where the randomness comes from; it must live on the parameters' device.

    Returns:
        The same module.

    Raises:
        ConfigError: the variance is negative or not finite.

    Source:
        zhang2021embedding (arXiv 2105.14573), appendix B.

    Example:
        >>> net = gaussian_init_(nn.Linear(2, 2), 0.0, torch.Generator())
        >>> net.weight.abs().sum().item()
        0.0
    """
    if not (math.isfinite(variance) and variance >= 0):
        raise ConfigError(
            f"Expected a variance that is finite and not negative. Got {variance}. Change the variance."
        )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=math.sqrt(variance), generator=generator)
    return module


def default_init_(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw a module anew from PyTorch's default distributions, but from a generator, in place.

    Linear and convolution: weight and bias uniform on ±1/√fan_in. Embedding: N(0, 1). Recurrent: uniform on
    ±1/√hidden. Norms: weight 1, bias 0, running statistics reset. Tied parameters are drawn once per module
    that holds them; the last one wins.

    Args:
        module: the module to overwrite.
        generator: where the randomness comes from; it must live on the parameters' device.

    Returns:
        The same module.

    Raises:
        ConfigError: a submodule holds parameters of its own and its default is not known here.

    Example:
        >>> net = default_init_(nn.Linear(4, 2), torch.Generator().manual_seed(0))
        >>> bool(net.weight.abs().max() <= 0.5)
        True
    """
    with torch.no_grad():
        for name, part in module.named_modules():
            own = dict(part.named_parameters(recurse=False))
            if isinstance(part, nn.Linear | nn.modules.conv._ConvNd):
                _uniform(own, 1 / math.sqrt(max(_fan_in(part), 1)), generator)
            elif isinstance(part, nn.RNNBase | nn.RNNCellBase):
                _uniform(own, 1 / math.sqrt(part.hidden_size), generator)
            elif isinstance(part, nn.Embedding):
                part.weight.normal_(generator=generator)
                if part.padding_idx is not None:
                    part.weight[part.padding_idx] = 0
            elif isinstance(part, _NORMS):
                part.reset_parameters()
            elif own:
                raise ConfigError(
                    f"Expected submodules with a known default. Got {type(part).__name__} "
                    f"at {name or 'the top'!r} with parameters {', '.join(own)}. "
                    "Initialise the module yourself."
                )
    return module


def _fan_in(part: nn.Module) -> int:
    """Inputs that one output sums over, as PyTorch counts them: all axes of the weight but the first."""
    weight = part.weight
    return math.prod(weight.shape[1:]) if isinstance(weight, Tensor) else 1


def _uniform(parameters: dict[str, nn.Parameter], bound: float, generator: torch.Generator) -> None:
    for parameter in parameters.values():
        parameter.uniform_(-bound, bound, generator=generator)
