"""grid_losses: the loss of one objective at all points of a grid, in one pass over the data.

Batches outside, points inside. For a tiny net the time goes into starting operations, so many points are
evaluated at once (`vmap`); for any other, one by one, with the shortcuts that hold.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves

from thalweg.batching import Batch
from thalweg.kernels import plain_kernels
from thalweg.objective import Objective
from thalweg.probes.accuracy import Classes
from thalweg.probes.grid import Grid
from thalweg.probes.shortcuts import Piece, Shortcuts

Advance = Callable[[float], None]

# Multiplications of one net on one batch, samples × parameters, up to which many points are evaluated at once.
# Measured on one core for networks of three linear layers: ten times faster at 2e4, twice at 1e6, equal at 3e6.
_TINY = 1_000_000
# Points at once; as in `Objective`: more do not pay on a CPU and cost memory in proportion.
_POINTS_AT_ONCE = 64


@dataclass(frozen=True)
class GridLosses:
    """What some rows of a grid gave on one data set.

    Args:
        loss: R at the points, in float64.
        accuracy: fraction of the targets that are predicted; None unless they are numbers of classes.
        ways: how the batches were evaluated, in words.
    """

    loss: Float[Tensor, "rows columns"]
    accuracy: Float[Tensor, "rows columns"] | None
    ways: tuple[str, ...]


def grid_losses(objective: Objective, grid: Grid, rows: Sequence[int], advance: Advance) -> GridLosses:
    """Evaluate an objective at some rows of a grid.

    Args:
        objective: the landscape.
        grid: the points.
        rows: which rows of it.
        advance: told after each row which part of one row and one batch is done.

    Returns:
        Losses and accuracies.

    Raises:
        ShapeError: the loss is not a scalar.
        DataError: no target counts in the loss.
    """
    sums = torch.zeros(2, len(rows), grid.shape[1], dtype=torch.float64)
    weights, num_counted = 0.0, 0
    ways: dict[str, None] = {}
    shortcuts = Shortcuts(objective, grid)
    for weight, batch in objective.weighted_batches():
        with _without_gradients():
            classes = Classes.of(objective.loss, objective.apply(grid.origin, batch[0]), batch[1])
        task = _Task(objective, grid, rows, classes, advance)
        found, way = task.at_once(batch) or task.one_by_one(batch, shortcuts)
        sums += torch.tensor([weight, 1.0], dtype=torch.float64).view(2, 1, 1) * found
        weights += weight
        num_counted += classes.count(batch[1])
        ways[way] = None
    loss = sums[0] if objective.reduction == "sum" else sums[0] / weights
    return GridLosses(loss, sums[1] / num_counted if num_counted else None, tuple(ways))


@dataclass(frozen=True)
class _Task:
    """The rows to evaluate, and on which objective; each method gives (2, rows, columns): loss and number right."""

    objective: Objective
    grid: Grid
    rows: Sequence[int]
    classes: Classes
    advance: Advance

    def at_once(self, batch: Batch) -> tuple[Tensor, str] | None:
        """Evaluate many points with each operation; None where that does not pay or does not work."""
        if not _is_tiny(self.objective, batch):
            return None
        inputs, targets = batch
        columns = self.grid.shape[1]

        def scored(theta: Tensor) -> tuple[Tensor, Tensor]:
            outputs = self.objective.apply(theta, inputs)
            return self.objective.reduced(outputs, targets), self.classes.correct(outputs, targets)

        found = []
        try:
            with _without_gradients(), warnings.catch_warnings():
                warnings.filterwarnings("error", "There is a performance drop")  # then points are looped over
                for rows in _blocks(self.rows, max(1, _POINTS_AT_ONCE // columns)):
                    pair = vmap(scored, chunk_size=_POINTS_AT_ONCE)(self.grid.thetas(rows))
                    found.append(torch.stack([part.cpu().double().view(-1, columns) for part in pair]))
        except (
            RuntimeError,
            UserWarning,
        ):  # control flow that depends on values, an operation without a batching rule
            return None
        self.advance(float(len(self.rows)))
        return torch.cat(found, 1), f"{_POINTS_AT_ONCE} points at a time"

    def one_by_one(self, batch: Batch, shortcuts: Shortcuts) -> tuple[Tensor, str]:
        """Evaluate point by point, with the shortcuts that hold."""
        pieces = shortcuts.pieces(batch)
        total = torch.zeros(2, len(self.rows), self.grid.shape[1], dtype=torch.float64)
        apply = shortcuts.apply if pieces else self._apply_plainly
        # What inference mode and fused kernels change was part of the check.
        with torch.inference_mode() if pieces else _without_gradients():
            for piece in pieces or [Piece(1.0, *batch)]:
                shortcuts.begin()
                for place, row in enumerate(self.rows):
                    total[:, place] += self._row(row, piece, apply)
                    self.advance(1.0 / max(len(pieces), 1))
        return total, shortcuts.in_words(len(pieces))

    def _row(self, row: int, piece: Piece, apply: Callable[[int, int, Any], Any]) -> Tensor:
        losses, counts = [], []
        for column in range(self.grid.shape[1]):
            outputs = apply(row, column, piece.inputs)
            losses.append(self.objective.reduced(outputs, piece.targets))
            counts.append(self.classes.correct(outputs, piece.targets))
        return torch.stack([torch.stack(losses).cpu().double() * piece.share, torch.stack(counts).cpu().double()])

    def _apply_plainly(self, row: int, column: int, inputs: Any) -> Any:
        return self.objective.apply(self.grid.theta(row, column), inputs)


@contextlib.contextmanager
def _without_gradients() -> Iterator[None]:
    """Evaluate as `Objective.value` does."""
    with torch.no_grad(), plain_kernels():
        yield


def _is_tiny(objective: Objective, batch: Batch) -> bool:
    """Whether starting the operations costs more than the arithmetic; convolutions with many weights do not batch."""
    if objective.mode == "train" or any(len(shape) > 2 for shape in objective.space.shapes):
        return False
    inputs = [leaf for leaf in tree_leaves(batch[0]) if isinstance(leaf, Tensor) and leaf.ndim]
    rows = max((x.numel() // x.shape[-1] if x.is_floating_point() else x.numel() for x in inputs), default=0)
    return rows * objective.num_params <= _TINY


def _blocks(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
