"""`thalweg runs`: what is in the store."""

from collections import Counter

import typer

from thalweg.cli.options import AsJson, StoreFolder
from thalweg.cli.verdicts import print_json, show_rows
from thalweg.lab.claims import Verdict
from thalweg.lab.runs.run import Run
from thalweg.lab.runs.store import store_at
from thalweg.lab.wording import in_time

_WORDS: dict[Verdict, str] = {"holds": "hold", "fails": "fail", "untested": "untested"}


def runs(out: StoreFolder = None, as_json: AsJson = False) -> None:
    """List the runs of the store; damaged ones are named on stderr."""
    store = store_at(out)
    listing = store.runs()
    for sentence in listing.damaged:
        typer.echo(f"warning: {sentence}", err=True)
    found = sorted((*listing.runs, *listing.failed), key=lambda run: run.manifest.started)
    if as_json:
        rows = [_described(run) for run in found]
        print_json({"store": str(store.root.resolve()), "runs": rows, "damaged": list(listing.damaged)})
    elif found:
        show_rows(
            ["run", "recipe", "preset", "seed", "status", "claims", "took", "started"],
            [_row(r) for r in found],
        )
    else:
        typer.echo(f"No runs in {store.root.resolve()}.")


def _described(run: Run) -> dict[str, object]:
    manifest = run.manifest
    return {
        "run": run.id,
        "recipe": manifest.recipe,
        "preset": manifest.preset,
        "parameters": manifest.parameters,
        "status": manifest.status,
        "seconds": round(manifest.seconds, 3),
        "started": manifest.started,
        "claims": {claim.id: claim.verdict for claim in manifest.claims},
        "folder": str(run.folder.resolve()),
    }


def _row(run: Run) -> list[str]:
    manifest = run.manifest
    counts = Counter(claim.verdict for claim in manifest.claims)
    claims = ", ".join(f"{counts[v]} {word}" for v, word in _WORDS.items() if counts[v]) or "–"
    return [
        run.id[:12],
        manifest.recipe,
        manifest.preset,
        str(manifest.seed),
        manifest.status,
        claims,
        in_time(manifest.seconds),
        manifest.started[:19].replace("T", " "),
    ]
