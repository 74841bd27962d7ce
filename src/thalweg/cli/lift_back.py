"""`thalweg lift --back`: the convolutional network that is nearest to a lifted checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from thalweg.cli.network import Network, count_parameters, load_network, width_metadata
from thalweg.cli.verdicts import print_json, show_rows
from thalweg.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from thalweg.lifting import Deviation


def bring_back(checkpoint: Path, target: Path, options: Mapping[str, Any], *, as_json: bool) -> None:
    """Write the convolutional network nearest to a lifted checkpoint, and say how far it is.

    Args:
        checkpoint: the lifted one.
        target: the file to write.
        options: how the module is built, as `load_network` takes them.
        as_json: print one JSON object.

    Raises:
        CheckpointError: the checkpoint is not lifted or does not fit, or the file cannot be written.
    """
    from thalweg.checkpoint import load_into, save_state
    from thalweg.lifting import deviation
    from thalweg.structure.comparison import output_change

    network = load_network(checkpoint, **options)
    if network.relaxed is None:
        raise CheckpointError(
            f"Expected a checkpoint that `thalweg lift` wrote. Got {checkpoint}, which is none. Leave out --back."
        )
    lifting, origin = network.relaxed.lifting, network.relaxed.origin
    state: dict[str, Tensor] = network.module.state_dict()
    measured = deviation(lifting, state)
    load_into(origin, lifting.nearest(state))
    change = output_change(origin, network.module, network.inputs, "convolutional")
    save_state(target, origin.state_dict(), width_metadata(network.widths) | {"thalweg.source": checkpoint.name})
    record = _record(network, origin, measured, change, target)
    if as_json:
        print_json(record)
        return
    _show(record)


def _record(
    network: Network, origin: "nn.Module", measured: "Deviation", change: float, target: Path
) -> dict[str, Any]:
    return {
        "file": str(target),
        "bytes": target.stat().st_size,
        "parameters": {"before": count_parameters(network.module), "after": count_parameters(origin)},
        "off_local": {"lifted": measured.lifted, "total": measured.total, "by_layer": dict(measured.by_layer)},
        "sharing": {"lifted": measured.sharing, "by_layer": dict(measured.sharing_by_layer)},
        "distance": measured.distance,
        "output_change": change,
        "example": network.words,
    }


def _show(record: dict[str, Any]) -> None:
    local, shared = record["off_local"], record["sharing"]
    rows = [[n or "(all)", f"{d:.3g}", f"{shared['by_layer'][n]:.3g}"] for n, d in local["by_layer"].items()]
    rows.append(["all lifted", f"{local['lifted']:.3g}", f"{shared['lifted']:.3g}"])
    show_rows(["layer", "off-local", "violation of weight sharing"], rows)
    typer.echo(f"off-local, of all parameters: {local['total']:.3g}")
    typer.echo(f"distance to the nearest convolutional network: {record['distance']:.3g} of the norm")
    typer.echo(f"parameters: {record['parameters']['before']:,} -> {record['parameters']['after']:,}")
    typer.echo(f"outputs change by {record['output_change']:.1e} (relative; example batch: {record['example']})")
    typer.echo(f"wrote {record['file']}: load_state_dict takes it into your convolutional module")
