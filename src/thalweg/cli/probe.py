"""`thalweg probe`: what the landscape is like at a user's own checkpoints."""

import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import thalweg
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
from thalweg.cli.measurement import Point, Wishes, cost_of, measure
from thalweg.cli.network import Arguments, Model, Net, TrustPickle
from thalweg.cli.options import AsJson, DataRoot, Device, Workers, checked_device
from thalweg.cli.parts import Parts, Value
from thalweg.cli.verdicts import print_json, show_rows
from thalweg.errors import ConfigError, StoreError
from thalweg.lab.files import write_whole
from thalweg.lab.progress import shown_progress
from thalweg.lab.wording import in_time

if TYPE_CHECKING:
    import torch

_DTYPES = ("float32", "float64")
_FOLDER = Path("thalweg-probe")


def probe(  # noqa: PLR0913, PLR0917 - one argument per option of the command line
    checkpoints: Annotated[
        list[Path],
        typer.Argument(metavar="CKPT...", help="Checkpoints, folders of them, or safetensors with `thetas`."),
    ],
    data: Data,
    model: Model = None,
    net: Net = None,
    arguments: Arguments = None,
    data_arguments: DataArguments = None,
    data_root: DataRoot = None,
    split: DataSplit = None,
    samples: NumSamples = None,
    loss: Loss = None,
    eigen: Annotated[int, typer.Option(metavar="K", min=0, help="So many largest eigenvalues.")] = 1,
    negative: Annotated[int, typer.Option(metavar="K", min=0, help="So many smallest: the most negative ones.")] = 0,
    tolerance: Annotated[float, typer.Option(help="Of an eigenvalue, relative to it.")] = 1e-3,
    density: Annotated[bool, typer.Option("--density", help="The spectral density, and the trace with it.")] = False,
    probes: Annotated[int, typer.Option(min=1, help="Random vectors of the density.")] = 10,
    lanczos_steps: Annotated[int, typer.Option(min=1, help="Lanczos steps of each.")] = 50,
    trace: Annotated[bool, typer.Option("--trace", help="The trace by XTrace, with 20 products.")] = False,
    degeneracy: Annotated[
        bool, typer.Option("--degeneracy", help="Count negative, zero and positive eigenvalues.")
    ] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Look at each layer's own block, too.")] = False,
    slice_: Annotated[
        str | None, typer.Option("--slice", metavar="1d|2d", help="The loss over a line or plane.")
    ] = None,
    directions: Annotated[
        str, typer.Option(help="Of the slice: random, eigen, through (2 or 3 checkpoints), or pca (3 and more).")
    ] = "random",
    span: Annotated[
        float, typer.Option(help="How far a random or eigen slice goes, in lengths of its directions.")
    ] = 1.0,
    points: Annotated[
        int, typer.Option(min=2, help="Of a slice, along each axis; an even number counts one more.")
    ] = 51,
    batch_size: BatchSize = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64. Default: the checkpoint's.")] = None,
    device: Device = "cpu",
    workers: Workers = 1,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the report and the numbers.")] = _FOLDER,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Measure gradient, curvature, degeneracy and slices of the landscape at checkpoints of a network."""
    elapsed, started = timed(), datetime.datetime.now(datetime.UTC)
    wishes = Wishes(
        eigen=eigen,
        negative=negative,
        tolerance=tolerance,
        density=density,
        num_probes=probes,
        num_steps=lanczos_steps,
        trace=trace,
        degeneracy=degeneracy,
        layers=layers,
        slice=_axes(slice_),
        directions=_one_of("--directions", directions, ("random", "eigen", "through", "pca")),
        span=span,
        points=points,
        seed=seed,
    )
    _check(wishes)
    kind, place = _dtype(dtype), checked_device(device)
    from thalweg.cli.snapshots import find_snapshots, load_points, require_fitting

    snapshots = find_snapshots(checkpoints)
    require_fitting(snapshots, wishes)
    landscape = load_landscape(
        data,
        data_root=data_root,
        arguments=data_arguments,
        split=split,
        num_samples=samples,
        seed=seed,
        batch_size=batch_size,
        loss=loss,
        with_test=wishes.slice is not None,
    )
    built = {"model": model, "net": net, "arguments": arguments, "trust_pickle": trust_pickle}
    found = load_points(snapshots, landscape, kind, place, **built)
    _make_folder(out)
    measured, shared = _measured(found, wishes, Parts(out / "parts", workers))
    facts = {
        "data": landscape.data_words,
        "test data": landscape.test_words or None,
        "loss": landscape.loss_words,
        "dtype": str(found[0].objective.dtype).removeprefix("torch."),
        "seed": seed,
        "mode": "eval: BatchNorm with its running statistics, no dropout",
    }
    record = _record(measured, shared, facts, place, started, elapsed())
    _write(out, record, landscape, measured, shared, facts)
    _show(measured, shared, out, record, landscape, as_json=as_json)


def _check(wishes: Wishes) -> None:
    if not 0.0 < wishes.tolerance < 1.0:
        raise ConfigError(f"Expected --tolerance between 0 and 1. Got {wishes.tolerance}. Choose one such as 1e-3.")
    if not 0.0 < wishes.span < float("inf"):
        raise ConfigError(f"Expected a positive --span. Got {wishes.span}. Choose one such as 1.")
    if wishes.directions == "pca" and wishes.slice == "1d":
        raise ConfigError("Expected --slice 2d for --directions pca. Got 1d. Two components are drawn.")
    if wishes.directions != "random" and wishes.slice is None:
        raise ConfigError(f"Expected --slice 1d or 2d with --directions {wishes.directions}. Got none. Add it.")


def _axes(word: str | None) -> Any:
    return None if word is None else _one_of("--slice", word, ("1d", "2d"))


def _one_of(option: str, word: str, words: Sequence[str]) -> str:
    if word not in words:
        raise ConfigError(f"Expected {option} {', '.join(words)}. Got {word!r}. Choose one of them.")
    return word


def _dtype(word: str | None) -> "torch.dtype | None":
    if word is None:
        return None
    import torch

    found: torch.dtype = getattr(torch, _one_of("--dtype", word, _DTYPES))
    return found


def _make_folder(out: Path) -> None:
    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"Expected a folder that can be written. Got {out}: {error.strerror or error}. Choose another --out."
        ) from error


def _measured(points: Sequence[Point], wishes: Wishes, parts: Parts) -> tuple[list[Value], Value | None]:
    """Measure at every checkpoint, then what they have in common; say first how long it may take."""
    from thalweg.cli.snapshots import shared_slice

    is_shared = wishes.slice is not None and wishes.directions in ("through", "pca")
    costs = [cost_of(point, wishes, is_last=is_shared and point is points[-1]) for point in points]
    seconds = sum(cost * point.gradient_seconds for cost, point in zip(costs, points, strict=True))
    total = len(points) + is_shared
    with shown_progress("probe") as report:
        report(0.0, f"one gradient takes {in_time(points[0].gradient_seconds)}; in all about {in_time(seconds)}")
        measured = []
        for place, point in enumerate(points):
            before = place

            def inner(fraction: float, text: str, before: int = before) -> None:
                report(min((before + fraction) / total, 0.999), text)

            measured.append(measure(point, wishes, parts, inner))
        shared = None
        if is_shared:
            identity = {
                "points": [point.fingerprint for point in points],
                "names": [point.name for point in points],
                "test": [point.test_landscape for point in points],
                "options": [wishes.slice, wishes.directions, wishes.points],
            }

            def last(fraction: float, text: str) -> None:
                report(min((len(points) + fraction) / total, 0.999), f"slice: {text}")

            shared = parts.kept(identity, lambda: shared_slice(points, wishes, parts.workers, last))
        report(1.0, "done")
    return measured, shared


def _record(
    measured: Sequence[Value],
    shared: Value | None,
    facts: Value,
    device: str,
    started: datetime.datetime,
    seconds: float,
) -> Value:
    """Everything, with where it comes from."""
    from dataclasses import asdict

    from thalweg.lab.runs.environment import current_environment

    return {
        **{key.replace(" ", "_"): value for key, value in facts.items()},
        "checkpoints": list(measured),
        "shared_slice": shared,
        "device": device,
        "environment": asdict(current_environment()),
        "command": shlex.join(["thalweg", *sys.argv[1:]]),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
    }


def _write(
    out: Path,
    record: Value,
    landscape: Landscape,
    measured: Sequence[Value],
    shared: Value | None,
    facts: Value,
) -> None:
    from thalweg.cli.probe_page import figures, tables
    from thalweg.lab.report import Section, write_report
    from thalweg.lab.runs.environment import Environment
    from thalweg.lab.runs.run import SCHEMA_VERSION, Manifest

    names = [str(point["name"]) for point in measured]
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        id="",
        recipe="probe",
        reference="",
        title=f"The landscape at {names[0]}" if len(names) == 1 else f"The landscape at {len(names)} checkpoints",
        source="",
        summary=f"{', '.join(names[:6])}{' …' if len(names) > 6 else ''} on {landscape.words}.",
        version=1,
        preset="",
        parameters={key: value for key, value in facts.items() if value is not None},
        status="finished",
        device=record["device"],
        environment=Environment(**record["environment"]),
        started=record["started"],
        seconds=record["seconds"],
        command=record["command"],
        claims=(),
        checksums={},
    )
    section = Section(manifest, tuple(figures(measured, shared)), tables=tuple(tables(measured)))
    write_whole(out / "probe.json", json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    write_report(out / "report.html", [section])


def _show(
    measured: Sequence[Value],
    shared: Value | None,
    out: Path,
    record: Value,
    landscape: Landscape,
    *,
    as_json: bool,
) -> None:
    from thalweg.cli.probe_page import summary

    if as_json:
        print_json({**record, "report": str(out / "report.html"), "version": thalweg.__version__})
        return
    typer.echo(landscape.words)
    show_rows(*summary(measured))
    for laid in (*(point.get("slice") for point in measured), shared):
        if laid:
            typer.echo(f"slice: {len(laid['rows']):,} points in {in_time(laid['seconds'])}; {laid['directions']}")
    typer.echo(f"numbers: {out / 'probe.json'}")
    typer.echo(f"report: {(out / 'report.html').resolve()}")
