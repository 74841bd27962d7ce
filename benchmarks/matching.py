"""matching: the assignment of units, against the authors' call of POT.

Two sets of rows as hard as butterflies of trained networks: rows of low rank and unequal lengths, and a permuted copy
of these with so much noise that the best partner is often not the nearest row. Both solvers get the same float64
rows: `assign` (one matrix product, scipy's shortest augmenting paths), and `ot.dist` + `ot.emd` as the
authors call it (costs divided by their maximum, iterations as POT has them by default and without end).

Run: `python benchmarks/matching.py [--rounds 3] [--large] [--large-pot]`.

Measured on a busy 2-core machine (AMD EPYC, one thread, 3 rounds, least CPU-seconds counted; 1 round of the large
one), torch 2.13.0+cpu, POT 0.9.7.post1:

    units   features   assign       ot.dist + ot.emd, default   endless     cost
    2,000   795        0.47 CPU-s   1.29 CPU-s                  1.04 CPU-s  the same to 9 digits
    6,144   3,083      13.1 CPU-s   not run                     not run

Verdict: at 2,000 units 2.2 times faster than POT without end, and optimal: POT's default of 100,000 iterations is
enough here. Taking the least cost of each column off before the search is what pays: without, scipy takes 1.8 CPU-s
for the search alone, with it 0.05; on two 784-1000-10 nets trained on 5,000 digits 0.44 and 0.14. The paper's code
solves the problem anew at every t; here it is solved once.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import ot
import torch
from torch import Tensor

from thalweg.matching import assign

SIZES = {"small": (2_000, 795), "large": (6_144, 3_083)}
NOISE = 0.14
"""Noise over the spread of the rows, for each root of a feature: scipy on the bare costs then takes at 2,000 units
what it was seen to take on butterflies of two trained 784-2000-10 nets, 2 to 3 s."""


def problem(units: int, features: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rank = features // 8  # units of a trained layer lie near few directions, and differ in size
    basis = torch.randn(rank, features, generator=generator, dtype=torch.float64)
    ours = torch.randn(units, rank, generator=generator, dtype=torch.float64) @ basis / rank**0.5
    ours *= torch.rand(units, 1, generator=generator, dtype=torch.float64) + 0.5
    order = torch.randperm(units, generator=generator)
    return ours, ours[order] + NOISE * features**0.5 * torch.randn(
        units, features, generator=generator, dtype=torch.float64
    )


def by_assign(ours: Tensor, theirs: Tensor) -> float:
    return assign(ours, theirs).cost


def by_pot(ours: Tensor, theirs: Tensor, pivots: int) -> float:
    cost = ot.dist(ours.numpy(), theirs.numpy())
    masses = np.full(len(cost), 1 / len(cost))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = ot.emd(masses, masses, cost / cost.max(), numItermax=pivots)
    order = plan.argmax(axis=1)
    if len(set(order)) < len(order):
        print("  (the plan is no permutation)")
    return float((plan * cost).sum() * len(cost))


def timed(call: Callable[[], float], rounds: int) -> tuple[float, float, float]:
    walls, cpus, cost = [], [], 0.0
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        cost = call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus), cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="also 6,144 units of 3,083 features")
    parser.add_argument("--large-pot", action="store_true", help="and POT on these, which is slow")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, (units, features) in SIZES.items():
        if name == "large" and not (options.large or options.large_pot):
            continue
        ours, theirs = problem(units, features)
        print(f"{units:,} units x {features:,} features")
        calls: dict[str, Callable[[], float]] = {"assign": partial(by_assign, ours, theirs)}
        if name == "small" or options.large_pot:
            calls["ot.dist + ot.emd, default"] = partial(by_pot, ours, theirs, 100_000)
            calls["ot.dist + ot.emd, endless"] = partial(by_pot, ours, theirs, 100_000_000)
        for label, call in calls.items():
            wall, cpu, cost = timed(call, options.rounds if name == "small" else 1)
            print(f"  {label:26}  {wall:7.2f} s  {cpu:7.2f} CPU-s  cost {cost:.9g}", flush=True)


if __name__ == "__main__":
    main()
