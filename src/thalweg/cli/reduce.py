"""`thalweg reduce`: merge the units of a checkpoint that do the same, and drop those that do nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.cli.embed import free_target, like, require_rebuilt
from thalweg.cli.landscape import BatchSize, DataArguments, DataSplit, Loss, NumSamples, Seed, load_landscape
from thalweg.cli.network import (
    WIDTHS_KEY,
    Arguments,
    Checkpoint,
    Example,
    Model,
    Net,
    Network,
    Shape,
    TrustPickle,
    build_module,
    count_parameters,
    load_network,
)
from thalweg.cli.options import AsJson, DataRoot, Device, checked_device
from thalweg.cli.verdicts import print_json, show_rows
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.embeddings import Reduced


def reduce(  # noqa: PLR0913, PLR0917 - one argument per option of the command line
    checkpoint: Checkpoint,
    model: Model = None,
    net: Net = None,
    arguments: Arguments = None,
    shape: Shape = None,
    example: Example = None,
    similarity: Annotated[
        float | None,
        typer.Option(
            help="Merge units at least this similar, in (0, 1]. Default: only equal ones; with --data, chosen.",
            show_default=False,
        ),
    ] = None,
    amplitude: Annotated[
        float | None,
        typer.Option(
            help="Drop units whose amplitude is at most this fraction of the largest. Default: 0; with --data and "
            "without --similarity, 0 and 0.01 are tried.",
            show_default=False,
        ),
    ] = None,
    groups: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="Which groups. Default: all.", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER|FILE|PKG.MOD:LOADER",
            help="Measure on these data what each width keeps, and choose by it. Given as for `thalweg probe`.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="With --data: choose the fewest units that agree on at least 1 − this of the data. Default: 0.01.",
            show_default=False,
        ),
    ] = None,
    data_arguments: DataArguments = None,
    data_root: DataRoot = None,
    split: DataSplit = None,
    samples: NumSamples = None,
    loss: Loss = None,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write. Default: CKPT-narrow.safetensors, here.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --data: the page. Default: beside the checkpoint, as .html."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files.")] = False,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Write a narrower checkpoint; without --similarity and --amplitude it computes the same."""
    target = free_target(out, checkpoint, "narrow", force=force)
    names = [n.strip() for n in groups.split(",")] if groups else None
    built: dict[str, Any] = {"model": model, "net": net, "arguments": arguments}
    shown: dict[str, Any] = {"shape": shape, "example": example}
    if data is None:
        only = {"--tolerance": tolerance, "--data-arg": data_arguments, "--split": split, "--samples": samples}
        _require_no_data(only | {"--loss": loss, "--batch-size": batch_size, "--report": report})
        network = load_network(checkpoint, **built, **shown, trust_pickle=trust_pickle)
        _reduce_alone(network, built, (similarity, amplitude or 0.0, names), target, checkpoint, as_json=as_json)
        return
    from thalweg.cli.reduce_on_data import Choice, free_page, reduce_on_data

    choice = Choice.of(similarity, amplitude, tolerance, names)
    place = checked_device(device)
    page = free_page(report, target, force=force)
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
    files = (checkpoint, target, page)
    options = {"trust_pickle": trust_pickle, **shown}
    reduce_on_data(files, landscape, choice, built, options, place, as_json=as_json)


def _require_no_data(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"Expected --data with {name}. Got {name} alone. Add --data, or leave it out.")


def _reduce_alone(
    network: Network,
    built: Mapping[str, Any],
    wanted: tuple[float | None, float, list[str] | None],
    target: Path,
    checkpoint: Path,
    *,
    as_json: bool,
) -> None:
    """Reduce by the weights alone."""
    from thalweg.embeddings import reduce as reduce_module

    similarity, amplitude, names = wanted
    result = reduce_module(network.module, network.inputs, similarity=similarity, amplitude=amplitude, groups=names)
    write_narrow(network, built, result, target, checkpoint)
    if as_json:
        print_json(facts(network, result, target))
        return
    _show(network, result, target)


def write_narrow(
    network: Network, built: Mapping[str, Any], result: "Reduced", target: Path, checkpoint: Path
) -> None:
    """Write the narrow checkpoint, with the widths that it has.

    Args:
        network: before.
        built: model, net and arguments, as `build_module` takes them.
        result: what was made of it.
        target: the file to write.
        checkpoint: where the network came from.

    Raises:
        CheckpointError: it cannot be written, or a buffer that it leaves out is not what the factory makes.
    """
    from thalweg.checkpoint import save_state

    require_rebuilt(
        network,
        result.module,
        lambda: like(build_module(**built), network),
        "Build --model with the narrow widths, so that they can be compared",
    )
    widths = result.reduction.widths
    left = {n: after for n, (before, after) in widths.items() if n in network.widths or after < before}
    metadata = {WIDTHS_KEY: json.dumps(left), "thalweg.source": checkpoint.name, **network.lift_metadata}
    save_state(target, result.module.state_dict(), metadata)


def facts(network: Network, result: "Reduced", target: Path) -> dict[str, Any]:
    """Give what was written as plain values."""
    sizes = {"before": count_parameters(network.module), "after": count_parameters(result.module)}
    table = {n: {"before": b, "after": a} for n, (b, a) in result.reduction.widths.items()}
    return {"file": str(target), "widths": table, "parameters": sizes, "output_change": result.error}


def group_rows(result: "Reduced") -> tuple[list[str], list[list[str]]]:
    """Give the table of groups: what was merged and dropped in each."""
    rows = []
    for name, (before, after) in result.reduction.widths.items():
        merge = result.reduction.merges.get(name)
        dropped = int((merge.labels < 0).sum()) if merge else 0
        least = f"{merge.similarity:.6f}" if merge and before - dropped > after else "–"
        rows.append([name, str(before), str(after), str(before - after - dropped), str(dropped), least])
    return ["group", "before", "after", "merged", "dropped", "least similarity"], rows


def _show(network: Network, result: "Reduced", target: Path) -> None:
    show_rows(*group_rows(result))
    before, after = count_parameters(network.module), count_parameters(result.module)
    typer.echo(f"parameters: {before:,} -> {after:,}")
    typer.echo(f"outputs change by {result.error:.1e} (relative; example batch: {network.words})")
    typer.echo(f"wrote {target}")
