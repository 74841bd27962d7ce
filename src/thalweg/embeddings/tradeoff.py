"""The trade-off of a reduction: how much of what a network computes is left at which width, over all data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from thalweg.batching import rows_of
from thalweg.embeddings.agreement import Comparison, Progress, compare
from thalweg.embeddings.checked import reduce_by
from thalweg.embeddings.reduction import Merge, Reduction, find_merges_at
from thalweg.errors import DataError, PlanError, StructureError
from thalweg.objective import Objective
from thalweg.precision import copied
from thalweg.probes.examine import examine
from thalweg.structure import View, trace
from thalweg.structure.trace import Inputs, arguments_of

LEVELS = (0.999, 0.99, 0.98, 0.95, 0.92, 0.9, 0.87, 0.85, 0.82, 0.8, 0.75, 0.7, 0.6, 0.5)
"""Levels of similarity. 0.9 is that of the paper's figure 5; the others are chosen by us, close around it, where the
choice most often falls, and down to units whose incoming vectors are 60 degrees apart."""

AMPLITUDES = (0.0, 0.01)
"""Fractions of the largest amplitude below which units are dropped. 0 drops only what nothing reads. The paper drops
"neurons of low amplitude" without saying where it cuts: 0.01 drops about as many of its figure 5 (105 of 400 in a
training of ours; about 110 in the figure)."""

_SLACK = 1e-12
"""By how much an agreement may fall short: 1 - 0.18 is more than 0.82 in float64. Chosen by us, far above rounding
and far below the share of one sample."""

_SAMPLES = 4  # of the first batch, to trace a network with; chosen by us


@dataclass(frozen=True, eq=False)
class TradeOffPoint:
    """One reduction and what it keeps.

    Args:
        similarity: least similarity of units that were merged; None: only equal ones.
        amplitude: fraction of the largest amplitude up to which units were dropped.
        reduction: which units were merged and dropped; points that come to the same share it.
        num_units: units of all groups together.
        num_params: entries of all parameters.
        comparison: loss, accuracy, agreement with the network before, change of the outputs.
        is_dominated: another point has no more units and no less agreement.
    """

    similarity: float | None
    amplitude: float
    reduction: Reduction
    num_units: int
    num_params: int
    comparison: Comparison
    is_dominated: bool

    @property
    def widths(self) -> dict[str, int]:
        """Group -> width after."""
        return {name: after for name, (_, after) in self.reduction.widths.items()}

    @property
    def agreement(self) -> float:
        """Agreement with the network before, in [0, 1]."""
        return self.comparison.agreement


@dataclass(frozen=True, eq=False)
class TradeOff:
    """Width against agreement.

    Along one amplitude, no group grows as the level of similarity falls.

    Args:
        view: the groups.
        before: the network as it is: nothing merged, agreement 1.
        points: `before`, then only equal units merged, then every level for every amplitude.
        kept: groups that could be reduced but were left as they are, and why.
    """

    view: View
    before: TradeOffPoint
    points: tuple[TradeOffPoint, ...]
    kept: Mapping[str, str]

    @property
    def frontier(self) -> tuple[TradeOffPoint, ...]:
        """Points that no other dominates, the widest first: units and agreement both fall from one to the next."""
        return tuple(sorted((p for p in self.points if not p.is_dominated), key=lambda p: -p.num_units))


def trade_off(
    objective: Objective,
    theta: Float[Tensor, " params"],
    *,
    levels: Sequence[float] = LEVELS,
    amplitudes: Sequence[float] = AMPLITUDES,
    groups: Iterable[str] | None = None,
    view: View | None = None,
    progress: Progress | None = None,
) -> TradeOff:
    """Reduce a network to ever fewer units, and measure on all data what each reduction keeps.

    All groups are reduced together. At one amplitude clusters nest as the level falls, because linkage is complete;
    where a level has nothing to give for a group (under an average, clusters of unlike sizes; or loud units that
    cancel and let quiet ones be heard), the narrowest merge of the levels above stays. All networks run side by
    side in a single pass over the data.

    Args:
        objective: data, loss and network.
        theta: the point that is reduced, shape (params,).
        levels: least similarities, in (0, 1]. Default: `LEVELS`.
        amplitudes: see `find_merges`; each gives a curve of its own. Default: `AMPLITUDES`.
        groups: which groups. Default: all that can be reduced; one whose size the code fixes is left as it is.
        view: a view of your own, in place of tracing.
        progress: called as progress(fraction, text).

    Returns:
        All points; the frontier among them is monotone.

    Raises:
        DataError: the data cannot be read, hold NaN or infinity, or the network does not run on them.
        NumericalError: the outputs or the loss are not finite.
        PlanError: a level or an amplitude out of range, or a named group that cannot be reduced.
        ShapeError: theta does not fit the module, or the targets do not fit the outputs.
        StructureError: no such group; the module cannot be traced or resized.

    Source:
        zhang2021embedding, section 3.2 and figure 5, one level there. The curve over levels is ours.

    Example:
        >>> import torch
        >>> from thalweg.embeddings import pick, trade_off
        >>> net = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1)).double()
        >>> x = torch.randn(20, 2, dtype=torch.float64)
        >>> objective = Objective(net, nn.MSELoss(), (x, x[:, :1]))
        >>> curve = trade_off(objective, objective.theta())
        >>> curve.before.num_units, pick(curve, min_agreement=0.0).num_units <= 6
        (6, True)
    """
    examine(objective, theta)
    module = copied(objective.module, device=objective.device)
    objective.space.write(theta, module)
    inputs = _example(objective)
    view = view or trace(module, inputs)
    chosen = list(groups) if groups is not None else [g.name for g in view.groups if g.is_duplicable]
    chain, narrow, kept = _carried_out(
        module, inputs, view, (levels, amplitudes, chosen), is_free=groups is None, progress=progress
    )
    compared = compare(objective, theta, list(narrow.values()), progress=_after(progress, _CHECKED))
    by_key = dict(zip(narrow, compared[1:], strict=True))
    rows = [((None, 0.0), Reduction(view, {})), *chain]
    keys = [_key(reduction) for _, reduction in rows]
    found = [by_key.get(key, compared[0]) for key in keys]
    units = [sum(after for _, after in reduction.widths.values()) for _, reduction in rows]
    outdone = _dominated(list(zip(units, [c.agreement for c in found], strict=True)))
    points = [
        TradeOffPoint(*level, reduction, size, _params(narrow.get(key, module)), comparison, is_dominated)
        for (level, reduction), key, size, comparison, is_dominated in zip(
            rows, keys, units, found, outdone, strict=True
        )
    ]
    return TradeOff(view, points[0], tuple(points), kept)


def pick(curve: TradeOff, *, min_agreement: float = 0.99, max_loss_increase: float | None = None) -> TradeOffPoint:
    """Choose the point of fewest units that is still good enough; of equals the one that agrees most.

    Args:
        curve: what `trade_off` measured.
        min_agreement: least agreement, in [0, 1]. Default 0.99, chosen by us: the paper's own reduction agreed with
            its network on 98.5 % of the images, and retrained it then. Met to 1e-12, so that 1 - 0.18 admits 0.82.
        max_loss_increase: largest increase of the loss, as a fraction of the loss before. Default: any.

    Returns:
        The point; the network as it is if no reduction is good enough.

    Raises:
        PlanError: a tolerance out of range.

    Example:
        >>> import torch
        >>> from thalweg.embeddings import pick, trade_off
        >>> net = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1)).double()
        >>> x = torch.randn(20, 2, dtype=torch.float64)
        >>> objective = Objective(net, nn.MSELoss(), (x, x[:, :1]))
        >>> curve = trade_off(objective, objective.theta(), levels=[0.9])
        >>> pick(curve, min_agreement=1.0, max_loss_increase=0.0).num_units
        6
    """
    if not 0 <= min_agreement <= 1:
        raise PlanError(f"Expected an agreement in [0, 1]. Got {min_agreement}. Choose one such as 0.99.")
    if max_loss_increase is not None and not max_loss_increase >= 0:
        raise PlanError(f"Expected an increase of the loss of at least 0. Got {max_loss_increase}. Choose e.g. 0.05.")
    loss = curve.before.comparison.loss
    most = float("inf") if max_loss_increase is None else loss + max_loss_increase * abs(loss)
    good = [p for p in curve.points if p.agreement >= min_agreement - _SLACK and p.comparison.loss <= most]
    return min(good, key=lambda p: (p.num_units, -p.agreement), default=curve.before)


def _example(objective: Objective) -> Inputs:
    """A few samples, as arguments of the network."""
    batch = next(iter(objective.batches()))
    try:
        return arguments_of(rows_of(batch, slice(_SAMPLES))[0])
    except (DataError, IndexError):
        return arguments_of(batch[0])


# Building and proving the narrow networks comes before the pass over the data: so much of the progress. A guess.
_CHECKED = 0.2

Chain = list[tuple[tuple[float | None, float], Reduction]]


def _carried_out(
    module: nn.Module,
    inputs: Inputs,
    view: View,
    wanted: tuple[Sequence[float], Sequence[float], list[str]],
    *,
    is_free: bool,
    progress: Progress | None,
) -> tuple[Chain, dict[Any, nn.Module], dict[str, str]]:
    """Build every narrow network once; where that fails, leave out the groups that are to blame and say why."""
    levels, amplitudes, names = wanted
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    kept: dict[str, str] = {}
    while True:
        left = [name for name in names if name not in kept]
        chain = list(_chain(view, state, left, levels, amplitudes))
        distinct = {_key(r): r for _, r in chain if r.merges}
        narrow = {}
        for number, (key, reduction) in enumerate(distinct.items()):
            try:
                narrow[key] = reduce_by(module, inputs, reduction).module
            except StructureError:
                blamed = _unfit(module, inputs, reduction) if is_free else {}
                if not blamed:
                    raise
                kept |= blamed
                break
            if progress is not None:
                text = f"{number + 1} of {len(distinct)} narrow networks built and proved"
                progress(_CHECKED * (number + 1) / len(distinct), text)
        else:
            return chain, narrow, kept


def _unfit(module: nn.Module, inputs: Inputs, reduction: Reduction) -> dict[str, str]:
    """Give the groups that cannot be resized even alone, with the reason."""
    found = {}
    for name, merge in reduction.merges.items():
        try:
            reduce_by(module, inputs, Reduction(reduction.view, {name: merge}))
        except StructureError as error:
            found[name] = str(error)
    return found


def _chain(
    view: View, state: Mapping[str, Tensor], names: list[str], levels: Sequence[float], amplitudes: Sequence[float]
) -> Iterator[tuple[tuple[float | None, float], Reduction]]:
    """Give the reduction of equal units, then for every amplitude those of all levels as they fall."""
    falling = sorted(levels, reverse=True)
    wanted = [(None, 0.0), *((level, amplitude) for amplitude in amplitudes for level in falling)]
    equal, *found = find_merges_at(view, state, wanted, groups=names)
    yield wanted[0], equal
    narrowest: dict[str, Merge] = {}
    for number, (level, reduction) in enumerate(zip(wanted[1:], found, strict=True)):
        if number % len(falling) == 0:  # another amplitude
            narrowest = dict(equal.merges)
        for name, merge in reduction.merges.items():
            if name not in narrowest or merge.after < narrowest[name].after:
                narrowest[name] = merge
        yield level, Reduction(view, dict(narrowest))


def _key(reduction: Reduction) -> Any:
    """Name a reduction by what it does."""
    return tuple((name, merge.labels.tobytes(), merge.kept.tobytes()) for name, merge in reduction.merges.items())


def _dominated(pairs: Sequence[tuple[int, float]]) -> list[bool]:
    """Say of every pair (units, agreement) whether another is as good in both; of equal pairs the first stands."""
    first: dict[tuple[int, float], int] = {}
    for place, pair in enumerate(pairs):
        first.setdefault(pair, place)
    return [
        first[pair] != place or any(u <= pair[0] and a >= pair[1] for u, a in first if (u, a) != pair)
        for place, pair in enumerate(pairs)
    ]


def _after(progress: Progress | None, share: float) -> Progress | None:
    """Report what comes after a share of the work."""
    if progress is None:
        return None
    return lambda fraction, text: progress(share + (1 - share) * fraction, text)


def _params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
