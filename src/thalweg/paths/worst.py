"""worst: the highest point of a path, searched between the points of a grid."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Evaluate = Callable[[Sequence[float]], None]

# Maxima of the grid that are looked at: at most so many, and within this share of the range of the greatest. Our
# choice: paths of the literature have one or two maxima a leg.
_MOST_MAXIMA, _SHARE_OF_RANGE = 3, 0.05
# Rounds of a search, each one pass over the data. Our choice: a parabola needs two to four.
_MOST_ROUNDS = 16
# Rounds after which halves of the bracket are tried as well: a parabola that converges has done so by then.
_PATIENCE = 3


@dataclass(frozen=True)
class Worst:
    """The highest point of a path.

    Args:
        t: where.
        loss: how high; infinite where a loss is infinite or not a number.
        leg: on which leg.
        is_refined: whether it was searched between the points of the grid.
        within: a maximum lies at most this far away in t, if the loss has one maximum between the neighbouring
            points.
    """

    t: float
    loss: float
    leg: int
    is_refined: bool
    within: float


def maxima(times: Sequence[float], losses: Sequence[float]) -> list[int]:
    """List the largest local maxima of a grid, the largest first.

    Args:
        times: ascending.
        losses: at the times.

    Returns:
        Positions; none if the losses are all the same.
    """
    top, bottom = max(losses), min(losses)
    if top == bottom:
        return []
    high = [float("-inf"), *losses, float("-inf")]
    found = [
        k
        for k, loss in enumerate(losses)
        if high[k] <= loss >= high[k + 2]
        and loss >= top - _SHARE_OF_RANGE * (top - bottom)
        and (k == 0 or loss > losses[k - 1])
    ]
    return sorted(found, key=lambda k: -losses[k])[:_MOST_MAXIMA]


def search(
    known: Callable[[], tuple[Sequence[float], Sequence[float]]],
    evaluate: Evaluate,
    intervals: Sequence[tuple[float, float]],
    resolution: float,
) -> None:
    """Evaluate points until each of the largest maxima is bracketed within `resolution` of its leg.

    Within a leg the loss is smooth, so the vertex of the parabola through three points is tried, with a point on
    either side of it; a joint may be a kink and is looked at from both of its legs. All maxima share a pass.

    Args:
        known: gives the times so far, ascending, and their losses.
        evaluate: evaluates further times.
        intervals: t at which each leg begins and ends.
        resolution: width of a bracket, as a share of its leg's duration.
    """
    times, losses = known()
    brackets = [
        bracket
        for k in maxima(times, losses)
        for bracket in _brackets(times[max(k - 1, 0)], times[k], times[min(k + 1, len(times) - 1)], intervals)
    ]
    for attempt in range(_MOST_ROUNDS):
        wanted: dict[float, None] = {}
        times, losses = known()
        if max(losses) == float("inf"):
            return
        for low, high, start, end in brackets:
            first, last = bisect_left(times, low), bisect_left(times, high)
            if first >= len(times) or times[first] != low or times[last] != high:
                wanted |= dict.fromkeys((low, high))  # a joint that was not on the grid
                continue
            step = resolution * (end - start)
            wanted |= dict.fromkeys(
                _proposals(times[first : last + 1], losses[first : last + 1], step, is_slow=attempt >= _PATIENCE)
            )
        fresh = sorted(t for t in wanted if t not in set(times))
        if not fresh:
            return
        evaluate(fresh)


def _brackets(
    low: float, middle: float, high: float, intervals: Sequence[tuple[float, float]]
) -> list[tuple[float, float, float, float]]:
    """Cut the surroundings of a maximum at the joints: low, high, and the leg's start and end."""
    ends = [end for _, end in intervals]
    found = []
    for start, end in intervals[bisect_left(ends, low) : bisect_left(ends, high) + 1]:
        left, right = max(low, start), min(high, end)
        if left < right and (left <= middle <= right):
            found.append((left, right, start, end))
    return found


def _proposals(times: Sequence[float], losses: Sequence[float], step: float, *, is_slow: bool) -> list[float]:
    """Say which times of one leg to look at next; none once the highest one is bracketed."""
    top = max(range(len(times)), key=lambda k: losses[k])
    t = times[top]
    left = times[top - 1] if top else None
    right = times[top + 1] if top + 1 < len(times) else None
    wide = [other for other in (left, right) if other is not None and abs(other - t) > step]
    if not wide:
        return []
    halves = [(t + other) / 2 for other in wide]
    if left is None or right is None:
        return [t + step / 2 * (1 if left is None else -1), *halves]
    vertex = _vertex((left, t, right), (losses[top - 1], losses[top], losses[top + 1]))
    near = (
        [vertex + side * step / 2 for side in (-1, 0, 1)]
        if abs(vertex - t) > step / 4
        else [t - step / 2, t + step / 2]
    )
    inside = [p for p in near if left < p < right]
    return inside + (halves if is_slow or not inside else [])


def _vertex(times: tuple[float, float, float], losses: tuple[float, float, float]) -> float:
    """Give the top of the parabola through three points; the middle one where there is none."""
    (a, b, c), (fa, fb, fc) = times, losses
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    if left == right:
        return b
    return b - ((b - a) * left - (b - c) * right) / (2 * (left - right))
