"""A data set in memory: inputs, targets, and where they come from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Shaped
from torch import Tensor

from thalweg.errors import DataError


@dataclass(frozen=True)
class Dataset:
    """Inputs and targets of a task.

    Args:
        inputs: one sample per row.
        targets: class numbers (int64), or values to regress on.
        num_classes: number of classes; None for regression.
        name: the name under which it is found.
        source: where it comes from and how it was normalised.

    Raises:
        DataError: there are no samples, or not as many targets as inputs.

    Example:
        >>> data = Dataset(torch.zeros(3, 2), torch.tensor([0, 1, 1]), 2, "toy", "made here")
        >>> len(data), data.one_hot().targets[0].tolist()
        (3, [1.0, 0.0])
    """

    inputs: Shaped[Tensor, "samples ..."]
    targets: Tensor
    num_classes: int | None
    name: str
    source: str

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets) or len(self.inputs) == 0:
            raise DataError(
                f"Expected as many inputs as targets, at least one. Got {len(self.inputs)} and "
                f"{len(self.targets)} in {self.name}. Check the data."
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def select(self, samples: int | Sequence[int] | Tensor) -> "Dataset":
        """Keep the first so many samples, or those of the given numbers.

        Raises:
            DataError: more samples are asked for than there are, or none.
        """
        if isinstance(samples, int):
            if not 0 < samples <= len(self):
                raise DataError(
                    f"Expected between 1 and {len(self)} samples of {self.name}. Got {samples}. "
                    "Ask for another number."
                )
            samples = torch.arange(samples)
        numbers = torch.as_tensor(samples, dtype=torch.long)
        return replace(self, inputs=self.inputs[numbers], targets=self.targets[numbers])

    def one_hot(self) -> "Dataset":
        """Turn class numbers into 0-1 vectors of the inputs' dtype, for a mean squared error.

        Raises:
            DataError: the targets are no class numbers.
        """
        if self.num_classes is None:
            raise DataError(
                f"Expected a data set of classes. Got {self.name}, a regression. Use its targets as they are."
            )
        vectors = torch.nn.functional.one_hot(self.targets, self.num_classes)
        return replace(self, targets=vectors.to(self.inputs.dtype))
