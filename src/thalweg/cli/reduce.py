"""`thalweg reduce`: merge the units of a checkpoint that do the same, and drop those that do nothing."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thalweg.cli.embed import free_target, like, require_rebuilt
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
from thalweg.cli.options import AsJson
from thalweg.cli.verdicts import print_json, show_rows

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
            help="Merge units at least this similar, in (0, 1]. Default: only equal ones.", show_default=False
        ),
    ] = None,
    amplitude: Annotated[
        float, typer.Option(help="Drop units whose amplitude is at most this fraction of the largest.")
    ] = 0.0,
    groups: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="Which groups. Default: all.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write. Default: CKPT-narrow.safetensors, here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Write a narrower checkpoint; without --similarity and --amplitude it computes the same."""
    target = free_target(out, checkpoint, "narrow", force=force)
    network = load_network(
        checkpoint,
        model=model,
        net=net,
        arguments=arguments,
        shape=shape,
        example=example,
        trust_pickle=trust_pickle,
    )
    from thalweg.checkpoint import save_state
    from thalweg.embeddings import reduce as reduce_module

    names = [n.strip() for n in groups.split(",")] if groups else None
    result = reduce_module(network.module, network.inputs, similarity=similarity, amplitude=amplitude, groups=names)
    widths = result.reduction.widths
    require_rebuilt(
        network,
        result.module,
        lambda: like(build_module(model, net, arguments), network),
        "Build --model with the narrow widths, so that they can be compared",
    )
    left = {n: after for n, (before, after) in widths.items() if n in network.widths or after < before}
    save_state(target, result.module.state_dict(), {WIDTHS_KEY: json.dumps(left), "thalweg.source": checkpoint.name})
    if as_json:
        sizes = {"before": count_parameters(network.module), "after": count_parameters(result.module)}
        table = {n: {"before": b, "after": a} for n, (b, a) in widths.items()}
        print_json({"file": str(target), "widths": table, "parameters": sizes, "output_change": result.error})
        return
    _show(network, result, target)


def _show(network: Network, result: "Reduced", target: Path) -> None:
    rows = []
    for name, (before, after) in result.reduction.widths.items():
        merge = result.reduction.merges.get(name)
        dropped = int((merge.labels < 0).sum()) if merge else 0
        least = f"{merge.similarity:.6f}" if merge and before - dropped > after else "–"
        rows.append([name, str(before), str(after), str(before - after - dropped), str(dropped), least])
    show_rows(["group", "before", "after", "merged", "dropped", "least similarity"], rows)
    before_, after_ = count_parameters(network.module), count_parameters(result.module)
    typer.echo(f"parameters: {before_:,} -> {after_:,}")
    typer.echo(f"outputs change by {result.error:.1e} (relative; example batch: {network.words})")
    typer.echo(f"wrote {target}")
