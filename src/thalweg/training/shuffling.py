"""Mini-batches in a new random order on every pass, or in that of the data, from whatever data an objective has."""

from collections.abc import Iterator

import torch

from thalweg.batching import Batch, joined, num_samples, rows_of
from thalweg.objective import Objective
from thalweg.precision import placed


def shuffled_batches(
    objective: Objective, batch_size: int, generator: torch.Generator, *, shuffle: bool = True
) -> Iterator[Batch]:
    """Yield one pass over the data in a new random order, on the device and in the dtype of the objective.

    Data in memory are shuffled as a whole; batches of a loader come in the loader's order, each shuffled and cut.

    Args:
        objective: whose data.
        batch_size: samples of a mini-batch; the last one may be smaller.
        generator: source of the order, on the CPU.
        shuffle: if not, the rows stay in their order and nothing is drawn.

    Yields:
        (inputs, targets).

    Raises:
        DataError: the batches are not one row per sample.

    Example:
        >>> from torch import nn
        >>> x = torch.arange(4.0).unsqueeze(1)
        >>> objective = Objective(nn.Linear(1, 1), nn.MSELoss(), (x, x))
        >>> [len(y) for _, y in shuffled_batches(objective, 3, torch.Generator().manual_seed(0))]
        [3, 1]
    """
    batches = list(objective.batches()) if objective.in_memory else []
    for batch in [joined(batches)] if len(batches) > 1 else batches or objective.batches():
        count = num_samples(batch)
        # Rows in order are copied too: what augments, or a ReLU in place, must not write into the user's data.
        order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size].to(objective.device)
            yield placed(rows_of(batch, rows), device=objective.device, dtype=objective.dtype)
