"""`thalweg run`: one recipe, its claims, its report."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thalweg.cli.faults import CLAIM_FAILS, exit_code
from thalweg.cli.launch import carry_out, import_from_here, reported, sorted_out, timed
from thalweg.cli.options import AsJson, DataRoot, Device, Force, StoreFolder, Workers, checked_device
from thalweg.cli.settings import configured, split_words
from thalweg.cli.verdicts import json_of, print_json, show_claims, tally, verdict_of
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.lab.recipe import Recipe
    from thalweg.lab.runs.run import Run
    from thalweg.lab.runs.store import Store


def run(  # noqa: PLR0913, PLR0917 - one argument per option of the command line
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe, or module:NAME of your own.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PRESET] [KEY=VALUE]", help="Preset (default cpu), then changes to it."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("-c", "--config", metavar="FILE", help="Changes to the preset: .yaml, .toml or .json."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights to measure in place of trained ones: the field of that name."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, counted up from the preset's.")] = 1,
    data_root: DataRoot = None,
    device: Device = "cpu",
    out: StoreFolder = None,
    workers: Workers = 1,
    force: Force = False,
    as_json: AsJson = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no HTML report.")] = False,
) -> None:
    """Run a recipe and hold its claims against what it measures; what the store has is not run again."""
    from thalweg.lab.catalogue import load_recipe
    from thalweg.lab.jobs import Job
    from thalweg.lab.runs.store import store_at
    from thalweg.lab.wording import in_time

    clock, store = timed(), store_at(out)
    import_from_here()
    entry = load_recipe(recipe)
    name, assignments = split_words(words or [])
    name = name or entry.recipe.default_preset
    preset = configured(entry.recipe.preset(name), config, [*assignments, *_named(checkpoint, entry.recipe, name)])
    device = checked_device(device)
    jobs = [
        Job(
            entry.reference,
            name,
            preset.parameters() | {"seed": preset.seed + shift},
            store.root,
            device,
            data_root,
            force,
        )
        for shift in range(seeds)
    ]
    runs, errors = sorted_out(carry_out(jobs, min(workers, seeds), entry.recipe.name))
    report = str(reported(runs, _report_path(store, runs))) if runs and not no_report else None
    if runs and as_json:
        print_json(json_of(runs, clock(), report) | {"preset": name})
    elif runs:
        show_claims(runs)
        ids = ", ".join(run.id[:12] for run in runs)
        typer.echo(f"{entry.recipe.name} {name}: {tally(runs)} ({in_time(clock())}, run {ids})")
        if report:
            typer.echo(f"report: {report}")
    if errors:
        raise typer.Exit(exit_code(errors[0]))
    if verdict_of(runs) == "fails":
        raise typer.Exit(CLAIM_FAILS)


def _named(checkpoint: Path | None, recipe: "Recipe", preset: str) -> list[str]:
    """Word the option as what it stands for.

    Raises:
        ConfigError: the recipe takes no checkpoint.
    """
    if checkpoint is None:
        return []
    if "checkpoint" not in type(recipe.preset(preset)).model_fields:
        raise ConfigError(
            f"Expected a recipe that takes a checkpoint, such as luck_matters/figure_6. Got {recipe.name!r}. "
            "Leave out --checkpoint."
        )
    return [f"checkpoint={json.dumps(str(checkpoint), ensure_ascii=False)}"]  # YAML pairs no surrogates


def _report_path(store: "Store", runs: "list[Run]") -> Path:
    first = runs[0].manifest
    seeds = f"-{len(runs)}-seeds" if len(runs) > 1 else ""
    return store.reports / f"{first.recipe.replace('/', '-')}-{first.preset}{seeds}-{first.id[:8]}.html"
