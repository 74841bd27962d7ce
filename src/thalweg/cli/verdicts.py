"""Verdicts on stdout: a table on a terminal, aligned text elsewhere, one JSON object where asked."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import typer

from thalweg.lab.claims import ClaimResult, Verdict, overall
from thalweg.lab.runs.run import Run
from thalweg.lab.wording import MARKS, in_words

_COLOURS: dict[Verdict, str] = {"holds": "green", "fails": "bold red", "untested": "bright_black"}


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows: a table on a terminal, else text in aligned columns, one line per row."""
    if sys.stdout.isatty():
        _show_table(columns, rows)
        return
    flat = [[" ".join(cell.split()) for cell in row] for row in ([c.upper() for c in columns], *rows)]
    widths = [max(len(row[i]) for row in flat) for i in range(len(columns))]
    for row in flat:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        word = row[0].split(" ")[-1]
        table.add_row(
            Text(row[0], style=next((s for v, s in _COLOURS.items() if v == word), "")), *map(Text, row[1:])
        )
    Console(file=sys.stdout).print(table)


def show_claims(runs: Sequence[Run]) -> None:
    """Print one row per claim; over several runs of one recipe, how many of them hold."""
    names = {run.manifest.recipe for run in runs}
    columns = ["verdict", "claim", "measured", "expected", "criterion"]
    if len(runs) > 1 and len(names) == 1:
        rows = [
            [f"{MARKS[c['verdict']]} {c['verdict']}", c["sentence"], c["held"], c["expected"], c["criterion"]]
            for c in over_seeds(runs)
        ]
    else:
        rows = [_row(claim) for run in runs for claim in run.manifest.claims]
        if len(names) > 1:
            columns.insert(1, "recipe")
            owners = [run.manifest.recipe for run in runs for _ in run.manifest.claims]
            rows = [[row[0], owner, *row[1:]] for row, owner in zip(rows, owners, strict=True)]
    show_rows(columns, rows)
    for run in runs:
        for claim in run.manifest.claims:
            if claim.verdict == "fails" and claim.reason:
                typer.echo(f"{run.manifest.recipe}: {claim.id}: {claim.reason}")


def _row(claim: ClaimResult) -> list[str]:
    verdict = f"{MARKS[claim.verdict]} {claim.verdict}"
    return [verdict, claim.sentence, in_words(claim.measured), claim.expected, claim.criterion]


def over_seeds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Sum up each claim over runs of one recipe that differ in the seed."""
    summed = []
    for results in zip(*(run.manifest.claims for run in runs), strict=True):
        counts = Counter(result.verdict for result in results)
        summed.append(
            {
                "id": results[0].id,
                "sentence": results[0].sentence,
                "measured": [result.measured for result in results],
                "expected": results[0].expected,
                "criterion": results[0].criterion,
                "verdict": overall(result.verdict for result in results),
                "held": f"{counts['holds']} of {len(results)} seeds hold"
                + (f", {counts['untested']} untested" if counts["untested"] else ""),
            }
        )
    return summed


def tally(runs: Sequence[Run]) -> str:
    """Word how many claims hold, over all runs."""
    counts = Counter(claim.verdict for run in runs for claim in run.manifest.claims)
    tested = counts["holds"] + counts["fails"]
    untested = f", {counts['untested']} untested" if counts["untested"] else ""
    return f"{counts['holds']} of {tested} tested claims hold{untested}"


def verdict_of(runs: Sequence[Run]) -> Verdict:
    """Sum up the verdicts of all claims of some runs."""
    return overall(claim.verdict for run in runs for claim in run.manifest.claims)


def json_of(runs: Sequence[Run], seconds: float, report: str | None) -> dict[str, Any]:
    """Describe the runs of one recipe as one JSON object.

    For one run: `run` is its id, `measured` the measured value. Over several seeds: `run` and each `measured`
    are lists in the order of the seeds, and a claim's `verdict` is "fails" if it fails for any.
    """
    first = runs[0].manifest
    keys = ("id", "sentence", "measured", "expected", "criterion", "verdict")
    if len(runs) == 1:
        claims = [{key: getattr(claim, key) for key in keys} for claim in first.claims]
    else:
        claims = [{key: claim[key] for key in keys} for claim in over_seeds(runs)]
    return {
        "recipe": first.recipe,
        "preset": first.preset,
        "run": first.id if len(runs) == 1 else [run.id for run in runs],
        "seconds": round(seconds, 3),
        "claims": claims,
        "report": report,
    }


def print_json(value: object) -> None:
    """Print one line of JSON, the last on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))
