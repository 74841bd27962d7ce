"""Reduction, the inverse of embedding: merge units that do the same, drop units that do nothing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor, nn

from thalweg.embeddings.surgery import resized_module
from thalweg.errors import PlanError
from thalweg.structure import Group, View
from thalweg.structure.symmetry import scaled_along
from thalweg.structure.tree import FloatArray, IntArray, gather, resized, spread, unit_of

_ROUNDINGS = 32
"""Roundings by which entries of equal units may differ; copies made by an embedding do not differ at all."""


@dataclass(frozen=True, eq=False)
class Merge:
    """How the units of one group are merged.

    Args:
        labels: for every unit before, the unit after that takes its outgoing weights; -1 if dropped.
        kept: for every unit after, the unit before whose incoming weights it has.
        ratios: for every unit before, its size relative to the kept one (1 unless homogeneous).
        similarity: least similarity of two units that were merged; 1 if none were.
    """

    labels: IntArray
    kept: IntArray
    ratios: FloatArray
    similarity: float

    @property
    def before(self) -> int:
        """Number of units before."""
        return len(self.labels)

    @property
    def after(self) -> int:
        """Number of units after."""
        return len(self.kept)


@dataclass(frozen=True)
class Reduction:
    """A point of a narrower network that computes the same, or nearly.

    W̃[·, i] = Σ_{j in cluster i} r(j)·W[·, j], with r(j) = ‖w_j‖/‖w_kept‖ for positively homogeneous units and 1
    for all others; incoming weights are those of the kept unit.

    Args:
        view: the groups of the wide module.
        merges: group -> merge, for the groups that become narrower.
    """

    view: View
    merges: Mapping[str, Merge]

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Group -> (width before, width after), for all groups."""
        return {
            g.name: (g.size, self.merges[g.name].after if g.name in self.merges else g.size) for g in self.view.groups
        }

    def state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reduce parameters and buffers by name."""
        return {name: self._carried(name, tensor) for name, tensor in state.items()}

    def narrow(self, module: nn.Module) -> nn.Module:
        """Build the narrow module: a copy whose layers have the new sizes and weights.

        Raises:
            StructureError: a layer of a kind that cannot be resized.
        """
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        sizes = {name: merge.after for name, merge in self.merges.items()}
        with torch.no_grad():
            return resized_module(module, self.view, sizes, self.state(state))

    def _carried(self, name: str, tensor: Tensor) -> Tensor:
        trees = self.view.axes.get(name)
        roles = self.view.members_of(name) if trees is not None else {}
        for dim, tree in enumerate(trees or ()):
            here = {g: self.merges[g] for (d, g) in roles if d == dim and g in self.merges}
            if not here:
                continue
            consumes = {g for g in here if roles[dim, g] == "consumer"}
            if consumes:
                tensor = _summed(tensor, dim, _cut_down(tree, here, consumes))
            producing = {g: here[g].kept for g in here if g not in consumes}
            if producing:
                index = gather(tree, producing)
                tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
        return tensor


def _cut_down(tree: object, here: Mapping[str, Merge], names: set[str]) -> tuple[IntArray, FloatArray, int]:
    """For every position before: the position after, and the factor with which it is added there."""
    narrow = resized(tree, {g: here[g].after for g in names})  # type: ignore[arg-type]
    target = gather(narrow, {g: np.maximum(here[g].labels, 0) for g in names})
    factor = spread(tree, {g: np.where(here[g].labels < 0, 0.0, here[g].ratios) for g in names})  # type: ignore[arg-type]
    return target, factor, narrow.size


def _summed(tensor: Tensor, dim: int, how: tuple[IntArray, FloatArray, int]) -> Tensor:
    target, factor, size = how
    shape = [size if d == dim else n for d, n in enumerate(tensor.shape)]
    index = torch.from_numpy(target).to(tensor.device)
    return tensor.new_zeros(shape).index_add_(dim, index, scaled_along(tensor, dim, factor))


def find_merges(
    view: View,
    state: Mapping[str, Tensor],
    *,
    similarity: float | None = None,
    amplitude: float = 0.0,
    groups: Iterable[str] | None = None,
) -> Reduction:
    """Find units that can be merged or dropped.

    Two units are similar by 2⟨u,v⟩/(‖u‖² + ‖v‖²) of their incoming vectors (weights, bias, normalisation), which
    is 1 only for equal ones; by the cosine for positively homogeneous units, whose size goes into the outgoing
    weights. Clusters are complete: every pair in a cluster is at least that similar. Of a cluster the unit of
    largest amplitude stays; of equal units, where no similarity is given, the first.

    Source:
        zhang2021embedding, section 3.2 and figure 5. Departures: complete linkage in place of a threshold on a
        sorted matrix; the loudest unit stays in place of a random one, which keeps more of the function; units that
        are not homogeneous must agree in size too; any module over its view.

    Args:
        view: the groups.
        state: parameters and buffers by name.
        similarity: least similarity within a cluster, in (0, 1]; 0.9 in the paper's figure 5. Default: only
            units equal to rounding, which keeps the function and undoes an embedding.
        amplitude: drop a unit when ‖incoming‖·‖outgoing‖ is at most this fraction of the largest. Default 0:
            only units that nothing reads.
        groups: which groups. Default: all that can be reduced.

    Returns:
        The reduction; groups under an average (LayerNorm) are merged only if all clusters have one size.

    Raises:
        PlanError: similarity or amplitude out of range, or a named group that cannot be reduced.
        StructureError: no such group.
    """
    return find_merges_at(view, state, [(similarity, amplitude)], groups=groups)[0]


def find_merges_at(
    view: View,
    state: Mapping[str, Tensor],
    levels: Sequence[tuple[float | None, float]],
    *,
    groups: Iterable[str] | None = None,
) -> list[Reduction]:
    """Find what can be merged or dropped at several levels; what they have in common is computed once.

    Args:
        view: the groups.
        state: parameters and buffers by name.
        levels: (similarity, amplitude) of each, as `find_merges` takes them.
        groups: which groups. Default: all that can be reduced.

    Returns:
        For each level the reduction that `find_merges` gives.

    Raises:
        PlanError: a similarity or an amplitude out of range, or a named group that cannot be reduced.
        StructureError: no such group.
    """
    for similarity, amplitude in levels:
        if similarity is not None and not 0 < similarity <= 1:
            raise PlanError(f"Expected a similarity in (0, 1]. Got {similarity}. 1 merges equal units only.")
        if not 0 <= amplitude < 1:
            raise PlanError(
                f"Expected an amplitude in [0, 1). Got {amplitude}. 0 drops only units that nothing reads."
            )
    chosen = [view.group(n) for n in groups] if groups is not None else [g for g in view.groups if g.is_duplicable]
    for group in chosen:
        if not group.is_duplicable:
            raise PlanError(
                f"Expected a group that can be reduced. Got {group.name!r}: {group.obstacle}. Leave it out."
            )
    merges: list[dict[str, Merge]] = [{} for _ in levels]
    for group in chosen:
        units = _Units.of(view, group, state)
        for found, (similarity, amplitude) in zip(merges, levels, strict=True):
            merge = _merge(view, group, state, units, (similarity, amplitude))
            if merge is not None:
                found[group.name] = merge
    return [Reduction(view, found) for found in merges]


def similarity_matrix(view: View, state: Mapping[str, Tensor], group: str) -> FloatArray:
    """Give the similarity of the incoming vectors of every pair of units, as `find_merges` measures it.

    Args:
        view: the groups.
        state: parameters and buffers by name.
        group: which group.

    Returns:
        Shape (units, units), symmetric, in [-1, 1]; 1 only for units that do the same.

    Raises:
        StructureError: no such group.
    """
    found = view.group(group)
    free, bound = _incoming(view, found, state)
    if not found.is_homogeneous:
        return _closeness(np.concatenate([free, bound], axis=1))
    cosine = _cosine(free)
    return np.minimum(cosine, _closeness(bound)) if bound.shape[1] else cosine


@dataclass(frozen=True, eq=False)
class _Units:
    """What all levels of one group have in common: incoming vectors, their sizes, and how alike they are."""

    alike: FloatArray
    free: FloatArray
    bound: FloatArray
    incoming: FloatArray
    rounding: float

    @classmethod
    def of(cls, view: View, group: Group, state: Mapping[str, Tensor]) -> "_Units":
        free, bound = _incoming(view, group, state)
        dtype = next(state[m.tensor].dtype for m in group.members if m.tensor in state)
        incoming = np.linalg.norm(np.concatenate([free, bound], axis=1), axis=1)
        rounding = _ROUNDINGS * torch.finfo(dtype).eps
        return cls(similarity_matrix(view, state, group.name), free, bound, incoming, rounding)

    @cached_property
    def tree(self) -> FloatArray:
        """Complete linkage, to be cut at any level; for two units and more."""
        distance = 1 - self.alike
        distance = np.maximum((distance + distance.T) / 2, 0)
        np.fill_diagonal(distance, 0)
        return np.asarray(linkage(squareform(distance, checks=False), method="complete"))

    def clusters(self, similarity: float) -> IntArray:
        """Number the clusters in which every pair is at least that similar."""
        if len(self.alike) == 1:
            return np.zeros(1, dtype=np.int64)
        slack = max(1 - similarity, 1e-14)  # the rounding of a similarity
        return np.asarray(fcluster(self.tree, slack, criterion="distance"), dtype=np.int64)


def _merge(
    view: View, group: Group, state: Mapping[str, Tensor], units: _Units, level: tuple[float | None, float]
) -> Merge | None:
    alike, free, bound, incoming = units.alike, units.free, units.bound, units.incoming
    similarity, amplitude = level
    if similarity is None:
        firsts = _equal_units(free, bound, alike, units.rounding, scaled=group.is_homogeneous)
    else:
        alone = _outgoing_norms(view, group, state, np.arange(group.size), np.ones(group.size))
        firsts = _loudest(units.clusters(similarity), incoming * alone)
    sizes = np.linalg.norm(free, axis=1)
    ratios = np.ones(group.size)
    if group.is_homogeneous:
        ratios = np.where(sizes[firsts] > 0, sizes / np.where(sizes[firsts] > 0, sizes[firsts], 1.0), 1.0)
    kept = np.unique(firsts)
    if group.coupling == "average":
        counts = np.bincount(firsts)[kept]
        if not bool((counts == counts[0]).all()):
            return None
    else:
        outgoing = _outgoing_norms(view, group, state, firsts, ratios)
        # A unit without incoming weights is silent only where zero in gives zero out.
        kept = _loud(kept, incoming * outgoing if group.zero_preserving else outgoing, amplitude)
    if len(kept) == group.size:
        return None
    labels = np.array([int(np.searchsorted(kept, f)) if f in kept else -1 for f in firsts])
    together = np.tril(firsts[:, None] == firsts, -1) & (labels >= 0)[:, None]
    return Merge(labels, kept, ratios, float(alike[together].min(initial=1.0)))


def _equal_units(free: FloatArray, bound: FloatArray, alike: FloatArray, slack: float, *, scaled: bool) -> IntArray:
    """Give every unit the first one that equals it to rounding, in direction where units may be scaled."""
    sizes = np.linalg.norm(free, axis=1, keepdims=True)
    rows = np.concatenate([free / np.where(sizes > 0, sizes, 1.0) if scaled else free, bound], axis=1)
    largest = np.abs(rows).max(axis=1, initial=0.0)
    firsts = np.arange(len(rows))
    heads: list[int] = []
    for unit in range(len(rows)):
        near = [h for h in heads if alike[unit, h] > 1 - 1e-6]
        equal = (h for h in near if np.abs(rows[unit] - rows[h]).max(initial=0.0) <= slack * largest[unit])
        firsts[unit] = next(equal, unit)
        if firsts[unit] == unit:
            heads.append(unit)
    return firsts


def _loudest(clusters: IntArray, amplitudes: FloatArray) -> IntArray:
    """Give every unit the one of largest amplitude in its cluster; of equals the first."""
    order = np.lexsort((np.arange(len(clusters)), -amplitudes, clusters))
    heads = order[np.unique(clusters[order], return_index=True)[1]]
    return np.asarray(heads[np.unique(clusters, return_inverse=True)[1]], dtype=np.int64)


def _loud(kept: IntArray, amplitudes: FloatArray, amplitude: float) -> IntArray:
    """Keep the units whose amplitude counts; always one."""
    mine = amplitudes[kept]
    loud = kept[mine > amplitude * mine.max()] if mine.max() > 0 else kept[:1]
    return loud if len(loud) else kept[[int(mine.argmax())]]


def _incoming(view: View, group: Group, state: Mapping[str, Tensor]) -> tuple[FloatArray, FloatArray]:
    """Vectors that make each unit: (those that scale it, the others), one row per unit."""
    free, bound = [np.zeros((group.size, 0))], [np.zeros((group.size, 0))]
    for member in group.members:
        if member.role != "consumer" and member.tensor in state and state[member.tensor].is_floating_point():
            rows = _rows(view, group, member.tensor, member.dim, state[member.tensor])
            scales = not group.is_homogeneous or (member.tensor, member.dim) in group.scaled
            (free if scales else bound).append(rows)
    return np.concatenate(free, axis=1), np.concatenate(bound, axis=1)


def _rows(view: View, group: Group, name: str, dim: int, tensor: Tensor) -> FloatArray:
    """Collect what lies at each unit's positions along a dim, one row per unit."""
    units = unit_of(view.axes[name][dim], group.name)
    values = tensor.detach().movedim(dim, 0).reshape(tensor.shape[dim], -1).to("cpu", torch.float64).numpy()
    order = np.argsort(units, kind="stable")
    order = order[units[order] >= 0]
    return np.asarray(values[order].reshape(group.size, -1))


def _outgoing_norms(
    view: View, group: Group, state: Mapping[str, Tensor], firsts: IntArray, ratios: FloatArray
) -> FloatArray:
    """Norm of each cluster's summed outgoing weights, at its first unit."""
    squares = np.zeros(group.size)
    for member in group.members:
        if member.role == "consumer" and member.tensor in state:
            rows = _rows(view, group, member.tensor, member.dim, state[member.tensor]) * ratios[:, None]
            summed = np.zeros_like(rows)
            np.add.at(summed, firsts, rows)
            squares += (summed**2).sum(axis=1)
    return np.sqrt(squares)


def _closeness(rows: FloatArray) -> FloatArray:
    """2⟨u,v⟩/(‖u‖² + ‖v‖²); 1 for two zero vectors."""
    if rows.shape[1] == 0:
        return np.ones((len(rows), len(rows)))
    squares = (rows**2).sum(axis=1)
    sums = squares[:, None] + squares[None, :]
    return np.where(sums > 0, 2 * rows @ rows.T / np.where(sums > 0, sums, 1.0), 1.0)


def _cosine(rows: FloatArray) -> npt.NDArray[np.float64]:
    """⟨u,v⟩/(‖u‖‖v‖); 1 for two zero vectors, 0 for a zero and another."""
    norms = np.linalg.norm(rows, axis=1)
    unit = rows / np.where(norms > 0, norms, 1.0)[:, None]
    result = unit @ unit.T
    dead = norms == 0
    result[np.ix_(dead, dead)] = 1.0
    return np.asarray(result)
