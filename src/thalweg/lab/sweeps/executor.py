"""The socket for whatever runs jobs: this process, a few others, a cluster."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

J = TypeVar("J")
R = TypeVar("R")


class Executor(Protocol):
    """Runs a function on jobs and gives back every job with its result or the exception it raised."""

    def run(self, function: Callable[[J], R], jobs: Iterable[J]) -> Iterator[tuple[J, R | Exception]]:
        """Run `function` on each job; results come as they are finished, each job exactly once.

        Args:
            function: defined in a module, so that another process can import it.
            jobs: what to run it on; plain values that can be pickled.
        """
        ...
