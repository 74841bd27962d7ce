"""Trained connections as methods of the panel: polygons, a Bezier curve, the string, and maps of units."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from thalweg.errors import ConfigError
from thalweg.paths.curves import CurveKind, train_curve
from thalweg.paths.flow_leg import flow_path
from thalweg.paths.flow_model import UnitMap
from thalweg.paths.methods import Connection, Progress
from thalweg.paths.pair import Pair
from thalweg.paths.panel import Own
from thalweg.paths.string import string

TRAINED: Mapping[str, str] = {
    "polygon-3": "two straight edges, the bend between them trained",
    "polygon-5": "four straight edges, the three bends between them trained",
    "bezier": "a quadratic Bezier curve, its middle point trained",
    "string": "a string of images relaxed onto a path of least loss, more where it is high",
}
"""Methods that train a path for the pair, by name, and what each does."""

_KINDS: Mapping[str, tuple[CurveKind, int]] = {
    "polygon-3": ("polygon", 3),
    "polygon-5": ("polygon", 5),
    "bezier": ("bezier", 3),
}

_CYCLES = 4
"""Cycles of the string: the default of `string`."""


@dataclass(frozen=True)
class TrainedSettings:
    """How paths are trained.

    Args:
        epochs: of polygons and Bezier curves, passes over the data. Default: MNIST in Anokhin & Yarotsky 2020 (200
            for CIFAR-10).
        learning_rate: of SGD. Default and the two next: the same paper.
        batch_size: samples of a mini-batch.
        momentum: of SGD.
        weight_decay: of polygons and Bezier curves, on the point of the curve.
        string_steps: of the string, mini-batches in each of its cycles. Default: that of `string`.
        seed: of the order of the data and of the t that are drawn.
    """

    epochs: int = 60
    learning_rate: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 1e-4
    string_steps: int = 250
    seed: int = 0


def trained(name: str, settings: TrainedSettings | None = None, *, progress: Progress | None = None) -> Own:
    """Give a trained method as the panel takes it.

    Args:
        name: of `TRAINED`.
        settings: of the training.
        progress: called as progress(fraction, text).

    Returns:
        A function from a pair to a connection.

    Raises:
        ConfigError: no such method.

    **Source:** polygons and Bezier curves: Garipov et al. 2018 (arXiv 1802.10026); the string: Draxler et al. 2018
    (arXiv 1803.00885).

    Example:
        >>> from torch import nn
        >>> from thalweg.objective import Objective
        >>> from thalweg.paths.panel import panel
        >>> x, y = torch.randn(64, 3), torch.randint(2, (64,))
        >>> nets = [nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)]
        >>> pair = Pair.of(Objective(nets[0], nn.CrossEntropyLoss(), (x, y)), *nets)
        >>> own = {"bezier": trained("bezier", TrainedSettings(epochs=2))}
        >>> [row.status for row in panel(pair, (), own=own, points=5)]
        ['measured']
    """
    if name not in TRAINED:
        raise ConfigError(f"Expected one of {', '.join(TRAINED)}. Got {name!r}. Choose a method.")
    settings = settings or TrainedSettings()
    tell = progress or _silent

    def run(pair: Pair) -> Connection:
        return (_string if name == "string" else _curve)(pair, name, settings, tell)

    run.__doc__ = TRAINED[name]  # the panel's words
    return run


def _curve(pair: Pair, name: str, settings: TrainedSettings, tell: Progress) -> Connection:
    kind, bends = _KINDS[name]
    began = time.perf_counter()
    found = train_curve(
        pair.objective,
        pair.theta_a,
        pair.theta_b,
        generator=torch.Generator().manual_seed(settings.seed),
        kind=kind,
        bends=bends,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        start_buffers=pair.buffers(pair.a),
        end_buffers=pair.buffers(pair.b),
        progress=lambda epoch, loss: tell(epoch / settings.epochs, f"{name}: epoch {epoch}, loss {loss:.4g}"),
    )
    return Connection(name, found.path, 1.0, {}, time.perf_counter() - began, notes=_told(found.status))


def _string(pair: Pair, name: str, settings: TrainedSettings, tell: Progress) -> Connection:
    began = time.perf_counter()
    found = string(
        pair.objective,
        pair.theta_a,
        pair.theta_b,
        generator=torch.Generator().manual_seed(settings.seed),
        cycles=_CYCLES,
        steps=settings.string_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        momentum=settings.momentum,
        start_buffers=pair.buffers(pair.a),
        end_buffers=pair.buffers(pair.b),
        progress=lambda cycle, loss: tell(cycle / _CYCLES, f"{name}: cycle {cycle}, highest loss {loss:.4g}"),
    )
    return Connection(name, found.path, 1.0, {}, time.perf_counter() - began, notes=_told(found.status))


def _told(status: str) -> tuple[str, ...]:
    return () if status == "finished" else ("the training diverged: choose a smaller learning rate",)


def flow_method(unit_map: UnitMap, name: str = "flow") -> Own:
    """Give a map of units that was fitted on other nets as the panel takes it.

    Args:
        unit_map: the map.
        name: of the method.

    Returns:
        A function from a pair to a connection.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 3.3.
    """

    def run(pair: Pair) -> Connection:
        began = time.perf_counter()
        path = flow_path(
            pair.objective.space,
            pair.view,
            unit_map,
            pair.theta_a,
            pair.theta_b,
            start_buffers=pair.buffers(pair.a),
            end_buffers=pair.buffers(pair.b),
        )
        others = [group.name for group in pair.view.groups if group.name != unit_map.group]
        notes = (f"only the units of {unit_map.group} are mapped; all else goes straight",) if others else ()
        return Connection(name, path, 1.0, {}, time.perf_counter() - began, notes=notes)

    run.__doc__ = f"units of {unit_map.group} through a map ({unit_map.shape.kind}) fitted on other nets"
    return run


def _silent(fraction: float, text: str) -> None:
    """Report to nobody."""
