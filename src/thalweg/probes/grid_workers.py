"""grid_workers: the rows of a grid shared out among a few processes with one thread each."""

import contextlib
import multiprocessing
import pickle
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from thalweg.errors import ConfigError
from thalweg.objective import Objective
from thalweg.probes.grid import Grid
from thalweg.probes.grid_losses import Advance, GridLosses, grid_losses

_Worker = tuple[SpawnProcess, Connection]


def in_processes(objectives: Sequence[Objective], grid: Grid, workers: int, advance: Advance) -> list[GridLosses]:
    """Evaluate objectives on a grid in spawned processes: process i takes rows i, i + workers, ...

    Every process has one thread and a copy of the data. Which process takes a row changes nothing, so any number
    of workers of two and more gives the same numbers. Leaving early, by Ctrl-C too, ends the processes.

    Args:
        objectives: the landscapes.
        grid: the points.
        workers: number of processes.
        advance: as in `grid_losses`.

    Returns:
        What each objective gave, on all rows.

    Raises:
        ConfigError: an objective cannot be pickled, a process may not start others, or one died.
    """
    if multiprocessing.current_process().daemon:
        raise ConfigError(
            "Expected workers=1 in a process that may not start others. "
            f"Got {workers}, in {multiprocessing.current_process().name}. Let one side have the workers."
        )
    rows = [range(start, grid.shape[0], workers) for start in range(min(workers, grid.shape[0]))]
    packed = _packed(objectives, grid)
    started: list[_Worker] = []
    try:
        for _ in rows:
            _start(started)
        for (_, pipe), own in zip(started, rows, strict=True):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: `_collected` says so
                pipe.send_bytes(packed)
                pipe.send(own)
        found = _collected(started, advance)
    finally:
        for process, pipe in started:
            _stop(process, pipe)
    return [_merged([f[i] for f in found], rows, grid) for i in range(len(objectives))]


def _packed(objectives: Sequence[Objective], grid: Grid) -> bytes:
    """Copy what the processes need; a tensor sent as it is would be moved into shared memory for good."""
    try:
        return pickle.dumps((objectives, grid))
    except Exception as error:  # whatever a foreign object's pickling does
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ConfigError(
            f"Expected a module, a loss and data that can be pickled. Got {reason}. "
            "Define them in a module that can be imported (no lambda), or use workers=1."
        ) from error


def _start(started: list[_Worker]) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    started.append((process, ours))
    process.start()
    theirs.close()


def _stop(process: SpawnProcess, pipe: Connection) -> None:
    pipe.close()
    if process.pid is None:  # it never started
        return
    process.terminate()
    process.join(1)
    if process.is_alive():
        process.kill()
        process.join()
    process.close()


def _serve(pipe: Connection) -> None:
    """Evaluate what comes through the pipe; Ctrl-C is for the parent, which terminates us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):  # the parent is gone
        try:
            objectives, grid = pickle.loads(pipe.recv_bytes())
            rows = pipe.recv()
            answer: bytes = pickle.dumps([grid_losses(o, grid, rows, pipe.send) for o in objectives])
        except (EOFError, ConnectionResetError, BrokenPipeError):
            raise
        except Exception as error:  # it travels to the caller
            answer = _packed_error(error)
        pipe.send_bytes(answer)


def _packed_error(error: Exception) -> bytes:
    try:
        message = pickle.dumps(error)
        pickle.loads(message)
    except Exception:  # an exception whose constructor takes other arguments
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return message


def _collected(started: Sequence[_Worker], advance: Advance) -> list[list[GridLosses]]:
    """Wait for the answers, one per process, in the order of the processes."""
    answers: dict[int, list[GridLosses]] = {}
    while len(answers) < len(started):
        waiting = {place: pipe for place, (_, pipe) in enumerate(started) if place not in answers}
        ready = wait(list(waiting.values()))
        for place in [place for place, pipe in waiting.items() if pipe in ready]:
            try:
                answer = started[place][1].recv()
            except (EOFError, ConnectionResetError):
                raise _died(started[place][0]) from None
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, float):
                advance(answer)
            else:
                answers[place] = answer
    return [answers[place] for place in range(len(started))]


def _died(process: SpawnProcess) -> ConfigError:
    process.join(1)
    return ConfigError(
        f"Expected worker processes that live. Got one that ended with exit code {process.exitcode}. "
        "Call it under `if __name__ == '__main__':` in a script, see that memory suffices for a copy of the data "
        "in each, or use workers=1."
    )


def _merged(found: Sequence[GridLosses], rows: Sequence[Sequence[int]], grid: Grid) -> GridLosses:
    """Put the rows of the processes back into their places."""

    def placed(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = torch.empty(grid.shape, dtype=torch.float64)
        for part, own in zip(parts, rows, strict=True):
            whole[list(own)] = part
        return whole

    accuracies = [f.accuracy for f in found if f.accuracy is not None]
    ways = dict.fromkeys(way for f in found for way in f.ways)
    return GridLosses(placed([f.loss for f in found]), placed(accuracies) if accuracies else None, tuple(ways))
