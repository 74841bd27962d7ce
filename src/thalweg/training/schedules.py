"""schedules: what the learning rate is multiplied by as a training goes on."""

import math
from collections.abc import Callable

from thalweg.errors import ConfigError

Schedule = Callable[[float], float]
"""Gives the factor on the learning rate at a share of the epochs, in [0, 1)."""


def paper_schedule(share: float) -> float:
    """Give 1 up to half of the epochs, then fall linearly to 0.01 at 90 % of them, and stay there.

    Args:
        share: of the epochs that are done, in [0, 1).

    Returns:
        The factor.

    Source:
        The code of anokhin2020lowloss (arXiv 2008.00741), which took it from that of garipov2018loss
        (arXiv 1802.10026); neither paper's text has it.

    Example:
        >>> [round(paper_schedule(share), 3) for share in (0.0, 0.5, 0.7, 0.9, 0.99)]
        [1.0, 1.0, 0.505, 0.01, 0.01]
    """
    return 1.0 - 0.99 * min(max((share - 0.5) / 0.4, 0.0), 1.0)


def cosine_schedule(share: float) -> float:
    """Fall from 1 to 0 along half a cosine: (1 + cos(π·share)) / 2.

    Args:
        share: of the epochs that are done, in [0, 1).

    Returns:
        The factor.

    Source:
        Loshchilov & Hutter 2017 (arXiv 1608.03983), equation 5, without restarts.

    Example:
        >>> cosine_schedule(0.0), round(cosine_schedule(0.5), 12)
        (1.0, 0.5)
    """
    return (1.0 + math.cos(math.pi * share)) / 2.0


def constant_schedule(share: float) -> float:
    """Give 1 at every share of the epochs.

    Args:
        share: of the epochs that are done, in [0, 1).

    Returns:
        The factor.
    """
    del share
    return 1.0


SCHEDULES: dict[str, Schedule] = {
    "paper": paper_schedule,
    "constant": constant_schedule,
    "cosine": cosine_schedule,
}


def learning_rate_factors(schedule: str | Schedule, epochs: int) -> tuple[float, ...]:
    """Spell out a schedule: its factor for every epoch, at the share of the epochs that lie before it.

    Args:
        schedule: "paper", "constant", "cosine", or a function of the share.
        epochs: how many.

    Returns:
        One factor for each epoch.

    Raises:
        ConfigError: an unknown name, fewer than one epoch, or a factor that is negative or not finite.

    Example:
        >>> [round(factor, 2) for factor in learning_rate_factors("paper", 5)]
        [1.0, 1.0, 1.0, 0.75, 0.26]
    """
    if epochs < 1:
        raise ConfigError(f"Expected at least one epoch. Got {epochs}. Choose a positive number.")
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ConfigError(
                f"Expected a schedule out of {', '.join(SCHEDULES)}, or a function. Got {schedule!r}. Choose one."
            )
        schedule = SCHEDULES[schedule]
    factors = tuple(float(schedule(epoch / epochs)) for epoch in range(epochs))
    wrong = next((f for f in factors if not (math.isfinite(f) and f >= 0)), None)
    if wrong is not None:
        raise ConfigError(f"Expected a schedule of factors that are finite and not negative. Got {wrong}. Mend it.")
    return factors
