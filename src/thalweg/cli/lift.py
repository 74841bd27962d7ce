"""`thalweg lift`: carry a convolutional checkpoint exactly into a dense or locally-connected network, and back."""

import datetime
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.cli.embed import free_target
from thalweg.cli.launch import timed
from thalweg.cli.lift_options import kinds_of, size_of
from thalweg.cli.lifted import LIFTED_KEY, Statement, require_unlifted
from thalweg.cli.network import (
    Arguments,
    Checkpoint,
    Example,
    Model,
    Net,
    Network,
    Shape,
    TrustPickle,
    count_parameters,
    load_network,
    width_metadata,
)
from thalweg.cli.options import AsJson
from thalweg.cli.verdicts import print_json, show_rows
from thalweg.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from thalweg.lifting import LiftedLayer, LiftPlan

Value = dict[str, Any]


def lift(  # noqa: PLR0913, PLR0917 - one argument per option of the command line
    checkpoint: Checkpoint,
    model: Model = None,
    net: Net = None,
    arguments: Arguments = None,
    shape: Shape = None,
    example: Example = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="KIND|NAME=KIND,…",
            help="fc (dense), local (a kernel for each position) or shared (as it is); or one for each layer, by "
            "name or pattern (conv*=local), the first that fits; others stay. Default: fc.",
            show_default=False,
        ),
    ] = None,
    padded: Annotated[
        bool,
        typer.Option("--padded", help="Keep zero padding as a layer before a dense map, as the paper's code does."),
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Refuse lifted weights of more, e.g. 4GB, 1.5GiB. Default: what is free.",
            show_default=False,
        ),
    ] = None,
    back: Annotated[
        bool, typer.Option("--back", help="Of a lifted checkpoint, write the nearest convolutional network.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where to write. Default: CKPT-lifted.safetensors (--back: CKPT-back.…), here."
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page, too, an .html file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files.")] = False,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint whose convolutions are dense or locally connected, and which computes the same."""
    elapsed, started = timed(), datetime.datetime.now(datetime.UTC)
    target = free_target(out, checkpoint, "back" if back else "lifted", force=force)
    page = _free_page(report, target, force=force)
    built: Value = {"model": model, "net": net, "arguments": arguments}
    options: Value = {**built, "shape": shape, "example": example, "trust_pickle": trust_pickle}
    if back:
        _require_none({"--to": to, "--padded": padded or None, "--max-memory": max_memory, "--report": report})
        from thalweg.cli.lift_back import bring_back

        bring_back(checkpoint, target, options, as_json=as_json)
        return
    kinds, limit = kinds_of("fc" if to is None else to), size_of(max_memory)
    require_unlifted(checkpoint, trust_pickle=trust_pickle)
    network = load_network(checkpoint, **options)
    plan = _planned(network, kinds, limit, target, padded=padded)
    if not as_json:
        _show_plan(network, plan, target)
    record = _lifted(network, kinds, limit, (checkpoint, target), built, padded=padded)
    if page is not None:
        from thalweg.cli.lift_page import write_page

        write_page(page, {**record, "started": started.isoformat(timespec="seconds"), "seconds": round(elapsed(), 3)})
        record["report"] = str(page)
    if as_json:
        print_json(record)
        return
    _show(record)


def _require_none(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"Expected --back without {name}. Got both. Leave one out: {name} says how to lift.")


def _free_page(report: Path | None, target: Path, *, force: bool) -> Path | None:
    if report is None:
        return None
    from thalweg.cli.reduce_on_data import free_page

    return free_page(report, target, force=force)


def _planned(network: Network, kinds: Any, limit: int | None, target: Path, *, padded: bool) -> "LiftPlan":
    """Find what would be lifted, and see that memory and disk hold it."""
    import torch

    from thalweg.lifting import lift_plan
    from thalweg.lifting.lift import require_memory
    from thalweg.lifting.memory import available_memory, worded_bytes

    plan = lift_plan(network.module, network.inputs, to=kinds, padded=padded)
    require_memory(plan, available_memory(torch.device("cpu")) if limit is None else limit)
    size, free = _file_bytes(network, plan, target), shutil.disk_usage(target.parent).free
    if size > free:
        raise CheckpointError(
            f"Expected {size:,} bytes ({worded_bytes(size)}) of disk for {target}. Got {free:,} "
            f"({worded_bytes(free)}). Free some space, or choose another place."
        )
    return plan


def _file_bytes(network: Network, plan: "LiftPlan", target: Path) -> int:
    """Count the bytes of all tensors of a lifted state as `save_state` writes them.

    A .safetensors file holds a tensor once for each of its names, a .pt file once.
    """
    from torch import Tensor

    is_tied = target.suffix != ".safetensors"
    owners = {name for layer in plan.layers for name in layer.names}
    sizes: dict[object, int] = {}
    for name, value in network.module.state_dict().items():
        owner, _, kind = name.rpartition(".")
        if isinstance(value, Tensor) and not (owner in owners and kind in {"weight", "bias"}):
            sizes[(value.data_ptr(), value.shape) if is_tied else name] = value.numel() * value.itemsize
    lifted = sum(layer.num_bytes * (1 if is_tied else len(layer.names)) for layer in plan.layers)
    return lifted + sum(sizes.values())


def _lifted(
    network: Network,
    kinds: Any,
    limit: int | None,
    files: tuple[Path, Path],
    built: Mapping[str, Any],
    *,
    padded: bool,
) -> Value:
    """Lift, write, and say what was done."""
    from thalweg.checkpoint import save_state
    from thalweg.cli.lift_snippet import Built, loading_lines
    from thalweg.lifting import lift as lift_module

    made = lift_module(network.module, network.inputs, to=kinds, padded=padded, max_memory=limit)
    source, target = files
    metadata = width_metadata(network.widths)
    if made.plan.layers:
        metadata[LIFTED_KEY] = Statement.of(made.plan, network.inputs, padded=padded).worded()
    save_state(target, made.module.state_dict(), metadata | {"thalweg.source": source.name})
    return {
        "file": str(target),
        "bytes": target.stat().st_size,
        "layers": [layer_facts(layer) for layer in made.plan.layers],
        "kept": dict(made.plan.kept),
        "parameters": {"before": count_parameters(network.module), "after": count_parameters(made.module)},
        "padded": padded,
        "output_change": made.error,
        "example": network.words,
        "load": loading_lines(network.module, made.plan, Built(**built, widths=network.widths), target),
    }


def layer_facts(layer: "LiftedLayer") -> Value:
    """Give what a lift makes of one layer as plain values.

    Args:
        layer: which.
    """
    import math

    return {
        "name": layer.name,
        "kind": layer.kind,
        "parameters": {"before": layer.num_shared, "after": layer.num_params},
        "bytes": layer.num_bytes,
        "local": layer.geometry.local_entries / math.prod(layer.weight_shape),
    }


def layer_rows(layers: list[Value]) -> tuple[list[str], list[list[str]]]:
    """Give the table of lifted layers.

    Args:
        layers: as `layer_facts` has them.
    """
    from thalweg.lifting.memory import worded_bytes

    heads = ["layer", "to", "parameters", "lifted", "size", "share that is local"]
    rows = []
    for layer in layers:
        before, after = (f"{layer['parameters'][key]:,}" for key in ("before", "after"))
        size, local = worded_bytes(layer["bytes"]), f"{layer['local']:.3g}"
        rows.append([layer["name"] or "(all)", layer["kind"], before, after, size, local])
    return heads, rows


def _show_plan(network: Network, plan: "LiftPlan", target: Path) -> None:
    from thalweg.lifting.memory import worded_bytes

    show_rows(*layer_rows([layer_facts(layer) for layer in plan.layers]))
    for name, reason in plan.kept.items():
        typer.echo(f"{name}: kept as it is, {reason}")
    before = count_parameters(network.module)
    after = before + sum(layer.num_params - layer.num_shared for layer in plan.layers)
    lifted, whole = worded_bytes(plan.num_bytes), worded_bytes(_file_bytes(network, plan, target))
    typer.echo(f"parameters: {before:,} -> {after:,}; lifted weights take {lifted}, the file {whole}")


def _show(record: Value) -> None:
    from thalweg.lifting.memory import worded_bytes

    size = record["bytes"]
    typer.echo(f"outputs change by {record['output_change']:.1e} (relative; example batch: {record['example']})")
    typer.echo(f"wrote {record['file']}: {size:,} bytes ({worded_bytes(size)})")
    if "report" in record:
        typer.echo(f"report: {Path(record['report']).resolve()}")
    typer.echo("to load it in plain PyTorch:")
    for line in record["load"]:
        typer.echo(f"    {line}".rstrip())
