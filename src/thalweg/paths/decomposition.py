"""Which layer breaks a connection: the straight line taken apart, layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.paths.adjust import RIDGE, Adjuster
from thalweg.paths.leg import blend_leg
from thalweg.paths.pair import Pair, State
from thalweg.paths.path import Path
from thalweg.paths.profile import profile
from thalweg.paths.stages import Stage, stages


@dataclass(frozen=True)
class LayerBarrier:
    """What one layer has to do with the barrier.

    Args:
        layer: by its weight.
        parameters: how many move with it.
        rise_from_a: greatest rise of the training loss when this layer alone goes straight from A's to B's.
        rise_from_b: the same in B, on the way to A's.
        mended: how much lower the loss is at the midpoint of the whole line when this layer alone is fitted there;
            None for a layer that cannot be fitted.
    """

    layer: str
    parameters: int
    rise_from_a: float
    rise_from_b: float
    mended: float | None


def layer_barriers(pair: Pair, *, target: State | None = None, points: int = 7) -> tuple[LayerBarrier, ...]:
    """Measure each layer's part in the barrier between two networks.

    Args:
        pair: the networks.
        target: B, or B with its units in A's order.
        points: of each line.

    Returns:
        One entry for each layer, in the order of execution.

    **Source:** one layer at a time is the layer-wise connectivity of Adilova et al. 2023 (arXiv 2307.06966); the
    fit at the midpoint is ours.
    """
    target = pair.b if target is None else target
    middle = {n: torch.lerp(pair.a[n], target[n], 0.5) for n in pair.objective.space.names}
    at_middle = _loss(pair, middle)
    found = []
    for stage in stages(pair):
        forth, back = (_rise(pair, one, two, stage, points) for one, two in ((pair.a, target), (target, pair.a)))
        count = sum(pair.a[n].numel() for n in stage.names)
        fitted = _fitted(pair, target, middle, stage)
        mended = None if fitted is None else at_middle - _loss(pair, {**middle, **fitted})
        found.append(LayerBarrier(stage.label, count, forth, back, mended))
    return tuple(found)


def _rise(pair: Pair, one: State, two: State, stage: Stage, points: int) -> float:
    end = {**one, **{n: two[n] for n in stage.names}}
    leg = blend_leg(stage.label, pair.trained(one), pair.trained(end))
    if not leg.blends:
        return 0.0
    path = Path(pair.objective.space, (leg, leg.reversed()), (), pair.buffers(one), pair.buffers(one))
    times = [k / (points - 1) / 2 for k in range(points)]
    losses = profile(path, pair.objective, times=times, refine=False).train_loss
    return float((losses - losses[0]).max())


def _loss(pair: Pair, parameters: Mapping[str, Tensor]) -> float:
    """The loss at a point, with the running statistics of its own."""
    trained = pair.trained(pair.a)
    leg = blend_leg("", trained, {**trained, **parameters})
    path = Path(pair.objective.space, (leg, leg.reversed()), (), pair.buffers(pair.a), pair.buffers(pair.a))
    found = profile(path, pair.objective, times=[0.5], refine=False)
    return float(found.train_loss[found.times == 0.5][0])


def _fitted(pair: Pair, target: State, middle: State, stage: Stage) -> dict[str, Tensor] | None:
    site = pair.execution.site(stage.weight or "")
    reads = site is not None and any(r != "producer" for r in pair.view.members_of(site.weight).values())
    if site is None or site.calls != 1 or not reads:
        return None
    adjuster, name = Adjuster(pair, ridge=RIDGE), frozenset({site.weight})
    here, there = (adjuster.targets({**pair.a, **state}, name) for state in (pair.a, target))
    wanted = {n: torch.lerp(here[n], there[n], 0.5) for n in name}
    return adjuster.fitted({**pair.a, **middle}, wanted)
