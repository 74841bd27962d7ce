"""Biases of BatchNorm layers: a negative one lets a node fire on less than half of whitened data."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from thalweg.errors import DataError


@dataclass(frozen=True)
class BiasShare:
    """The biases of one BatchNorm layer.

    Args:
        name: of the layer in the state.
        biases: c₁ of each node, a copy on the CPU.
        negative: share of biases below 0.
    """

    name: str
    biases: Float[Tensor, " nodes"]
    negative: float


def negative_biases(state: Mapping[str, object]) -> tuple[BiasShare, ...]:
    """Read the biases of every BatchNorm in a state dict, in the state's order; no module is needed.

    Args:
        state: names to tensors, as `state_dict` gives. A layer is a BatchNorm if it has a running mean, a running
            variance and a bias of one size; those without a bias are passed over.

    Returns:
        One entry for each layer.

    Raises:
        DataError: no BatchNorm with biases is there, or its biases are not finite.

    Source:
        tian2019luck (arXiv 1905.13405), section 4.1, figures 6 and 16: counted for each BatchNorm of a network.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(4)
        >>> _ = norm.bias.data.copy_(torch.tensor([-1.0, 2.0, -3.0, 0.0]))
        >>> [(share.name, share.negative) for share in negative_biases(torch.nn.Sequential(norm).state_dict())]
        [('0', 0.5)]
    """
    found = []
    for key in state:
        prefix, _, last = key.rpartition("running_mean")
        own = [state.get(f"{prefix}{name}") for name in ("running_mean", "running_var", "bias")]
        tensors = [tensor for tensor in own if isinstance(tensor, Tensor) and tensor.ndim == 1]
        if last or not key.endswith("running_mean") or len({len(tensor) for tensor in tensors}) != 1:
            continue
        if len(tensors) == len(own):
            biases = tensors[-1].detach().cpu().clone()
            if not bool(biases.isfinite().all()):
                raise DataError(f"Expected finite biases of {prefix[:-1]!r}. Got others. Check the training.")
            found.append(BiasShare(prefix.removesuffix("."), biases, float((biases < 0).double().mean())))
    if not found:
        raise DataError(
            "Expected a BatchNorm with biases: a running_mean, a running_var and a bias of one layer. "
            f"Got {', '.join(list(state)[:4]) or 'nothing'}. Pass the state dict of a network with BatchNorm."
        )
    return tuple(found)
