"""`thalweg view`: the groups of interchangeable units of a user's network, traced and verified."""

import json
from pathlib import Path
from typing import Annotated

import typer

from thalweg.cli.network import Arguments, Example, Model, Net, Shape, TrustPickle, describe, load_network
from thalweg.cli.options import AsJson
from thalweg.cli.verdicts import print_json, show_rows


def view(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="[CKPT]", help="Checkpoint; without one, the module as it is built.")
    ] = None,
    model: Model = None,
    net: Net = None,
    arguments: Arguments = None,
    shape: Shape = None,
    example: Example = None,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Print the groups of units of a network: what makes them, what reads them, what may be done to them."""
    from thalweg.structure import trace

    network = load_network(
        checkpoint,
        model=model,
        net=net,
        arguments=arguments,
        shape=shape,
        example=example,
        trust_pickle=trust_pickle,
    )
    found = trace(network.module, network.inputs)
    if as_json:
        print_json(json.loads(found.to_json()))
        return
    typer.echo(f"{type(network.module).__name__}, example batch: {network.words}")
    if found.groups:
        show_rows(["group", "units", "flags", "made by", "read by"], describe(found))
    else:
        typer.echo("no groups: nothing may be permuted")
    for group in found.groups:
        if group.obstacle:
            typer.echo(f"{group.name}: not duplicable, {group.obstacle}")
    for name in found.rejected:
        typer.echo(f"rejected by verification: {name}")
    for operation, count in found.frozen_by.items():
        typer.echo(f"frozen by an operation without a rule: {operation} ({count}x)")
    if found.groups:
        typer.echo(f"verified: outputs change by {found.error:.1e} (relative) when all groups are permuted at once")
