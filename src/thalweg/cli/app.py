"""The entry point: commands by name, and how a command ends."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
import typer.main

import thalweg
from thalweg.cli.faults import INTERRUPTED, exit_code, lines

# Each name is a module of `thalweg.cli` with a function of that name: the command. To add one, add its name and
# the first line of its docstring: a command that is not asked for is listed without being loaded.
COMMANDS = {
    "tour": "Run every built-in recipe in its quick size: minutes on a laptop, ends with one report.",
    "recipes": "List the built-in recipes.",
    "run": "Run a recipe and hold its claims against what it measures; what the store has is not run again.",
    "runs": "List the runs of the store; damaged ones are named on stderr.",
    "report": "Write one HTML report of stored runs; it is self-contained and computes nothing.",
    "view": "Print the groups of units of a network: what makes them, what reads them, what may be done to them.",
    "embed": "Write a wider checkpoint that computes the same; a critical point stays a critical point.",
    "reduce": "Write a narrower checkpoint; without --similarity and --amplitude it computes the same.",
    "lift": "Write a checkpoint whose convolutions are dense or locally connected, and which computes the same.",
    "train": "Train a network from several seeds and write a checkpoint of each; what is there is not trained again.",
    "probe": "Measure gradient, curvature, degeneracy and slices of the landscape at checkpoints of a network.",
    "connect": "Connect two checkpoints of one network by paths of low loss, and measure each path from end to end.",
    "merge": "Merge two checkpoints of one network into one: units aligned, weights averaged, statistics repaired.",
    "match": "Find which unit of one network is which unit of another, by what they do on data.",
    "ensemble": "Average several checkpoints of one network, on one backbone or each for itself; write one net.",
}

RESUMED = {"tour", "run", "train", "probe", "connect"}
"""Commands that go on from where they were interrupted."""


def build(words: Sequence[str]) -> typer.Typer:
    """Put the commands together; only those among the words are loaded."""
    app = typer.Typer(
        name="thalweg",
        help="Charts the loss landscape of a neural network.",
        epilog="Exit codes: 0 fine, 1 internal error, 2 wrong input, 3 a claim fails, 130 interrupted.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_common)
    for name, summary in COMMANDS.items():
        if name in words:
            app.command(name)(getattr(importlib.import_module(f"thalweg.cli.{name}"), name))
        else:
            app.command(name, help=summary)(_not_loaded)
    return app


def _not_loaded() -> None:
    """Stand for a command that the command line does not name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and give its exit code.

    Args:
        arguments: the words after `thalweg`; default those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_debugged = "--debug" in words or bool(os.environ.get("THALWEG_DEBUG"))
    command = typer.main.get_command(build(words))
    try:
        command.main(args=[word for word in words if word != "--debug"], prog_name="thalweg")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if is_debugged:
            _show_traceback()
        for line in lines(error, is_debugged=is_debugged):
            typer.echo(line, err=True)
        return exit_code(error)
    else:
        code = 0
    if code == INTERRUPTED:
        is_kept = next((word for word in words if word in COMMANDS), None) in RESUMED
        typer.echo(f"interrupted{': state kept; run the same command again to resume' if is_kept else ''}", err=True)
    return code


def _show_traceback() -> None:
    import traceback

    typer.echo(traceback.format_exc(), err=True)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"thalweg {thalweg.__version__}")
        raise typer.Exit


def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (or set THALWEG_DEBUG=1).")
    ] = False,
) -> None:
    """Take the options that stand before a command; `main` reads --debug itself, wherever it stands."""
