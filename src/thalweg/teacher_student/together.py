"""together: several students in training at a time, each in a thread of its own."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import torch

from thalweg.errors import ConfigError
from thalweg.teacher_student.runs import Run

# Seconds between two looks at how far the threads are. Chosen by us.
_LOOKS_EVERY = 0.25


class _Stopped(Exception):
    """The training is over for another reason."""


def workers_of(workers: int | None, count: int, device: torch.device, *, are_apart: bool) -> int:
    """Choose how many students train at a time.

    Args:
        workers: what was asked for; None: as many as torch has threads, on the CPU, where sources are apart.
        count: of students.
        device: where they are.
        are_apart: whether sources are known to share nothing.

    Raises:
        ConfigError: fewer than one was asked for.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"Expected at least one worker. Got {workers}. Leave it out for torch's number of threads.")
    usual = torch.get_num_threads() if device.type == "cpu" and are_apart else 1
    return min(usual if workers is None else workers, count)


def advance(
    runs: Sequence[Run], rates: Sequence[float], is_first: bool, tell: Callable[[int], None], workers: int
) -> None:
    """Take a step of every run for each learning rate.

    torch's operations hold no lock of Python's, so that threads run side by side where these are large enough. What
    comes of the runs depends on the number of workers by rounding alone, as some of torch's sums (those of BatchNorm)
    depend on its number of threads.

    Args:
        runs: the trainings.
        rates: learning rates.
        is_first: whether these are the first steps of all.
        tell: called in the calling thread with the steps taken, of all runs together.
        workers: threads. One: the calling thread does everything.

    Raises:
        Exception: what one of the runs raised; the others are left within a few steps.
    """
    taken = [0 if run.is_going else len(rates) for run in runs]  # one that diverged has no more to do
    if not any(run.is_going for run in runs):
        tell(sum(taken))
        return
    if workers == 1:
        for k, run in enumerate(runs):

            def count(steps: int, k: int = k) -> None:
                taken[k] = steps
                tell(sum(taken))

            run.advance(rates, is_first, count)
        return
    is_over, is_inference = threading.Event(), torch.is_inference_mode_enabled()

    def work(k: int) -> None:
        def count(steps: int) -> None:
            taken[k] = steps
            if is_over.is_set():
                raise _Stopped

        if not is_over.is_set():
            with torch.inference_mode(is_inference):  # a mode holds for its thread alone
                runs[k].advance(rates, is_first, count)

    each = max(1, torch.get_num_threads() // workers)
    with _threads_as_before(), ThreadPoolExecutor(workers, "student", torch.set_num_threads, (each,)) as pool:
        try:
            _await([pool.submit(work, k) for k in range(len(runs))], lambda: tell(sum(taken)))
        finally:
            is_over.set()


def _await(futures: Sequence[Future[None]], look: Callable[[], None]) -> None:
    """Wait for all, looking at them again and again; raise what the first one raised."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, _LOOKS_EVERY, FIRST_EXCEPTION)
        for future in done:
            future.result()
        look()


@contextlib.contextmanager
def _threads_as_before() -> Iterator[None]:
    """Restore how many threads torch uses: what a worker sets holds for threads to come too."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
