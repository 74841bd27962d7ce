"""reporting: what a mini-batch training tells on its way, and what a user's function sees of it."""

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from thalweg.errors import ConfigError
from thalweg.training.naming import named
from thalweg.training.resumption import Randomness

Progress = Callable[[float, str], None]
Observe = Callable[[int, nn.Module], Mapping[str, float] | None]

# Seconds between two reports of progress within an epoch. Chosen by us.
_TOLD_EVERY = 0.5


class Teller:
    """Tells the progress of an epoch, at most every half second.

    Args:
        progress: called with the share of the work and a text; None tells nothing.
        epoch: of which epoch, counted from 0.
        epochs: of how many.
        num_batches: mini-batches of the epoch; None, if unknown, tells its end alone.
    """

    def __init__(self, progress: Progress | None, epoch: int, epochs: int, num_batches: int | None) -> None:
        self._progress, self._epoch, self._epochs, self._num_batches = progress, epoch, epochs, num_batches
        self._last = time.monotonic()

    def step(self, losses: list[Tensor]) -> None:
        """Report within an epoch of known length."""
        if self._progress is None or self._num_batches is None or time.monotonic() - self._last < _TOLD_EVERY:
            return
        self._last = time.monotonic()
        share = min(len(losses) / self._num_batches, 1.0)
        self._progress((self._epoch + share) / self._epochs, self._text(float(losses[-1])))

    def end(self, loss: float) -> None:
        """Report the end of the epoch."""
        if self._progress is not None:
            self._progress((self._epoch + 1) / self._epochs, self._text(loss))

    def _text(self, loss: float) -> str:
        return f"epoch {self._epoch + 1} of {self._epochs}, loss {loss:.4g}"


class Observer:
    """Shows a training to a user's function between its epochs, and collects what that returns.

    Args:
        observe: called with the epochs done and the module; None sees nothing.
        randomness: that of the training, which is put aside meanwhile.
    """

    def __init__(self, observe: Observe | None, randomness: Randomness) -> None:
        self._observe, self._randomness = observe, randomness
        self.found: list[dict[str, float]] = []

    def look(self, epochs: int, module: nn.Module) -> None:
        """Call the function on a module that is training, in eval mode and without gradients.

        Args:
            epochs: how many are done; what was seen before is not looked at again.
            module: in train mode before and after.

        Raises:
            ConfigError: what the function returns are no numbers by name.
        """
        if self._observe is None or epochs < len(self.found):
            return
        module.eval()
        module.zero_grad(set_to_none=True)
        with self._randomness.aside(epochs + 1):  # 0 is the start of the training's own
            seen = self._observe(epochs, module)
        module.train()
        module.zero_grad(set_to_none=True)
        try:
            self.found.append({str(name): _number(value) for name, value in dict(seen or {}).items()})
        except (TypeError, ValueError, RuntimeError) as error:  # a tensor of several numbers: RuntimeError
            raise ConfigError(
                f"Expected observe to return numbers by name, or None. Got {seen!r:.80}. Return a dict of floats."
            ) from error

    def take_up(self, found: list[dict[str, float]], epochs: int) -> None:
        """Go on from what was seen of so many epochs.

        Raises:
            ValueError: something of it was not seen.
        """
        if self._observe is None:
            return
        if len(found) != epochs + 1:
            raise ValueError(f"Expected {epochs + 1} observations. Got {len(found)}. Observe from the start.")
        self.found = list(found)


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def observer_words(observe: Observe | None) -> tuple[Any, ...]:
    """Name a function that observes as `named` does, but without the addresses of what a `functools.partial` holds.

    Args:
        observe: the function; of None there are no words.

    Example:
        >>> observer_words(None)
        ()
    """
    return () if observe is None else (re.sub(r" at 0x[0-9a-fA-F]+", "", named(observe)),)
