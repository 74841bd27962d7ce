"""shortcuts: ways to evaluate a batch at many points faster, each used only where it was seen to change nothing.

A large batch is cut into pieces that fit the cache, images lie channels last, and layers that read the data
directly are computed once (`first_layer`). Every batch is checked first: at two opposite corners and in the
middle of the grid, outputs and loss must be those of the plain way to rounding.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from thalweg import batching
from thalweg.batching import Batch
from thalweg.errors import DataError
from thalweg.kernels import plain_kernels
from thalweg.objective import Objective
from thalweg.probes.first_layer import FirstLayer, stand_in
from thalweg.probes.grid import Grid
from thalweg.probes.private import Private

# The largest tensor that a net makes of one piece of a batch. Measured: with three convolutions of 3×32×32 images
# (8 KB a sample), pieces of 1,000 samples are faster than of 500 (by 10 %) and of 250 or 2,000 (by 25 to 100 %);
# with wide ones (256 KB), pieces of 50 to 100 than of 500 (by 60 %); a linear net gains nothing below 5,000.
_PIECE_BYTES = 2**23
_SMALLEST_PIECE = 50
# Our choice: with fewer points, the checks at three of them cost as much as they save.
_FEWEST_POINTS = 16
# In eps of the largest number compared. Our choice: two orders of summation differ by tens of eps, a shortcut
# that does not hold by far more, and float64 stays within 1e-12.
_TOLERANCE = 1000.0
# What Python calls to read a value of a tensor.
_READS = {"item", "tolist", "numpy", "equal", "is_nonzero", "__bool__", "__float__", "__int__", "__index__"}


@dataclass(frozen=True)
class Piece:
    """A part of a batch: the batch's loss is Σ share·loss over its pieces.

    Args:
        share: the piece's share.
        inputs: of its samples.
        targets: of its samples.
    """

    share: float
    inputs: Any
    targets: Any


@dataclass(frozen=True)
class Way:
    """How a batch is evaluated.

    Args:
        size: samples in a piece, at most; 0 for the whole batch.
        is_channels_last: images in that memory format.
    """

    size: int
    is_channels_last: bool

    def pieces(self, objective: Objective, batch: Batch) -> list[Piece]:
        """Cut a batch, with shares as torch's own loss has them; for any other loss the check decides."""
        parts = _parts(objective, batch, self.size) if self.size else [Piece(1.0, *batch)]
        if not self.is_channels_last:
            return parts
        return [Piece(p.share, p.inputs.contiguous(memory_format=torch.channels_last), p.targets) for p in parts]


class Shortcuts:
    """What holds for one objective along one grid.

    Args:
        objective: the landscape; its module is copied, not touched.
        grid: the points.
    """

    def __init__(self, objective: Objective, grid: Grid) -> None:
        self._objective, self._grid = objective, grid
        self._private: Private | None = None
        self._layers: list[FirstLayer] = []
        self._ways: list[Way] = []
        rows, columns = grid.shape
        self._checks = ((rows - 1, columns - 1), (rows // 2, columns // 2), (0, 0))

    def pieces(self, batch: Batch) -> list[Piece]:
        """Choose the fastest way that agrees with the plain one on this batch.

        Args:
            batch: inputs and targets.

        Returns:
            The pieces to evaluate with `apply`; none if only the plain way is right.
        """
        if math.prod(self._grid.shape) < _FEWEST_POINTS:
            return []
        if self._private is None:
            self._private = Private(self._objective)
            self._layers = stand_in(self._private, self._grid)
            self._ways = _ways(self._objective, self._grid.origin, batch)
        while self._ways:  # what failed once is not tried again
            pieces = self._ways[0].pieces(self._objective, batch)
            with contextlib.suppress(RuntimeError):  # a view of memory laid out otherwise, a gradient inside
                if self._agrees(pieces, batch):
                    return pieces
            del self._ways[0]
        return []

    def begin(self) -> None:
        """Say that another piece comes."""
        for layer in self._layers:
            layer.forget()

    def apply(self, row: int, column: int, inputs: Any) -> Any:
        """Run the module at a point of the grid, on the inputs of the piece that was begun."""
        theta = self._grid.theta(row, column)
        for layer in self._layers:
            layer.move(row, column, theta)
        return (self._private or self._objective).apply(theta, inputs)

    def in_words(self, num_pieces: int) -> str:
        """Say what is done with a batch of so many pieces; none is the plain way."""
        if not num_pieces:
            return "one point at a time"
        num_affine = sum(layer.is_used for layer in self._layers)
        words = [
            "one point at a time",
            f"{num_affine} layer{'s' * (num_affine > 1)} on the data computed once" if num_affine else "",
            f"batches cut into pieces of at most {self._ways[0].size} samples" if num_pieces > 1 else "",
            "channels last" if self._ways[0].is_channels_last else "",
        ]
        return ", ".join(filter(None, words))

    def _agrees(self, pieces: list[Piece], batch: Batch) -> bool:
        """Compare outputs and losses with the plain way at the checks."""
        expected, found = [], []
        for check in self._checks:
            with torch.no_grad(), plain_kernels(), _Watch() as watch:
                outputs = self._objective.apply(self._grid.theta(*check), batch[0])
                expected.append(self._objective.reduced(outputs, batch[1]))
            # A branch that a value of the whole batch decides may be another one for a piece of it.
            if len(pieces) > 1 and (watch.is_read or not isinstance(outputs, Tensor)):
                return False
            with torch.inference_mode():
                parts, loss = [], torch.zeros_like(expected[-1])
                for piece in pieces:
                    self.begin()
                    parts.append(self.apply(*check, piece.inputs))
                    loss = loss + piece.share * self._objective.reduced(parts[-1], piece.targets)
                found.append(loss)
                if not _is_rounding(torch.cat(parts) if len(parts) > 1 else parts[0], outputs):
                    return False
        losses = torch.stack(expected)
        return bool(torch.isfinite(losses).any()) and _is_rounding(torch.stack(found), losses)


class _Watch(TorchFunctionMode):
    """See whether Python reads a value of a tensor, and how large the tensors are that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.is_read = False
        self.largest: int = 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.is_read = self.is_read or getattr(func, "__name__", "") in _READS
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.largest = max(self.largest, made.nbytes)
        return made


def _parts(objective: Objective, batch: Batch, size: int) -> list[Piece]:
    """Cut a batch into even pieces; into one, if it is small or its samples are not rows."""
    whole = [Piece(1.0, *batch)]
    try:
        parts = list(batching.pieces(batch, size))
    except DataError:
        return whole
    if objective.reduction == "sum":
        return [Piece(1.0, *part) for part in parts]
    weigh = batching.mean_weight(objective.loss, objective.reduction)
    weights = [weigh(targets) for _, targets in parts]
    if len(parts) == 1 or not all(weights):  # the loss of a piece that counts nothing is 0/0
        return whole
    return [Piece(w / sum(weights), *part) for w, part in zip(weights, parts, strict=True)]


def _ways(objective: Objective, theta: Tensor, batch: Batch) -> list[Way]:
    """List what is to be tried, the fastest first."""
    is_image = isinstance(batch[0], Tensor) and batch[0].ndim == 4 and batch[0].is_floating_point()
    has_images = is_image and any(isinstance(m, nn.Conv2d) for m in objective.module.modules())
    layouts = (True, False) if has_images else (False,)
    sizes = dict.fromkeys((_piece_size(objective, theta, batch), 0))
    return [Way(size, layout) for layout in layouts for size in sizes]


def _piece_size(objective: Objective, theta: Tensor, batch: Batch) -> int:
    """Choose how many samples fit the cache; 0 leaves a batch whole.

    In train mode it stays whole: BatchNorm's statistics are taken over it.
    """
    if objective.mode == "train":
        return 0
    try:
        few = next(batching.pieces(batch, _SMALLEST_PIECE))
        with torch.no_grad(), plain_kernels(), _Watch() as watch:
            objective.apply(theta, few[0])
    except (DataError, RuntimeError):  # samples are not rows, or a size is part of the code
        return 0
    bytes_per_sample = watch.largest / batching.num_samples(few)
    return max(_SMALLEST_PIECE, int(_PIECE_BYTES / bytes_per_sample))


def _is_rounding(found: Any, expected: Any) -> bool:
    """Whether all tensors in two structures of outputs are equal but for rounding."""
    pairs = list(zip(*(_tensors(value) for value in (found, expected)), strict=False))
    return all(a.shape == b.shape and a.dtype == b.dtype and _is_close(a, b) for a, b in pairs)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _is_close(found: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    is_finite = torch.isfinite(expected)
    if not torch.equal(is_finite, torch.isfinite(found)):
        return False
    if not bool(is_finite.any()):
        return True
    bound = _TOLERANCE * torch.finfo(expected.dtype).eps * expected[is_finite].abs().max()
    return bool((found - expected)[is_finite].abs().max() <= bound)
