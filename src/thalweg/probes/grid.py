"""grid: the points of a line or a plane, in exactly the arithmetic in which they are evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The points theta = origin + Σ coordinate·direction of a line (one axis) or a plane (two).

    Args:
        origin: shape (params,).
        directions: shape (axes, params).
        axes: the coordinates along each direction, in the same dtype.
    """

    origin: Float[Tensor, " params"]
    directions: Float[Tensor, "axes params"]
    axes: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, along the first axis, and columns, along the second (one on a line)."""
        return len(self.axes[0]), len(self.axes[1]) if len(self.axes) > 1 else 1

    def theta(self, row: int, column: int = 0) -> Float[Tensor, " params"]:
        """Give one point."""
        theta = self.origin + self.axes[0][row] * self.directions[0]
        return theta + self.axes[1][column] * self.directions[1] if len(self.axes) > 1 else theta

    def thetas(self, rows: Sequence[int]) -> Float[Tensor, "points params"]:
        """Give all points of some rows, row by row, bit for bit those of `theta`."""
        points = self.origin + self.axes[0][list(rows)].unsqueeze(1) * self.directions[0]
        if len(self.axes) > 1:
            points = (points.unsqueeze(1) + self.axes[1].unsqueeze(1) * self.directions[1]).flatten(0, 1)
        return points
