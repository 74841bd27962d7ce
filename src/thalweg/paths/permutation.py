"""The permutation stage: from a network to itself with the units of a group in another order."""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Literal

import numpy as np
from torch import Tensor

from thalweg.errors import ConfigError, ShapeError, StructureError
from thalweg.paths.leg import LazyLeg, Leg, blend_leg
from thalweg.paths.path import Path
from thalweg.paths.permutation_arrangement import Arrangement, Base
from thalweg.paths.permutation_slots import Move, slot_rounds, unit_importance
from thalweg.space import Space
from thalweg.structure.symmetry import permute
from thalweg.structure.tree import FloatArray, IntArray
from thalweg.structure.view import View

PermutationKind = Literal["swaps", "reflections", "free_slots"]
State = Mapping[str, Tensor]
Kill = Callable[[State, IntArray], State]
"""Makes the outgoing weights of some units 0, and the layers that read the group make up for it."""

SHARE = 0.05
"""Of a group's units that are freed. Chosen by us: of 2,000 units that makes about 50 legs."""


def permutation_path(  # noqa: PLR0913 - the network, the order, and what each kind leaves open
    space: Space,
    view: View,
    state: State,
    group: str,
    order: IntArray,
    *,
    kind: PermutationKind = "free_slots",
    at_once: int = 1,
    slots: int | None = None,
    kill: Kill | None = None,
    importance: FloatArray | None = None,
) -> Path:
    """Go from a network to permute(view, state, {group: order}), bit for bit at both ends, along straight legs.

    - "swaps": the order's cycles, one swap of two units after another: size - #cycles legs.
    - "reflections": each cycle is a product of two reflections, and each of those a set of disjoint swaps: as many
      swaps, `at_once` of them in a leg.
    - "free_slots": units that nothing reads are places through which the others travel. What makes a unit is copied
      to a free place, then what reads the unit is handed over to the copy; neither changes what the network computes.
      All free places are used at once: about 2·size / slots legs. To begin with, the least important units are freed,
      and in the end they are read again: on these two legs alone the function changes, and they are left out where
      nothing read the units before.

    Legs are lazy: they hold who stands where, and make weights when looked at.

    Args:
        space: the coordinates.
        view: the groups.
        state: parameters and buffers at the start.
        group: whose units are put in another order.
        order: for every new place the old unit that goes there, as `permute` takes it.
        kind: which.
        at_once: of "swaps" and "reflections": disjoint swaps in one leg. Default 1, the paper's.
        slots: of "free_slots": units to free. Default: 5 % of them, at least 2.
        kill: of "free_slots": kill(state, units) gives the state in which these units' outgoing weights are 0. By
            default they are set to 0, and nothing else changes.
        importance: of "free_slots": a number for each unit; the least are freed. Default: `unit_importance`.

    Returns:
        The path. Buffers that belong to the units (BatchNorm's statistics) are permuted at its end.

    Raises:
        StructureError: no such group, or "free_slots" for one whose units cannot be duplicated singly.
        ShapeError: `order` or `importance` does not fit the group.
        ConfigError: `at_once` or `slots` is out of range.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 3.2, swaps units one pair at a time. Free slots
        are ours: a step of splitting embeddings (Zhang et al. 2021, arXiv 2111.15527) inside the network.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> view = View.of_spec(net, {"h": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]})
        >>> state = {n: p.detach() for n, p in net.named_parameters()}
        >>> path = permutation_path(Space.of(net), view, state, "h", np.array([1, 2, 0]), kind="swaps")
        >>> len(path.legs), bool((path.parameters(1.0)["0.bias"] == state["0.bias"][[1, 2, 0]]).all())
        (2, True)
    """
    size = view.group(group).size
    _require_sound(size, order, at_once, slots, importance)
    if kind == "free_slots":
        legs = _slot_legs(
            Base(view, state, group, space.names), order, slots or max(2, round(SHARE * size)), kill, importance
        )
    else:
        swaps = {"swaps": _swaps, "reflections": _reflections}[kind](order, at_once)
        legs = list(_swap_legs(Base(view, state, group, space.names), swaps))
    end = permute(view, state, {group: order})
    if not legs:
        legs = [blend_leg(f"{group}: no unit moves", _coordinates(space, state), _coordinates(space, end))]
    kept = set(space.names)
    buffers = [{n: t for n, t in each.items() if n not in kept} for each in (state, end)]
    return Path(space, tuple(legs), (), *buffers)


def _require_sound(
    size: int, order: IntArray, at_once: int, slots: int | None, importance: FloatArray | None
) -> None:
    if at_once < 1 or (slots is not None and not 1 <= slots <= size):
        raise ConfigError(
            f"Expected at_once of 1 or more and slots from 1 to {size}. Got {at_once} and {slots}. Leave them out."
        )
    if not np.array_equal(np.sort(order), np.arange(size)):
        raise ShapeError(f"Expected an order of {size} units. Got {len(order)} numbers. Name each unit once, from 0.")
    if importance is not None and importance.shape != (size,):
        raise ShapeError(f"Expected {size} importances. Got shape {importance.shape}. Give one for each unit.")


def _coordinates(space: Space, state: State) -> dict[str, Tensor]:
    return {name: state[name] for name in space.names}


def _cycles(order: IntArray) -> list[list[int]]:
    """Give the cycles with more than one unit: order[c[k]] = c[k + 1]."""
    seen, found = np.zeros(len(order), dtype=bool), []
    for start in range(len(order)):
        cycle, at = [], start
        while not seen[at]:
            seen[at] = True
            cycle.append(at)
            at = int(order[at])
        if len(cycle) > 1:
            found.append(cycle)
    return found


def _swaps(order: IntArray, at_once: int) -> list[list[Move]]:
    """Give rounds of swaps of places, of one pair of each of the longest cycles that remain."""
    # The unit that belongs to c[k] stands at c[k + 1] until it is called, and the one that stood at c[k] waits there.
    waiting = [list(pairwise(cycle))[::-1] for cycle in _cycles(order)]
    rounds = []
    while waiting:
        waiting.sort(key=len, reverse=True)
        rounds.append([pairs.pop() for pairs in waiting[:at_once]])
        waiting = [pairs for pairs in waiting if pairs]
    return rounds


def _reflections(order: IntArray, at_once: int) -> list[list[Move]]:
    """Give rounds of disjoint swaps: k -> -k of every cycle, then k -> -1 - k; together k -> k + 1."""
    rounds = []
    for offset in (0, -1):
        swaps = [
            (cycle[k], cycle[mirror])
            for cycle in _cycles(order)
            for k, mirror in ((k, (offset - k) % len(cycle)) for k in range(len(cycle)))
            if k < mirror
        ]
        rounds += [swaps[start : start + at_once] for start in range(0, len(swaps), at_once)]
    return rounds


def _swap_legs(base: Base, rounds: list[list[Move]]) -> Iterator[Leg]:
    size = base.view.group(base.group).size
    here = Arrangement(base, np.arange(size), np.ones(size, dtype=bool))
    for swaps in rounds:
        changed = {i: int(here.parents[j]) for a, b in swaps for i, j in ((a, b), (b, a))}
        there = here.with_changes(changed)
        yield LazyLeg(f"{base.group}: swap", here, there)
        here = there


def _slot_legs(
    base: Base, order: IntArray, slots: int, kill: Kill | None, importance: FloatArray | None
) -> list[Leg]:
    group = base.view.group(base.group)
    obstacle = group.obstacle or ("an average runs over its units" if group.coupling != "none" else None)
    if obstacle:
        raise StructureError(
            f"Expected a group whose units can be duplicated singly. Got {group.name!r}: {obstacle}. "
            "Take 'reflections' or 'swaps'."
        )
    if np.array_equal(order, np.arange(group.size)):
        return []
    if importance is None:
        importance = unit_importance(base.view, {n: base.state[n] for n in base.names}, group.name)
    free = np.argsort(importance, kind="stable")[:slots]
    live = np.ones(group.size, dtype=bool)
    live[free] = False
    state = base.state if kill is None else {**base.state, **kill(base.state, free)}
    freed = Arrangement(Base(base.view, state, group.name, base.names), np.arange(group.size), live)
    travel = list(_travel(freed, order, slot_rounds(order, free)))
    ends = travel[-1].end
    away = blend_leg(
        f"{group.name}: free {len(free)} units", {n: base.state[n] for n in base.names}, freed.parameters()
    )
    permuted = permute(base.view, base.state, {group.name: order})
    back = blend_leg(f"{group.name}: read them again", ends.parameters(), {n: permuted[n] for n in base.names})
    return [*([away] if away.blends else []), *travel, *([back] if back.blends else [])]


def _travel(start: Arrangement, order: IntArray, rounds: list[list[Move]]) -> Iterator[LazyLeg]:
    """Two legs for a round: what makes units is copied to free places, then what reads the units is handed over."""
    group, here = start.base.group, start
    for moves in rounds:
        copied = here.with_changes({to: int(here.parents[left]) for left, to in moves})
        handed = copied.with_changes({}, read=[to for _, to in moves], unread=[left for left, _ in moves])
        yield LazyLeg(f"{group}: copy to free places", here, copied)
        yield LazyLeg(f"{group}: hand over", copied, handed)
        here = handed
    if not np.array_equal(here.parents, order):
        yield LazyLeg(
            f"{group}: free units go to their places", here, Arrangement(start.base, order.copy(), here.live)
        )
