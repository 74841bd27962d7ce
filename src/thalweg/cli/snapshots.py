"""Checkpoints on the command line as points of one landscape: files, folders of them, snapshots of a training."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.cli.landscape import Landscape, objective_on
from thalweg.cli.measurement import Point, Value, Wishes, slice_values
from thalweg.cli.network import load_network
from thalweg.cli.samples import first_batch
from thalweg.errors import CheckpointError, ConfigError, DataError
from thalweg.lab.recipe import Progress

if TYPE_CHECKING:
    import torch
    from torch import nn

_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
_SAMPLES = 4  # of the first batch, to run a network once; chosen by us
_SLOW = 1.0  # seconds of a gradient from which it is not timed twice; chosen by us


@dataclass(frozen=True)
class Snapshot:
    """Where the weights of one point lie.

    Args:
        name: for tables and pictures.
        path: the file.
        step: of the training, if the name or the file says so.
        row: of the array `thetas` in the file; None for a checkpoint.
    """

    name: str
    path: Path
    step: int | None
    row: int | None = None


def find_snapshots(paths: Sequence[Path]) -> list[Snapshot]:
    """Spell out what a user named: a checkpoint, a folder of them, a file with `thetas` (and `steps`).

    Raises:
        CheckpointError: a file is missing, or a folder holds no checkpoint.
    """
    found: list[Snapshot] = []
    for path in paths:
        if path.is_dir():
            files = sorted((p for p in path.iterdir() if p.suffix in _SUFFIXES), key=_natural)
            if not files:
                kinds = ", ".join(_SUFFIXES)
                raise CheckpointError(f"Expected checkpoints ({kinds}) in {path}. Got none. Name the files.")
            found += [Snapshot(p.stem, p, _step(p)) for p in files]
        else:
            found += _trajectory(path) or [Snapshot(path.stem, path, _step(path))]
    names = [snapshot.name for snapshot in found]
    return [s if names.count(s.name) == 1 else Snapshot(str(s.path), s.path, s.step, s.row) for s in found]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort numbers within names by size."""
    return [(int(word), "") if word.isdigit() else (0, word) for word in re.split(r"(\d+)", path.name)]


def _step(path: Path) -> int | None:
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else None


def _trajectory(path: Path) -> list[Snapshot]:
    """Give the snapshots of a safetensors file of thetas; none if it is something else."""
    if path.suffix != ".safetensors" or not path.is_file():
        return []
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if "thetas" not in file.keys() or len(file.get_slice("thetas").get_shape()) != 2:
                return []
            count = file.get_slice("thetas").get_shape()[0]
            steps = [int(s) for s in file.get_tensor("steps")] if "steps" in file.keys() else range(count)
    except (safetensors.SafetensorError, OSError):
        return []  # said better where it is read as a checkpoint
    if len(steps) != count:
        raise CheckpointError(
            f"Expected a step for each of {count} thetas in {path}. Got {len(steps)}. Mend the file."
        )
    return [Snapshot(f"step {step}", path, int(step), row) for row, step in enumerate(steps)]


def load_points(
    snapshots: Sequence[Snapshot], landscape: Landscape, dtype: "torch.dtype | None", device: str, **network: Any
) -> list[Point]:
    """Build the network at every snapshot, see that all fits together, and take loss and gradient.

    Args:
        snapshots: where the weights lie.
        landscape: data and loss.
        dtype: floating type of the computation. Default: that of the weights.
        device: where to compute.
        network: how to build the module, as `load_network` takes it.

    Raises:
        ThalwegError: a checkpoint, the data or the loss do not fit.
    """
    return [_point(snapshot, landscape, dtype, device, network) for snapshot in snapshots]


def _point(
    snapshot: Snapshot, landscape: Landscape, dtype: "torch.dtype | None", device: str, network: dict[str, Any]
) -> Point:
    from thalweg.probes import examine, gradient_norm

    module = _module(snapshot, landscape, network)
    objective = objective_on(landscape, module, dtype=dtype, device=device)
    test = None
    if landscape.test_data is not None:
        test = objective_on(landscape, module, is_test=True, dtype=dtype, device=device)
    theta = objective.theta()
    examination = examine(objective, theta)
    seconds = float("inf")
    for _ in range(2):  # the first may be slow for once
        start = time.perf_counter()
        gradient = gradient_norm(objective, theta)
        seconds = min(seconds, time.perf_counter() - start)
        if seconds > _SLOW:
            break
    return Point(snapshot.name, snapshot.step, objective, test, theta, examination, gradient, seconds)


def _module(snapshot: Snapshot, landscape: Landscape, network: dict[str, Any]) -> "nn.Module":
    from thalweg.space import Space

    path = snapshot.path if snapshot.row is None else None
    module = load_network(path, shape=None, example=None, inputs=_example(landscape), **network).module
    if snapshot.row is not None:
        import safetensors

        with safetensors.safe_open(snapshot.path, framework="pt") as file:
            theta = file.get_slice("thetas")[snapshot.row]
        space = Space.of(module)
        if len(theta) != space.num_params:
            raise CheckpointError(
                f"Expected thetas of {space.num_params} parameters in {snapshot.path}. Got {len(theta)}. "
                "Give the factory its arguments: --arg key=value."
            )
        space.write(theta.to(next(module.parameters()).dtype), module)
    return module


def _example(landscape: Landscape) -> Any:
    """A few samples, as arguments of the network."""
    from thalweg.batching import rows_of
    from thalweg.structure.trace import arguments_of

    batch = first_batch(landscape.data)
    try:
        inputs, _ = rows_of(tuple(batch), slice(_SAMPLES))
    except (DataError, IndexError):
        inputs = batch[0]
    return arguments_of(inputs)


def shared_slice(points: Sequence[Point], wishes: Wishes, workers: int, progress: Progress) -> Value:
    """Lay one line or plane through several checkpoints, or along their principal components.

    Raises:
        ConfigError: the number of checkpoints does not fit.
        NumericalError: the checkpoints lie on one line.
        ShapeError: they are of different networks.
    """
    import torch

    from thalweg.probes import line, plane, principal_components, three_points

    first = points[0]
    walk: Any = {"test": first.test, "workers": workers, "progress": progress}
    thetas = [point.theta for point in points]
    if wishes.slice == "1d":
        _require(points, 2, 2, "--slice 1d --directions through")
        half = wishes.points // 2
        reach = torch.arange(-half, half + 1, dtype=torch.float64) / max(half, 1)
        coordinates = 0.5 + reach * (0.5 + wishes.span / 4)
        found = line(first.objective, thetas[0], thetas[1] - thetas[0], coordinates=coordinates, **walk)
        markers: list[Value] = [{"a": float(i), "b": 0.0, "name": p.name} for i, p in enumerate(points)]
        return slice_values(found, f"the straight line from {first.name} (0) to {points[1].name} (1)", markers)
    if wishes.directions == "pca":
        _require(points, 3, 10**9, "--directions pca")
        laid = principal_components(torch.stack(thetas))
        shares = " and ".join(f"{share:.1%}" for share in laid.explained or ())
        words = f"principal components of the way, seen from {points[-1].name}; they explain {shares} of it"
    else:
        _require(points, 3, 3, "--slice 2d --directions through")
        laid = three_points(*thetas)
        words = "the plane through the three checkpoints; lengths are distances of their weights"
    centre = points[-1] if wishes.directions == "pca" else first
    found = plane(centre.objective, laid.origin, laid.directions, coordinates=laid.coordinates(wishes.points), **walk)
    places = zip(points, laid.points.values(), strict=True)
    return slice_values(found, words, [{"a": x, "b": y, "name": p.name} for p, (x, y) in places])


def _require(points: Sequence[Point], least: int, most: int, words: str) -> None:
    if not least <= len(points) <= most:
        wanted = f"{least}" if least == most else f"at least {least}"
        raise ConfigError(f"Expected {wanted} checkpoints for {words}. Got {len(points)}. Name them.")
