"""Scores: what an ensemble reaches on data, and what it costs in parameters and multiply-adds."""

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.ensembles.ensemble import Ensemble
from thalweg.kernels import plain_kernels
from thalweg.objective import Objective
from thalweg.probes.accuracy import Classes
from thalweg.structure.sites import SiteCall, run_with


@dataclass(frozen=True)
class EnsembleScore:
    """What an ensemble reaches, and at what cost.

    Args:
        loss: R on all data.
        accuracy: fraction of the labels that are predicted; None where targets are no classes.
        parameters: numbers to keep, those of the backbone once.
        multiply_adds: of linear layers and convolutions, for one sample, the backbone's once. Products inside
            attention, norms and activations are not counted.
    """

    loss: float
    accuracy: float | None
    parameters: int
    multiply_adds: int


def evaluate(ensemble: Ensemble, objective: Objective) -> EnsembleScore:
    """Measure an ensemble on data.

    Args:
        ensemble: the networks and how they are averaged.
        objective: loss and data; its own module counts only for its architecture. Networks run in eval mode.

    Returns:
        Loss, accuracy and cost.

    Raises:
        DataError: no target counts in the loss.
        ShapeError: the loss is not a scalar.
    """
    return _scores(ensemble, objective, first=len(ensemble.members))[-1]


def growth(ensemble: Ensemble, objective: Objective) -> tuple[EnsembleScore, ...]:
    """Measure the ensembles of the first 1, 2, … members, in one pass over the data.

    Args:
        ensemble: the networks and how they are averaged.
        objective: loss and data.

    Returns:
        One score for each number of members; the last is that of `evaluate`.

    Raises:
        DataError: no target counts in the loss.
        ShapeError: the loss is not a scalar.
    """
    return _scores(ensemble, objective, first=1)


def _scores(ensemble: Ensemble, objective: Objective, first: int) -> tuple[EnsembleScore, ...]:
    counts = range(first, len(ensemble.members) + 1)
    losses, right = [0.0] * len(counts), [0] * len(counts)
    weights, targeted, classes = 0.0, 0, None
    with torch.no_grad(), plain_kernels():
        for weight, (inputs, targets) in objective.weighted_batches():
            total: Tensor | None = None
            for number, outputs in enumerate(ensemble.member_outputs(inputs), 1):
                total = ensemble.added(total, outputs)
                if number not in counts:
                    continue
                mean = ensemble.averaged(total, number)
                classes = classes or Classes.of(objective.loss, mean, targets)
                losses[number - first] += weight * float(objective.reduced(mean, targets))
                right[number - first] += int(classes.correct(mean, targets))
            weights += weight
            targeted += classes.count(targets) if classes else 0
    unit = 1.0 if objective.reduction == "sum" else weights
    costs = [(num_parameters(ensemble, count), multiply_adds(ensemble, count)) for count in counts]
    return tuple(
        EnsembleScore(loss / unit, hits / targeted if targeted else None, *cost)
        for loss, hits, cost in zip(losses, right, costs, strict=True)
    )


def num_parameters(ensemble: Ensemble, members: int | None = None) -> int:
    """Count the parameters of an ensemble, those of the backbone once, a tied one once.

    Args:
        ensemble: the networks.
        members: how many of them, from the first. Default: all.

    Returns:
        The number.
    """
    count = len(ensemble.members) if members is None else members
    sizes = {name: p.numel() for name, p in ensemble.module.named_parameters()}
    return sum(size * (1 if name in ensemble.shared else count) for name, size in sizes.items())


def multiply_adds(ensemble: Ensemble, members: int | None = None) -> int:
    """Count the multiplications of linear layers and convolutions for one sample, the backbone's once.

    Args:
        ensemble: the networks.
        members: how many of them, from the first. Default: all.

    Returns:
        The number.
    """
    count = len(ensemble.members) if members is None else members
    total, is_behind = 0, ensemble.first_own is None

    def handler(call: SiteCall) -> Tensor:
        nonlocal total, is_behind
        is_behind = is_behind or call.site.weight == ensemble.first_own
        result = call.apply(call.weight, call.bias)
        total += result.numel() * call.weight[0].numel() * (count if is_behind else 1)
        return result

    outputs = run_with(ensemble.module, ensemble.members[0], ensemble.example, handler)
    return total // max(len(outputs), 1)
