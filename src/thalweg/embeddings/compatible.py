"""General compatible embeddings: every wide weight has a share of its own, under two conditions on sums."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.embeddings.splitting import Embedding
from thalweg.embeddings.surgery import resized_module
from thalweg.errors import PlanError
from thalweg.space import Space
from thalweg.structure.symmetry import factors_along, scaled_along
from thalweg.structure.tree import FloatArray, IntArray, Tree, gather, groups_of, resized, spread, unit_of

_SUM_TOLERANCE = 1e-12
"""How far a sum may be from 0, relative to the sum of sizes (at least 1): a few roundings in float64."""


@dataclass(frozen=True, eq=False)
class CompatibleEmbedding:
    """Carries a point exactly into a wider network, with a share for each weight in place of one for each unit.

    With an index map p and numbers α (one for every wide weight) and β (one for every wide unit),

        W'_l[j, k] = α_l[j, k] · W_l[p_l(j), p_{l-1}(k)],    b'_l[j] = b_l[p_l(j)].

    Features copy if Σ_{k: p(k)=i} α_l[j, k] = 1 for every wide j and narrow i. Errors share, z'_l[j] = β_l[j]
    z_l[p(j)], if Σ_{j: p(j)=s} β_l[j] α_l[j, k] = β_{l-1}[k] for every narrow s and wide k, with β = 1 at the
    outputs. Together they give ∂R/∂W'_l[j, k] = β_l[j] · ∂R/∂W_l[p(j), p(k)] at every point, so that critical
    points go to critical points. Both conditions make the β of the copies of a unit sum to 1: β are the shares
    of a split, whose own α_l[j, k] is β_{l-1}[k]. So every compatible embedding is a split plus *deviations*
    E = α - β that sum to 0 over the copies k of every unit read, and, weighted by β, over the copies j of every
    unit made. A block of weights between a unit with c copies and one with d has (c-1)(d-1) free numbers.

    Source:
        zhang2022hierarchical (arXiv 2111.15527), the general compatible embedding: index map, α and β with the
        two conditions above. Departures: any module over its view in place of fully-connected networks (one
        number for every position of a kernel); split plus deviation in place of α and β.

    Args:
        embedding: the split; its shares are β.
        deviations: E, name of a parameter or buffer -> a tensor of its wide shape, in units of α. A name that is
            left out deviates nowhere.

    Raises:
        PlanError: a deviation breaks a condition, has another shape, is not finite, gives weights to a null
            unit, or belongs to a tensor that has no freedom (`freedom` lists those that have).

    Example:
        >>> from thalweg.embeddings import split_plan
        >>> from thalweg.structure import trace
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> view = trace(net, torch.zeros(3, 1))
        >>> split = Embedding(view, Space.of(net), split_plan(view, {"0": 4, "2": 4}))
        >>> tilt = torch.tensor([[1.0, 0, -1, 0], [0, 0, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]])
        >>> CompatibleEmbedding(split, {"2.weight": tilt}).apply(Space.of(net).theta(net)).shape
        torch.Size([33])
    """

    embedding: Embedding
    deviations: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name, deviation in self.deviations.items():
            _require_compatible(self.embedding, name, deviation)

    @property
    def wide_space(self) -> Space:
        """Coordinates of the wide module."""
        return self.embedding.wide_space

    def factors(self, name: str) -> Tensor:
        """Give α of one parameter or buffer: what every wide entry takes of the narrow entry that it copies.

        Args:
            name: of the parameter or buffer; one that the view does not know is copied whole.

        Returns:
            α in float64, of the wide shape; a single 1 for a name that the view does not know.
        """
        splits, roles = self.embedding.plan.splits, self.embedding.view.members_of(name)
        trees = self.embedding.view.axes.get(name, ())
        alpha = torch.ones([resized(t, self.embedding.plan.widths).size for t in trees], dtype=torch.float64)
        for dim, tree in enumerate(trees):
            here = {g: r for (d, g), r in roles.items() if d == dim and g in splits}
            if here:
                own = {g: splits[g].shares if r == "consumer" else splits[g].alive for g, r in here.items()}
                alpha = scaled_along(alpha, dim, spread(resized(tree, self.embedding.plan.widths), own))
        return alpha + self.deviations[name].to(alpha) if name in self.deviations else alpha

    def state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embed parameters and buffers by name (a state dict, or part of one).

        Args:
            state: name -> tensor of the narrow module.

        Returns:
            name -> tensor of the wide module, in the same dtype.

        Raises:
            ShapeError: a tensor does not have the shape that the view knows.
        """
        wide = self.embedding.state(state)
        for name, deviation in self.deviations.items():
            if name in wide:
                wide[name] = wide[name] + deviation.to(wide[name]) * self._copied(name, state[name])
        return wide

    def apply(self, theta: Float[Tensor, " narrow"]) -> Float[Tensor, " wide"]:
        """Embed a point; linear and injective.

        Raises:
            ShapeError: theta does not fit the narrow module.
        """
        return self.wide_space.theta(self.state(self.embedding.space.parameters(theta)))

    def gradient(self, gradient: Float[Tensor, " narrow"]) -> Float[Tensor, " wide"]:
        """Predict ∇R at the embedded point from ∇R at the narrow one: exact at every point.

        It is that of the split: β is in it, α is not.

        Raises:
            ShapeError: the gradient does not fit the narrow module.
        """
        return self.embedding.gradient(gradient)

    def wide(self, module: nn.Module) -> nn.Module:
        """Build the wide module: a copy of the narrow one whose layers have the new sizes and weights.

        Raises:
            StructureError: a layer of a kind that cannot be resized.
        """
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with torch.no_grad():
            return resized_module(module, self.embedding.view, self.embedding.plan.widths, self.state(state))

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        """W[p(j), p(k)], without a share."""
        sources = {g: s.sources for g, s in self.embedding.plan.splits.items()}
        for dim, tree in enumerate(self.embedding.view.axes[name]):
            index = gather(tree, sources)
            tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
        return tensor


def freedom(embedding: Embedding) -> dict[str, int]:
    """Count the numbers that may be chosen freely beside the shares: (c-1)(d-1) for each block of copies.

    A tensor has freedom if one of its axes reads units that are split and another one makes units that are:
    hidden-to-hidden weights, kernels between channels, recurrent weights, projections of a residual stream.
    Groups under an average (LayerNorm) have it too: every copy of a unit still is a copy. Left out, because
    the gradient would not be exact: a weight that another trainable tensor multiplies entry by entry, one
    that makes units along two axes, and the group axis of a grouped convolution (its units are kept apart, not
    summed, so their copies cannot trade).

    Source:
        zhang2022hierarchical, the two conditions of the general compatible embedding, counted.

    Args:
        embedding: the split.

    Returns:
        Name of a parameter or buffer -> dimension of its deviations, for those that have any.

    Example:
        >>> from thalweg.embeddings import split_plan
        >>> from thalweg.structure import trace
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> view = trace(net, torch.zeros(3, 1))
        >>> freedom(Embedding(view, Space.of(net), split_plan(view, {"0": 6, "2": 5})))
        {'2.weight': 12}
    """
    counts = {}
    for name, trees in embedding.view.axes.items():
        sheet = _sheet(embedding, name)
        if isinstance(sheet, tuple):
            free = {f.dim: int(f.alive.sum()) - len(np.unique(f.labels[f.alive > 0])) for f in sheet}
            sizes = [free.get(d, resized(t, embedding.plan.widths).size) for d, t in enumerate(trees)]
            if np.prod(sizes) > 0:
                counts[name] = int(np.prod(sizes))
    return counts


def random_compatible(embedding: Embedding, generator: torch.Generator, *, scale: float = 1.0) -> CompatibleEmbedding:
    """Draw a compatible embedding: standard normal deviations, projected onto those that keep both conditions.

    The two projections act along different axes and commute, so that one after the other is the orthogonal one.

    Source:
        zhang2022hierarchical, the two conditions of the general compatible embedding; the draw is ours.

    Args:
        embedding: the split.
        generator: of the draw.
        scale: standard deviation of α before projecting. Default 1, our choice: of the size of a share itself.

    Returns:
        The split with deviations in every tensor that has freedom; without any it is the split alone.

    Example:
        >>> from thalweg.embeddings import split_plan
        >>> from thalweg.structure import trace
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> view = trace(net, torch.zeros(3, 1))
        >>> split = Embedding(view, Space.of(net), split_plan(view, {"0": 4, "2": 4}))
        >>> drawn = random_compatible(split, torch.Generator().manual_seed(0))
        >>> drawn.factors("2.weight")[:, [0, 2]].sum(dim=1)
        tensor([1., 1., 1., 1.], dtype=torch.float64)
    """
    deviations = {}
    for name in freedom(embedding):
        shape = [resized(t, embedding.plan.widths).size for t in embedding.view.axes[name]]
        drawn = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        sheet = _sheet(embedding, name)
        for fibres in sheet if isinstance(sheet, tuple) else ():
            drawn = fibres.projected(drawn)
        deviations[name] = drawn
    return CompatibleEmbedding(embedding, deviations)


@dataclass(frozen=True, eq=False)
class _Fibres:
    """A wide axis in classes of copies of one narrow position, with the weights under which a deviation sums to 0.

    Args:
        dim: which dim.
        groups: the groups whose copies are counted.
        tree: the axis that the classes are positions of.
        labels: for every wide position its class.
        weights: 1 for what reads a unit, β for what makes one; 0 for a null unit.
        alive: 0 for a null unit, else 1.
    """

    dim: int
    groups: tuple[str, ...]
    tree: Tree
    labels: IntArray
    weights: FloatArray
    alive: FloatArray = field(repr=False)

    def sums(self, tensor: Tensor) -> Tensor:
        """Σ w E over every class, which takes the place of the axis."""
        weighted = scaled_along(tensor, self.dim, self.weights)
        shape = [self.tree.size if d == self.dim else n for d, n in enumerate(tensor.shape)]
        return weighted.new_zeros(shape).index_add_(self.dim, torch.from_numpy(self.labels), weighted)

    def projected(self, tensor: Tensor) -> Tensor:
        """E - w (Σ w E) / Σ w² in every class, and 0 for null units."""
        tensor = scaled_along(tensor, self.dim, self.alive)
        squares = np.bincount(self.labels, weights=self.weights**2, minlength=self.tree.size)
        means = self.sums(tensor) / factors_along(tensor, self.dim, np.where(squares > 0, squares, 1.0))
        back = means.index_select(self.dim, torch.from_numpy(self.labels))
        return tensor - scaled_along(back, self.dim, self.weights)

    def place(self, label: int) -> str:
        """Say which unit a class belongs to."""
        units = [(int(unit_of(self.tree, g)[label]), g) for g in self.groups]
        return ", ".join(f"unit {u} of {g!r}" for u, g in units if u >= 0) or f"position {label}"


def _sheet(embedding: Embedding, name: str) -> tuple[_Fibres, ...] | str:
    """Give the fibres along every axis of a tensor that binds deviations, or say why it has no freedom."""
    splits, view = embedding.plan.splits, embedding.view
    roles = {place: role for place, role in view.members_of(name).items() if place[1] in splits}
    reads = {g for (_, g), role in roles.items() if role == "consumer"}
    if "both" in roles.values():
        return "it is tied: one axis both makes and reads units"
    apart = {g for (_, g), role in roles.items() if role != "consumer" and _is_nested(embedding, g, reads)}
    reading = {d for (d, _), role in roles.items() if role == "consumer"}
    making = {d for (d, g), role in roles.items() if role != "consumer" and g not in apart}
    if not reading or not making:
        return "it does not both read units that are split and make such units along another axis"
    if len(making) > 1:
        return "it makes units along two axes"
    makes = {g for (d, g) in roles if d in making} - apart
    if (factor := _entrywise_factor(embedding, name, makes, reads)) is not None:
        return f"the trainable {factor!r} multiplies it entry by entry, and its gradient would not be a share"
    return tuple(_fibres(embedding, name, d, apart, is_read=d in reading) for d in sorted(reading | making))


def _fibres(embedding: Embedding, name: str, dim: int, apart: set[str], *, is_read: bool) -> _Fibres:
    splits = embedding.plan.splits
    groups = tuple(dict.fromkeys(g for g in groups_of(embedding.view.axes[name][dim]) if g in splits))
    mine = tuple(g for g in groups if g not in apart)
    tree = resized(embedding.view.axes[name][dim], {g: splits[g].wide for g in groups if g in apart})
    wide = resized(tree, embedding.plan.widths)
    alive = spread(wide, {g: splits[g].alive for g in groups})
    weights = alive if is_read else spread(wide, {g: splits[g].shares for g in mine})
    return _Fibres(dim, mine, tree, gather(tree, {g: splits[g].sources for g in mine}), weights, alive)


def _is_nested(embedding: Embedding, group: str, others: set[str]) -> bool:
    """Say whether some position belongs to a unit of a group and of another one: then they are kept apart."""
    for tree in _all_trees(embedding):
        found = set(groups_of(tree)) & others - {group}
        mine = unit_of(tree, group) >= 0 if found else np.zeros(0, dtype=bool)
        if any(bool((mine & (unit_of(tree, g) >= 0)).any()) for g in found):
            return True
    return False


def _all_trees(embedding: Embedding) -> Iterator[Tree]:
    for trees in embedding.view.axes.values():
        yield from trees


def _entrywise_factor(embedding: Embedding, name: str, makes: set[str], reads: set[str]) -> str | None:
    """Find a trainable tensor that is copied along both groups of a weight: a factor of each of its entries."""
    for other in embedding.space.names:
        roles = embedding.view.members_of(other)
        made = {(d, g) for (d, g), role in roles.items() if role == "producer"}
        if other != name and any(d != e and g in makes and h in reads for d, g in made for e, h in made):
            return other
    return None


def _require_compatible(embedding: Embedding, name: str, deviation: Tensor) -> None:
    """Check one deviation: the shape, the null units, and the two sums."""
    sheet = _sheet(embedding, name)
    if isinstance(sheet, str):
        raise PlanError(
            f"Expected deviations of {', '.join(map(repr, freedom(embedding))) or 'no tensor of this plan'}. "
            f"Got one of {name!r}: {sheet}. Leave it out."
        )
    shape = tuple(resized(t, embedding.plan.widths).size for t in embedding.view.axes[name])
    if tuple(deviation.shape) != shape or not bool(torch.isfinite(deviation).all()):
        raise PlanError(
            f"Expected finite deviations of {name!r} of the wide shape {shape}. Got shape {tuple(deviation.shape)}, "
            f"{int((~torch.isfinite(deviation)).sum())} of them not finite. Mend the deviations."
        )
    deviation = deviation.detach().to(device="cpu", dtype=torch.float64)
    dims = [f.dim for f in sheet if bool(scaled_along(deviation, f.dim, 1 - f.alive).any())]
    if dims:
        raise PlanError(
            f"Expected no deviation of {name!r} at null units. Got one along dim {dims[0]}. "
            "A null unit has zero weights in and out: mend the deviations."
        )
    for fibres in sheet:
        sizes = replace(fibres, weights=np.abs(fibres.weights)).sums(deviation.abs())
        excess = fibres.sums(deviation).abs() - _SUM_TOLERANCE * sizes.clamp(min=1)
        if float(excess.max()) > 0:
            worst = int(excess.movedim(fibres.dim, 0).flatten(1).amax(dim=1).argmax())
            sums = fibres.sums(deviation).select(fibres.dim, worst).flatten()
            weighted = "" if bool((fibres.weights == fibres.alive).all()) else ", weighted by the shares,"
            raise PlanError(
                f"Expected the deviations of {name!r}{weighted} to sum to 0 over the copies of "
                f"{fibres.place(worst)}. Got {float(sums[sums.abs().argmax()]):.6g}. "
                "Only then do outputs and critical points stay."
            )
