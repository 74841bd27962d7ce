"""What is measured of a network that left the convolutional ones, and what a whole protocol of them gives."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from thalweg.lab.tables import Table, Tables
from thalweg.recipes.needle_in_the_haystack.images import Images, scores
from thalweg.recipes.needle_in_the_haystack.protocol import (
    CNN,
    RELAXED,
    STANDARD,
    Protocol,
    Relaxed,
    Share,
    Space,
    part,
)

if TYPE_CHECKING:
    from torch import Tensor

    from thalweg.lifting import LiftedLayer

CNN_COST = 0.3
"""Time of an epoch of a convolutional network in those of a dense one, for the bar of progress. A guess of ours."""


def protocol_tables(
    protocol: Protocol, spaces: Sequence[Space], share: Share, *, with_filters: bool = False
) -> Tables:
    """Run the protocol of one seed: train, relax at every time into every space, train from scratch, measure.

    Args:
        protocol: for the seed.
        spaces: where to relax to.
        share: of the progress.
        with_filters: draw first-layer filters too, into a table.

    Returns:
        "curves" (along training), "networks" (one row for each) and "filters".
    """
    preset = protocol.preset
    weights = [CNN_COST * preset.epochs, *[preset.relaxed_epochs] * (len(spaces) * (len(preset.times) + 1))]
    shares = share.split(weights)
    snapshots, curves = protocol.convolutional(next(shares), preset.times)
    last = curves[-1]
    networks = [{**_plain_row(protocol, last), "seconds": None}]
    filters: Table = []
    for space in spaces:
        for time in (None, *preset.times):
            own = next(shares)
            name = f"{protocol.seed}-{STANDARD[space] if time is None else RELAXED[space]}-{time}"

            def compute(space: Space = space, time: int | None = time, own: Share = own) -> dict[str, Any]:
                if time is None:
                    made = protocol.standard(space, own)
                else:
                    made = protocol.relaxed(snapshots[time], time, space, own)
                shown = time in _shown(preset.times) and with_filters
                return {
                    "curves": made.rows,
                    "network": summary(protocol, made),
                    "filters": filter_rows(protocol.seed, made) if shown else [],
                }

            found = part(protocol.context, name, compute)
            curves = [*curves, *found["curves"]]
            networks.append(found["network"])
            filters += found["filters"]
    return {"curves": curves, "networks": networks, "filters": filters}


def summary(protocol: Protocol, made: Relaxed) -> dict[str, Any]:
    """Give one row on a relaxed network: its start and end, how far it went, and what it owes to which weights.

    `local_alone` and `off_local_alone` are test accuracies with the other weights set to 0; `scale` is the median
    size of off-local weights of the first lifted layer in that of local ones.
    """
    first, last = made.rows[0], made.rows[-1]
    row = {
        **{key: value for key, value in last.items() if key != "epoch"},
        "start_train_loss": first["train_loss"],
        "start_test_accuracy": first["test_accuracy"],
        "is_monotone": all(
            b["train_loss"] <= a["train_loss"] for a, b in zip(made.rows, made.rows[1:], strict=False)
        ),
        "lift_error": made.error,
        "parameters": sum(p.numel() for p in made.module.parameters()),
        "seconds": made.fitted.seconds,
    }
    row["megabytes"] = sum(p.numel() * p.element_size() for p in made.module.parameters()) / 1e6
    if made.lifting.layers[0].kind == "fc":
        row |= _masked(protocol.images, made)
        row["scale"] = _scale(made.lifting.layers[0], made.state)
    return row


def filter_rows(seed: int, made: Relaxed) -> Table:
    """Give a unit's weights on the first channel as cells, before and after training: log10|w|, None for 0.

    The unit is the first channel's in the middle of the image.
    """
    from thalweg.lifting import filter_image

    layer = made.lifting.layers[0]
    middle = tuple(size // 2 for size in layer.geometry.output_size)
    rows: Table = []
    for when, state in (("start", made.start), ("end", made.state)):
        image = filter_image(made.lifting, state, layer.name, 0, middle)[0].abs()
        rows += [
            {
                "seed": seed,
                "relax_time": made.time,
                "when": when,
                "row": i,
                "column": j,
                "value": math.log10(value) if (value := float(image[i, j])) else None,
            }
            for i in range(image.shape[0])
            for j in range(image.shape[1])
        ]
    return rows


def _shown(times: Sequence[int]) -> tuple[int, ...]:
    """Relax times whose filters are drawn: the first, one in the middle, the last but one."""
    return (times[0], times[len(times) // 2], times[max(0, len(times) - 2)])


def _plain_row(protocol: Protocol, last: dict[str, Any]) -> dict[str, Any]:
    net = protocol.build()
    count = sum(p.numel() for p in net.parameters())
    return {
        **{key: value for key, value in last.items() if key != "epoch"},
        "network": CNN,
        "parameters": count,
        "megabytes": 4 * count / 1e6,
    }


def _masked(images: Images, made: Relaxed) -> dict[str, float]:
    """Measure test accuracy with the local weights alone, and with the off-local ones alone."""
    from torch.func import functional_call

    from thalweg.lifting import masked

    inputs, targets = images.test
    device = next(made.module.parameters()).device
    found: dict[str, float] = {}
    for keep in ("local", "off-local"):
        state = masked(made.lifting, made.state, keep="local" if keep == "local" else "off-local")
        logits = images.outputs(partial(functional_call, made.module, state), inputs, device)
        found[f"{keep.replace('-', '_')}_alone"] = scores(logits, targets)[1]
    return found


def _scale(layer: "LiftedLayer", state: "dict[str, Tensor]") -> float:
    """Compare the median size of off-local weights with that of local ones."""
    import torch

    prefix = f"{layer.name}." if layer.name else ""
    weight = state[f"{prefix}{layer.inner}weight"].contiguous()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for _, view in layer.ties(mask):
        view.fill_(True)
    local, off = weight[mask].abs().median(), weight[~mask].abs().median()
    return float(off / local)
