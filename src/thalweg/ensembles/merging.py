"""Merging: one network out of two, between them, with its statistics repaired."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from thalweg.ensembles.ensemble import single
from thalweg.ensembles.repair import repaired
from thalweg.ensembles.scores import EnsembleScore, evaluate
from thalweg.ensembles.statistics import STATISTICS_SAMPLES, layers_with_statistics, re_estimated
from thalweg.errors import ConfigError, StructureError
from thalweg.matching.align import align
from thalweg.matching.rebasin import straight_through
from thalweg.objective import Objective
from thalweg.paths.adjust import RIDGE, Adjuster
from thalweg.paths.pair import Pair, State
from thalweg.paths.route import joint
from thalweg.structure.symmetry import permute
from thalweg.structure.tree import IntArray

Match = Literal["none", "weights", "activations", "straight through"]
Means = Literal["midpoint", "joint"]

_RATE, _BATCH = 1e-3, 256
"""Learning rate and samples of a step of the straight-through alignment. Chosen by us."""

_MOST_KNOTS = 10
"""Stretches of the joint fit, at most; between two of them the weights are interpolated. Chosen by us."""


@dataclass(frozen=True, eq=False)
class Merged:
    """A network between two.

    Args:
        state: parameters and buffers, a plain checkpoint.
        states: every step by name, in order: "A", "B", "plain" (the point between A and B as they are), "aligned"
            (with B's units in A's order) and "repaired"; a step that was not taken is not there.
        permutations: group -> for every unit of A the unit of B that goes there.
        notes: what was done, and what a user should know.
    """

    state: State
    states: Mapping[str, State]
    permutations: Mapping[str, IntArray]
    notes: tuple[str, ...]

    def scores(self, objective: Objective) -> dict[str, EnsembleScore]:
        """Measure every step.

        Args:
            objective: loss and data, of the same network.

        Returns:
            One score for each of `states`.
        """
        return {name: evaluate(single(objective, state, name), objective) for name, state in self.states.items()}


def merge(
    pair: Pair,
    *,
    match: Match = "weights",
    at: float = 0.5,
    repair: bool = True,
    method: Means = "midpoint",
    rebasin_steps: int = 200,
    seed: int = 0,
) -> Merged:
    """Merge two networks into one of the same architecture.

    B's units are brought into A's order, the weights are averaged, and what averaging does to the statistics of the
    features is repaired: with normalisation layers that keep statistics these are taken anew from the data; without
    any, each channel of every linear map but the last is rescaled and shifted (REPAIR), folded into the weights.

    Args:
        pair: the networks, on training data.
        match: by what units are recognised; "none" takes B as it is.
        at: t of (1-t)·A + t·B, between 0 and 1.
        repair: repair the statistics.
        method: "midpoint" averages weights; "joint" fits each layer but the first, by centred ridge, to
            pre-activations between those of both networks; then no channel needs rescaling.
        rebasin_steps: steps of the "straight through" alignment.
        seed: of what is drawn.

    Returns:
        The merged network and the steps to it.

    Raises:
        ConfigError: `at` is not within (0, 1), or no such match or method.
        StructureError: units are to be matched, but the network has no interchangeable ones.

    **Source:** Ainsworth et al. 2022 (arXiv 2209.04836); REPAIR, Jordan et al. 2022 (arXiv 2211.08403); the joint fit
    is ours.

    Example:
        >>> from torch import nn
        >>> from thalweg.paths.pair import Pair
        >>> x, y = torch.randn(64, 3), torch.randint(2, (64,))
        >>> nets = [nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)]
        >>> pair = Pair.of(Objective(nets[0], nn.CrossEntropyLoss(), (x, y)), *nets)
        >>> list(merge(pair).states)
        ['A', 'B', 'plain', 'aligned', 'repaired']
    """
    if not 0 < at < 1:
        raise ConfigError(f"Expected a point between 0 and 1. Got {at}. 0 is A, 1 is B, 0.5 lies halfway.")
    if method not in ("midpoint", "joint"):
        raise ConfigError(f"Expected method 'midpoint' or 'joint'. Got {method!r}. Choose one of them.")
    permutations = _matched(pair, match, rebasin_steps, seed)
    target: State = permute(pair.view, pair.b, permutations) if permutations else pair.b
    states: dict[str, State] = {"A": pair.a, "B": pair.b, "plain": _between(pair.a, pair.b, at)}
    merged: State = _between(pair.a, target, at)
    notes = list[str]()
    if method == "joint":
        merged, notes = _jointly(pair, target, at)
    if permutations or method == "joint":
        states["aligned"] = merged
    if repair:
        found, told = _with_statistics(pair, merged, target, at, is_fitted=method == "joint")
        notes += told
        if found is not merged:
            states["repaired"] = merged = found
    return Merged(merged, states, permutations, tuple(notes))


def require_units(pair: Pair) -> None:
    """See that a network has units that can be matched.

    Raises:
        StructureError: it has none.
    """
    if not pair.view.groups:
        frozen = ", ".join(pair.view.frozen_by) or "none"
        raise StructureError(
            f"Expected a network with interchangeable units. Got none (operations without a rule: {frozen}). "
            "Merge without matching: match 'none'."
        )


def _matched(pair: Pair, match: Match, steps: int, seed: int) -> dict[str, IntArray]:
    if match == "none":
        return {}
    if match not in ("weights", "activations", "straight through"):
        raise ConfigError(f"Expected weights, activations, straight through or none. Got {match!r}. Choose one.")
    require_units(pair)
    generator = torch.Generator().manual_seed(seed)
    if match == "activations":
        found = align(pair.view, pair.a, pair.b, by="activations", module=pair.objective.module, inputs=pair.inputs)
        return dict(found.permutations)
    found = align(pair.view, pair.a, pair.b, by="weights", generator=generator)
    if match == "straight through":
        options = {"steps": steps, "learning_rate": _RATE, "batch_size": _BATCH, "generator": generator}
        found = straight_through(pair.objective, pair.view, pair.a, pair.b, start=found, **options).alignment  # type: ignore[arg-type]
    return dict(found.permutations)


def _between(a: State, b: State, at: float) -> dict[str, Tensor]:
    return {n: torch.lerp(t, b[n], at) if t.is_floating_point() else t for n, t in a.items()}


def _jointly(pair: Pair, target: State, at: float) -> tuple[dict[str, Tensor], list[str]]:
    adjuster = Adjuster(pair, ridge=RIDGE)
    share = Fraction(at).limit_denominator(_MOST_KNOTS)
    knots = share.denominator if abs(float(share) - at) < 1e-9 else _MOST_KNOTS
    legs, _ = joint(pair, target, adjuster=adjuster, knots=knots)
    fits = [fit for fit in adjuster.fits if fit.is_scarce]
    notes = [f"every layer but the first fitted, ridge {RIDGE:g}"]
    if fits:
        worst = min(fits, key=lambda fit: fit.samples / fit.features)
        notes.append(
            f"at worst {worst.samples:,} samples for {worst.features:,} features: fewer than two for each; more hold "
            "the fit"
        )
    return {**_between(pair.a, target, at), **legs[0].parameters(at)}, notes


def _with_statistics(
    pair: Pair, merged: State, target: State, at: float, *, is_fitted: bool
) -> tuple[State, list[str]]:
    layers = layers_with_statistics(pair.objective.module)
    if layers:
        total = pair.objective.num_samples()
        count = (
            f"{total:,}" if total is not None and total <= STATISTICS_SAMPLES else f"at least {STATISTICS_SAMPLES:,}"
        )
        words = f"statistics of {len(layers)} normalisation layers re-estimated on {count} samples"
        return re_estimated(pair.objective, merged), [words]
    if is_fitted:
        return merged, ["no layer keeps statistics, and fitted layers need no rescaling: nothing repaired"]
    module = pair.objective.module
    few = tree_map_only(Tensor, lambda t: t[:STATISTICS_SAMPLES] if t.ndim else t, pair.inputs)
    found = repaired(module, pair.execution, merged, (pair.a, target), at, few)
    notes = [f"channels of {len(found.corrected)} linear maps rescaled and shifted"]
    if found.unshifted:
        notes.append(f"without a bias, rescaled only: {', '.join(found.unshifted)}")
    if found.left:
        notes.append(f"run more than once or with a bias that is no parameter, left alone: {', '.join(found.left)}")
    return found.state, notes
