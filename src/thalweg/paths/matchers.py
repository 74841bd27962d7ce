"""Matchers: bring the target's units into the order that fits where a route stands, layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from thalweg.matching.transport import assign
from thalweg.matching.units import Part, unit_rows
from thalweg.paths.pair import Pair, State
from thalweg.paths.stages import Stage
from thalweg.structure.symmetry import permute
from thalweg.structure.tree import IntArray, groups_of
from thalweg.structure.view import Group


@dataclass
class Transport:
    """Matches the units of a stage to the target's by optimal transport: the bijection of least squared distance.

    A unit is its incoming weights at this stage and, where what they lead to is fixed (outputs, or units that are
    matched already), its outgoing weights.

    Args:
        pair: the networks.
        with_outgoing: whether outgoing weights count.
        permutations: what was done to B so far, group by group. Groups in it from the start stay as they are.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 3.2: equal numbers of equal weights make the
    transport an assignment. With weight adjustment the authors match incoming weights only.
    """

    pair: Pair
    with_outgoing: bool
    permutations: dict[str, IntArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._settled = set(self.permutations)

    def __call__(self, stage: Stage, current: State, target: State) -> State:
        """Give the target with the units of the stage in the order that fits."""
        view = self.pair.view
        for name in stage.makes:
            if name in self._settled:
                continue
            self._settled.add(name)
            group = self._seen(view.group(name), stage)
            if not group.members:
                continue
            part: Part = "butterfly" if self.with_outgoing else "incoming"
            ours, theirs = (unit_rows(view, group, state, part) for state in (current, target))
            order = assign(ours, theirs).order
            target = permute(view, target, {name: order})
            before = self.permutations.get(name, np.arange(group.size))
            self.permutations[name] = before[order]
        return target

    def _seen(self, group: Group, stage: Stage) -> Group:
        """Keep the members that say the same in both networks."""
        kept = []
        for member in group.members:
            others = {g for tree in self.pair.view.axes[member.tensor] for g in groups_of(tree)} - {group.name}
            own = member.role != "consumer" and member.tensor in stage.names
            read = self.with_outgoing and member.role == "consumer" and member.tensor not in stage.names
            if (own or read) and others <= self._settled - {group.name}:
                kept.append(member)
        return replace(group, members=tuple(kept))


def matched_from_the_start(pair: Pair, permutations: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """Keep the permutations of groups whose units several layers make (residual streams).

    Their units cannot be matched at one stage alone.

    Args:
        pair: the networks.
        permutations: of all groups.

    Returns:
        Those of the groups that more than one linear map makes.
    """
    sites = {site.weight for site in pair.execution.sites}
    found = {}
    for group in pair.view.groups:
        makers = {m.tensor for m in group.members if m.role != "consumer" and m.tensor in sites}
        if len(makers) != 1 and group.name in permutations:
            found[group.name] = permutations[group.name]
    return found
