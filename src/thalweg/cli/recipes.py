"""`thalweg recipes`: what can be run."""

import typer

from thalweg.cli.options import AsJson
from thalweg.cli.verdicts import print_json, show_rows
from thalweg.lab.catalogue import find_recipes


def recipes(as_json: AsJson = False) -> None:
    """List the built-in recipes."""
    entries = find_recipes()
    if as_json:
        keys = ("name", "title", "source", "version", "summary")
        found = [{key: getattr(e.recipe, key) for key in keys} for e in entries]
        for row, entry in zip(found, entries, strict=True):
            row |= {"presets": list(entry.recipe.presets), "claims": [c.id for c in entry.recipe.claims]}
        print_json({"recipes": found})
        return
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
