"""What is measured of a network that left the convolutional ones, and what a whole protocol of them gives."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.lab.parts import Share, part
from thalweg.lab.tables import Table, Tables
from thalweg.recipes.needle_in_the_haystack.images import Images, scores
from thalweg.recipes.needle_in_the_haystack.protocol import (
    CNN,
    STANDARD,
    Protocol,
    Relaxed,
    Space,
)

if TYPE_CHECKING:
    from torch import Tensor

    from thalweg.lifting import LiftedLayer, LiftPlan

CNN_COST = 0.5
"""Time of an epoch of a convolutional network in those of a dense one, for the bar of progress. A guess of ours."""
# Copies of the weights that a training of a relaxed network takes at its peak: measured 9.9 with SGD and 11.9 with
# Adam at 33 million parameters, before two of them went; not measured again.
_COPIES = {"sgd": 10, "adam": 12}


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

    Raises:
        MemoryLimitError: the networks do not fit; told before any is trained.
    """
    preset, data = protocol.preset, protocol.images.name
    works: list[tuple[Space, int | None]] = [
        (space, time) for space in spaces for time in ((None, *preset.times) if space in STANDARD else preset.times)
    ]
    protocol.context.progress(share.start, sizes(protocol, works))
    shares = share.split([CNN_COST * preset.epochs, *[preset.relaxed_epochs] * len(works)])
    snapshots, curves = protocol.convolutional(next(shares), preset.times)
    networks = [_plain_row(protocol, curves)]
    filters: Table = []
    for space, time in works:
        own = next(shares)
        shown = with_filters and space == "fc" and (time is None or time in _shown(preset.times))

        def compute(
            folder: Path | None, space: Space = space, time: int | None = time, own: Share = own, shown: bool = shown
        ) -> dict[str, Any]:
            if time is None:
                made = protocol.standard(space, own, folder, with_start=shown)
            else:
                made = protocol.relaxed(snapshots[time], time, space, own, folder, with_start=shown)
            drawn = filter_rows(protocol.seed, made) if shown else []
            return {"curves": made.rows, "network": summary(protocol, made), "filters": drawn}

        name = f"{protocol.seed}-{space}-{'standard' if time is None else time}"
        found = part(protocol.context, name, data, compute)
        curves = [*curves, *found["curves"]]
        before = networks[0]["seconds"] * (time or 0) / preset.epochs
        networks.append({**found["network"], "total_seconds": found["network"]["seconds"] + before})
        filters += found["filters"]
    return {"curves": curves, "networks": networks, "filters": filters}


def sizes(protocol: Protocol, works: Sequence[tuple[Space, int | None]]) -> str:
    """Word how large the networks of a protocol are, before any is made.

    Raises:
        MemoryLimitError: training one of them would take more memory than the device has.
    """
    import torch

    from thalweg.errors import MemoryLimitError
    from thalweg.lifting import lift_plan
    from thalweg.lifting.memory import available_memory, worded_bytes

    preset, net, words = protocol.preset, protocol.build(), []
    own = sum(p.numel() for p in net.parameters())
    free = available_memory(torch.device(protocol.context.device))
    for space in dict.fromkeys(space for space, _ in works):
        plan: LiftPlan = lift_plan(net, protocol.images.train[0][:2], to=space, padded=preset.padded)
        count = own + sum(layer.num_params - layer.num_shared for layer in plan.layers)
        need = _COPIES[preset.optimizer] * 4 * count
        if free is not None and need > free:
            raise MemoryLimitError(
                f"Expected {need:,} bytes ({worded_bytes(need)}) of memory to train a network of {count:,} "
                f"parameters. Got {free:,} ({worded_bytes(free)}). Choose smaller images or fewer channels."
            )
        number = sum(other == space for other, _ in works)
        words.append(f"{number} of {count:,} parameters ({space}), {worded_bytes(4 * count)} each")
    where = f"; states to go on from, one at a time, in {protocol.context.folder}" if protocol.context.folder else ""
    return f"seed {protocol.seed}: networks to train: {', '.join(words)}{where}"


def summary(protocol: Protocol, made: Relaxed) -> dict[str, Any]:
    """Give one row on a relaxed network: its start and end, how far it went, and what it owes to which weights.

    `local_alone` and `off_local_alone` are test accuracies with the other weights set to 0; `scale` is the median
    size of off-local weights of the first lifted layer in that of local ones. `parameters` leaves out weights that
    read nothing but padding, which never move; `megabytes` is what the network takes.
    """
    first, last = made.rows[0], made.rows[-1]
    count = sum(p.numel() for p in made.module.parameters())
    dead = sum(
        math.prod(layer.weight_shape) - layer.geometry.local_entries
        for layer in made.lifting.layers
        if layer.kind == "local"
    )
    row = {
        **{key: value for key, value in last.items() if key != "epoch"},
        "start_train_loss": first["train_loss"],
        "start_test_accuracy": first["test_accuracy"],
        "best_test_accuracy": max(row["test_accuracy"] for row in made.rows),
        "is_monotone": all(
            b["train_loss"] <= a["train_loss"] for a, b in zip(made.rows, made.rows[1:], strict=False)
        ),
        "gap": made.gap,
        "parameters": count - dead,
        "megabytes": sum(p.numel() * p.element_size() for p in made.module.parameters()) / 1e6,
        "seconds": made.seconds,
    }
    if made.lifting.layers and made.lifting.layers[0].kind == "fc":
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
                "network": made.name,
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


def _plain_row(protocol: Protocol, curves: Table) -> dict[str, Any]:
    count = sum(p.numel() for p in protocol.build().parameters())
    return {
        **{key: value for key, value in curves[-1].items() if key != "epoch"},
        "network": CNN,
        "best_test_accuracy": max(row["test_accuracy"] for row in curves),
        "total_seconds": curves[-1]["seconds"],
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
