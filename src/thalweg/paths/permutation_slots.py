"""Free slots: which units to free, and how those that stay travel through the places that are free."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from thalweg.structure.symmetry import unit_positions
from thalweg.structure.tree import FloatArray, IntArray
from thalweg.structure.view import Role, View

Move = tuple[int, int]
"""A unit goes from one place to another, which is free."""


def unit_importance(
    view: View, state: Mapping[str, Tensor], group: str, variance: FloatArray | None = None
) -> FloatArray:
    """Say how much a unit counts: the norm of its outgoing weights, times how much what it gives varies.

    Args:
        view: the groups.
        state: parameters and buffers by name.
        group: of the units.
        variance: of what each unit gives, on data. Default: the squared norm of what makes the unit stands for it.

    Returns:
        One number for each unit; 0 where nothing reads it.
    """
    outgoing = _squares(view, state, group, "consumer")
    return np.asarray(
        np.sqrt(outgoing * (_squares(view, state, group, "producer") if variance is None else variance))
    )


def _squares(view: View, state: Mapping[str, Tensor], group: str, role: Role) -> FloatArray:
    """Sum the squares of each unit's weights over the members of a role."""
    total = np.zeros(view.group(group).size)
    for member in view.group(group).members:
        tensor = state.get(member.tensor)
        if member.role != role or tensor is None or not torch.is_floating_point(tensor):
            continue
        sums = (
            tensor.detach()
            .double()
            .square()
            .movedim(member.dim, 0)
            .reshape(tensor.shape[member.dim], -1)
            .sum(1)
            .cpu()
            .numpy()
        )
        units = unit_positions(view, member.tensor, member.dim, group)
        np.add.at(total, units[units >= 0], sums[units >= 0])
    return total


def slot_rounds(order: IntArray, free: IntArray) -> list[list[Move]]:
    """Plan how units travel to their places through free ones, so many at a time as there are free places.

    A free place calls the unit that belongs there; the place which that unit leaves is free next, and calls the next:
    a chain. A place that calls nobody takes the unit in the middle of the longest chain, which cuts it in two, or
    opens a cycle that no free place is on.

    Args:
        order: for every place the unit that goes there.
        free: units that nothing reads, and so the places that are free at first.

    Returns:
        Rounds; the moves of a round start from other places than they go to, and go to places that are free.

    Example:
        >>> slot_rounds(np.array([1, 0, 2]), np.array([2]))
        [[(0, 2)], [(1, 0)], [(2, 1)]]
    """
    target, place = np.argsort(order), np.arange(len(order))
    active, closed, idle = _chains(order, free)
    rounds = []
    while active or closed:
        moves: list[Move] = []

        def go(unit: int, to: int, moves: list[Move] = moves) -> int:
            left = int(place[unit])
            moves.append((left, to))
            place[unit] = to
            return left

        rest, vacated = [], []
        for chain in active:
            left = go(chain[0], int(target[chain[0]]))
            if len(chain) > 1:
                rest.append(chain[1:])
            else:
                vacated.append(left)
        while idle:
            cycle = max(closed, key=len, default=[])
            chain = max(rest, key=len, default=[])
            if cycle and len(cycle) >= len(chain):
                closed.remove(cycle)
                go(cycle[-1], idle.pop())
                rest.append(cycle)
            elif len(chain) > 1:
                rest.remove(chain)
                middle = (len(chain) + 1) // 2
                go(chain[middle - 1], idle.pop())
                rest += [chain[:middle], chain[middle:]]
            else:
                break
        active, idle = rest, idle + vacated
        rounds.append(moves)
    return rounds


def _chains(order: IntArray, free: IntArray) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Give the chains of units that free places will call, the cycles without one, and those that call nobody."""
    freed = {int(unit) for unit in free}
    seen = set(freed)
    active, closed, idle = [], [], []
    for start in sorted(freed):
        chain, at = [], start
        while int(order[at]) not in freed:
            at = int(order[at])
            chain.append(at)
        seen.update(chain)
        if chain:
            active.append(chain)
        else:
            idle.append(start)
    for start in range(len(order)):
        cycle, at = [], int(order[start])
        while at not in seen:
            cycle.append(at)
            seen.add(at)
            at = int(order[at])
        if len(cycle) > 1:
            closed.append(cycle)
    return active, closed, idle
