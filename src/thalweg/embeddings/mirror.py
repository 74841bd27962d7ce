"""mirror: data that are closed under x -> -x, and functions on them that are each other's mirror image."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thalweg.objective import Objective

_SAME = 1e-12
"""Difference of two numbers of the data that are equal, relative to the largest: rounding in float64."""


@dataclass(frozen=True)
class Mirror:
    """The symmetry of a data set: inputs[order] = -inputs, targets[order] = sign·targets.

    Args:
        order: for every sample, the sample with the opposite input.
        sign: what the symmetry does to the targets, 1 or -1.
    """

    order: Int[Tensor, " samples"]
    sign: int

    def image(self, outputs: Float[Tensor, " outputs"]) -> Float[Tensor, " outputs"]:
        """Give s·f(-x) on the data from f(x) on the data, both flattened.

        Args:
            outputs: f on all samples, flattened.

        Returns:
            The outputs of the mirror image.
        """
        rows = outputs.reshape(len(self.order), -1)
        return (self.sign * rows[self.order]).flatten()


def mirror_of_data(objective: Objective) -> Mirror | None:
    """Find the symmetry x -> -x, y -> ±y of the data of an objective.

    A network that is closed under x -> -x (first-layer weights change sign) and y -> ±y then has critical points
    in pairs of mirror images.

    Args:
        objective: the landscape; its inputs and targets must be tensors with one row per sample.

    Returns:
        The symmetry, the even one if both hold; None if the data are not closed under it.

    **Source:** the two critical points of width 2 in Zhang et al. 2021 (arXiv 2105.14573), Fig. 4, are such a
    pair; the detection is ours.

    Example:
        >>> x = torch.linspace(-1, 1, 5).unsqueeze(1)
        >>> mirror_of_data(Objective(torch.nn.Linear(1, 1), torch.nn.MSELoss(), (x, x**3))).sign
        -1
    """
    batches = list(objective.batches())
    if not all(isinstance(part, Tensor) and part.is_floating_point() for batch in batches for part in batch):
        return None
    inputs = torch.cat([x for x, _ in batches]).double().flatten(1)
    targets = torch.cat([y for _, y in batches]).double().flatten(1)
    # Opposite samples stand at opposite places of a random direction.
    places = inputs @ torch.randn(inputs.shape[1], generator=torch.Generator().manual_seed(0)).to(inputs)
    order = torch.empty_like(places.argsort())
    order[(-places).argsort()] = places.argsort()
    if not bool((inputs[order] + inputs).abs().max() <= _SAME * inputs.abs().max()):
        return None
    for sign in (1, -1):
        if bool((targets[order] - sign * targets).abs().max() <= _SAME * targets.abs().max()):
            return Mirror(order, sign)
    return None
