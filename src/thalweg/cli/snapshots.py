"""Checkpoints on the command line as points of one landscape: files, folders of them, snapshots of a training."""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.cli.landscape import Landscape, objective_on
from thalweg.cli.measurement import Point, Wishes, slice_values
from thalweg.cli.network import load_network
from thalweg.cli.parts import Value, digest
from thalweg.cli.samples import first_batch
from thalweg.errors import CheckpointError, ConfigError, DataError, NumericalError, ShapeError
from thalweg.lab.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch import nn

    from thalweg.objective import Objective

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
    return [s if names.count(s.name) == 1 else _by_path(s) for s in found]


def _by_path(snapshot: Snapshot) -> Snapshot:
    name = str(snapshot.path) if snapshot.row is None else f"{snapshot.path}, {snapshot.name}"
    return replace(snapshot, name=name)


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


def require_fitting(snapshots: Sequence[Snapshot], wishes: Wishes) -> None:
    """See that a slice through checkpoints has as many as it needs, before anything is computed.

    Raises:
        ConfigError: it has fewer or more.
    """
    if wishes.slice is None or wishes.directions not in ("through", "pca"):
        return
    least = 2 if wishes.slice == "1d" else 3
    most = 10**9 if wishes.directions == "pca" else least
    if not least <= len(snapshots) <= most:
        wanted = f"{least}" if least == most else f"at least {least}"
        words = f"--slice {wishes.slice} --directions {wishes.directions}"
        raise ConfigError(f"Expected {wanted} checkpoints for {words}. Got {len(snapshots)}. Name them.")


def _point(
    snapshot: Snapshot, landscape: Landscape, dtype: "torch.dtype | None", device: str, network: dict[str, Any]
) -> Point:
    import torch

    from thalweg.probes import examine, gradient_norm

    module = _module(snapshot, landscape, network)
    if dtype is None and next(module.parameters()).dtype not in (torch.float32, torch.float64):
        dtype = torch.float32  # half precision has no curvature to speak of
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
    if not math.isfinite(gradient.l1):
        raise NumericalError(
            f"Expected a finite gradient at {snapshot.name}. Got {gradient.l1}. Check the loss there."
        )
    return Point(
        *(snapshot.name, snapshot.step, objective, test, theta, examination, gradient, seconds),
        landscape=_identity(objective, landscape),
        test_landscape=_identity(test, landscape) if test is not None else "",
    )


def _identity(objective: "Objective", landscape: Landscape) -> str:
    """Hash what decides a landscape: data, loss, coordinates, buffers and frozen parameters."""
    from torch.utils._pytree import tree_leaves

    state = [*objective.module.named_buffers(), *objective.module.named_parameters()]
    fixed = [part for name, value in state if name not in objective.space.names for part in (name, value)]
    data = (leaf for batch in objective.batches() for leaf in tree_leaves(batch))
    return digest([landscape.loss_words, objective.space.names, objective.space.shapes, *fixed, *data])


def _module(snapshot: Snapshot, landscape: Landscape, network: dict[str, Any]) -> "nn.Module":
    from thalweg.space import Space

    path = snapshot.path if snapshot.row is None else None
    module = load_network(path, shape=None, example=None, inputs=example_from(landscape), **network).module
    if snapshot.row is not None:
        import safetensors

        with safetensors.safe_open(snapshot.path, framework="pt") as file:
            theta = file.get_slice("thetas")[snapshot.row]
        space, whole = Space.of(module.to(theta.dtype)), [*module.parameters(), *module.buffers()]
        if len(whole) > len(space.names):
            raise CheckpointError(
                f"Expected a network of nothing but trainable parameters for the thetas of {snapshot.path}. "
                f"Got {len(whole) - len(space.names)} buffers or frozen parameters, which thetas lack. "
                "Save a state dict for each snapshot."
            )
        if len(theta) != space.num_params:
            raise CheckpointError(
                f"Expected thetas of {space.num_params} parameters in {snapshot.path}. Got {len(theta)}. "
                "Give the factory its arguments: --arg key=value."
            )
        space.write(theta, module)
    return module


def example_from(landscape: Landscape) -> Any:
    """Give a few samples, as arguments of the network."""
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
        NumericalError: the checkpoints lie on one line.
        ShapeError: they are of different networks.
    """
    import torch

    from thalweg.probes import line, plane, principal_components, three_points

    centre = points[-1] if wishes.directions == "pca" else points[0]
    for point in points:
        if point.objective.space != centre.objective.space:
            raise ShapeError(
                f"Expected checkpoints of one network. Got {point.name} of {point.objective.num_params:,} parameters "
                f"and {centre.name} of {centre.objective.num_params:,}. Take those of one size."
            )
    first = points[0]
    walk: Any = {"test": centre.test, "workers": workers, "progress": progress}
    thetas, half = [point.theta for point in points], wishes.points // 2
    kept = f"; buffers are those of {centre.name}" if list(centre.objective.module.buffers()) else ""
    if wishes.slice == "1d":
        coordinates = 0.5 + 0.75 * torch.arange(-half, half + 1, dtype=torch.float64) / max(half, 1)
        found = line(first.objective, thetas[0], thetas[1] - thetas[0], coordinates=coordinates, **walk)
        markers: list[Value] = [{"a": float(i), "b": 0.0, "name": p.name} for i, p in enumerate(points)]
        words = f"the straight line from {first.name} (0) to {points[1].name} (1)"
        return slice_values(found, words + kept, markers)
    if wishes.directions == "pca":
        laid = principal_components(torch.stack(thetas))
        shares = " and ".join(f"{share:.1%}" for share in laid.explained or ())
        words = f"principal components of the way, seen from {points[-1].name}; they explain {shares} of it"
    else:
        laid = three_points(*thetas)
        words = "the plane through the three checkpoints; lengths are distances of their weights"
    grid = laid.coordinates(2 * half + 1)
    found = plane(centre.objective, laid.origin, laid.directions, coordinates=grid, **walk)
    places = zip(points, laid.points.values(), strict=True)
    return slice_values(found, words + kept, [{"a": x, "b": y, "name": p.name} for p, (x, y) in places])
