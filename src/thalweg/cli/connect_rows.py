"""Two checkpoints as a pair, and one row for each method, kept on disk as soon as it is measured."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import thalweg
from thalweg.cli.connect_methods import Wishes
from thalweg.cli.connect_page import is_better
from thalweg.cli.landscape import Landscape, objective_on
from thalweg.cli.network import load_network
from thalweg.cli.parts import Parts, Value, digest
from thalweg.cli.snapshots import _identity, example_from
from thalweg.errors import CheckpointError, ConfigError, NumericalError
from thalweg.lab.files import unwritable
from thalweg.lab.plain import canonical
from thalweg.lab.progress import Progress, shown_progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from thalweg.objective import Objective
    from thalweg.paths import Path as Way
    from thalweg.paths.pair import Pair
    from thalweg.paths.panel import PanelRow
    from thalweg.paths.profile import Profile

_PATH = "path-{}.safetensors"


@dataclass(frozen=True)
class Couple:
    """Two checkpoints, checked and measured.

    Args:
        pair: the networks on the data.
        test: the landscape on test data.
        ends: loss and accuracy of A and of B.
        statistics: how running statistics are set along a path.
        identity: what decides every row: weights, data, loss.
    """

    pair: "Pair"
    test: "Objective | None"
    ends: tuple[Value, Value]
    statistics: str
    identity: Value


def load_couple(
    files: tuple[Path, Path], landscape: Landscape, wishes: Wishes, device: str, built: Mapping[str, Any]
) -> Couple:
    """Build the network from both checkpoints, see that all fits together, and measure both.

    Args:
        files: the checkpoints A and B.
        landscape: data and loss.
        wishes: samples for fits, and the seed of their draw.
        device: where to compute.
        built: how to build the module, as `load_network` takes it.

    Raises:
        ThalwegError: a checkpoint, the data or the loss do not fit.
        NumericalError: the loss of one of them is not finite.
    """
    from thalweg.paths import linear, profile
    from thalweg.paths.pair import Pair
    from thalweg.probes import examine

    (module, a), (_, b) = (_loaded(file, landscape, built) for file in files)
    module.load_state_dict(a, strict=False)  # --model may name one module, which B was read into
    kind = _dtype(a, b)
    objective = objective_on(landscape, module, dtype=kind, device=device)
    test = None
    if landscape.test_data is not None:
        test = objective_on(landscape, module, is_test=True, dtype=kind, device=device)
    examine(objective, objective.theta())
    pair = Pair.of(objective, a, b, fit_samples=wishes.fit_samples, seed=wishes.seed)
    buffers = {"start_buffers": pair.buffers(pair.a), "end_buffers": pair.buffers(pair.b)}
    line = linear(objective.space, pair.theta_a, pair.theta_b, **buffers)
    # The two ends are the checkpoints; a third point tells how statistics are set between.
    found = profile(line, objective, test=test, points=3, refine=False)
    ends = _end(found, 0), _end(found, -1)
    for file, end in zip(files, ends, strict=True):
        if not abs(float(end["train_loss"])) < float("inf"):
            raise NumericalError(f"Expected a finite loss at {file}. Got {end['train_loss']}. Check its weights.")
    identity = {
        "command": "connect",
        "a": digest([*pair.a, *pair.a.values()]),
        "b": digest([*pair.b, *pair.b.values()]),
        "data": _identity(objective, landscape),
        "test": _identity(test, landscape) if test is not None else "",
        "ends": ends,
    }
    return Couple(pair, test, ends, found.statistics, identity)


def _loaded(file: Path, landscape: Landscape, built: Mapping[str, Any]) -> "tuple[nn.Module, dict[str, Tensor]]":
    """Build the module with the weights of a checkpoint; its state is a copy."""
    try:
        network = load_network(file, shape=None, example=None, inputs=example_from(landscape), **built)
    except CheckpointError as error:
        if str(file) in str(error):
            raise
        raise CheckpointError(str(error).replace(". Got ", f". Got {file} with ", 1)) from error
    own = [*network.module.named_parameters(), *network.module.named_buffers()]
    return network.module, {name: tensor.detach().clone() for name, tensor in own}


def _dtype(a: "Mapping[str, Tensor]", b: "Mapping[str, Tensor]") -> "torch.dtype":
    """Give the wider type of both; half precision is connected in single."""
    import torch

    found = torch.float32
    for tensor in (*a.values(), *b.values()):
        if tensor.is_floating_point():
            found = torch.promote_types(found, tensor.dtype)
    return found


def _end(found: "Profile", place: int) -> Value:
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    columns = {name: getattr(found, name) for name in names}
    return {name: None if values is None else float(values[place]) for name, values in columns.items()}


class _FailedError(Exception):
    """A method failed: its row is told, and tried again next time."""

    def __init__(self, row: Value) -> None:
        super().__init__()
        self.row = row


@dataclass
class _Kept:
    """Paths beside the rows: of trained methods, of those asked for, and of the best so far."""

    couple: Couple
    wishes: Wishes
    folder: Path
    best: Value | None = None

    def file(self, name: str) -> Path:
        identity = canonical({**self.identity(name), "thalweg": thalweg.__version__})
        return self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.safetensors"

    def identity(self, name: str) -> Value:
        return {**self.couple.identity, **self.wishes.deciding(name)}

    def is_kept(self, name: str) -> bool:
        return self.wishes.is_trained(name) or (self.wishes.save is not None and name in self.wishes.save)

    def take(self, row: Value, path: "Way | None") -> None:
        """Note a row; write its path if it is of use, and drop the one that it beats."""
        name = row["method"]
        is_best = self.wishes.save is None and is_better(row, self.best)
        if path is not None and name not in self.wishes.flows and (is_best or self.is_kept(name)):
            _write_path(path, self.file(name))
        if is_best:
            if self.best is not None and not self.is_kept(self.best["method"]):
                self.file(self.best["method"]).unlink(missing_ok=True)
            self.best = row


def measured(couple: Couple, wishes: Wishes, parts: Parts) -> list[Value]:
    """Measure every method, or read what an earlier command measured.

    Args:
        couple: the networks.
        wishes: which methods, and how.
        parts: where rows are kept.

    Returns:
        One row for each method, in order, as plain values.

    Raises:
        StoreError: a row cannot be written.
    """
    rows: list[Value] = []
    kept = _Kept(couple, wishes, parts.folder)
    with shown_progress("connect") as report:
        for place, name in enumerate(wishes.methods):

            def inner(fraction: float, text: str, place: int = place) -> None:
                report(min((place + fraction) / len(wishes.methods), 0.999), text)

            inner(0.0, name)
            rows.append(_row(kept, name, parts, inner))
        report(1.0, "done")
    return rows


def _row(kept: _Kept, name: str, parts: Parts, tell: Progress) -> Value:
    def compute() -> Value:
        row = _panel_row(kept.couple, kept.wishes, name, tell)
        found = row_values(row)
        if row.status == "failed":
            raise _FailedError(found)
        kept.take(found, row.connection.path if row.connection is not None else None)
        return found

    try:
        row = parts.kept(kept.identity(name), compute)
    except _FailedError as failed:
        return failed.row
    kept.take(row, None)
    return row


def _panel_row(couple: Couple, wishes: Wishes, name: str, tell: Progress) -> "PanelRow":
    from thalweg.paths.panel import panel

    own = wishes.own(name, tell)
    rows = panel(
        couple.pair,
        () if own else (name,),
        own=own,
        test=couple.test,
        points=wishes.points,
        settings=wishes.closed,
        progress=tell,
    )
    return rows[0]


def row_values(row: "PanelRow") -> Value:
    """Give a row of the panel as plain values, with its profile."""
    found: Value = {
        "method": row.method,
        "words": row.words,
        "source": row.source,
        "status": row.status,
        "reason": row.reason,
        "values": row.values(),
    }
    if row.connection is None or row.profile is None:
        return found
    legs = zip(row.connection.path.legs, row.connection.path.intervals, strict=True)
    return found | {
        "meets": row.connection.meets,
        "notes": list(row.connection.notes),
        "legs": [{"label": leg.label, "from": start, "to": end} for leg, (start, end) in legs],
        "profile": row.profile.rows(),
        "finite": row.profile.status,
        "measured": row.profile.reuse,
    }


def require_free_paths(folder: Path, wishes: Wishes, inputs: Sequence[Path], *, force: bool) -> None:
    """See that no path would take the place of a file of the user's, before any work is done.

    Raises:
        ConfigError: a path would be written over a checkpoint, or over a file that no earlier run lists.
    """
    known = _listed(folder)
    for name in wishes.methods if wishes.save is None else wishes.save:
        target = folder / _PATH.format(name)
        if not target.exists() or name in wishes.flows:
            continue
        if _is_among(target, inputs):
            raise ConfigError(f"Expected results apart from A and B. Got {target} for a path. Choose another --out.")
        if target.name not in known and not force:
            raise ConfigError(
                f"Expected a folder without other files for paths. Got {target}. Use --force to overwrite it."
            )


def written_paths(
    couple: Couple, wishes: Wishes, rows: Sequence[Value], best: str | None, folder: Path, inputs: Sequence[Path] = ()
) -> dict[str, Path]:
    """Write the paths that were asked for; those that an earlier run wrote there, by its panel.json, are removed.

    A path through a map of units is not written: it is the map's file and the two checkpoints.

    Args:
        couple: the networks.
        wishes: whose paths.
        rows: what was measured.
        best: the best method.
        folder: of the results.
        inputs: files that stay, whatever their names are.

    Returns:
        The file of each method whose path was written.

    Raises:
        StoreError: a path cannot be written.
    """
    there = {row["method"] for row in rows if row["status"] == "measured"} - set(wishes.flows)
    wanted = (best,) if wishes.save is None else wishes.save
    kept, found = _Kept(couple, wishes, folder / "parts"), {}
    for name in (n for n in wanted if n in there):
        source, target = kept.file(str(name)), folder / _PATH.format(name)
        if not source.is_file():  # measured by an earlier command, which did not keep it
            connection = _panel_connection(couple, wishes, str(name))
            _write_path(connection, source)
        _publish(source, target)
        found[str(name)] = target
    for other in folder.glob(_PATH.format("*")):
        if other.name in _listed(folder) and other not in found.values() and not _is_among(other, inputs):
            other.unlink()
    return found


def _listed(folder: Path) -> set[str]:
    """Name the paths that an earlier run wrote into the folder; none where it says nothing of them."""
    try:
        found = json.loads((folder / "panel.json").read_bytes())["files"]["paths"].values()
        return {Path(path).name for path in found}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or not ours
        return set()


def _is_among(file: Path, others: Sequence[Path]) -> bool:
    return any(other.exists() and file.samefile(other) for other in others)


def _panel_connection(couple: Couple, wishes: Wishes, name: str) -> "Way":
    from thalweg.paths.methods import connect

    own = wishes.own(name, lambda fraction, text: None)
    made = own[name](couple.pair) if own else connect(couple.pair, name, wishes.closed)
    return made.path


def _write_path(path: "Way", file: Path) -> None:
    from thalweg.paths.saved import save_path

    save_path(path, file)


def _publish(source: Path, target: Path) -> None:
    """Give a file a second name, without a second copy where the disk can; whole or not at all."""
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        aside.unlink(missing_ok=True)
        try:
            os.link(source, aside)
        except OSError:
            shutil.copyfile(source, aside)
        os.replace(aside, target)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(target, error) from error
        raise
