"""critical_points: a catalogue of the distinct critical points that many trials met in networks of several widths.

Two points are the same entry if they compute the same on the data, arise at the same width, and agree there up to
permutation and sign of units (or lie on one connected set of critical points).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thalweg.embeddings.entries import Catalogue, Count, Entry, Image, Sighting
from thalweg.embeddings.matching import match
from thalweg.embeddings.mirror import mirror_of_data
from thalweg.embeddings.origins import Family, Network, Origin, origins, outputs_of, widths_by_group
from thalweg.embeddings.plan import split_plan
from thalweg.embeddings.splitting import Embedding
from thalweg.errors import DataError, PlanError, ShapeError
from thalweg.objective import Objective
from thalweg.probes.degeneracy import Inertia, inertia
from thalweg.probes.many import hessians
from thalweg.probes.spectrum import eigen
from thalweg.structure import flip, permute
from thalweg.training.polishing import CriticalPoints, polish_all

_FLOOR = 1e-3
"""A change of loss below this fraction of the loss at theta = 0 never counts as far. Chosen by us: near a minimum of
loss 0 a polish lowers the loss by any factor, and gradient descent ends there at 2e-4 of the loss at 0 after the
300,000 steps of figure 4."""
_SAME_POINT = 1e-4
"""Largest difference of two points that are one, relative to the largest entry of its parameter. Chosen by us, far
below that of distinct points (more than 1e-2 in figure 4 of the paper)."""
_FINEST = 1e-15
"""An entry is polished as far as it goes; few points come below this L1 norm of the gradient in float64."""
_FINE_STEPS = 20
"""Most steps of that polish. Chosen by us: from a polished point, one or two reach rounding."""
_INSIDE = (0.25, 0.5, 0.75)
"""Where the straight line between two points is looked at."""
_CRITICAL = 1e-10
"""L1 norm of the gradient of a critical point: the threshold of the paper's figure 4."""
_FACTOR = 10.0
"""Of the gradient's L1 norm in the threshold of an eigenvalue. Chosen by us, see `signs_at`."""


@dataclass(frozen=True)
class Met:
    """The critical points that the trials of one network met.

    Args:
        objective: the landscape of the network.
        points: the points, as `polish_all` gives them.
        trials: the trial that met each point; shape (points,).
        network: how tables call the network. Default: its widths.

    Raises:
        ShapeError: there are not as many trials as points, or the points do not fit the module.
    """

    objective: Objective
    points: CriticalPoints
    trials: Int[Tensor, " points"]
    network: str = ""

    def __post_init__(self) -> None:
        if len(self.trials) != len(self.points) or self.points.thetas.shape[1] != self.objective.num_params:
            raise ShapeError(
                f"Expected one trial per point, and points of {self.objective.num_params} parameters. Got "
                f"{len(self.trials)} trials, points of shape {tuple(self.points.thetas.shape)}. "
                "Pass what polish_all gave for this objective."
            )


def catalogue(
    met: Sequence[Met],
    *,
    raw_gradient_l1: float = 1e-10,
    loss_change: float = 0.05,
    same_function: float = 1e-5,
    threshold: float | None = None,
) -> Catalogue:
    """Find the distinct critical points that many trials met, and where each of them arises.

    Points that a polish did not make critical, or carried to another loss, are no visits. The others are clustered
    by their outputs on the data, which no symmetry changes; each is brought to the narrowest network in which it is
    a critical point of the same outputs (its origin); points of one function and one width of origin are one entry
    if they agree up to permutation and sign of units, if the entry is degenerate at its origin, or if the straight
    line between them is critical all along. Each entry is then embedded into the networks of the list, where its
    loss and gradient are taken before the polish, its eigenvalues after.

    Args:
        met: the points, one `Met` per network; the networks differ in the sizes of their groups only.
        raw_gradient_l1: threshold under which a point counted as critical without polishing: 1e-10 in the paper.
        loss_change: a polish that changes the loss by more than this fraction went far. Default 0.05, chosen by
            us: the levels of figure 4 are further apart, plateau points within 0.01. Changes below 1e-3 of the
            loss at theta = 0 never count.
        same_function: largest difference of an output of one function, relative to the largest output. Chosen by
            us: ‖∇R‖₁ ≤ 1e-12 leaves less than 1e-6 at eigenvalues of 1e-12, the entries of figure 4 differ by
            more than 1e-2.
        threshold: an eigenvalue within ± this is zero. Default: from rounding and from ‖∇R‖₁, see `signs_at`.

    Returns:
        The catalogue.

    Raises:
        DataError: no network is given, or two of the same widths.
        ShapeError: the outputs of the networks have different shapes.
        StructureError: a module cannot be traced or resized.

    **Source:** Zhang et al. 2021 (arXiv 2105.14573), Sec. 5 and Fig. 4: clusters by loss, output function and input
    weights, zero output excluded. Departures: points are polished, the widths of origin are found by reduction.

    Example:
        >>> from thalweg.data import three_tanh
        >>> from thalweg.embeddings import Met, catalogue
        >>> from thalweg.nets import two_layer
        >>> data = three_tanh()
        >>> objective = Objective(two_layer(1).double(), torch.nn.MSELoss(), (data.inputs, data.targets))
        >>> thetas = torch.tensor([[0.09, 0.0, 3.7], [-0.09, 0.0, -3.7]], dtype=torch.float64)
        >>> found = catalogue([Met(objective, polish_all(objective, thetas), torch.arange(2))])
        >>> [(round(entry.loss, 6), entry.visits) for entry in found.entries]
        [(0.109023, {'width 1': 2})]
    """
    networks = [Network.of(m.objective, m.network) for m in met]
    if not networks or len({n.widths for n in networks}) < len(networks):
        raise DataError(
            f"Expected networks of different widths, at least one. Got {[n.name for n in networks]}. "
            "Give all points of one network in one Met."
        )
    options = _Options(raw_gradient_l1, same_function, threshold)
    counts, points = _counted(met, networks, loss_change)
    sizes = sorted({len(p.outputs) for p in points})
    if len(sizes) > 1:
        raise ShapeError(
            f"Expected networks with as many outputs on all data. Got {sizes}. Give every network the same data."
        )
    scale = max([float(p.outputs.abs().max()) for p in points], default=1.0) or 1.0
    family = Family(networks)
    points = _with_origins(networks, points, family, same_function, scale)
    clusters = [c for same in _by_function(points, same_function * scale) for c in _by_point(same, family, threshold)]
    pairs = [(_entry(cluster, networks, options, scale), cluster) for cluster in clusters]
    pairs.sort(key=lambda pair: _order(pair[0]))
    entries = [replace(entry, id=number) for number, (entry, _) in enumerate(pairs, 1)]
    entries = _mirrored(entries, networks[0].objective, same_function * scale)
    entries = [replace(e, images=tuple(_images(e, networks, threshold, family))) for e in entries]
    sightings = [s for number, (_, c) in enumerate(pairs, 1) for s in _sightings(c, number, networks)]
    return Catalogue(
        entries=tuple(e for e in entries if not e.is_zero),
        zero_entries=tuple(e for e in entries if e.is_zero),
        sightings=tuple(sorted(sightings, key=lambda s: (s.network, s.point))),
        counts=tuple(counts),
    )


@dataclass(frozen=True)
class _Options:
    """What `catalogue` was asked for."""

    raw_gradient_l1: float
    same_function: float
    threshold: float | None


@dataclass(frozen=True)
class _Point:
    """A counted point: which network of the list, which of its points, its trial, and what was measured there."""

    network: int
    number: int
    trial: int
    theta: Tensor
    loss: float
    outputs: Tensor
    raw_gradient_l1: float
    distance: float
    origin: Origin


@dataclass(frozen=True)
class _Cluster:
    """Points that are one entry; the first is the leader. `residuals` are their differences from it."""

    network: Network
    points: list[_Point]
    residuals: list[float]


def _counted(met: Sequence[Met], networks: Sequence[Network], loss_change: float) -> tuple[list[Count], list[_Point]]:
    """Say which points are visits, and measure their outputs."""
    counts, points = [], []
    for index, (one, network) in enumerate(zip(met, networks, strict=True)):
        found = one.points
        at_zero = float(network.objective.value(torch.zeros_like(found.thetas[:1]))[0]) if len(found) else 0.0
        slack = _FLOOR * at_zero if math.isfinite(at_zero) else 0.0
        stays = (found.values - found.raw_values).abs() <= loss_change * found.raw_values.abs() + slack
        kept = torch.nonzero(found.is_converged & stays).flatten().tolist()
        outputs = outputs_of(network.objective, found.thetas[kept])
        for row, number in enumerate(kept):
            theta = found.thetas[number]
            measured = (found.values, found.raw_gradient_l1, found.distances)
            loss, raw, distance = (float(values[number]) for values in measured)
            origin = Origin(network.widths, theta, 0.0)
            point = _Point(index, number, int(one.trials[number]), theta, loss, outputs[row], raw, distance, origin)
            points.append(point)
        moved = int((found.is_converged & ~stays).sum())
        failed = int((~found.is_converged).sum())
        trials = len(set(one.trials.tolist()))
        counts.append(Count(network.name, trials, len(found), failed, moved, len(kept)))
    return counts, points


def _with_origins(
    networks: Sequence[Network], points: Sequence[_Point], family: Family, same_function: float, scale: float
) -> list[_Point]:
    """Find the origin of every point, all points of one network at once."""
    result = []
    for index, network in enumerate(networks):
        mine = [p for p in points if p.network == index]
        if mine:
            thetas = torch.stack([p.theta for p in mine])
            found = origins(network, thetas, family, same_function=same_function, scale=scale)
            result += [replace(p, origin=origin) for p, origin in zip(mine, found, strict=True)]
    return result


def _by_function(points: Sequence[_Point], bound: float) -> list[list[_Point]]:
    """Cluster points by their outputs: each joins the first cluster whose first point has them."""
    clusters: list[list[_Point]] = []
    for point in points:
        same = (c for c in clusters if float((c[0].outputs - point.outputs).abs().max()) <= bound)
        cluster = next(same, None)
        if cluster is None:
            clusters.append([point])
        else:
            cluster.append(point)
    return clusters


def _by_point(points: Sequence[_Point], family: Family, threshold: float | None) -> Iterator[_Cluster]:
    """Cluster points of one function by the width of origin and by the point there."""
    for widths in sorted({p.origin.widths for p in points}):
        network = family.of_widths(widths)
        left = [p for p in points if p.origin.widths == widths]
        slopes = network.objective.gradient(torch.stack([p.origin.theta for p in left])).abs().sum(1)
        left = [left[i] for i in slopes.argsort(stable=True).tolist()]
        while left:
            leader = left[0].origin.theta
            is_degenerate = signs_at(network.objective, leader, threshold).zero > 0
            residuals = [_difference(network, leader, p.origin.theta) for p in left]
            is_same = [is_degenerate or r <= _SAME_POINT for r, _ in residuals]
            is_same = [
                same or _is_connected(network.objective, leader, moved)
                for same, (_, moved) in zip(is_same, residuals, strict=True)
            ]
            mine = [i for i, same in enumerate(is_same) if same]
            yield _Cluster(network, [left[i] for i in mine], [residuals[i][0] for i in mine])
            left = [p for p, same in zip(left, is_same, strict=True) if not same]


def _difference(network: Network, leader: Tensor, theta: Tensor) -> tuple[float, Tensor]:
    """Bring a point as close to the leader as symmetry allows; give what is left, and the point."""
    found = match(network.view, network.state(leader), network.state(theta), odd=network.odd)
    moved = flip(network.view, permute(network.view, network.state(theta), found.permutations), found.signs)
    return found.residual, network.objective.space.theta(moved)


def _is_connected(objective: Objective, one: Tensor, two: Tensor) -> bool:
    """Say whether the straight line between two critical points is critical, by the paper's threshold."""
    inside = torch.stack([one + t * (two - one) for t in _INSIDE])
    return bool((objective.gradient(inside).abs().sum(1) <= _CRITICAL).all())


def signs_at(objective: Objective, theta: Float[Tensor, " params"], threshold: float | None = None) -> Inertia:
    """Count the signs of the Hessian's eigenvalues at a point that is critical up to a small gradient.

    Along a direction in which critical points lie, ‖H·v‖ is the gradient's size at the point for a v of unit size;
    so an eigenvalue within a few ‖∇R‖₁ of zero cannot be told from zero, nor one within rounding.

    Args:
        objective: the landscape.
        theta: the point.
        threshold: an eigenvalue within ± this is zero. Default: the larger of P·eps·max|λ| (see `inertia`) and
            10·‖∇R‖₁; the factor was chosen by us.

    Returns:
        The counts.

    Raises:
        NumericalError: the Hessian is not finite.
    """
    matrix = hessians(objective, theta.unsqueeze(0))[0]
    values = eigen(matrix)[0]
    if threshold is not None:
        return inertia(values, threshold)
    rounding = inertia(values)
    own = _FACTOR * float(objective.gradient(theta).abs().sum())
    return rounding if own <= rounding.threshold else inertia(values, own)


def _entry(cluster: _Cluster, networks: Sequence[Network], options: _Options, scale: float) -> Entry:
    """Polish the leader as far as it goes, and count the trials that met it."""
    objective, points = cluster.network.objective, cluster.points
    best = polish_all(objective, points[0].origin.theta.unsqueeze(0), gradient_l1=_FINEST, max_steps=_FINE_STEPS)
    outputs = objective.outputs(best.thetas[0]).flatten()
    visits, raw_visits = {}, {}
    for index, network in enumerate(networks):
        mine = [p for p in points if p.network == index]
        visits[network.name] = len({p.trial for p in mine})
        raw_visits[network.name] = len({p.trial for p in mine if p.raw_gradient_l1 <= options.raw_gradient_l1})
    return Entry(
        id=0,
        widths=widths_by_group(cluster.network),
        theta=best.thetas[0],
        loss=float(best.values[0]),
        gradient_l1=float(best.gradient_l1[0]),
        inertia=signs_at(objective, best.thetas[0], options.threshold),
        outputs=outputs,
        is_zero=float(outputs.abs().max()) <= options.same_function * scale,
        visits=visits,
        raw_visits=raw_visits,
        max_distance=max(p.distance for p in points),
    )


def _order(entry: Entry) -> tuple[bool, float, int, tuple[float, ...]]:
    """Main list first, then falling loss; mirror images, of one loss up to rounding, by their outputs."""
    return entry.is_zero, -round(entry.loss, 9), sum(entry.widths.values()), tuple(entry.outputs[:3].tolist())


def _mirrored(entries: Sequence[Entry], objective: Objective, bound: float) -> list[Entry]:
    """Find the mirror image of every entry among the entries of the same widths."""
    mirror = mirror_of_data(objective)
    if mirror is None:
        return list(entries)
    result = []
    for entry in entries:
        image = mirror.image(entry.outputs)
        same = [e for e in entries if e.widths == entry.widths and float((e.outputs - image).abs().max()) <= bound]
        others = [e.id for e in same if e.id != entry.id]
        is_symmetric = float((entry.outputs - image).abs().max()) <= bound
        mirror_of = None if is_symmetric or not others else others[0]
        result.append(replace(entry, mirror_of=mirror_of, is_symmetric=is_symmetric))
    return result


def _images(entry: Entry, networks: Sequence[Network], threshold: float | None, family: Family) -> Iterator[Image]:
    """Embed an entry into every network of the list that is at least as wide and that a plan reaches."""
    origin = family.of_widths(tuple(entry.widths.values()))
    for network in networks:
        sizes = widths_by_group(network)
        if any(sizes[name] < width for name, width in entry.widths.items()):
            continue
        try:
            plan = split_plan(origin.view, sizes)
        except PlanError:  # units under an average, which only whole multiples of their number reach
            continue
        theta = Embedding(origin.view, origin.objective.space, plan).apply(entry.theta)
        found = polish_all(network.objective, theta.unsqueeze(0))
        signs = signs_at(network.objective, found.thetas[0], threshold)
        yield Image(
            network=network.name,
            theta=found.thetas[0],
            gradient_l1=float(found.gradient_l1[0]),
            inertia=signs,
            raw_gradient_l1=float(found.raw_gradient_l1[0]),
            distance=float(found.distances[0]),
            loss=float(found.raw_values[0]),
        )


def _sightings(cluster: _Cluster, entry: int, networks: Sequence[Network]) -> Iterator[Sighting]:
    for point, residual in zip(cluster.points, cluster.residuals, strict=True):
        network = networks[point.network]
        yield Sighting(
            network=network.name,
            trial=point.trial,
            point=point.number,
            entry=entry,
            is_embedded=network.widths != cluster.network.widths,
            raw_gradient_l1=point.raw_gradient_l1,
            distance=point.distance,
            change=point.origin.change,
            residual=residual,
        )
