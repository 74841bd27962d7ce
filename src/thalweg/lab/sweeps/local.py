"""Jobs on this machine: one after another here, or in a few supervised processes."""

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from thalweg.errors import ConfigError

J = TypeVar("J")
R = TypeVar("R")

# Workers share the cores between them, so none starts threads of its own.
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
_ATTEMPTS = 2  # our choice: one retry tells an accident (a kill) from a job that kills its worker


class WorkerDiedError(RuntimeError):
    """A job's worker was killed, twice."""


@dataclass(frozen=True)
class LocalExecutor:
    """Runs jobs on this machine.

    With one worker the jobs run here, in order. With more, each runs in a spawned process with one thread; a
    worker that dies is replaced and its job tried once more. Leaving the iteration early, by Ctrl-C too,
    terminates the workers.

    Args:
        workers: number of processes.

    Raises:
        ConfigError: fewer than one worker.
    """

    workers: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"Expected at least 1 worker. Got {self.workers}. Use --workers 1.")

    def run(self, function: Callable[[J], R], jobs: Iterable[J]) -> Iterator[tuple[J, R | Exception]]:
        """Run `function` on each job; see `Executor.run`."""
        if self.workers == 1:
            return _in_turn(function, jobs)
        return _in_parallel(function, list(jobs), self.workers)


def _in_turn(function: Callable[[J], R], jobs: Iterable[J]) -> Iterator[tuple[J, R | Exception]]:
    for job in jobs:
        try:
            result: R | Exception = function(job)
        except Exception as error:  # it is the caller's to judge; the other jobs go on
            result = error
        yield job, result


@dataclass
class _Worker:
    """A process, our end of its pipe, and the index of the job it holds."""

    process: SpawnProcess
    pipe: Connection
    index: int = -1

    def stop(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join(1)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


@dataclass
class _Pool:
    """The state of one parallel run."""

    function: Callable[[Any], Any]
    jobs: list[Any]
    queue: deque[int]
    attempts: dict[int, int] = field(default_factory=dict)
    workers: list[_Worker] = field(default_factory=list)

    def assign(self, worker: _Worker) -> None:
        """Hand the next job to an idle worker, or let it go if there is none."""
        if not self.queue:
            self.workers.remove(worker)
            worker.stop()
            return
        worker.index = self.queue.popleft()
        self.attempts[worker.index] = self.attempts.get(worker.index, 0) + 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died idle: `collect` sees it
            worker.pipe.send(self.jobs[worker.index])

    def start(self) -> None:
        worker = _spawn(self.function)
        self.workers.append(worker)
        self.assign(worker)

    def collect(self, worker: _Worker) -> tuple[Any, Any] | None:
        """Take a worker's result and give it a new job; None if it died and its job is tried again."""
        job, index = self.jobs[worker.index], worker.index
        try:
            result = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.workers.remove(worker)
            worker.stop()
            is_last = self.attempts[index] >= _ATTEMPTS
            if not is_last:
                self.queue.append(index)
            if self.queue:
                self.start()
            return (job, WorkerDiedError(f"the worker of {job!r} was killed twice")) if is_last else None
        self.assign(worker)
        return job, result


def _in_parallel(function: Callable[[J], R], jobs: list[J], workers: int) -> Iterator[tuple[J, R | Exception]]:
    pool = _Pool(function, jobs, deque(range(len(jobs))))
    try:
        for _ in range(min(workers, len(jobs))):
            pool.start()
        while pool.workers:
            ready = set(wait([worker.pipe for worker in pool.workers]))
            for worker in [w for w in pool.workers if w.pipe in ready]:
                done = pool.collect(worker)
                if done is not None:
                    yield done
    finally:
        for worker in pool.workers:
            worker.stop()


def _spawn(function: Callable[[Any], Any]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(function, theirs), daemon=True)
    with _environment(_ONE_THREAD):
        process.start()
    theirs.close()
    return _Worker(process, ours)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for a process that is started here; libraries read them when they are loaded."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    """Do jobs until the pipe closes; Ctrl-C is for the parent, which terminates us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            job = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            message = pickle.dumps(function(job))
        except Exception as error:  # it travels to the caller
            message = _packed(error)
        try:
            pipe.send_bytes(message)
        except BrokenPipeError:
            return


def _packed(error: Exception) -> bytes:
    """Pickle an exception; one that does not survive the journey is told in words."""
    try:
        message = pickle.dumps(error)
        pickle.loads(message)
    except Exception:  # whatever a foreign exception's pickling does
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return message
