"""`thalweg report`: one page for stored runs."""

from pathlib import Path
from typing import Annotated

import typer

from thalweg.cli.launch import import_from_here, reported
from thalweg.cli.options import AsJson
from thalweg.cli.verdicts import print_json
from thalweg.errors import StoreError
from thalweg.lab.runs.store import store_at


def report(
    wanted: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="First digits of the runs' ids. Default: every finished run."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The file. Default: reports/report.html in the store."),
    ] = None,
    store_folder: Annotated[
        Path | None,
        typer.Option("--store", metavar="DIR", help="Run store. Default: $THALWEG_RUNS, else ./thalweg-runs."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML report of stored runs; it is self-contained and computes nothing."""
    import_from_here()
    store = store_at(store_folder)
    if wanted:
        runs = [store.search(start) for start in wanted]
    else:
        listing = store.runs()
        runs = list(listing.runs)
        for sentence in listing.damaged:
            typer.echo(f"warning: {sentence}", err=True)
    if not runs:
        raise StoreError(f"Expected finished runs in {store.root}. Got none. Run a recipe first: thalweg recipes.")
    title = None if len(runs) == 1 else f"{len(runs)} runs"
    path = reported(runs, out or store.reports / "report.html", title)
    if as_json:
        print_json({"report": str(path), "runs": [run.id for run in runs]})
    else:
        typer.echo(f"report: {path}")
