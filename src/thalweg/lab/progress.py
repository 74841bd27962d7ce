"""Progress on stderr: a bar on a terminal, a plain line every ten seconds elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

Progress = Callable[[float, str], None]
"""Called with the fraction of the work that is done, in [0, 1], and a text."""

_EVERY_SECONDS = 10.0


@dataclass
class PlainProgress:
    """Writes one line at the start, every ten seconds, and at the end.

    Args:
        title: what is running.
        stream: where lines go.
        clock: seconds.
    """

    title: str
    stream: TextIO
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._started = self.clock()
        self._last = float("-inf")
        self._is_done = False

    def __call__(self, fraction: float, text: str) -> None:
        """Report that a fraction of the work, in [0, 1], is done."""
        now = self.clock()
        is_end = fraction >= 1
        if self._is_done or (now - self._last < _EVERY_SECONDS and not is_end):
            return
        self._last, self._is_done = now, is_end
        spent = now - self._started
        left = f", {spent / fraction - spent:.0f} s left" if 0 < fraction < 1 else ""
        share = min(max(fraction, 0.0), 1.0)
        self.stream.write(f"{self.title}: {share:4.0%} {text} ({spent:.0f} s{left})\n")
        self.stream.flush()


@contextlib.contextmanager
def shown_progress(title: str, stream: TextIO | None = None) -> Iterator[Progress]:
    """Show progress while a `with` block runs; it is reported to what the block is given.

    Args:
        title: what is running.
        stream: default stderr; results alone go to stdout.
    """
    stream = stream or sys.stderr
    if not stream.isatty():
        yield PlainProgress(title, stream)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Bars(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task(escape(title), total=1.0, text="")
        yield lambda fraction, text: bar.update(task, completed=fraction, text=escape(text))
