"""`thalweg connect`: paths of low loss between two checkpoints of one network, by every method."""

import datetime
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import thalweg
from thalweg.cli.connect_methods import Wishes
from thalweg.cli.landscape import (
    BatchSize,
    Data,
    DataArguments,
    DataSplit,
    Landscape,
    Loss,
    NumSamples,
    Seed,
    load_landscape,
)
from thalweg.cli.launch import timed
from thalweg.cli.network import Arguments, Model, Net, TrustPickle
from thalweg.cli.options import AsJson, DataRoot, Device, checked_device
from thalweg.cli.parts import Parts, Value
from thalweg.cli.verdicts import print_json, show_rows
from thalweg.errors import ConfigError, StoreError
from thalweg.lab.files import write_whole
from thalweg.lab.plain import plain

if TYPE_CHECKING:
    from thalweg.cli.connect_rows import Couple

REPORT = "report.html"


def connect(  # noqa: PLR0913, PLR0917 - one argument per option of the command line
    a: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint at t = 0: .safetensors, or .pt/.pth.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Checkpoint of the same network at t = 1.")],
    data: Data,
    model: Model = None,
    net: Net = None,
    arguments: Arguments = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,…",
            help="Which: closed (all that train nothing), all (polygon-3, polygon-5, bezier and string, too), names.",
        ),
    ] = "closed",
    data_arguments: DataArguments = None,
    data_root: DataRoot = None,
    split: DataSplit = None,
    samples: NumSamples = None,
    loss: Loss = None,
    points: Annotated[int, typer.Option(min=2, help="Points t along each path; every leg has one, at least.")] = 61,
    fit_samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Samples that layers are fitted on, at most.")
    ] = 10_000,
    knots: Annotated[int, typer.Option(min=1, help="Stretches of a stage between two fits.")] = 5,
    permutation: Annotated[
        str, typer.Option(help="How units go to B's own order: free_slots, swaps or reflections.")
    ] = "free_slots",
    curve_epochs: Annotated[int, typer.Option(min=1, help="Epochs of polygons and Bezier curves.")] = 60,
    curve_learning_rate: Annotated[float, typer.Option(help="Learning rate of trained paths.")] = 0.01,
    curve_batch_size: Annotated[int, typer.Option(min=1, help="Samples of a step of trained paths.")] = 128,
    string_steps: Annotated[int, typer.Option(min=1, help="Steps of each of the string's four cycles.")] = 250,
    flow: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A map of units that was trained and saved; repeat for more."),
    ] = None,
    take_apart: Annotated[
        bool,
        typer.Option("--take-apart", help="Measure which layer breaks the straight line, and what width mends it."),
    ] = False,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    seed: Seed = 0,
    save: Annotated[
        str, typer.Option(metavar="NAME,…", help="Whose paths are written: best, all, none, or names.")
    ] = "best",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the results. Default: A-to-B-connection, here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the results in that folder.")] = False,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Connect two checkpoints of one network by paths of low loss, and measure each path from end to end."""
    elapsed, started = timed(), datetime.datetime.now(datetime.UTC)
    place, folder = checked_device(device), free_folder(out, a, b, force=force)
    wishes = Wishes.of(
        methods=methods,
        flows=flow or [],
        save=save,
        points=points,
        fit_samples=fit_samples,
        knots=knots,
        permutation=permutation,
        epochs=curve_epochs,
        learning_rate=curve_learning_rate,
        batch_size=curve_batch_size,
        string_steps=string_steps,
        seed=seed,
    )
    from thalweg.cli.connect_rows import load_couple, measured, require_free_paths, written_paths

    require_free_paths(folder, wishes, (a, b), force=force)
    landscape = load_landscape(
        data,
        data_root=data_root,
        arguments=data_arguments,
        split=split,
        num_samples=samples,
        seed=seed,
        batch_size=batch_size,
        loss=loss,
        with_test=True,
    )
    built = {"model": model, "net": net, "arguments": arguments, "trust_pickle": trust_pickle}
    couple = load_couple((a, b), landscape, wishes, place, built)
    make_folder(folder)
    rows = measured(couple, wishes, Parts(folder / "parts"))
    record = _record((a, b), couple, wishes, rows, landscape)
    if take_apart:
        from thalweg.cli.connect_apart import taken_apart

        record["apart"] = taken_apart(couple, seed, Parts(folder / "parts"))
    files = written_paths(couple, wishes, rows, record["best"], folder, (a, b))
    record |= {"files": _files(folder, files), "device": place, "command": shlex.join(["thalweg", *sys.argv[1:]])}
    record |= {"started": started.isoformat(timespec="seconds"), "seconds": round(elapsed(), 3)}
    _write(folder, plain(record))
    _show(plain(record), as_json=as_json)


def free_folder(out: Path | None, a: Path, b: Path, *, force: bool) -> Path:
    """Give the folder of the results, before any work is done.

    Raises:
        ConfigError: there are results in it already.
    """
    folder = out or Path(f"{a.stem}-to-{b.stem}-connection")
    there = [file for file in _NAMES.values() if (folder / file).exists()]
    if there and not force:
        raise ConfigError(
            f"Expected a folder without results. Got {folder}, which has a {there[0]}. Use --force to overwrite it; "
            "what was measured is not measured again."
        )
    return folder


def make_folder(folder: Path) -> None:
    """Make the folder and what is kept in it.

    Raises:
        StoreError: it cannot be made or written.
    """
    try:
        (folder / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"Expected a folder that can be written. Got {folder}: {error.strerror or error}. Choose another --out."
        ) from error


def _files(folder: Path, paths: Mapping[str, Path]) -> Value:
    found: Value = {name: str(folder / file) for name, file in _NAMES.items()}
    return found | {"paths": {name: str(path) for name, path in paths.items()}}


_NAMES = {"report": REPORT, "numbers": "panel.json", "profiles": "profiles.csv"}


def _record(
    files: Sequence[Path], couple: "Couple", wishes: Wishes, rows: Sequence[Value], landscape: Landscape
) -> Value:
    """Everything, with where it comes from."""
    from dataclasses import asdict

    from thalweg.cli.connect_page import best_of
    from thalweg.lab.runs.environment import current_environment

    return {
        "a": {"file": str(files[0]), **couple.ends[0]},
        "b": {"file": str(files[1]), **couple.ends[1]},
        "statistics": couple.statistics,
        "data": landscape.data_words,
        "test_data": landscape.test_words or None,
        "loss": landscape.loss_words,
        "settings": wishes.facts(),
        "rows": list(rows),
        "best": best_of(rows),
        "environment": asdict(current_environment()),
    }


def _write(folder: Path, record: Value) -> None:
    from thalweg.cli.connect_page import profiles_csv, write_page

    write_whole(folder / _NAMES["profiles"], profiles_csv(record["rows"]))
    write_whole(folder / _NAMES["numbers"], json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    write_page(folder / REPORT, record)


def _show(record: Value, *, as_json: bool) -> None:
    from thalweg.cli.connect_page import end_words, remarks, rule, summary

    if as_json:
        rows: list[Any] = [row["values"] for row in record["rows"]]
        kept = {key: record[key] for key in ("a", "b", "statistics", "data", "test_data", "loss", "settings")}
        more = {key: record[key] for key in ("best", "files", "device", "command", "started", "seconds")}
        apart = {"apart": record["apart"]} if "apart" in record else {}
        print_json({**kept, "rows": rows, **apart, **more, "version": thalweg.__version__})
        return
    for line in end_words(record):
        typer.echo(line)
    show_rows(*summary(record))
    if record["best"]:
        typer.echo(f"best: {record['best']} ({rule(record)})")
    for name, kind, text in remarks(record["rows"]):
        typer.echo(f"{name}: {kind}: {text}")
    if "apart" in record:
        from thalweg.cli.connect_apart import layer_rows, width_rows

        show_rows(*layer_rows(record["apart"]))
        show_rows(*width_rows(record["apart"]))
    for name, path in record["files"]["paths"].items():
        typer.echo(f"path of {name}: {path}")
    if record["best"] in record["settings"]["flows"]:
        typer.echo(f"path of {record['best']}: the map {record['settings']['flows'][record['best']]} gives it")
    typer.echo(f"numbers: {record['files']['numbers']}, {record['files']['profiles']}")
    typer.echo(f"report: {Path(record['files']['report']).resolve()}")
