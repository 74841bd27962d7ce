"""`thalweg ensemble`: several checkpoints as one predictor, with one backbone or none, and as one net."""

import datetime
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import thalweg
from thalweg.cli.embed import free_target
from thalweg.cli.landscape import BatchSize, Data, DataArguments, DataSplit, Loss, NumSamples, Seed, load_landscape
from thalweg.cli.launch import timed
from thalweg.cli.merge import checked
from thalweg.cli.network import Arguments, Model, Net, TrustPickle
from thalweg.cli.options import AsJson, DataRoot, Device, checked_device
from thalweg.cli.parts import Value
from thalweg.cli.reduce_on_data import free_page
from thalweg.cli.snapshots import find_snapshots
from thalweg.cli.verdicts import print_json, show_rows
from thalweg.errors import CheckpointError, ConfigError, StructureError
from thalweg.lab.plain import plain
from thalweg.lab.progress import Progress, shown_progress

if TYPE_CHECKING:
    from thalweg.cli.networks import Networks
    from thalweg.ensembles import Ensemble

AVERAGES = ("probabilities", "outputs")


def ensemble(  # noqa: PLR0913, PLR0917 - one argument per option of the command line
    checkpoints: Annotated[
        list[Path],
        typer.Argument(metavar="CKPT…", help="Two or more checkpoints of one network, or folders of them."),
    ],
    data: Data,
    model: Model = None,
    net: Net = None,
    arguments: Arguments = None,
    own_layers: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=1,
            help="WA(N): layers, from the end, that each network has for itself; repeat for more. Default: 1.",
            show_default=False,
        ),
    ] = None,
    average: Annotated[
        str | None,
        typer.Option(help="probabilities or outputs. Default: probabilities for classes.", show_default=False),
    ] = None,
    ridge: Annotated[
        float, typer.Option(min=0, help="Of the fits, over the mean square of a feature; 0: least squares.")
    ] = 1e-4,
    fit_samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Samples that layers are fitted on, at most.")
    ] = 10_000,
    data_arguments: DataArguments = None,
    data_root: DataRoot = None,
    split: DataSplit = None,
    samples: NumSamples = None,
    loss: Loss = None,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where WA(1) is written as one net. Default: FIRST-ensemble.safetensors."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page. Default: beside the checkpoint, as .html.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files.")] = False,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Average several checkpoints of one network, on one backbone or each for itself; write one net."""
    elapsed, started = timed(), datetime.datetime.now(datetime.UTC)
    if average is not None:
        checked(average, AVERAGES, "--average")
    files = _files(checkpoints)
    target = out
    for file in files:
        target = free_target(target, file, "ensemble", force=force)
    page, place = free_page(report, target, force=force), checked_device(device)  # type: ignore[arg-type]
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
    from thalweg.cli.networks import load_networks

    built = {"model": model, "net": net, "arguments": arguments}
    networks = load_networks(files, landscape, built, {"trust_pickle": trust_pickle}, place)
    options = {"ridge": ridge, "fit_samples": fit_samples, "average": average, "seed": seed}
    adjusted, refused = _adjusted(networks, own_layers, options)
    record = _measured(networks, adjusted, refused, options, target)  # type: ignore[arg-type]
    record |= {"report": str(page), "device": place, "command": shlex.join(["thalweg", *sys.argv[1:]])}
    record |= {"started": started.isoformat(timespec="seconds"), "seconds": round(elapsed(), 3)}
    from thalweg.cli.ensemble_page import write_page

    plainly = plain(record)
    write_page(page, plainly)
    if as_json:
        print_json({**plainly, "version": thalweg.__version__})
        return
    _show(plainly)


def _files(paths: Sequence[Path]) -> list[Path]:
    """Spell out folders.

    Raises:
        CheckpointError: a file holds points of a training, or a folder nothing.
        ConfigError: there are fewer than two checkpoints.
    """
    found = find_snapshots(paths)
    if any(snapshot.row is not None for snapshot in found):
        name = next(snapshot.path for snapshot in found if snapshot.row is not None)
        raise CheckpointError(f"Expected checkpoints. Got {name}, points of a training. Save a state dict of each.")
    if len(found) < 2:
        raise ConfigError(f"Expected two checkpoints or more. Got {len(found)}. Name them, or a folder of them.")
    return [snapshot.path for snapshot in found]


def _adjusted(
    networks: "Networks", own_layers: Sequence[int] | None, options: dict[str, Any]
) -> "tuple[list[Ensemble], list[str]]":
    """Make every WA(n), and say of each that cannot be made why.

    Raises:
        ConfigError: the user asked for numbers of layers of which none is possible.
    """
    from thalweg.ensembles import wa_ensemble

    made: list[Ensemble] = []
    faults: dict[int, ConfigError | StructureError] = {}
    for n in dict.fromkeys(own_layers or [1]):
        try:
            made.append(wa_ensemble(networks.train, networks.states, own_layers=n, **options))
        except (ConfigError, StructureError) as error:
            faults[n] = error
    wrong = [error for error in faults.values() if isinstance(error, ConfigError)]
    if own_layers and not made and len(wrong) == len(faults):
        raise wrong[0]
    return made, [f"WA({n}): {error}" for n, error in faults.items()]


def _measured(
    networks: "Networks", adjusted: "Sequence[Ensemble]", refused: list[str], options: dict[str, Any], target: Path
) -> Value:
    """Make every ensemble, write the one that is a single net, and measure all."""
    from thalweg.cli.networks import write_network
    from thalweg.ensembles import output_ensemble, single, weight_average

    train, states = networks.train, networks.states
    independent = output_ensemble(train, states, average=options["average"])
    with shown_progress("ensemble") as report:
        report(0.2, "layers fitted")
        singles = [single(train, state, file.name) for file, state in zip(networks.files, states, strict=True)]
        exported, unwritten = _exported(train, adjusted)
        entries = [*singles, *exported, *adjusted, independent, weight_average(train, states)]
        rows = _rows(networks, entries, lambda share, text: report(0.2 + 0.79 * share, text))
        measured = (
            write_network(networks, exported[0].export(), target, " + ".join(f.name for f in networks.files))
            if exported
            else {name: rows[0][name] for name, _ in networks.objectives()}
        )
        report(1.0, "done")
    return {
        "file": str(target) if exported else None,
        "files": [str(file) for file in networks.files],
        "own_layers": [ensemble.own_layers for ensemble in adjusted],
        **options,
        "average": independent.average,
        "data": networks.landscape.data_words,
        "test_data": networks.landscape.test_words or None,
        "loss": networks.landscape.loss_words,
        "rows": rows,
        "measured": measured,
        "notes": [*refused, *unwritten, *(f"{e.name}: {note}" for e in entries for note in e.notes)],
    }


def _exported(objective: Any, adjusted: "Sequence[Ensemble]") -> "tuple[list[Ensemble], list[str]]":
    """Make one net of WA(1), or say why there is none."""
    from thalweg.ensembles import single

    first = next((ensemble for ensemble in adjusted if ensemble.own_layers == 1), None)
    if first is None:
        return [], ["Nothing was written: WA(1) alone is one net, and it is not among these."]
    try:
        return [single(objective, replace(first, average="outputs").export(), "WA(1) as one net")], []
    except StructureError as error:
        return [], [f"WA(1) is not one net, and nothing was written: {error}"]


def _rows(networks: "Networks", entries: "Sequence[Ensemble]", progress: Progress) -> list[Value]:
    """Measure each ensemble, and those of its first members."""
    from thalweg.cli.networks import values
    from thalweg.ensembles import growth

    rows: list[Value] = []
    for place, entry in enumerate(entries):
        progress(place / len(entries), entry.name)
        scores = {name: growth(entry, objective) for name, objective in networks.objectives()}
        last = scores["train"][-1]
        row: Value = {"name": entry.name, "members": len(entry.members), "average": entry.average}
        row |= {"parameters": last.parameters, "multiply_adds": last.multiply_adds}
        row |= {name: values(found[-1]) for name, found in scores.items()}
        row["growth"] = {name: [asdict(score) for score in found] for name, found in scores.items()}
        rows.append(row)
    return rows


def _show(record: Value) -> None:
    from thalweg.cli.ensemble_page import network_rows
    from thalweg.cli.merge_page import again_rows

    typer.echo(f"{record['data']}; loss: {record['loss']}")
    show_rows(*network_rows(record))
    for note in record["notes"]:
        typer.echo(note)
    if record["file"]:
        typer.echo(f"wrote {record['file']}; measured again from it:")
        show_rows(*again_rows(record))
    typer.echo(f"report: {Path(record['report']).resolve()}")
