"""Split plans: which narrow unit every wide unit copies, and which share of its outgoing weights it takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from thalweg.errors import PlanError
from thalweg.structure import Group, View
from thalweg.structure.tree import FloatArray, IntArray

NULL = -1
"""Parent of a null unit: no incoming and no outgoing weights."""

_SHARE_TOLERANCE = 1e-12
"""How far shares may sum from 1, relative to the sum of their sizes: a few roundings in float64."""


@dataclass(frozen=True, eq=False)
class Split:
    """A split of one group: wide unit j copies unit p(j) and takes the share a(j) of its outgoing weights.

    Args:
        narrow: number of units before.
        parents: p, one old unit for every new one; onto; -1 for a null unit.
        shares: a, any real numbers with Σ_{j: p(j)=i} a(j) = 1 for every old unit i; 0 for a null unit.

    Raises:
        PlanError: shares of a unit do not sum to 1, a unit has no copy, or lengths differ.

    Example:
        >>> Split(1, np.array([0, 0]), np.array([0.25, 0.75])).wide
        2
    """

    narrow: int
    parents: IntArray
    shares: FloatArray

    def __post_init__(self) -> None:
        if len(self.parents) != len(self.shares):
            raise PlanError(
                f"Expected one share for each of the {len(self.parents)} wide units. Got {len(self.shares)}. "
                "Give as many shares as units."
            )
        if self.parents.min() < NULL or self.parents.max() >= self.narrow:
            raise PlanError(
                f"Expected parents from 0 to {self.narrow - 1} (or {NULL} for a null unit). "
                f"Got {sorted(set(self.parents.tolist()))}. Mend the plan."
            )
        if not np.isfinite(self.shares).all():
            raise PlanError("Expected finite shares. Got NaN or infinity. Mend the plan.")
        if np.any(self.shares[self.parents == NULL]):
            raise PlanError("Expected share 0 for null units. Got another. Mend the plan.")
        for unit in range(self.narrow):
            mine = self.shares[self.parents == unit]
            if len(mine) == 0:
                raise PlanError(f"Expected at least one copy of every unit. Got none of unit {unit}. Mend the plan.")
            if abs(mine.sum() - 1) > _SHARE_TOLERANCE * max(1.0, np.abs(mine).sum()):
                raise PlanError(
                    f"Expected the shares of unit {unit} to sum to 1. Got {mine.tolist()}, sum {mine.sum():.6g}. "
                    "Only then does the wide network compute the same function."
                )

    @property
    def wide(self) -> int:
        """Number of units after."""
        return len(self.parents)

    @property
    def sources(self) -> IntArray:
        """A unit to copy from for every wide unit, 0 for null units."""
        return np.where(self.parents == NULL, 0, self.parents)

    @property
    def alive(self) -> FloatArray:
        """1 for every copy, 0 for every null unit."""
        return np.asarray(self.parents != NULL, dtype=np.float64)

    def then(self, other: "Split") -> "Split":
        """Compose: split the units of this split's result again.

        Raises:
            PlanError: the other split starts from another width.
        """
        if other.narrow != self.wide:
            raise PlanError(f"Expected a split of {self.wide} units. Got one of {other.narrow}. Check the order.")
        parents = np.where(other.parents == NULL, NULL, self.parents[other.sources])
        return Split(self.narrow, parents, self.shares[other.sources] * other.shares)


@dataclass(frozen=True)
class Plan:
    """A split for some groups of a view; the others stay as they are.

    Args:
        splits: group -> split.
    """

    splits: Mapping[str, Split]

    @property
    def widths(self) -> dict[str, int]:
        """Group -> width after."""
        return {name: split.wide for name, split in self.splits.items()}

    @property
    def num_added(self) -> int:
        """K: the units that the wide network has more."""
        return sum(s.wide - s.narrow for s in self.splits.values())

    def then(self, other: "Plan") -> "Plan":
        """Compose two plans: this one first.

        Raises:
            PlanError: widths do not match.
        """
        splits = dict(self.splits)
        for name, split in other.splits.items():
            splits[name] = splits[name].then(split) if name in splits else split
        return Plan(splits)


def one_step(view: View, group: str, unit: int, share: float) -> Plan:
    """Plan the one-step embedding T^α: copy one unit, give the copy the share α of its outgoing weights.

    Source:
        zhang2021embedding, definition 5: the copy is appended, the original keeps 1 - α.

    Args:
        view: the groups.
        group: which group.
        unit: which unit of it, from 0.
        share: α, any real number.

    Returns:
        The plan.

    Raises:
        PlanError: no such unit, or the group cannot be split.
        StructureError: no such group.

    Example:
        >>> from torch import nn
        >>> from thalweg.structure import trace
        >>> view = trace(nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)), torch.zeros(2, 1))
        >>> one_step(view, "0", unit=1, share=0.25).splits["0"].shares
        array([1.  , 0.75, 0.25])
    """
    found = view.group(group)
    _require_free(found)
    if not 0 <= unit < found.size:
        raise PlanError(f"Expected a unit from 0 to {found.size - 1} of {group!r}. Got {unit}. Choose another.")
    parents = np.append(np.arange(found.size), unit)
    shares = np.ones(found.size + 1)
    shares[unit], shares[-1] = 1 - share, share
    return Plan({group: Split(found.size, parents, shares)})


def split_plan(
    view: View,
    widths: Mapping[str, int],
    *,
    shares: Literal["equal", "random"] | Mapping[str, Sequence[float | int]] = "equal",
    parents: Mapping[str, Sequence[int]] | None = None,
    generator: torch.Generator | None = None,
) -> Plan:
    """Plan the embedding into given widths.

    Args:
        view: the groups.
        widths: group -> width after. Originals come first, copies follow; extra units go to the old units in
            turn.
        shares: "equal" (1/k for k copies; the choice of the paper's experiments), "random" (standard normal,
            shifted to sum to 1: negative ones and ones above 1 occur), or given, group -> one for each wide unit.
        parents: group -> for every wide unit the old unit it copies, in place of taking turns; -1 plans a null
            unit, which has zero weights in and out.
        generator: needed for random shares.

    Returns:
        A split for every group that changes its width or its order.

    Raises:
        PlanError: a width below the group's, a group that cannot be split, an uneven split of a group under
            an average, a null unit where zero is not kept, or shares that do not sum to 1.
        StructureError: no such group.

    Example:
        >>> from torch import nn
        >>> from thalweg.structure import trace
        >>> view = trace(nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)), torch.zeros(2, 1))
        >>> split_plan(view, {"0": 5}).splits["0"].parents
        array([0, 1, 0, 1, 0])
    """
    splits = {}
    for name in [*widths, *[n for n in parents or {} if n not in widths]]:
        group = view.group(name)
        chosen = np.asarray(parents[name]) if parents and name in parents else None
        wide = widths.get(name, group.size if chosen is None else len(chosen))
        if wide < group.size:
            raise PlanError(
                f"Expected a width of at least {group.size} for {name!r}. Got {wide}. "
                "An embedding only widens; use reduce to narrow."
            )
        if chosen is None:
            chosen = np.arange(wide) % group.size
        if len(chosen) != wide:
            raise PlanError(f"Expected {wide} parents for {name!r}. Got {len(chosen)}. Mend the plan.")
        if wide == group.size and np.array_equal(chosen, np.arange(wide)):
            continue
        splits[name] = Split(group.size, chosen, _shares(name, chosen, shares, generator))
        _require_allowed(group, splits[name])
    return Plan(splits)


def _shares(
    name: str,
    parents: IntArray,
    shares: Literal["equal", "random"] | Mapping[str, Sequence[float | int]],
    generator: torch.Generator | None,
) -> FloatArray:
    counts = np.bincount(parents[parents >= 0], minlength=int(parents.max()) + 1)
    alive = parents != NULL
    safe = np.where(alive, parents, 0)
    if shares == "random":
        if generator is None:
            raise PlanError("Expected a generator for random shares. Got none. Pass generator=torch.Generator().")
        drawn = torch.randn(len(parents), generator=generator, dtype=torch.float64).numpy()
        sums = np.bincount(safe[alive], weights=drawn[alive], minlength=len(counts))
        return np.where(alive, drawn + (1 - sums[safe]) / counts[safe], 0.0)
    if isinstance(shares, Mapping) and name in shares:
        return np.asarray(shares[name], dtype=np.float64)
    return np.where(alive, 1 / counts[safe], 0.0)


def _require_free(group: Group) -> None:
    if group.obstacle is not None:
        raise PlanError(
            f"Expected a group whose units can be duplicated. Got {group.name!r}: {group.obstacle}. "
            "Leave it at its width; `thalweg view` lists the groups that can grow."
        )
    if group.coupling == "average":
        raise PlanError(
            f"Expected a split of one unit of an independent group. Got {group.name!r}, whose units share an "
            "average. Split every unit equally often (a multiple of its width, equal shares)."
        )


def _require_allowed(group: Group, split: Split) -> None:
    if group.coupling != "average" or group.obstacle is not None:
        _require_free(group)
        if np.any(split.parents == NULL) and not group.zero_preserving:
            raise PlanError(
                f"Expected null units only where zero input weights give a zero unit. Got {group.name!r}, whose "
                "activation is not zero at zero: the wide point would not be critical. Split units instead."
            )
        return
    counts = np.bincount(split.parents[split.parents >= 0], minlength=group.size)
    even = split.wide == counts[0] * group.size and bool((counts == counts[0]).all())
    if not even or not bool((split.shares == split.shares[0]).all()):
        raise PlanError(
            f"Expected every unit of {group.name!r} equally often, with equal shares (its units share an average, "
            f"as in LayerNorm or GroupNorm). Got copies {counts.tolist()}. "
            f"Choose a multiple of {group.size} and equal shares."
        )
