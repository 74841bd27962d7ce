"""accuracy: how many targets a network predicts, where targets are the numbers of classes."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from thalweg.objective import Loss


@dataclass(frozen=True)
class Classes:
    """Where outputs have their classes, and which target counts in no loss.

    Args:
        axis: the dim of the outputs along which the classes lie; None if targets are not class numbers.
        ignored: the target that the loss leaves out.
    """

    axis: int | None
    ignored: int = -100

    @classmethod
    def of(cls, loss: Loss, outputs: Any, targets: Any) -> "Classes":
        """Read off one batch whether its targets are numbers of classes, and where the outputs have them.

        They are if the targets are integers and the outputs have one dim more: dim 1, where torch's losses
        expect the classes, or else the last one.

        Args:
            loss: the loss; its `ignore_index`, if it has one, is the ignored target (default: torch's -100).
            outputs: of the module.
            targets: of the same batch.
        """
        options = loss.keywords if isinstance(loss, functools.partial) else getattr(loss, "__dict__", {})
        ignored = options.get("ignore_index", -100)
        axis = _axis(outputs, targets)
        if axis is not None:
            counted = targets[targets != ignored]
            axis = axis if bool((counted < outputs.shape[axis]).all()) else None  # counts of something
        return cls(axis, ignored)

    def correct(self, outputs: Any, targets: Any) -> Int[Tensor, ""]:
        """Count the targets that have the largest output; an output of NaN predicts nothing."""
        if self.axis is None:
            return torch.zeros((), dtype=torch.int64)
        largest, predicted = outputs.max(self.axis)
        is_right = (predicted == targets) & (largest == largest) & (targets != self.ignored)  # noqa: PLR0124 - NaN
        count: Tensor = is_right.sum()
        return count

    def count(self, targets: Any) -> int:
        """Count the targets that can be predicted."""
        return 0 if self.axis is None else int((targets != self.ignored).sum())


def _axis(outputs: Any, targets: Any) -> int | None:
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return None
    is_integer = targets.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    if not (
        is_integer
        and outputs.is_floating_point()
        and outputs.ndim == targets.ndim + 1
        and targets.numel()
        and targets.ndim
    ):
        return None
    if outputs.shape[:1] + outputs.shape[2:] == targets.shape:
        return 1
    return -1 if outputs.shape[:-1] == targets.shape else None
