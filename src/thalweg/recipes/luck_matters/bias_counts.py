"""Counting biases: those of a file or of networks trained here, by layer, by half, and as histograms."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from thalweg.lab.tables import Table

if TYPE_CHECKING:
    from torch import Tensor

BINS = 20  # of a histogram, on each side of 0; chosen by us


class Biases(NamedTuple):
    """The biases of one BatchNorm layer: its name, and one number for each node."""

    layer: str
    values: tuple[float, ...]


Network = tuple[Biases, ...]


class Counted(NamedTuple):
    """What a checkpoint holds: the hash of the file, and the biases in it."""

    sha256: str
    network: Network


def of_state(state: "Mapping[str, Tensor]") -> Network:
    """Read the biases of every BatchNorm in a state, in its order.

    Raises:
        DataError: there are none.
    """
    from thalweg.teacher_student import negative_biases

    return tuple(Biases(found.name, tuple(found.biases.tolist())) for found in negative_biases(state))


def of_file(file: str) -> Counted:
    """Read the biases in a checkpoint; a file that is still the same is read once.

    Raises:
        CheckpointError: it is missing, damaged, unsafe or no checkpoint.
        DataError: it has no BatchNorm.
    """
    from thalweg.checkpoint import load_state
    from thalweg.errors import CheckpointError

    path = Path(file).expanduser()
    if not path.is_file():
        load_state(path)  # says what is wrong with it
    try:
        facts = path.stat()
        return _of_file(path, path.resolve(), facts.st_size, facts.st_mtime_ns)
    except CheckpointError as error:  # a recipe offers no way to trust a pickle
        raise CheckpointError(
            str(error).replace("; or, if you trust whoever made it, add --trust-pickle", "")
        ) from error


@functools.lru_cache(maxsize=4)
def _of_file(path: Path, place: Path, size: int, changed: int) -> Counted:
    import hashlib

    from thalweg.checkpoint import load_state

    del place, size, changed  # they tell another file, and one that was changed
    network = of_state(load_state(path))
    with path.open("rb") as stream:
        return Counted(hashlib.file_digest(stream, "sha256").hexdigest(), network)


def by_layer(networks: Mapping[str, Network]) -> Table:
    """Count in each layer of each network: nodes, and the shares of biases that are negative or exactly 0."""
    return [
        {
            "network": name,
            "place": place,
            "layer": biases.layer,
            "nodes": len(biases.values),
            "negative": _share(biases.values),
            "zero": sum(value == 0 for value in biases.values) / len(biases.values),
        }
        for name, network in networks.items()
        for place, biases in enumerate(network)
    ]


def negative_share(network: Network) -> float:
    """Give the share of negative biases among all of a network."""
    return _share([value for biases in network for value in biases.values])


def halves(network: Network) -> tuple[Network, Network]:
    """Part the layers of a network into lower and upper ones; the middle one of an odd number is in neither."""
    half = len(network) // 2
    return network[:half], network[len(network) - half :]


def in_halves(networks: Iterable[Network]) -> dict[str, float] | None:
    """Give the shares of negative biases in the lower and the upper half of the layers, of all networks together.

    Returns:
        Both shares; None if there is only one layer.
    """
    parts = [halves(network) for network in networks]
    lower, upper = (tuple(layer for part in parts for layer in part[k]) for k in (0, 1))
    return {"lower": negative_share(lower), "upper": negative_share(upper)} if lower else None


def histogram_rows(networks: Mapping[str, Network]) -> Table:
    """Count biases in bins, layer by layer, all networks together.

    Bins are equally wide on both sides of 0, which is an edge; a bias of exactly 0 counts in a bin of its own, whose
    edges are both 0.
    """
    import numpy as np

    rows: Table = []
    for place, layers in enumerate(zip(*networks.values(), strict=True)):
        values = np.concatenate([np.array(biases.values) for biases in layers])
        widest = float(np.abs(values).max()) or 1.0
        edges = np.linspace(-widest, widest, 2 * BINS + 1)
        edges[BINS] = 0.0
        below, above = values[values < 0], values[values > 0]
        counts = np.histogram(below, edges[: BINS + 1])[0].tolist() + np.histogram(above, edges[BINS:])[0].tolist()
        panel = f"{place}: {layers[0].layer}"
        rows += [
            {"layer": panel, "low": float(low), "high": float(high), "count": count}
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ]
        rows.append({"layer": panel, "low": 0.0, "high": 0.0, "count": int((values == 0).sum())})
    return rows


def _share(values: Sequence[float]) -> float:
    return sum(value < 0 for value in values) / len(values)
