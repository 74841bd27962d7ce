"""The one check on widths that every constructor of this room makes."""

from collections.abc import Iterable

from thalweg.errors import ConfigError


def checked_widths(what: str, widths: Iterable[int], *, at_least: int = 0) -> tuple[int, ...]:
    """Return widths as a tuple of positive integers.

    Args:
        what: the argument's name, for the message.
        widths: the widths.
        at_least: how many there must be.

    Raises:
        ConfigError: there are too few, or one is not a positive integer.

    Example:
        >>> checked_widths("widths", [1, 3, 1], at_least=2)
        (1, 3, 1)
    """
    found = tuple(widths)
    whole = all(isinstance(w, int) and not isinstance(w, bool) and w > 0 for w in found)
    if len(found) < at_least or not whole:
        raise ConfigError(
            f"Expected {what} as positive whole numbers, at least {at_least} of them. Got {found}. Change {what}."
        )
    return found
