"""Launching: jobs through the executor, with progress, and the report of what they left."""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from thalweg.cli.faults import lines

if TYPE_CHECKING:
    from thalweg.lab.jobs import Job
    from thalweg.lab.progress import Progress
    from thalweg.lab.runs.run import Run


def carry_out(jobs: "Sequence[Job]", workers: int, title: str) -> "list[Run | Exception]":
    """Do jobs and show their progress.

    Args:
        jobs: what to do.
        workers: number of processes; 1 works in this one.
        title: what the progress is of.

    Returns:
        For each job, in their order, its run or what it raised.
    """
    from thalweg.lab.jobs import perform
    from thalweg.lab.progress import shown_progress
    from thalweg.lab.sweeps.local import LocalExecutor

    place = {id(job): index for index, job in enumerate(jobs)}
    results: dict[int, Run | Exception] = {}
    with shown_progress(title) as report:
        inner: Progress = _share_of(report, results, len(jobs))
        function: Callable[[Job], Run] = perform
        if workers == 1:
            function = partial(perform, progress=inner)
        else:
            report(0.0, f"0 of {len(jobs)} done")
        for job, result in LocalExecutor(workers).run(function, jobs):
            results[place[id(job)]] = result
            num_failed = sum(isinstance(r, Exception) for r in results.values())
            failed = f", {num_failed} failed" if num_failed else ""
            report(len(results) / len(jobs), f"{len(results)} of {len(jobs)} done{failed}")
    return [results[index] for index in range(len(jobs))]


def _share_of(report: "Progress", finished: "dict[int, Run | Exception]", total: int) -> "Progress":
    """Turn the progress of one job into its share of all."""

    def inner(fraction: float, text: str) -> None:
        share = (len(finished) + min(max(fraction, 0.0), 1.0)) / total
        report(min(share, 0.999), text)  # 1 is reported when the last run is stored

    return inner


def sorted_out(results: "Sequence[Run | Exception]") -> "tuple[list[Run], list[Exception]]":
    """Part the runs from the errors, and tell the errors on stderr.

    Raises:
        Exception: the only result is an error.
    """
    from thalweg.lab.runs.run import Run

    if len(results) == 1 and isinstance(results[0], Exception):
        raise results[0]
    runs = [result for result in results if isinstance(result, Run)]
    errors = [result for result in results if isinstance(result, Exception)]
    for error in errors:
        for line in lines(error):
            typer.echo(line, err=True)
    return runs, errors


def reported(runs: "Sequence[Run]", path: Path, title: str | None = None) -> Path:
    """Write the report of some runs, and tell on stderr what could not be drawn.

    Raises:
        StoreError: the report cannot be written.
    """
    from thalweg.lab.report.page import section_of, write_report

    sections = [section_of(run) for run in runs]
    for section in sections:
        if section.note:
            typer.echo(f"warning: {section.manifest.recipe}: {section.note}", err=True)
    return write_report(path, sections, title).resolve()


def import_from_here() -> None:
    """Let `module:NAME` find a user's own recipe in the folder where they work."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def timed() -> Callable[[], float]:
    """Start a clock; call it for the seconds since."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start
