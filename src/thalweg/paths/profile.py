"""profile: loss and accuracy along a path, on training and test data, and the worst point of it."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from thalweg.batching import Batch
from thalweg.errors import ConfigError
from thalweg.objective import Objective
from thalweg.paths.evaluation import Course, Curve, Runner, Spot, recut, theta_at
from thalweg.paths.path import Path
from thalweg.paths.reuse import Reuse
from thalweg.paths.statistics import Statistics
from thalweg.paths.worst import Worst, search
from thalweg.probes.accuracy import Classes

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Lowest:
    """The least accuracy along a path.

    Args:
        t: where.
        accuracy: a fraction.
    """

    t: float
    accuracy: float


@dataclass(frozen=True)
class Profile:
    """What a path costs.

    Losses that are not numbers are given as infinite, and `status` says so.

    Args:
        times: every t that was evaluated, ascending, from 0 to 1.
        train_loss: of the training objective at the times.
        train_accuracy: None unless targets are numbers of classes.
        test_loss: None without a test objective.
        test_accuracy: None without one, or unless targets are numbers of classes.
        leg: on which leg each t lies; a joint counts as the end of the leg before.
        is_on_grid: the t of the grid; the others were added by the search for the worst point.
        worst: the highest training loss.
        statistics: how the running statistics of normalisation layers were set.
        status: "finite", or how many losses are not.
        reuse: what was computed once for several t.
        seconds: how long it took.
    """

    times: Float[Tensor, " times"]
    train_loss: Float[Tensor, " times"]
    train_accuracy: Float[Tensor, " times"] | None
    test_loss: Float[Tensor, " times"] | None
    test_accuracy: Float[Tensor, " times"] | None
    leg: Int[Tensor, " times"]
    is_on_grid: Bool[Tensor, " times"]
    worst: Worst
    statistics: str
    status: str
    reuse: str
    seconds: float

    @property
    def end_losses(self) -> tuple[float, float]:
        """Training loss at t = 0 and t = 1."""
        return float(self.train_loss[0]), float(self.train_loss[-1])

    @property
    def barrier(self) -> float:
        """Greatest height of the training loss above the straight line between its ends."""
        return _barrier(self.times, self.train_loss)

    @property
    def test_barrier(self) -> float | None:
        """The same of the test loss."""
        return None if self.test_loss is None else _barrier(self.times, self.test_loss)

    @property
    def worst_train_accuracy(self) -> Lowest | None:
        """Least training accuracy over all times."""
        return _lowest(self.times, self.train_accuracy)

    @property
    def worst_test_accuracy(self) -> Lowest | None:
        """Least test accuracy over all times."""
        return _lowest(self.times, self.test_accuracy)

    def rows(self) -> list[dict[str, float | int | bool]]:
        """Give one flat row for each t, for tables and figures."""
        columns = {
            "t": self.times,
            "leg": self.leg,
            "train_loss": self.train_loss,
            "train_accuracy": self.train_accuracy,
            "test_loss": self.test_loss,
            "test_accuracy": self.test_accuracy,
            "is_on_grid": self.is_on_grid,
        }
        lists = {name: column.tolist() for name, column in columns.items() if column is not None}
        return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def profile(  # noqa: PLR0913 - one question; each keyword is one choice of how to measure it
    path: Path | Curve,
    objective: Objective,
    *,
    test: Objective | None = None,
    points: int = 61,
    times: Sequence[float] | Tensor | None = None,
    refine: bool = True,
    resolution: float = 1e-3,
    statistics: Literal["re-estimate", "own"] = "re-estimate",
    statistics_samples: int = 2000,
    reuse: bool = True,
    progress: Progress | None = None,
) -> Profile:
    """Measure loss and accuracy along a path, and search its worst point.

    All t are evaluated in one pass over the data, and the search takes a few more. At t = 0 and 1 the networks are
    those of the path's ends, running statistics included, so that they have the loss and accuracy of the
    checkpoints.

    Args:
        path: a path, or a function from t, of shape (times,), to theta, of shape (times, params).
        objective: the landscape on the training data.
        test: the same network's on test data.
        points: of the grid, about: both ends of every leg and equally many within each. Default: 61, as Garipov et
            al. (arXiv 1802.10026) and Anokhin & Yarotsky for VGG16.
        times: the t of the grid instead; 0 and 1 are added.
        refine: search the worst point between the points of the grid.
        resolution: a maximum is bracketed within this share of its leg's duration. Our choice.
        statistics: of normalisation layers within the path: "re-estimate", from the first training samples at each
            t, or "own": straight from those of one end to those of the other.
        statistics_samples: how many samples. Our choice: 2,000 give a channel's mean to 2 % of its deviation.
        reuse: compute once what does not change along a leg; each way is checked against the plain one first.
        progress: told the fraction done and what is being done.

    Returns:
        The profile.

    Raises:
        ShapeError: the path is of another network, or a t is outside [0, 1].
        ConfigError: fewer than 2 points, or an unknown choice of statistics.
        DataError: no target counts in a loss.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 5, who report the worst point of a uniform grid;
    the search between its points is ours.

    Example:
        >>> from torch import nn
        >>> from thalweg.paths import linear
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> objective = Objective(nn.Linear(1, 1, bias=False), nn.MSELoss(), (x, 0 * x))
        >>> path = linear(objective.space, torch.tensor([-1.0]), torch.tensor([2.0]))
        >>> found = profile(path, objective, points=4)
        >>> found.end_losses, found.worst.t, found.barrier
        ((2.5, 10.0), 1.0, 0.0)
    """
    if points < 2:
        raise ConfigError(f"Expected at least 2 points. Got {points}. Ask for more.")
    measurement = _Measurement(path, objective, test, statistics, statistics_samples, progress, reuse=reuse)
    started = time.perf_counter()
    grid = measurement.grid(points, times)
    measurement.train(grid, "along the path")
    if refine:
        measurement.refine(resolution)
    measurement.test()
    return measurement.profile(set(grid), started, is_refined=refine)


@dataclass
class _Values:
    """Losses and accuracies by t."""

    loss: dict[float, float] = field(default_factory=dict)
    accuracy: dict[float, float] = field(default_factory=dict)
    num_not_finite: int = 0


class _Measurement:
    """A profile in the making."""

    def __init__(
        self,
        path: Path | Curve,
        objective: Objective,
        test: Objective | None,
        statistics: str,
        num_samples: int,
        progress: Progress | None,
        *,
        reuse: bool,
    ) -> None:
        self._path, self._objective, self._test = path, objective, test
        self._course, self._runner = Course(path, objective), Runner(objective)
        self._test_course = Course(path, test) if test is not None else None
        self._reuse = Reuse(self._runner, is_wanted=reuse and objective.mode == "eval")
        self._statistics = Statistics(self._runner, self._course, objective, statistics, num_samples, self._reuse)
        self._buffers: dict[float, Mapping[str, Tensor]] = {}
        self._spots: dict[float, Spot] = {}
        self._trained, self._tested = _Values(), _Values()
        self._progress, self._is_reused = progress, reuse

    def grid(self, points: int, times: Sequence[float] | Tensor | None) -> list[float]:
        """Give the t of the grid, ascending, with 0 and 1."""
        if times is not None:
            return sorted({0.0, 1.0, *(float(t) for t in times)})
        if self._course.path is not None:
            return list(self._course.path.grid(points))
        return [k / (points - 1) for k in range(points)]

    def train(self, times: Sequence[float], what: str) -> None:
        """Evaluate the training objective."""
        spots = [self._course.spot(t) for t in times]
        buffers = self._statistics.at(spots)
        for spot, found in zip(spots, buffers, strict=True):
            self._spots[spot.t], self._buffers[spot.t] = spot, found
        _measure(
            self._runner, self._reuse, self._course, self._objective, spots, buffers, self._trained, self._told(what)
        )

    def refine(self, resolution: float) -> None:
        """Search the worst point."""

        def known() -> tuple[list[float], list[float]]:
            times = sorted(self._trained.loss)
            return times, [self._trained.loss[t] for t in times]

        def evaluate(times: Sequence[float]) -> None:
            self.train(times, "around the worst point")

        search(known, evaluate, self._course.intervals, resolution)

    def test(self) -> None:
        """Evaluate the test objective where the training objective was."""
        if self._test is None or self._test_course is None:
            return
        times = sorted(self._spots)
        spots, runner = [self._spots[t] for t in times], Runner(self._test)
        buffers = [
            {n: b.to(self._test.device, self._test.dtype) if b.is_floating_point() else b for n, b in own.items()}
            for own in (self._buffers[t] for t in times)
        ]
        told = self._told("on the test data")
        reuse = Reuse(runner, is_wanted=self._is_reused and self._test.mode == "eval")
        _measure(runner, reuse, self._test_course, self._test, spots, buffers, self._tested, told)

    def profile(self, grid: set[float], started: float, *, is_refined: bool) -> Profile:
        """Put everything together."""
        times = sorted(self._spots)
        loss = [self._trained.loss[t] for t in times]
        top = max(range(len(times)), key=lambda k: loss[k])
        around = [abs(times[top] - times[k]) for k in (top - 1, top + 1) if 0 <= k < len(times)]
        was_searched = is_refined and math.isfinite(loss[top])
        worst = Worst(times[top], loss[top], self._spots[times[top]].leg, was_searched, max(around))
        lost = self._trained.num_not_finite + self._tested.num_not_finite
        return Profile(
            times=torch.tensor(times, dtype=torch.float64),
            train_loss=torch.tensor(loss, dtype=torch.float64),
            train_accuracy=_column(self._trained.accuracy, times),
            test_loss=_column(self._tested.loss, times),
            test_accuracy=_column(self._tested.accuracy, times),
            leg=torch.tensor([self._spots[t].leg for t in times]),
            is_on_grid=torch.tensor([t in grid for t in times]),
            worst=worst,
            statistics=self._statistics.in_words,
            status=f"{lost} losses are not finite" if lost else "finite",
            reuse=self._reuse.in_words,
            seconds=time.perf_counter() - started,
        )

    def _told(self, what: str) -> Callable[[float], None]:
        return lambda fraction: self._progress(fraction, what) if self._progress is not None else None


def _measure(
    runner: Runner,
    reuse: Reuse,
    course: Course,
    objective: Objective,
    spots: Sequence[Spot],
    buffers: Sequence[Mapping[str, Tensor]],
    values: _Values,
    told: Callable[[float], None],
) -> None:
    """Evaluate an objective at some spots."""
    source = recut(objective, theta_at(course, spots[len(spots) // 2], objective), runner)
    steps = _Steps(told, len(spots), sum(1 for _ in source.weighted_batches()) if source.in_memory else None)
    losses, counts = torch.zeros(2, len(spots), dtype=torch.float64)
    weights = [0.0] * len(spots)
    counted = [0] * len(spots)
    classes: dict[int, Classes] = {}

    def visit(number: int, weight: float, batch: Batch, outputs: Any) -> None:
        losses[number] += weight * objective.reduced(outputs, batch[1]).cpu().double()
        weights[number] += weight
        if id(batch) not in classes:
            classes[id(batch)] = Classes.of(objective.loss, outputs, batch[1])
        kind = classes[id(batch)]
        counts[number] += kind.correct(outputs, batch[1]).cpu()
        counted[number] += kind.count(batch[1])
        steps.advance()

    def batches() -> Iterator[tuple[float, Batch]]:
        for pair in source.weighted_batches():
            classes.clear()
            yield pair

    reuse.sweep(course, spots, buffers, batches, visit)
    for number, spot in enumerate(spots):
        loss = float(losses[number]) / (1.0 if objective.reduction == "sum" else weights[number])
        values.num_not_finite += not math.isfinite(loss)
        values.loss[spot.t] = float("inf") if math.isnan(loss) else loss
        if counted[number]:
            values.accuracy[spot.t] = float(counts[number]) / counted[number]
    told(1.0)


@dataclass
class _Steps:
    """Tells the fraction done; of a loader, whose length is not known, that of the first batch."""

    told: Callable[[float], None]
    num_spots: int
    num_batches: int | None
    done: int = 0

    def advance(self) -> None:
        self.done += 1
        self.told(min(1.0, self.done / (self.num_spots * (self.num_batches or 1))))


def _column(values: Mapping[float, float], times: Sequence[float]) -> Tensor | None:
    return torch.tensor([values[t] for t in times], dtype=torch.float64) if len(values) == len(times) else None


def _barrier(times: Tensor, losses: Tensor) -> float:
    chord = losses[0] + times * (losses[-1] - losses[0])
    return float((losses - chord).max())


def _lowest(times: Tensor, accuracies: Tensor | None) -> Lowest | None:
    if accuracies is None:
        return None
    place = int(accuracies.argmin())
    return Lowest(float(times[place]), float(accuracies[place]))
