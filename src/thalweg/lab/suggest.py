"""The nearest of the right answers to a wrong one."""

import difflib
from collections.abc import Iterable


def did_you_mean(wrong: str, right: Iterable[str]) -> str:
    """Word a suggestion, or nothing if no right answer is near.

    Example:
        >>> did_you_mean("widht", ["width", "seed"])
        "Did you mean 'width'?"
    """
    near = difflib.get_close_matches(wrong, list(right), n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else ""
