"""Routes: from one network into another, all layers at once, one layer's units at a time, or with adjusted readers.

Each route is made of an inner connector, which moves a layer's own weights along a line or an arc, and a schedule.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from thalweg.errors import StructureError
from thalweg.paths.adjust import Adjuster
from thalweg.paths.centres import centres
from thalweg.paths.leg import Blend, BlendLeg, Leg, blend_leg
from thalweg.paths.pair import Pair, State
from thalweg.paths.path import Path
from thalweg.paths.stages import Stage, stages

Inner = Literal["linear", "arc"]
Schedule = Literal["simultaneous", "butterfly", "adjusted", "joint"]
Matcher = Callable[[Stage, State, State], State]
"""Reorders the units that a stage makes: (stage, where the route stands, target) -> target."""

KNOTS = 5
"""Stretches of a stage between points at which the next layer is fitted. Chosen by us; the authors' code takes 10 for
one hidden layer and 6 for more."""


def simultaneous(pair: Pair, target: State, inner: Inner = "linear") -> tuple[list[Leg], State]:
    """Move all parameters at once, each along a line or an arc.

    Args:
        pair: the networks.
        target: where to go: B, or B with its units in another order.
        inner: the connector.

    Returns:
        The legs, and the target.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 3; each parameter tensor by itself.
    """
    leg = blend_leg("all layers", pair.trained(pair.a), pair.trained(target), centres=_centres(pair, target, inner))
    return [leg], target


def butterfly(
    pair: Pair, target: State, inner: Inner = "linear", *, adjuster: Adjuster, matcher: Matcher | None = None
) -> tuple[list[Leg], State]:
    """Move one layer's units at a time, incoming and outgoing weights together.

    Θ^A → Θ_2^{AB} → … → Θ_{n-1}^{AB} → Θ^B: only the points between are adjusted, and the last one is skipped.

    Args:
        pair: the networks.
        target: where to go.
        inner: the connector.
        adjuster: fits the outgoing weights at the points between.
        matcher: reorders the units of the target, layer by layer.

    Returns:
        The legs, and the target with its units in the order that the route led to.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 4.1.
    """
    route = _Route(pair, target, inner)
    for stage, later in _staged(pair):
        route.meet(stage, matcher)
        names = set(stage.names)
        if later and later <= set(stage.readers) | _companions(pair, stage):  # only the last layer is left: skip Θ_n
            names |= later
            route.go(f"{stage.label} and the last layer", {n: route.target[n] for n in names})
            break
        moved = {n: route.target[n] for n in stage.names}
        if stage.readers:
            wanted = adjuster.targets(pair.a, frozenset(stage.readers))
            moved |= adjuster.fitted({**route.current, **moved}, wanted, prior=route.current)
        route.go(stage.label, moved)
    return route.legs, route.target


def adjusted(
    pair: Pair,
    target: State,
    inner: Inner = "linear",
    *,
    adjuster: Adjuster,
    matcher: Matcher | None = None,
    knots: int = KNOTS,
) -> tuple[list[Leg], State]:
    """Move one layer at a time; what reads its units is fitted anew all the way (weight adjustment).

    W_{k+1}(t) = W_{k+1}^A X_k^A [X_k(t)]⁺ at finitely many t, linear between. With a ridge (`adjuster.ridge`) the
    fit is centred on where the layer stands, so that it begins there without a leg of its own, and the last layer's
    centre and target go over to B's, so that it arrives there.

    Args:
        pair: the networks.
        target: where to go.
        inner: the connector of the layer that moves.
        adjuster: fits the layers that read it.
        matcher: reorders the units of the target, layer by layer.
        knots: stretches of a stage between two fits.

    Returns:
        The legs, and the target with its units in the order that the route led to.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), sections 3.3 and 4.2. Departures: biases are fitted,
    too; in a network with skip connections every later layer that reads the moved units is; the leg from
    W_{k+1}^A to W_{k+1}(0), which the authors' code leaves out, is there.
    """
    route = _Route(pair, target, inner)
    for stage, later in _staged(pair):
        route.meet(stage, matcher)
        moved = {n: route.target[n] for n in stage.names}
        if not stage.readers:
            route.go(stage.label, moved)
        elif adjuster.ridge > 0:
            arrives = later <= set(stage.readers) | _companions(pair, stage)
            route.fit_towards(stage, moved, adjuster, knots, later if arrives else set())
        else:
            route.fit_along(stage, moved, adjuster, knots)
    return route.legs, route.target


class _Route:
    """Legs so far, and where they lead."""

    def __init__(self, pair: Pair, target: State, inner: Inner) -> None:
        self.pair, self.target, self.inner = pair, target, inner
        self.current: dict[str, Tensor] = dict(pair.a)
        self.legs: list[Leg] = []

    def meet(self, stage: Stage, matcher: Matcher | None) -> None:
        """Put the target's units of a stage into the order that fits where the route stands."""
        if matcher is not None:
            self.target = matcher(stage, self.current, self.target)

    def go(self, label: str, moved: Mapping[str, Tensor]) -> None:
        """Add a leg of the inner connector."""
        start, end = self.current, {**self.current, **moved}
        middle = _centres(self.pair, end, self.inner, start=start, names=list(moved))
        self._add(blend_leg(label, self.pair.trained(start), self.pair.trained(end), centres=middle), end)

    def fit_along(self, stage: Stage, moved: Mapping[str, Tensor], adjuster: Adjuster, knots: int) -> None:
        """The paper's stage: to the fit at t = 0, then along with a fit at every knot."""
        wanted = adjuster.targets(self.pair.a, frozenset(stage.readers))
        first = adjuster.fitted(self.current, wanted)
        straight = blend_leg(
            f"{stage.label}: to the fit at its start",
            self.pair.trained(self.current),
            self.pair.trained({**self.current, **first}),
        )
        self._add(straight, {**self.current, **first})
        leg = self._moving(stage.label, moved)
        later = (adjuster.fitted({**self.current, **leg.parameters(s)}, wanted) for s in _times(knots)[1:])
        fits = [first, *later]
        self._add_knots(stage, leg, fits, moved, adjuster)

    def fit_towards(
        self, stage: Stage, moved: Mapping[str, Tensor], adjuster: Adjuster, knots: int, arriving: set[str]
    ) -> None:
        """The ridge's stage: centred on where the readers stand; the last layer goes over to the target's."""
        readers = frozenset(stage.readers)
        here = adjuster.targets(self.current, readers)
        there = adjuster.targets({**self.current, **self.target}, readers) if arriving else here
        end = {n: self.target[n] for n in arriving}
        leg = self._moving(stage.label, {**moved, **end})
        fits: list[dict[str, Tensor]] = []
        for s in _times(knots):
            at = {**self.current, **leg.parameters(s)}
            wanted = Between(here, there, s) if arriving else here
            fits.append(adjuster.fitted(at, wanted, prior={**self.current, **_straight(self.current, end, s)}))
        fits[0] = {n: self.current[n] for n in fits[0]}
        if arriving:
            fits[-1] = {n: self.target[n] for n in fits[-1]}
        self._add_knots(stage, leg, fits, {**moved, **end}, adjuster)

    def _moving(self, label: str, moved: Mapping[str, Tensor]) -> BlendLeg:
        end = {**self.current, **moved}
        middle = _centres(self.pair, end, self.inner, start=self.current, names=list(moved))
        return blend_leg(label, self.pair.trained(self.current), self.pair.trained(end), centres=middle)

    def _add_knots(
        self,
        stage: Stage,
        leg: BlendLeg,
        fits: list[dict[str, Tensor]],
        moved: Mapping[str, Tensor],
        adjuster: Adjuster,
    ) -> None:
        times = _times(len(fits) - 1)
        knotted = {n: Blend("knots", tuple(fit[n] for fit in fits), times) for n in fits[0]}
        fixed = {n: t for n, t in leg.fixed.items() if n not in knotted}
        blends = {**{n: b for n, b in leg.blends.items() if n not in knotted}, **knotted}
        for name in stage.readers:
            change = max(float((b[name] - a[name]).norm()) for a, b in pairwise(fits))
            ratio = change / max(float(self.pair.a[name].norm()), 1e-30)
            adjuster.jumps[name] = max(ratio, adjuster.jumps.get(name, 0.0))
        self._add(BlendLeg(leg.label, fixed, blends), {**self.current, **moved, **fits[-1]})

    def _add(self, leg: BlendLeg, end: Mapping[str, Tensor]) -> None:
        self.current = {**self.current, **end}
        if leg.blends:
            self.legs.append(leg)


def joint(pair: Pair, target: State, *, adjuster: Adjuster, knots: int = KNOTS) -> tuple[list[Leg], State]:
    """Move all layers at once, each but the first fitted to pre-activations between those of both networks.

    At t the layers' targets and the ridge's centre are (1-t)·A + t·B, so that both ends are exact and there is one
    leg.

    Args:
        pair: the networks.
        target: where to go; aligned to A, or the fits have little to hold on to.
        adjuster: with a ridge.
        knots: stretches between two fits.

    Returns:
        The leg, and the target.

    **Source:** ours.
    """
    trained = set(pair.objective.space.names)
    names = [
        s.weight
        for s in pair.execution.sites
        if s.weight in trained and s.calls == 1 and _reads_units(pair, s.weight)
    ]
    chosen = frozenset(names)
    here, there = adjuster.targets(pair.a, chosen), adjuster.targets({**pair.a, **target}, chosen)
    leg = blend_leg("all layers", pair.trained(pair.a), pair.trained(target))
    fits: list[dict[str, Tensor]] = []
    for s in _times(knots):
        at = {**pair.a, **leg.parameters(s)}
        fits.append(adjuster.fitted(at, Between(here, there, s)))
    fits[0] = {n: pair.a[n] for n in fits[0]}
    fits[-1] = {n: target[n] for n in fits[-1]}
    knotted = {n: Blend("knots", tuple(fit[n] for fit in fits), _times(knots)) for n in fits[0]}
    fixed = {n: t for n, t in leg.fixed.items() if n not in knotted}
    blends = {**{n: b for n, b in leg.blends.items() if n not in knotted}, **knotted}
    return [BlendLeg("all layers, fitted", fixed, blends)], target


@dataclass(frozen=True)
class Between(Mapping[str, Tensor]):
    """(1-s)·one + s·two, tensor by tensor, made when it is asked for.

    Args:
        one: at s = 0.
        two: at s = 1.
        s: where between.
    """

    one: Mapping[str, Tensor]
    two: Mapping[str, Tensor]
    s: float

    def __getitem__(self, name: str) -> Tensor:
        return torch.lerp(self.one[name], self.two[name], self.s)

    def __iter__(self) -> Iterator[str]:
        return iter(self.one)

    def __len__(self) -> int:
        return len(self.one)


def path_of(pair: Pair, legs: list[Leg], target: State) -> Path:
    """Make the path of a route.

    Args:
        pair: the networks.
        legs: of the route.
        target: where it ends.

    Returns:
        The path, with the buffers of both ends.

    Raises:
        StructureError: the route does not end where it should.
    """
    if not legs:  # both networks are the same
        legs = [BlendLeg("nothing moves", pair.trained(pair.a), {})]
    for leg, s, wanted in ((legs[0], 0.0, pair.a), (legs[-1], 1.0, target)):
        found = leg.parameters(s)
        wrong = [n for n in pair.objective.space.names if not torch.equal(found[n], wanted[n])]
        if wrong:
            raise StructureError(
                f"Expected a route from A to B. Got another {wrong[0]!r} at {'its end' if s else 'its start'}: "
                "it is used in ways that this schedule does not follow. Take another method."
            )
    return Path(pair.objective.space, tuple(legs), (), pair.buffers(pair.a), pair.buffers(target))


def _staged(pair: Pair) -> list[tuple[Stage, set[str]]]:
    """Give each stage, and the parameters of all later ones."""
    found = stages(pair)
    return [(stage, {n for rest in found[k + 1 :] for n in rest.names}) for k, stage in enumerate(found)]


def _companions(pair: Pair, stage: Stage) -> set[str]:
    """Biases of the layers that read a stage's units."""
    return {s.bias for s in pair.execution.sites if s.weight in stage.readers and s.bias is not None}


def _reads_units(pair: Pair, weight: str) -> bool:
    return any(role != "producer" for role in pair.view.members_of(weight).values())


def _centres(
    pair: Pair, end: State, inner: Inner, *, start: State | None = None, names: list[str] | None = None
) -> dict[str, Tensor] | None:
    if inner == "linear":
        return None
    chosen = names or pair.objective.space.names
    return centres(pair.view, pair.a if start is None else start, end, chosen)


def _straight(one: State, two: State, s: float) -> dict[str, Tensor]:
    return {n: torch.lerp(one[n], two[n], s) for n in two}


def _times(knots: int) -> tuple[float, ...]:
    return (*(k / knots for k in range(knots)), 1.0)
