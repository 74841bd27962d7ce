"""Nodes that are kept of students, networks of these, and paired differences with their intervals."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from thalweg.lab.tables import Table
from thalweg.recipes.luck_matters.falling import FallPreset, Pairs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from thalweg.lab.figures import Figure
    from thalweg.teacher_student import Fall

LEVEL = 0.95  # of the intervals, the usual one
# Distances from a pair's seed to those of the samples that nodes are chosen on, and of the stream of new samples.
_CHOOSE, _STREAM = 600, 700


def lucky(rho: "Tensor", copies: int) -> list[int]:
    """Give every teacher node so many students of its own, so that the sum of all correlations is largest.

    Args:
        rho: correlations, (students, teachers).
        copies: students for each teacher node.

    Returns:
        Numbers of the students, in their order; each once.
    """
    from scipy.optimize import linear_sum_assignment

    students, _ = linear_sum_assignment(-rho.repeat(1, copies).cpu().numpy())
    return sorted(students.tolist())


def top(scores: "Tensor", count: int) -> list[int]:
    """Give the numbers of the nodes that score highest, in their order; of equal ones the first."""
    order: list[int] = scores.argsort(descending=True, stable=True)[:count].tolist()
    return sorted(order)


def others(taken: Sequence[int], width: int, generator: "torch.Generator") -> list[int]:
    """Draw as many of the other nodes of a layer, in their order."""
    import torch

    free = sorted(set(range(width)) - set(taken))
    drawn = torch.randperm(len(free), generator=generator)[: len(taken)].tolist()
    return sorted(free[k] for k in drawn)


def weight_norm(student: "nn.Module", place: int) -> "Tensor":
    """Compute ‖w_j‖, bias included, of each node j of a hidden layer."""
    from thalweg.teacher_student import chain

    linear = chain(student).layers[place].linear
    squares = linear.weight.detach().double().flatten(1).square().sum(1)
    return (squares if linear.bias is None else squares + linear.bias.detach().double().square()).sqrt()


def part_of(student: "nn.Module", kept: Sequence[Sequence[int]]) -> "nn.Module":
    """Build the network of some of a student's nodes, from their numbers in each hidden layer."""
    import torch

    from thalweg.teacher_student import subnetwork

    return subnetwork(student, [torch.tensor(nodes) for nodes in kept])


def trained(student: "nn.Module", fall: "Fall") -> "nn.Module":
    """Copy a student, with the weights that its training ended at."""
    import copy

    own = copy.deepcopy(student)
    fall.write(own)
    return own.eval()


def chooser(preset: FallPreset, base: Pairs, k: int) -> "Tensor":
    """Draw the samples on which the nodes to keep are chosen."""
    import torch

    from thalweg.data import gaussian

    generator = torch.Generator().manual_seed(base.seeds[k] + _CHOOSE)
    x = base.evaluations[k]
    return gaussian(len(x), preset.num_inputs, generator, std=preset.std, dtype=torch.float32).to(x.device)


def again(preset: FallPreset, base: Pairs, places: Sequence[int], students: "Sequence[nn.Module]") -> Pairs:
    """Pair networks with the teachers they are to learn from: on a stream that no student has seen.

    Args:
        preset: of the run.
        base: all pairs.
        places: for each network, the number of its pair; those of one pair see the same samples.
        students: the networks.
    """
    from thalweg.data import GaussianStream

    streams = [
        GaussianStream(
            preset.num_inputs, std=preset.std, seed=base.seeds[k] + _STREAM, device=base.evaluations[k].device
        )
        for k in places
    ]
    return Pairs(
        tuple(base.seeds[k] for k in places),
        [base.teachers[k] for k in places],
        students,
        streams,
        [base.evaluations[k] for k in places],
    )


def interval(values: Sequence[float]) -> dict[str, float] | None:
    """Give mean and confidence interval of differences, by Student's t; None of fewer than two."""
    from math import sqrt
    from statistics import mean, stdev

    from scipy.stats import t

    if len(values) < 2:
        return None
    middle, count = mean(values), len(values)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * stdev(values) / sqrt(count)
    return {"mean": middle, "low": middle - half, "high": middle + half, "pairs": count}


def spread(rows: Table, keys: Sequence[str], column: str) -> Table:
    """Average a column over the rows that agree in some others, with the interval of the mean: `low` and `high`."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(float(row[column]))
    out: Table = []
    for values, numbers in found.items():
        of_mean = interval(numbers) or {"mean": numbers[0], "low": numbers[0], "high": numbers[0], "pairs": 1}
        out.append(dict(zip(keys, values, strict=True)) | of_mean)
    return out


def raised(rows: Table) -> Table:
    """Turn means and intervals of log10 into the numbers that they stand for."""
    return [row | {name: 10.0 ** row[name] for name in ("mean", "low", "high")} for row in rows]


def difference_figure(rows: Table, names: Iterable[str], **texts: str) -> "Figure":
    """Draw differences: each pair's, their mean and its interval, on a line for each name.

    Args:
        rows: one for each pair, with the columns `name` and `difference`.
        names: in the order from the top.
        texts: id, title, caption and x_title of the figure.
    """
    from thalweg.lab.figures import ranking

    dots: Table = []
    for name in names:
        own = [float(row["difference"]) for row in rows if row["name"] == name]
        found = interval(own)
        dots += [{"name": name, "value": value, "what": "each seed"} for value in own]
        if found is not None:
            dots.append({"name": name, "value": found["mean"], "what": "mean"})
            ends = [{"name": name, "value": found[end], "what": "95 % interval"} for end in ("low", "high")]
            dots += ends
    return ranking(dots, series="what", references=[{"label": "no difference", "value": 0.0}], **texts)  # type: ignore[arg-type]
