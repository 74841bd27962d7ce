"""Methods of connection: an order of B's units, an inner connector, a schedule, and the way to B's own order."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from thalweg.errors import ConfigError, StructureError
from thalweg.matching.align import align
from thalweg.matching.rebasin import straight_through
from thalweg.paths.adjust import RIDGE, Adjuster
from thalweg.paths.matchers import Transport, matched_from_the_start
from thalweg.paths.pair import Pair, State, first_samples
from thalweg.paths.path import Path
from thalweg.paths.permutation import permutation_path
from thalweg.paths.route import KNOTS, Inner, Schedule, adjusted, butterfly, joint, path_of, simultaneous
from thalweg.paths.stages import stages
from thalweg.structure.symmetry import permute
from thalweg.structure.tree import IntArray

Match = Literal["none", "transport", "weights", "activations", "straight through"]
Permutation = Literal["free_slots", "swaps", "reflections"]
Progress = Callable[[float, str], None]

_FAR, _LARGE = 2.0, 10.0
"""Change between neighbouring fits, and growth by a fit, over the layer's norm, from which a note is made. Ours."""

_ACTIVATION_SAMPLES = 1_000
"""Samples whose activations units are matched by, held at once. Chosen by us: a few hundred do."""


@dataclass(frozen=True)
class Method:
    """A closed-form connection, composed of its parts.

    Args:
        name: as on the command line and in tables.
        words: what it does, in a few words.
        match: how B's units are brought into A's order first; the way back is part of the path.
        inner: how a layer's own weights move.
        schedule: all layers at once ("simultaneous"); one layer's units at a time ("butterfly"); with the next layer
            fitted all the way ("adjusted"); all at once, each fitted ("joint").
        ridge: of the fits; 0 is the paper's least squares. "joint" needs one above 0.
        source: of the method.

    Raises:
        ConfigError: an unknown part, or a ridge that does not fit.
    """

    name: str
    words: str
    match: Match = "none"
    inner: Inner = "linear"
    schedule: Schedule = "simultaneous"
    ridge: float = 0.0
    source: str = "anokhin2020lowloss"

    def __post_init__(self) -> None:
        for name, kinds in (("match", Match), ("inner", Inner), ("schedule", Schedule)):
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(
                    f"Expected {name} to be one of {', '.join(get_args(kinds))}. Got {getattr(self, name)!r}. "
                    "Choose one of them."
                )
        if not self.ridge >= 0 or (self.schedule == "joint" and self.ridge == 0):
            raise ConfigError(
                f"Expected a ridge of 0 or more, and above 0 for 'joint'. Got {self.ridge}. Take one such as {RIDGE}."
            )

    @property
    def is_fitted(self) -> bool:
        """Whether layers are fitted on data."""
        return self.schedule != "simultaneous"


_OURS, _REBASIN = "ours", "ainsworth2022rebasin"
METHODS: Mapping[str, Method] = {
    m.name: m
    for m in (
        Method("linear", "a straight line"),
        Method("arc", "an arc about the mean of all units", inner="arc"),
        Method("linear+butterfly", "one layer's units at a time, lines, fits between", schedule="butterfly"),
        Method("arc+butterfly", "one layer's units at a time, arcs, fits between", inner="arc", schedule="butterfly"),
        Method("linear+wa", "lines, the next layer fitted (least squares)", schedule="adjusted"),
        Method("arc+wa", "arcs, the next layer fitted (least squares)", inner="arc", schedule="adjusted"),
        Method(
            "ot",
            "transport, fits between layers, then permuted",
            match="transport",
            schedule="butterfly",
        ),
        Method("ot+wa", "transport, the next layer fitted, then permuted", match="transport", schedule="adjusted"),
        Method("linear+ridge", "lines, centred ridge fits", schedule="adjusted", ridge=RIDGE, source=_OURS),
        Method("arc+ridge", "arcs, centred ridge fits", inner="arc", schedule="adjusted", ridge=RIDGE, source=_OURS),
        Method(
            "ot+ridge",
            "transport, centred ridge fits, then permuted",
            match="transport",
            schedule="adjusted",
            ridge=RIDGE,
            source=_OURS,
        ),
        Method("weights", "aligned by weights, a line", match="weights", source=_REBASIN),
        Method("activations", "aligned by activations, a line", match="activations", source=_REBASIN),
        Method("rebasin", "aligned by straight-through steps, a line", "straight through", source=_REBASIN),
        Method("joint", "aligned by weights, all layers at once, fitted", "weights", "linear", "joint", RIDGE, _OURS),
        Method(
            "joint+activations",
            "aligned by activations, all layers at once, fitted",
            "activations",
            "linear",
            "joint",
            RIDGE,
            _OURS,
        ),
    )
}
"""The closed-form methods by name. Your own is one more `Method`."""


@dataclass(frozen=True)
class Settings:
    """What closed-form methods leave open.

    Args:
        knots: stretches of a stage between two fits.
        permutation: the legs that bring B's units into B's own order.
        at_once: disjoint swaps in one leg, of "swaps" and "reflections".
        slots: share of a group's units that "free_slots" frees. Chosen by us: 5 % make about 50 legs of 2,000 units.
        rebasin_steps: steps of the straight-through alignment. Chosen by us, as are its rate and batch: seconds for
            a network of a million parameters.
        rebasin_learning_rate: of its Adam.
        rebasin_batch_size: of its mini-batches.
        seed: of what is drawn.

    Raises:
        ConfigError: a number out of its range.
    """

    knots: int = KNOTS
    permutation: Permutation = "free_slots"
    at_once: int = 1
    slots: float = 0.05
    rebasin_steps: int = 100
    rebasin_learning_rate: float = 1e-3
    rebasin_batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.knots < 1 or self.at_once < 1 or self.rebasin_steps < 1 or not 0 < self.slots < 1:
            raise ConfigError(
                f"Expected knots, at_once and rebasin_steps of 1 or more and slots within (0, 1). Got {self.knots}, "
                f"{self.at_once}, {self.rebasin_steps} and {self.slots}. Leave them out for the defaults."
            )


@dataclass(frozen=True)
class Connection:
    """A path that a method found.

    Args:
        method: its name.
        path: from A to B, bit for bit.
        meets: t at which B's function is reached, with its units in A's order; from there on they are permuted. 1
            without that stage.
        permutations: what was done to B's units, group by group.
        seconds: it took.
        fits: how many layers were fitted.
        worst_fit: largest relative residual of a fit; None without one.
        notes: what a user should know.
    """

    method: str
    path: Path
    meets: float
    permutations: Mapping[str, IntArray]
    seconds: float
    fits: int = 0
    worst_fit: float | None = None
    notes: tuple[str, ...] = ()


def obstacle(pair: Pair, method: Method) -> str | None:
    """Say why a method does not apply to a network; None if it does.

    Args:
        pair: the networks.
        method: which one.

    Returns:
        The reason, or None.
    """
    if method.match != "none" or method.is_fitted:
        if not pair.view.groups:
            frozen = ", ".join(pair.view.frozen_by) or "none"
            return f"the network has no interchangeable units (operations without a rule: {frozen})"
    found = stages(pair)
    if method.schedule in ("butterfly", "adjusted", "joint") and not any(stage.readers for stage in found):
        names = ", ".join(dict.fromkeys(n for stage in found for n in stage.unfitted)) or "none"
        return f"no layer that reads units is a linear map that runs once (readers: {names})"
    if method.schedule == "butterfly" and method.match == "none" and len(found) <= 2:
        return f"with one hidden layer it is the same as {method.inner}"
    return None


def connect(
    pair: Pair,
    method: str | Method = "ot+wa",
    settings: Settings | None = None,
    *,
    progress: Progress | None = None,
) -> Connection:
    """Connect two networks by a closed-form method: nothing is trained.

    Args:
        pair: the networks.
        method: a name of `METHODS`, or your own composition.
        settings: what it leaves open.
        progress: called as progress(fraction, text).

    Returns:
        The path; its ends are the two networks, bit for bit.

    Raises:
        ConfigError: no such method.
        StructureError: it does not apply to this network; the message says why.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), sections 3 and 4; alignment: Ainsworth et al. 2022 (arXiv
    2209.04836); ridge, joint fits and free slots are ours.

    Example:
        >>> from torch import nn
        >>> from thalweg.objective import Objective
        >>> x, y = torch.randn(64, 3), torch.randint(2, (64,))
        >>> nets = [nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)]
        >>> pair = Pair.of(Objective(nets[0], nn.CrossEntropyLoss(), (x, y)), *nets)
        >>> found = connect(pair, "linear+wa")
        >>> [leg.label for leg in found.path.legs]
        ['0: to the fit at its start', '0', '2']
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ConfigError(f"Expected one of {', '.join(METHODS)}. Got {method!r}. Choose a method.")
        method = METHODS[method]
    reason = obstacle(pair, method)
    if reason is not None:
        raise StructureError(f"Expected a network that {method.name} applies to. Got this: {reason}. Take another.")
    settings = settings or Settings()
    tell = progress or _silent
    began = time.perf_counter()
    tell(0.0, f"{method.name}: matching")
    matcher, permutations = _ordered(pair, method, settings)
    target: State = permute(pair.view, pair.b, permutations) if permutations else pair.b
    few = first_samples(pair.inputs, pair.joint_samples) if method.schedule == "joint" else None
    adjuster = Adjuster(pair, ridge=method.ridge, inputs=few)
    if matcher is not None and method.schedule in ("simultaneous", "joint"):
        for stage in stages(pair):
            target = matcher(stage, pair.a, target)
    tell(0.2, f"{method.name}: the route")
    if method.schedule == "simultaneous":
        legs, target = simultaneous(pair, target, method.inner)
    elif method.schedule == "butterfly":
        legs, target = butterfly(pair, target, method.inner, adjuster=adjuster, matcher=matcher)
    elif method.schedule == "adjusted":
        options = {"adjuster": adjuster, "matcher": matcher, "knots": settings.knots}
        legs, target = adjusted(pair, target, method.inner, **options)  # type: ignore[arg-type]
    else:
        legs, target = joint(pair, target, adjuster=adjuster, knots=settings.knots)
    path = path_of(pair, legs, target)
    if matcher is not None:
        permutations = matcher.permutations
    tell(0.8, f"{method.name}: the order of B's units")
    path, meets = _to_own_order(pair, path, target, permutations, settings)
    tell(1.0, f"{method.name}: done")
    residuals = [fit.residual for fit in adjuster.fits]
    return Connection(
        method=method.name,
        path=path,
        meets=meets,
        permutations=permutations,
        seconds=time.perf_counter() - began,
        fits=len(residuals),
        worst_fit=max(residuals, default=None),
        notes=_notes(pair, adjuster, method),
    )


def _ordered(pair: Pair, method: Method, settings: Settings) -> tuple[Transport | None, dict[str, IntArray]]:
    """Match B's units to A's: now, or stage by stage."""
    generator = torch.Generator().manual_seed(settings.seed)
    if method.match == "none":
        return None, {}
    if method.match == "transport":
        streams = matched_from_the_start(pair, {g.name: np.arange(g.size) for g in pair.view.groups})
        known: dict[str, IntArray] = {}
        if streams:
            whole = align(pair.view, pair.a, pair.b, by="weights", generator=generator).permutations
            known = matched_from_the_start(pair, whole)
        outgoing = method.schedule in ("butterfly", "simultaneous")
        return Transport(pair, with_outgoing=outgoing, permutations=known), dict(known)
    if method.match == "activations":
        few = first_samples(pair.inputs, _ACTIVATION_SAMPLES)
        found = align(pair.view, pair.a, pair.b, by="activations", module=pair.objective.module, inputs=few)
        return None, dict(found.permutations)
    found = align(pair.view, pair.a, pair.b, by="weights", generator=generator)
    if method.match == "straight through":
        found = straight_through(
            *(pair.objective, pair.view, pair.a, pair.b),
            start=found,
            steps=settings.rebasin_steps,
            learning_rate=settings.rebasin_learning_rate,
            batch_size=settings.rebasin_batch_size,
            generator=generator,
        ).alignment
    return None, dict(found.permutations)


def _to_own_order(
    pair: Pair, path: Path, target: State, permutations: Mapping[str, IntArray], settings: Settings
) -> tuple[Path, float]:
    """Go on from B with its units in A's order to B itself, group by group."""
    state = target
    stages_back: list[Path] = []
    for group in pair.view.groups:
        order = permutations.get(group.name)
        if order is None or np.array_equal(order, np.arange(group.size)):
            continue
        kind = settings.permutation
        if kind == "free_slots" and not (group.is_duplicable and group.coupling == "none"):
            kind = "reflections"
        back = np.argsort(order)
        stages_back.append(
            permutation_path(
                *(pair.objective.space, pair.view, state, group.name, back),
                kind=kind,
                at_once=settings.at_once,
                slots=max(1, round(settings.slots * group.size)),
                kill=_killer(pair, group.name) if kind == "free_slots" else None,
            )
        )
        state = permute(pair.view, state, {group.name: back})
    if not stages_back:
        return path, 1.0
    way = stages_back[0]
    for place, more in enumerate(stages_back[1:], 1):
        way = way.then(more, share=place / (place + 1))
    return path.then(way), 0.5


def _killer(pair: Pair, group: str) -> Callable[[State, IntArray], State]:
    """Make what frees units: their outgoing weights become 0 and the layers that read the group are fitted anew."""
    from thalweg.paths.killing import without_units

    return lambda state, units: without_units(pair, group, state, units)


def _notes(pair: Pair, adjuster: Adjuster, method: Method) -> tuple[str, ...]:
    notes = []
    more = "a ridge holds it" if adjuster.ridge == 0 else "more samples hold it"
    scarce = [fit for fit in adjuster.fits if fit.is_scarce]
    if scarce:
        worst = min(scarce, key=lambda fit: fit.samples / fit.features)
        notes.append(
            f"{len(scarce)} of {len(adjuster.fits)} fits had fewer than two samples for each feature (at worst "
            f"{worst.samples:,} for {worst.features:,}): accuracy between may collapse; {more}"
        )
    remedy = "more knots or a ridge hold it" if adjuster.ridge == 0 else "more samples or knots hold it"
    told = (
        (adjuster.jumps, _FAR, "neighbouring fits of {} differ by {:.3g} times its norm, and between them is no fit"),
        (adjuster.growth, _LARGE, "a fit of {} has {:.3g} times its norm before"),
    )
    for found, most, words in told:
        name = max(found, key=lambda n, found=found: found[n], default=None)  # type: ignore[misc]
        if name is not None and found[name] > most:
            notes.append(f"{words.format(name, found[name])}: accuracy may collapse; {remedy}")
    unfitted = list(dict.fromkeys(n for stage in stages(pair) for n in stage.unfitted)) if method.is_fitted else []
    if unfitted:
        notes.append(
            f"read moved units but are no linear maps that run once, and are not fitted: {', '.join(unfitted)}"
        )
    if pair.objective._constants and pair.view.rejected:
        held = ", ".join(pair.view.rejected)
        notes.append(f"units that parameters which are not trained make or read keep their order: {held}")
    return tuple(notes)


def _silent(fraction: float, text: str) -> None:
    """Report to nobody."""
