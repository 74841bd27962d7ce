"""slices: R along a line or over a plane through a point, on training and test data."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from thalweg.errors import ConfigError, NumericalError, ShapeError
from thalweg.objective import Objective
from thalweg.probes.grid import Grid
from thalweg.probes.grid_losses import Advance, GridLosses, grid_losses
from thalweg.probes.grid_workers import in_processes

Progress = Callable[[float, str], None]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Slice:
    """R at the points theta = origin + a·directions[0] (+ b·directions[1]) of a line or a plane.

    Values that are not finite (a net that overflows far from its minimum) stand as they came, inf or NaN.

    Args:
        origin: shape (params,).
        directions: shape (axes, params): one for a line, two for a plane.
        axes: the coordinates a (and b), exactly the steps that were taken.
        loss: R, shape (len(a),) or (len(a), len(b)).
        accuracy: fraction of the targets that are predicted, in the same shape; None unless the targets are
            numbers of classes.
        test_loss: R on the test data; None without them.
        test_accuracy: as `accuracy`, on the test data.
        num_not_finite: number of points at which the loss, or the test loss, is inf or NaN.
        batchnorm: how BatchNorm was treated, a sentence for printing.
        method: how the points were evaluated, for printing.
        seconds: wall time.
    """

    origin: Float[Tensor, " params"]
    directions: Float[Tensor, "axes params"]
    axes: tuple[Tensor, ...]
    loss: Float[Tensor, "..."]
    accuracy: Float[Tensor, "..."] | None
    test_loss: Float[Tensor, "..."] | None
    test_accuracy: Float[Tensor, "..."] | None
    num_not_finite: int
    batchnorm: str
    method: str
    seconds: float

    def theta(self, *index: int) -> Float[Tensor, " params"]:
        """Give the point of one entry of the loss, bit for bit the one that was evaluated."""
        return Grid(self.origin, self.directions, self.axes).theta(*index)

    def rows(self) -> list[dict[str, Any]]:
        """Give a table: one row per point, with a, b (on a plane) and the columns that were measured."""
        names = ("loss", "accuracy", "test_loss", "test_accuracy")
        columns = {n: getattr(self, n).reshape(-1).tolist() for n in names if getattr(self, n) is not None}
        grids = torch.meshgrid(*self.axes, indexing="ij")
        places = {name: grid.reshape(-1).tolist() for name, grid in zip("ab", grids, strict=False)}
        table = places | columns
        return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def line(
    objective: Objective,
    theta: Float[Tensor, " params"],
    direction: Float[Tensor, "..."],
    *,
    coordinates: Tensor | None = None,
    test: Objective | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Slice:
    """Compute R(theta + a·direction) for every coordinate a.

    Args:
        objective: the landscape.
        theta: the point at a = 0, shape (params,).
        direction: shape (params,), of any length: an eigenvector, a `random_direction`, another theta minus this.
        coordinates: the a, shape (points,). Default: 51 points from -1 to 1, 0 among them.
        test: the landscape of the same module on other data.
        workers: processes that share the points; see `plane`.
        progress: told the fraction done and what is being done.

    Returns:
        The slice.

    Raises:
        ShapeError: theta, the direction or the test landscape does not fit the module.
        ConfigError: no coordinates, or ones that are not finite; fewer than one worker; with several, something
            that cannot be pickled.
        NumericalError: theta or the direction is not finite.
        DataError: no target counts in the loss.

    **Source:** Goodfellow et al. 2015 (arXiv 1412.6544), section 3, for a line between two points; Li et al. 2018
    (arXiv 1712.09913), section 4, for one along a direction.

    Example:
        >>> x = torch.ones(3, 1, dtype=torch.float64)
        >>> objective = Objective(torch.nn.Linear(1, 1, bias=False).double(), torch.nn.MSELoss(), (x, 0 * x))
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> line(objective, one, one, coordinates=torch.tensor([-1.0, 0.0, 2.0])).loss
        tensor([0., 1., 9.], dtype=torch.float64)
    """
    axes = (_axis(objective, coordinates),)
    return _measured(objective, theta, direction.unsqueeze(0), axes, test, workers, progress)


def plane(
    objective: Objective,
    theta: Float[Tensor, " params"],
    directions: Float[Tensor, "..."],
    *,
    coordinates: Tensor | Pair | None = None,
    test: Objective | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Slice:
    """Compute R(theta + a·directions[0] + b·directions[1]) on a grid of coordinates a and b.

    One pass over the data serves all points: batches outside, points inside. What the data meet first is not
    recomputed for every point, large batches are cut to fit the cache, and many points of a tiny net are evaluated
    at once, where a check against the plain way shows that it changes nothing but rounding.

    BatchNorm's running statistics are those of the module, the same at every point: they are no coordinates. An
    objective of mode "train" uses those of each batch instead.

    Args:
        objective: the landscape.
        theta: the point at a = b = 0, shape (params,).
        directions: shape (2, params).
        coordinates: the a and the b, one tensor for both or a pair. Default: 51 points from -1 to 1, 0 among them.
        test: the landscape of the same module on other data.
        workers: 1 works here, with torch's threads; more are spawned processes with one thread each, which take
            rows of the grid and give the same numbers however many they are (other than 1: another order of sums).
        progress: told the fraction done and what is being done.

    Returns:
        The slice; rows of its loss belong to a, columns to b.

    Raises:
        ShapeError: theta, the directions or the test landscape does not fit the module.
        ConfigError: no coordinates, or ones that are not finite; fewer than one worker; with several, something
            that cannot be pickled.
        NumericalError: theta or a direction is not finite.
        DataError: no target counts in the loss.

    **Source:** Li et al. 2018 (arXiv 1712.09913), sections 4 and 6, which draws 51 × 51 points over [-1, 1]².

    Example:
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> objective = Objective(torch.nn.Linear(2, 1, bias=False).double(), torch.nn.MSELoss(), (x, 0 * x[:, :1]))
        >>> found = plane(objective, 0 * x[0], x, coordinates=(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])))
        >>> found.loss
        tensor([[0.0000, 2.0000],
                [0.5000, 2.5000]], dtype=torch.float64)
        >>> found.rows()[1]
        {'a': 0.0, 'b': 2.0, 'loss': 2.0}
    """
    pair = coordinates if isinstance(coordinates, tuple) else (coordinates, coordinates)
    axes = tuple(_axis(objective, c) for c in pair)
    return _measured(objective, theta, directions, axes, test, workers, progress)


def _measured(
    objective: Objective,
    theta: Tensor,
    directions: Tensor,
    axes: tuple[Tensor, ...],
    test: Objective | None,
    workers: int,
    progress: Progress | None,
) -> Slice:
    start = time.perf_counter()
    grid = Grid(*_checked(objective, theta, directions, len(axes)), axes)
    if test is not None and test.space != objective.space:
        raise ShapeError(
            f"Expected a test landscape of the same parameters. Got {test.num_params} others instead of "
            f"{objective.num_params}. Build it on the same module with other data."
        )
    if workers < 1:
        raise ConfigError(f"Expected at least 1 worker. Got {workers}. Pass workers=1.")
    objectives = [objective] if test is None else [objective, test]
    advance = _advance(objectives, grid, progress)
    if workers > 1:
        found = in_processes(objectives, grid, workers, advance)
    else:
        found = [grid_losses(o, grid, range(grid.shape[0]), advance) for o in objectives]
    shape = tuple(len(c) for c in axes)
    parts = [_shaped(f, o, shape) for f, o in zip(found, objectives, strict=True)]
    (loss, accuracy), (test_loss, test_accuracy) = parts[0], parts[1] if test is not None else (None, None)
    is_finite = torch.isfinite(loss) if test_loss is None else torch.isfinite(loss) & torch.isfinite(test_loss)
    ways = dict.fromkeys(way for f in found for way in f.ways)
    method = "; ".join(ways) + (f"; {workers} processes" if workers > 1 else "")
    return Slice(
        *(grid.origin, grid.directions, axes, loss, accuracy, test_loss, test_accuracy),
        num_not_finite=int((~is_finite).sum()),
        batchnorm=_treatment(objective),
        method=method,
        seconds=time.perf_counter() - start,
    )


def _shaped(found: GridLosses, objective: Objective, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Give the numbers in the shape, dtype and place of the slice."""

    def placed(values: Tensor) -> Tensor:
        return values.reshape(shape).to(device=objective.device, dtype=objective.dtype)

    return placed(found.loss), None if found.accuracy is None else placed(found.accuracy)


def _axis(objective: Objective, coordinates: Tensor | None) -> Tensor:
    """Give the steps in the objective's dtype: what is stored is what is taken."""
    if coordinates is None:
        coordinates = torch.arange(-25, 26, dtype=torch.float64) / 25  # unlike linspace, exactly 0 in the middle
    if coordinates.ndim != 1 or not len(coordinates) or not bool(torch.isfinite(coordinates).all()):
        kind = "" if bool(torch.isfinite(coordinates).all()) else ", not all finite"
        raise ConfigError(
            f"Expected finite coordinates along an axis, at least one. Got shape {tuple(coordinates.shape)}{kind}. "
            "Pass torch.linspace(-1, 1, 51)."
        )
    return coordinates.detach().to(device=objective.device, dtype=objective.dtype)


def _checked(objective: Objective, theta: Tensor, directions: Tensor, num_axes: int) -> tuple[Tensor, Tensor]:
    num_params, shapes = objective.num_params, (tuple(theta.shape), tuple(directions.shape))
    if shapes != ((num_params,), (num_axes, num_params)):
        raise ShapeError(
            f"Expected a theta of shape ({num_params},) and {num_axes} direction{'s' * (num_axes > 1)} as long. "
            f"Got shapes {shapes[0]} and {shapes[1]}. Build them with Objective.theta and probes.random_direction."
        )
    origin, moves = (v.detach().to(device=objective.device, dtype=objective.dtype) for v in (theta, directions))
    if not bool(torch.isfinite(origin).all() and torch.isfinite(moves).all()):
        raise NumericalError("Expected a finite theta and finite directions. Got NaN or infinity. Check the point.")
    return origin, moves


def _treatment(objective: Objective) -> str:
    """Say how BatchNorm was treated."""
    norms = [m for m in objective.module.modules() if isinstance(m, _BatchNorm)]
    if not norms:
        return "The network has no BatchNorm."
    if objective.mode == "train":
        return "BatchNorm uses the statistics of each batch at each point; running statistics are not used."
    if any(m.running_mean is None for m in norms):
        return "BatchNorm without running statistics uses those of each batch; the rest, those of the module."
    return "BatchNorm uses the running statistics of the module, the same at every point; they are no coordinates."


def _advance(objectives: list[Objective], grid: Grid, progress: Progress | None) -> Advance:
    """Count the parts that are done; one part is one row of the grid on one batch."""
    if progress is None:
        return lambda part: None
    total = grid.shape[0] * sum(sum(1 for _ in o.batches()) for o in objectives)
    done = 0.0

    def advance(part: float) -> None:
        nonlocal done
        done += part
        progress(min(done / total, 1.0), f"{total} parts of a slice of {' × '.join(map(str, grid.shape))} points")

    return advance
