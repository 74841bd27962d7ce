"""`thalweg train`: one network trained from several seeds, to have end points of paths."""

import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import thalweg
from thalweg.cli.endpoints import Endpoint, Endpoints, Settings, augmentation, same_starts
from thalweg.cli.landscape import Data, DataArguments, Loss, NumSamples, Seed, load_landscape
from thalweg.cli.launch import timed
from thalweg.cli.network import Arguments, Model, Net
from thalweg.cli.options import AsJson, DataRoot, Device, checked_device
from thalweg.cli.parts import Value
from thalweg.cli.train_earlier import RECORD, REPORT, others, require_own_reports
from thalweg.cli.verdicts import print_json, show_rows
from thalweg.errors import ConfigError
from thalweg.lab.files import write_whole
from thalweg.lab.progress import shown_progress


def train(  # noqa: PLR0913, PLR0917 - one argument per option of the command line
    data: Data,
    model: Model = None,
    net: Net = None,
    arguments: Arguments = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 30,
    seeds: Annotated[int, typer.Option(min=1, help="Number of trainings, their seeds counted up from --seed.")] = 2,
    seed: Seed = 0,
    data_arguments: DataArguments = None,
    data_root: DataRoot = None,
    samples: NumSamples = None,
    loss: Loss = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a mini-batch.")] = 128,
    optimizer: Annotated[str, typer.Option(metavar="sgd|adam", help="How steps are taken.")] = "sgd",
    learning_rate: Annotated[
        float | None, typer.Option(help="Default: 0.01 for sgd, 0.001 for adam.", show_default=False)
    ] = None,
    momentum: Annotated[float, typer.Option(help="Of sgd.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Times the weights, added to the gradient.")] = 1e-4,
    schedule: Annotated[
        str,
        typer.Option(
            metavar="paper|constant|cosine",
            help="Of the learning rate. paper: constant, from half of the epochs on linear to 1 % at 90 %.",
        ),
    ] = "paper",
    augment: Annotated[
        str | None,
        typer.Option(
            metavar="crop_and_flip|crop|PKG.MOD:NAME", help="On each mini-batch. Default: none.", show_default=False
        ),
    ] = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the checkpoints and the report.")] = Path(
        "thalweg-train"
    ),
    force: Annotated[bool, typer.Option("--force", help="Overwrite files of another training or command.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a network from several seeds and write a checkpoint of each; what is there is not trained again."""
    elapsed, started = timed(), datetime.datetime.now(datetime.UTC)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"Expected a folder for --out. Got the file {out}. Choose another.")
    place = checked_device(device)
    settings = Settings.of(
        optimizer,
        learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
    )
    changes = augmentation(augment)
    landscape = load_landscape(
        data,
        data_root=data_root,
        arguments=data_arguments,
        num_samples=samples,
        seed=seed,
        loss=loss,
        with_test=True,
    )
    built = {"model": model, "net": net, "arguments": arguments}
    endpoints = Endpoints(built, landscape, settings, changes, out, place)
    plan = [endpoints.planned(number, force=force) for number in range(seed, seed + seeds)]
    if not force:
        require_own_reports(endpoints, plan)
    beside = others(endpoints, plan)
    rows = _rows(endpoints, plan, beside)
    facts: Value = {
        "net": " ".join([str(model or net), *(arguments or [])]),
        "data": landscape.data_words,
        "test_data": landscape.test_words or None,
        "loss": landscape.loss_words,
        **asdict(settings),
        "augment": augment,
    }
    record = _record(rows, facts, place, started.isoformat(timespec="seconds"), elapsed())
    _write(out, record)
    if as_json:
        print_json({**record, "report": str(out / REPORT), "version": thalweg.__version__})
        return
    _show(out, record, plan, beside)


def _rows(endpoints: Endpoints, plan: Sequence[Endpoint], beside: Sequence[Endpoint]) -> list[Value]:
    """Give the record of every seed, trained now or found, in order; those beside are of earlier commands."""
    left = [endpoint for endpoint in plan if endpoint.record is None]
    found = {endpoint.seed: endpoint.record for endpoint in (*plan, *beside) if endpoint.record is not None}
    if left:
        with shown_progress("train") as report:
            report(0.0, "looks at the data")
            endpoints.require_sound(left[0].seed)
            for place, endpoint in enumerate(left):
                words = f"seed {endpoint.seed}"

                def inner(fraction: float, text: str, before: int = place, words: str = words) -> None:
                    report(min((before + fraction) / len(left), 0.999), f"{words}: {text}")

                found[endpoint.seed] = endpoints.trained(endpoint, inner)
            report(1.0, "done")
    everyone = sorted((*plan, *beside), key=lambda endpoint: endpoint.seed)
    return [{**found[endpoint.seed], "file": str(endpoint.path)} for endpoint in everyone]


def _record(rows: Sequence[Value], facts: Value, device: str, started: str, seconds: float) -> Value:
    """Everything, with where it comes from."""
    from thalweg.lab.runs.environment import current_environment

    return {
        **facts,
        "seeds": list(rows),
        "device": device,
        "environment": asdict(current_environment()),
        "command": shlex.join(["thalweg", *sys.argv[1:]]),
        "started": started,
        "seconds": round(seconds, 3),
    }


def _write(out: Path, record: Value) -> None:
    from thalweg.cli.train_page import write_page

    write_whole(out / RECORD, json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    write_page(out / REPORT, record)


def _show(out: Path, record: Value, plan: Sequence[Endpoint], beside: Sequence[Endpoint]) -> None:
    from thalweg.cli.train_page import summary

    typer.echo(f"{record['net']} on {record['data']}; loss: {record['loss']}")
    show_rows(*summary(record["seeds"]))
    kept = [endpoint.seed for endpoint in plan if endpoint.record is not None]
    if kept:
        typer.echo(f"not trained again: seed {', '.join(map(str, kept))}")
    if beside:
        typer.echo(f"of earlier commands: seed {', '.join(str(endpoint.seed) for endpoint in beside)}")
    if same_starts(plan):
        typer.echo("every seed starts from the same weights: they differ in order, augmentation and dropout alone")
    typer.echo(f"wrote {', '.join(str(endpoint.path) for endpoint in plan)}")
    typer.echo(f"report: {(out / REPORT).resolve()}")
