"""recognition: is this point of a wide network an embedding of that point of a narrow one?

Both are brought to a *minimal form*, in which no two units do the same and every unit does something, and minimal
forms are matched: which unit is which, and with which sign, is an assignment problem. Everything works over the
view, on parameters by name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from thalweg.embeddings.matching import _require_alike, _residual, match
from thalweg.embeddings.minimal import _TOLERANCE, _scaled, minimal_form
from thalweg.embeddings.plan import NULL, Plan, Split
from thalweg.embeddings.reduction import _incoming, _rows
from thalweg.embeddings.splitting import Embedding
from thalweg.errors import PlanError
from thalweg.space import Space
from thalweg.structure import Group, View, flip, rescale
from thalweg.structure.tree import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Recognition:
    """How a wide point is an embedding of a narrow one.

    Args:
        parents: group -> for every wide unit, the narrow unit it copies; -1 for one that nothing reads.
        shares: group -> for every wide unit, its share of the outgoing weights of its parent.
        signs: group -> the sign with which it copies; 1 unless the group is odd.
        residual: largest difference between the wide point and the embedded narrow one, relative to the largest
            entry of its parameter. What makes a unit that nothing reads is left out: it is free.
    """

    parents: Mapping[str, IntArray]
    shares: Mapping[str, FloatArray]
    signs: Mapping[str, FloatArray]
    residual: float

    @property
    def plan(self) -> Plan:
        """The split plan; with the signs, and the sizes of units that may be rescaled, it gives the wide point."""
        return Plan({n: Split(int(p.max()) + 1, p, self.shares[n]) for n, p in self.parents.items()})


def recognise(
    wide_view: View,
    wide: Mapping[str, Tensor],
    narrow_view: View,
    narrow: Mapping[str, Tensor],
    *,
    odd: Iterable[str] = (),
    tolerance: float = _TOLERANCE,
) -> Recognition | None:
    """Say how a wide point is an embedding of a narrow one: who copies whom, with which share and sign.

    Args:
        wide_view: the groups of the wide network.
        wide: the wide point, parameters by name.
        narrow_view: the groups of the narrow network.
        narrow: the narrow point.
        odd: the groups whose units may change sign, see `odd_groups`.
        tolerance: as in `minimal_form`; also the largest residual of an embedding.

    Returns:
        Parents, shares, signs and the residual; None if the wide point is no embedding of the narrow one: it has
        another minimal form, or copies of one unit are not read in proportion.

    Raises:
        PlanError: the narrow point is not minimal, so that parents are not unique; or the tolerance is not in
            [0, 1).
        ShapeError: the networks differ in more than the sizes of their groups.

    **Source:** Zhang et al. 2021 (arXiv 2105.14573), definition 5, read backwards; null units as in the long
    version (arXiv 2111.15527); the recognition itself is ours.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from thalweg.embeddings import embed
        >>> from thalweg.structure import trace
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)).double()
        >>> x = torch.zeros(3, 1)
        >>> wide = embed(net, x, {"0": 3}, shares={"0": [0.25, 1, 0.75]}).module
        >>> states = [dict(m.named_parameters()) for m in (wide, net)]
        >>> found = recognise(trace(wide, x), states[0], trace(net, x), states[1])
        >>> found.parents["0"].tolist(), found.shares["0"].round(6).tolist()
        ([0, 1, 0], [0.25, 1.0, 0.75])
    """
    odd = frozenset(odd)
    wide, narrow = ({n: t.detach() for n, t in state.items()} for state in (wide, narrow))
    origin = minimal_form(narrow_view, narrow, odd=odd, tolerance=tolerance)
    if not origin.is_same:
        raise PlanError(
            "Expected a narrow point without copies or idle units. Got one that "
            f"reduces to widths {origin.widths}. Compare with its minimal form."
        )
    reduced = minimal_form(wide_view, wide, odd=odd, tolerance=tolerance)
    if reduced.widths != origin.widths:
        return None
    found = match(origin.view, narrow, reduced.state, odd=odd)
    if found.residual > 1:
        return None
    parents, signs, shares = {}, {}, {}
    for group in wide_view.groups:
        name, labels = group.name, reduced.parents[group.name]
        place = np.argsort(found.permutations[name])  # minimal unit -> narrow unit
        parents[name] = np.where(labels == NULL, NULL, place[labels])
        turned = found.signs[name][place][labels] * np.sign(reduced.weights[name])
        signs[name] = np.where(labels == NULL, 1.0, turned)
        shares[name] = _shares(wide_view, group, wide, parents[name], reduced.weights[name])
    candidate = Recognition(parents, shares, signs, found.residual)
    residual = _embedding_residual(candidate, wide_view, wide, narrow_view, narrow)
    return replace(candidate, residual=residual) if residual <= tolerance else None


def _shares(
    view: View, group: Group, wide: Mapping[str, Tensor], parents: IntArray, weights: FloatArray
) -> FloatArray:
    """Project each unit's outgoing weights on the sum over all copies of its parent; 1 where nothing reads them."""
    consumers = [m for m in group.members if m.role == "consumer" and m.tensor in wide]
    rows = [_rows(view, group, m.tensor, m.dim, wide[m.tensor]) for m in consumers]
    read = np.concatenate([np.zeros((group.size, 1)), *rows], axis=1) * weights[:, None]
    shares = np.zeros(group.size)
    for parent in range(int(parents.max(initial=NULL)) + 1):
        mine = np.flatnonzero(parents == parent)
        total = read[mine].sum(axis=0)
        square = float(total @ total)
        shares[mine] = read[mine] @ total / square if square else 1 / max(len(mine), 1)
        shares[mine] += (1 - shares[mine].sum()) / max(len(mine), 1)  # their sum is 1 up to rounding
    return shares


def _embedding_residual(
    candidate: Recognition,
    wide_view: View,
    wide: Mapping[str, Tensor],
    narrow_view: View,
    narrow: Mapping[str, Tensor],
) -> float:
    """Embed the narrow point as recognised, and compare with the wide one."""
    space = Space(tuple(narrow), tuple(tuple(t.shape) for t in narrow.values()))
    made = flip(wide_view, Embedding(narrow_view, space, candidate.plan).state(narrow), candidate.signs)
    for group in wide_view.groups:
        alive = np.asarray(candidate.parents[group.name] != NULL, dtype=np.float64)
        wide = _scaled(wide_view, group, wide, "producer", alive)
        if group.is_homogeneous:
            sizes = [np.linalg.norm(_incoming(wide_view, group, s)[0], axis=1) for s in (wide, made)]
            ratios = np.where((sizes[0] > 0) & (sizes[1] > 0), sizes[0] / np.where(sizes[1] > 0, sizes[1], 1), 1.0)
            made = rescale(wide_view, made, {group.name: np.where(ratios > 0, ratios, 1.0)})
    _require_alike(wide, made)
    return _residual(wide, made)
