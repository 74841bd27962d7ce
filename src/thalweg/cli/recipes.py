"""`thalweg recipes`: what can be run."""

import typer

from thalweg.cli.verdicts import show_rows
from thalweg.lab.catalogue import find_recipes


def recipes() -> None:
    """List the built-in recipes."""
    entries = find_recipes()
    rows = [
        [
            e.recipe.name,
            e.recipe.title,
            e.recipe.source,
            " ".join(e.recipe.presets),
            str(len(e.recipe.claims)),
        ]
        for e in entries
    ]
    show_rows(["recipe", "title", "source", "presets", "claims"], rows)
    if entries:
        typer.echo(f"\nRun one: thalweg run {entries[0].recipe.name} quick")
