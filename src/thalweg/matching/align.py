"""Alignment: the permutations of all groups that bring one network to the order of another."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from thalweg.errors import ConfigError, NumericalError, ShapeError
from thalweg.matching.activations import activation_similarity
from thalweg.matching.comparing import comparable_rows, neighbours, squared_distance
from thalweg.matching.transport import assign, best_order, correlations
from thalweg.matching.units import Part
from thalweg.structure import Group, View, permute
from thalweg.structure.tree import IntArray

By = Literal["weights", "incoming", "activations"]

_SWEEPS = 100
"""Most sweeps of coordinate descent. Chosen by us: 3 to 50 are seen in practice."""

_GAIN = 1e-12
"""Least gain of a step, relative to the distance before it; less is rounding. Chosen by us."""

_TIE = 1e-6
"""What the likeness of incoming weights counts beside a correlation of activations. Chosen by us: it decides between
units that do not act at all, and between hardly any others."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """What brings B to the order of A: `structure.permute(view, b, alignment.permutations)`.

    Args:
        permutations: group -> for every unit of A the unit of B that goes there, for every group of the view.
        sweeps: rounds over the groups that it took.
        cost: squared distance of A and the permuted B, over all parameters (running statistics are left out).
        converged: no step over a group alone comes closer ("weights"), or all groups were seen.
    """

    permutations: Mapping[str, IntArray]
    sweeps: int
    cost: float
    converged: bool


def align(  # noqa: PLR0913 - one door to three ways, each with its own few options
    view: View,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    *,
    by: By = "weights",
    module: nn.Module | None = None,
    inputs: Any = None,
    groups: Sequence[str] | None = None,
    start: Mapping[str, IntArray] | None = None,
    restarts: int = 0,
    generator: torch.Generator | None = None,
) -> Alignment:
    """Find which unit of B is which unit of A, for every group of a view.

    - "weights": coordinate descent on the squared distance of all parameters; a step assigns the units of one group
      by all that makes and reads them, the other groups as they stand. It begins, in forward order, with what is
      comparable under any permutation of groups not seen yet: their entries sorted.
    - "incoming": one pass in forward order by what makes the units, whose inputs are in A's order by then.
    - "activations": one pass by the correlation of activations on data; 0 for units that do not vary, and where these
      are compared with each other, their incoming weights decide.

    A residual stream is one group, so all that writes to it and reads it moves together.

    Args:
        view: the groups.
        a: the network whose order is kept, parameters and buffers by name.
        b: the network to be permuted.
        by: what units are recognised by. Default: "weights", which needs no data.
        module: for "activations": the architecture; it is copied and run in eval mode with the statistics of the
            states.
        inputs: for "activations": one batch of inputs, a few hundred samples.
        groups: the groups to match; others keep their order (that of `start`). Default: all.
        start: permutations to begin with. Default: none; "weights" then finds its own beginning.
        restarts: for "weights": further descents from the order of B, in random orders of the groups; the closest
            is kept.
        generator: of random orders. Default: forward order, in which no restart differs.

    Returns:
        The alignment. With "weights" and `start`, never farther apart than at the start.

    Raises:
        ConfigError: "activations" without module or inputs, or restarts without a generator.
        ShapeError: states of different names or shapes, or a start that is no permutation.
        NumericalError: a state that is not finite.
        StructureError: an unknown group.

    **Source:** "weights": Ainsworth et al. 2022 (arXiv 2209.04836), algorithm 1: maximal inner products are minimal
    squared distances. Theirs begins at the order of B; ours only where that is closer. "incoming": OT of neurons
    layer by layer, Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 4. "activations": Li et al. 2015 (arXiv
    1511.07543) and Ainsworth et al., section 3.1; the places of one unit are samples, and if several maps read it,
    their correlations are averaged.

    Example:
        >>> from thalweg.structure import trace
        >>> net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> view, state = trace(net, torch.zeros(3, 1)), dict(net.named_parameters())
        >>> shuffled = permute(view, state, {"0": np.array([1, 2, 0])})
        >>> align(view, state, shuffled).permutations["0"]
        array([2, 0, 1])
    """
    _require_alike(a, b)
    chosen = view.groups if groups is None else tuple(view.group(name) for name in groups)
    permutations = _started(view, start)
    pair = _Pair(view, a, permute(view, b, permutations), permutations)
    if by == "activations":
        return _by_activations(pair, chosen, b, module, inputs)
    if by == "incoming":
        _in_forward_order(pair, chosen, "incoming")
        return pair.alignment(sweeps=1, converged=True)
    if by != "weights":
        raise ConfigError(f"Expected weights, incoming or activations. Got {by!r}. Choose one of them.")
    if restarts and generator is None:
        raise ConfigError(f"Expected a generator for {restarts} restarts. Got none. Pass a torch.Generator.")
    return _by_weights(pair, chosen, restarts, generator, is_started=start is not None)


@dataclass
class _Pair:
    """A and the permuted B, and by what B is permuted."""

    view: View
    a: Mapping[str, Tensor]
    moved: Mapping[str, Tensor]
    permutations: dict[str, IntArray]

    def copy(self) -> "_Pair":
        return _Pair(self.view, self.a, self.moved, dict(self.permutations))

    def move(self, group: Group, order: IntArray) -> None:
        self.moved = permute(self.view, self.moved, {group.name: order})
        self.permutations[group.name] = self.permutations[group.name][order]

    def distance(self, names: Collection[str] | None = None) -> float:
        return squared_distance(self.a, self.moved, names)

    def order(self, group: Group, settled: Collection[str], part: Part = "butterfly") -> IntArray:
        ours, theirs = self.rows(group, settled, part)
        return assign(ours, theirs).order

    def rows(self, group: Group, settled: Collection[str], part: Part) -> list[Tensor]:
        return [comparable_rows(self.view, group, state, part, settled) for state in (self.a, self.moved)]

    def alignment(self, sweeps: int, *, converged: bool) -> Alignment:
        return Alignment(dict(self.permutations), sweeps, self.distance(), converged)


def _by_weights(
    pair: _Pair, groups: Sequence[Group], restarts: int, generator: torch.Generator | None, *, is_started: bool
) -> Alignment:
    linked = {g.name: neighbours(pair.view, g, pair.a) for g in groups}
    origin = pair.copy()
    open_ = {g.name for g in groups}
    if not is_started:
        _in_forward_order(pair, groups, "butterfly")
        open_ = {name for name in open_ if linked[name]}  # a group that stands alone is settled for good
    found = [_descended(pair, groups, linked, open_, generator)]
    if not is_started and found[0].cost > origin.distance():
        found.append(_descended(origin.copy(), groups, linked, {g.name for g in groups}, generator))
    found += [_descended(origin.copy(), groups, linked, {g.name for g in groups}, generator) for _ in range(restarts)]
    return min(found, key=lambda alignment: alignment.cost)


def _descended(
    pair: _Pair,
    groups: Sequence[Group],
    linked: Mapping[str, Collection[str]],
    open_: set[str],
    generator: torch.Generator | None,
) -> Alignment:
    """Assign group after group until no step comes closer; only groups beside which something moved are `open_`."""
    everything = {g.name for g in pair.view.groups}
    open_, sweeps = set(open_), 0
    while open_ and sweeps < _SWEEPS:
        sweeps += 1
        turns = range(len(groups)) if generator is None else torch.randperm(len(groups), generator=generator).tolist()
        for group in (groups[i] for i in turns):
            if group.name not in open_:
                continue
            open_.discard(group.name)
            if _improved(pair, group, everything):
                open_ |= set(linked[group.name]) & linked.keys()
    return pair.alignment(max(sweeps, 1), converged=not open_)


def _improved(pair: _Pair, group: Group, settled: Collection[str]) -> bool:
    """Assign one group and keep it if that comes closer: a weight from a group to itself makes the step a guess."""
    order = pair.order(group, settled)
    if np.array_equal(order, np.arange(group.size)):
        return False
    names = {m.tensor for m in group.members}
    trial = pair.copy()
    trial.move(group, order)
    before, after = pair.distance(names), trial.distance(names)
    if not after < before * (1 - _GAIN):
        return False
    pair.moved, pair.permutations = trial.moved, trial.permutations
    return True


def _in_forward_order(pair: _Pair, groups: Sequence[Group], part: Part) -> None:
    settled = {g.name for g in pair.view.groups} - {g.name for g in groups}
    for group in groups:
        pair.move(group, pair.order(group, settled, part))
        settled.add(group.name)


def _by_activations(
    pair: _Pair, groups: Sequence[Group], b: Mapping[str, Tensor], module: nn.Module | None, inputs: Any
) -> Alignment:
    if module is None or inputs is None:
        raise ConfigError(
            "Expected module and inputs to match by activations. Got only the states. Pass both, or match by weights."
        )
    similar = activation_similarity(pair.view, pair.a, b, module, inputs)
    settled = {g.name for g in pair.view.groups} - {g.name for g in groups}
    for group in groups:
        similarity = similar(group, pair.permutations, settled)
        if similarity is None:
            order = pair.order(group, settled)
        else:
            likeness = correlations(*pair.rows(group, settled, "incoming"))
            order = best_order(-similarity - _TIE * likeness)
        pair.move(group, order)
        settled.add(group.name)
    return pair.alignment(sweeps=1, converged=True)


def _started(view: View, start: Mapping[str, IntArray] | None) -> dict[str, IntArray]:
    given = dict(start or {})
    sizes = {g.name: g.size for g in view.groups}
    for name, order in given.items():
        size = sizes[name] if name in sizes else view.group(name).size
        if not np.array_equal(np.sort(order), np.arange(size)):
            raise ShapeError(
                f"Expected a permutation of {size} units for {name!r}. Got {order}. Take that of an Alignment."
            )
    return {name: np.asarray(given.get(name, np.arange(size)), dtype=np.int64) for name, size in sizes.items()}


def _require_alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    ours, theirs = ({n: tuple(t.shape) for n, t in state.items()} for state in (a, b))
    if ours != theirs:
        unlike = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        first = unlike[0]
        raise ShapeError(
            f"Expected two states of one network. Got {first!r} of shape {ours.get(first)} and {theirs.get(first)}"
            f"{f', and {len(unlike) - 1} more' if len(unlike) > 1 else ''}. Train both on the same architecture."
        )
    for name, state in (("a", a), ("b", b)):
        broken = [n for n, t in state.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
        if broken:
            raise NumericalError(
                f"Expected finite parameters. Got NaN or infinity in {broken[0]!r} of {name}. Check the checkpoint."
            )
