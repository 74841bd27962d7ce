"""`thalweg match`: which unit of one network is which unit of another."""

import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import thalweg
from thalweg.cli.embed import free_target
from thalweg.cli.landscape import (
    BatchSize,
    Data,
    DataArguments,
    DataSplit,
    Landscape,
    NumSamples,
    Seed,
    load_landscape,
)
from thalweg.cli.launch import timed
from thalweg.cli.network import Arguments, Model, Net, TrustPickle, load_network
from thalweg.cli.options import AsJson, DataRoot, Device, checked_device
from thalweg.cli.parts import Value
from thalweg.cli.reduce_on_data import free_page
from thalweg.cli.verdicts import print_json, show_rows
from thalweg.errors import CheckpointError, ConfigError, StructureError
from thalweg.lab.files import write_whole
from thalweg.lab.plain import plain
from thalweg.lab.progress import shown_progress

if TYPE_CHECKING:
    from torch import nn

    from thalweg.teacher_student import Match
    from thalweg.teacher_student.match import Layers


def match(  # noqa: PLR0913, PLR0917 - one argument per option of the command line
    a: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint of the reference: .safetensors, .pt or .pth.")],
    b: Annotated[
        Path, typer.Argument(metavar="B", help="Checkpoint of the network whose units are looked for in it.")
    ],
    data: Data,
    model: Model = None,
    net: Net = None,
    arguments: Arguments = None,
    model_b: Annotated[
        str | None, typer.Option(metavar="PKG.MOD:FACTORY", help="What builds B. Default: what builds A.")
    ] = None,
    net_b: Annotated[
        str | None, typer.Option(metavar="NAME", help="In place of --model-b: a net of thalweg.nets.")
    ] = None,
    arguments_b: Annotated[
        list[str] | None,
        typer.Option("--arg-b", metavar="KEY=VALUE", help="Argument of B's factory. Default: those of A's."),
    ] = None,
    layers: Annotated[
        str,
        typer.Option(
            metavar="auto|in-order|best|A=B,…",
            help="Which group of A is compared with which of B: in order, with the most alike, or by name (see "
            "thalweg view). auto: in order if both have as many, else the most alike.",
        ),
    ] = "auto",
    earlier: Annotated[
        list[Path] | None,
        typer.Option(metavar="CKPT", help="B at an earlier time, e.g. its initialisation; repeat for more."),
    ] = None,
    data_arguments: DataArguments = None,
    data_root: DataRoot = None,
    split: DataSplit = None,
    samples: NumSamples = None,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|FILE",
            help="Where to write correlations, a .safetensors file, and a .json beside. Default: A-B-match, here.",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page. Default: beside the correlations, as .html.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files.")] = False,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Find which unit of one network is which unit of another, by what they do on data."""
    elapsed, started = timed(), datetime.datetime.now(datetime.UTC)
    wanted = layers_of(layers)
    target = _free_target(out, [a, b, *(earlier or [])], force=force)
    page, place = free_page(report, target, force=force), checked_device(device)
    landscape = load_landscape(
        data,
        data_root=data_root,
        arguments=data_arguments,
        split=split,
        num_samples=samples,
        seed=seed,
        batch_size=batch_size,
        loss="cross_entropy",  # which is not taken: only inputs are
    )
    built: Value = {"model": model, "net": net, "arguments": arguments}
    other = {"model": model_b, "net": net_b, "arguments": arguments if arguments_b is None else arguments_b}
    if model_b is None and net_b is None:
        other |= {"model": model, "net": net}
    elif arguments_b is None:
        other["arguments"] = None
    files = [(a, built), (b, other), *((file, other) for file in earlier or [])]
    modules = [_loaded(file, landscape, {**how, "trust_pickle": trust_pickle}, place) for file, how in files]
    found = _matched(modules, [a, b, *(earlier or [])], landscape, wanted)
    from thalweg.cli.match_page import write_page
    from thalweg.cli.match_record import arrays, record_of

    record: Value = {"file": str(target), "a": str(a), "b": str(b), "earlier": [str(file) for file in earlier or []]}
    record |= {"data": landscape.data_words, "layers_by": layers, **record_of(found)}
    record |= {"report": str(page), "device": place, "command": shlex.join(["thalweg", *sys.argv[1:]])}
    record |= {"started": started.isoformat(timespec="seconds"), "seconds": round(elapsed(), 3)}
    plainly = plain({**record, "version": thalweg.__version__})
    _write(target, arrays(found), plainly)
    write_page(page, plainly, found)
    if as_json:
        print_json(plainly)
        return
    _show(plainly)


def layers_of(text: str) -> "Layers":
    """Read which group is compared with which: auto, in-order, best, or `a=b,c=d`.

    Args:
        text: what the user wrote.

    Raises:
        ConfigError: not of that form.

    Example:
        >>> layers_of("in-order"), layers_of("conv1=conv1, fc=hidden")
        ('in order', [('conv1', 'conv1'), ('fc', 'hidden')])
    """
    known: dict[str, Layers] = {"auto": "auto", "in-order": "in order", "best": "best"}
    if text in known:
        return known[text]
    pairs = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        one, _, two = (part.strip() for part in word.partition("="))
        if not one or not two or "=" in two:
            raise ConfigError(f"Expected --layers auto, in-order, best or A=B,…. Got {word!r}. Name both groups.")
        pairs.append((one, two))
    if not pairs or len(set(pairs)) < len(pairs):
        got = "a pair twice" if pairs else "nothing"
        raise ConfigError(f"Expected --layers auto, in-order, best or A=B,…. Got {got}. Name each pair once.")
    return pairs


def _free_target(out: Path | None, files: Sequence[Path], *, force: bool) -> Path:
    """Give the file of the correlations, before any work is done; the .json beside it must be free, too."""
    name = f"{files[0].stem}-{files[1].stem}-match.safetensors"
    chosen = Path(name) if out is None else out / name if out.is_dir() else out
    if chosen.suffix != ".safetensors":
        raise CheckpointError(f"Expected --out to be a folder or end in .safetensors. Got {chosen}. Rename it.")
    target = chosen
    for file in files:  # none that is read is overwritten
        target = free_target(target, file, "match", force=force)
    beside = target.with_suffix(".json")
    if beside.exists() and not force:
        raise ConfigError(f"Expected a new file. Got {beside}, which is there. Use --force to overwrite it.")
    return target


def _loaded(file: Path, landscape: Landscape, options: Value, device: str) -> "nn.Module":
    """Build a network from a checkpoint, and see that the data fit it."""
    from thalweg.cli.snapshots import example_from
    from thalweg.precision import copied
    from thalweg.structure.trace import prepared

    inputs = example_from(landscape)
    try:
        network = load_network(file, shape=None, example=None, inputs=inputs, **options)
        prepared(network.module, inputs)
    except (CheckpointError, StructureError) as error:
        if str(file) in str(error):
            raise
        raise type(error)(str(error).replace(". Got ", f". Got for {file}: ", 1)) from error
    return copied(network.module, device=device)  # --model may name one module, which all are read into


def _matched(
    modules: "Sequence[nn.Module]", files: Sequence[Path], landscape: Landscape, wanted: "Layers"
) -> "Match":
    from thalweg.teacher_student import match as match_networks

    a, b, *earlier = modules
    size = landscape.batch_size if landscape.data.is_pair else None
    with shown_progress("match") as report:
        report(0.0, f"the units of {files[0].name} and {files[1].name}")
        found = match_networks(
            a, b, landscape.data.data, layers=wanted, earlier=earlier, batch_size=size, progress=report
        )
        report(1.0, f"{found.num_samples:,} samples")
    return found


def _write(target: Path, tensors: dict[str, Any], record: Value) -> None:
    from thalweg.checkpoint import save_state

    save_state(target, tensors, {"thalweg.match": json.dumps({key: record[key] for key in ("a", "b", "data")})})
    write_whole(target.with_suffix(".json"), json.dumps(record, allow_nan=False, indent=1).encode())


def _show(record: Value) -> None:
    from thalweg.cli.match_record import earlier_rows, layer_rows, table_rows

    typer.echo(f"A: {record['a']}; B: {record['b']}; on {record['data']}")
    show_rows(*layer_rows(record))
    if record["table"]:
        typer.echo("mean best correlation of every layer of A with every layer of B:")
        show_rows(*table_rows(record))
    if record["earlier"]:
        typer.echo("the winners at earlier times, mean best correlation and mean rank (0: first, 1: last):")
        show_rows(*earlier_rows(record))
    for name, reason in record["skipped"].items():
        typer.echo(f"not compared: {name}: {reason}")
    typer.echo(f"wrote {record['file']} and {Path(record['file']).with_suffix('.json').name}")
    typer.echo(f"report: {Path(record['report']).resolve()}")
