"""Ranks: how well one quantity orders another."""

from collections.abc import Sequence
from math import sqrt


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Compute Spearman's correlation of ranks; equal values share the mean of their ranks.

    Args:
        x: values of one quantity.
        y: those of the other, in the same order.

    Returns:
        In [-1, 1]; 0 where one of them is constant.

    Example:
        >>> spearman([1, 2, 3, 4], [10, 20, 40, 30]), spearman([1, 2], [5, 5])
        (0.8, 0.0)
    """
    one, two = _ranks(x), _ranks(y)
    middle = (len(one) - 1) / 2
    both = sum((a - middle) * (b - middle) for a, b in zip(one, two, strict=True))
    spread = sqrt(sum((a - middle) ** 2 for a in one) * sum((b - middle) ** 2 for b in two))
    return round(both / spread, 12) if spread else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]
