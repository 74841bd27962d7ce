"""Stages: which parameters move together when a network is led into another one layer at a time."""

from dataclasses import dataclass

from thalweg.paths.pair import Pair
from thalweg.structure.tree import groups_of


@dataclass(frozen=True)
class Stage:
    """A layer: the parameters that move in one stage, and the linear maps that read the units they make.

    Args:
        label: the layer, by its weight.
        weight: the weight of its linear map; None if it has none.
        names: parameters that move.
        makes: groups whose units they make.
        readers: weights of the linear maps of later stages that read these units and can be fitted.
        unfitted: parameters of later stages that read these units but are no linear maps that run once.
    """

    label: str
    weight: str | None
    names: tuple[str, ...]
    makes: tuple[str, ...]
    readers: tuple[str, ...]
    unfitted: tuple[str, ...]


def stages(pair: Pair) -> tuple[Stage, ...]:
    """Cut the parameters into stages, in the order of execution: one for every linear map.

    What is used between two linear maps (norms, scales) moves with the one before; what is used before the first
    (embeddings) is a stage of its own if it makes units.

    Args:
        pair: the networks.

    Returns:
        The stages; together they hold every trainable parameter once.
    """
    execution = pair.execution
    trained = set(pair.objective.space.names)
    sites = {site.weight: site for site in execution.sites if site.weight in trained}
    used = [n for n in execution.order if n in trained]
    used += [n for n in pair.objective.space.names if n not in set(used)]
    cuts: list[list[str]] = [[]]
    for name in used:
        if name in sites and cuts[-1]:
            cuts.append([])
        cuts[-1].append(name)
    if len(cuts) > 1 and not any(n in sites or _made(pair, n) for n in cuts[0]):
        cuts[1] = cuts[0] + cuts[1]
        cuts = cuts[1:]
    found = []
    for place, names in enumerate(cuts):
        later = {n for rest in cuts[place + 1 :] for n in rest}
        makes = tuple(dict.fromkeys(g for n in names for g in _made(pair, n)))
        reading = [n for n in used if n in later and set(makes) & set(_read(pair, n))]
        fitted = tuple(n for n in reading if n in sites and sites[n].calls == 1)
        weight = next((n for n in names if n in sites), None)
        label = (weight or names[0]).removesuffix(".weight")
        found.append(Stage(label, weight, tuple(names), makes, fitted, tuple(n for n in reading if n not in fitted)))
    return tuple(found)


def _made(pair: Pair, name: str) -> list[str]:
    return [g for (_, g), role in pair.view.members_of(name).items() if role != "consumer"]


def _read(pair: Pair, name: str) -> list[str]:
    reading = [g for (_, g), role in pair.view.members_of(name).items() if role != "producer"]
    axes = pair.view.axes.get(name, ())
    return [g for g in reading if any(g in groups_of(tree) for tree in axes)]
