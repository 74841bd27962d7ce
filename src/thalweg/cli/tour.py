"""`thalweg tour`: every recipe in its quick size, one table, one report."""

from typing import Annotated

import typer

from thalweg.cli.faults import CLAIM_FAILS, exit_code
from thalweg.cli.launch import carry_out, reported, sorted_out, timed
from thalweg.cli.options import AsJson, DataRoot, Device, Force, StoreFolder, Workers, checked_device
from thalweg.cli.verdicts import json_of, print_json, show_claims, tally, verdict_of

_PRESET = "quick"


def tour(
    data_root: DataRoot = None,
    device: Device = "cpu",
    out: StoreFolder = None,
    workers: Workers = 2,
    force: Force = False,
    as_json: AsJson = False,
    opens: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
) -> None:
    """Run every built-in recipe in its quick size: minutes on a laptop, ends with one report."""
    from thalweg.lab.catalogue import find_recipes
    from thalweg.lab.jobs import Job
    from thalweg.lab.runs.store import store_at
    from thalweg.lab.wording import in_time

    clock, store, device = timed(), store_at(out), checked_device(device)
    jobs = [
        Job(
            entry.reference,
            _PRESET,
            entry.recipe.preset(_PRESET).parameters(),
            store.root,
            device,
            data_root,
            force,
        )
        for entry in find_recipes()
        if _PRESET in entry.recipe.presets
    ]
    runs, errors = sorted_out(carry_out(jobs, workers, "tour")) if jobs else ([], [])
    report = reported(runs, store.reports / "tour.html", "A tour of the landscape") if runs else None
    if as_json:
        print_json(
            {
                "recipes": [json_of([run], run.manifest.seconds, None) for run in runs],
                "seconds": round(clock(), 3),
                "report": str(report) if report else None,
            }
        )
    else:
        if runs:
            show_claims(runs)
        typer.echo(f"{len(runs)} of {len(jobs)} recipes: {tally(runs)} ({in_time(clock())})")
        if report:
            typer.echo(f"report: {report}")
    if report and opens:
        typer.launch(report.as_uri())
    if errors:
        raise typer.Exit(max(map(exit_code, errors)) if len(set(map(exit_code, errors))) == 1 else 1)
    if verdict_of(runs) == "fails":
        raise typer.Exit(CLAIM_FAILS)
