"""curve_training: an epoch of a Garipov curve, against an epoch of plain SGD on the same network.

The network is 784-2000-10 in float32, batches of 128. Both sides draw their mini-batches from `shuffled_batches`;
plain training is `torch.optim.SGD` with momentum and weight decay on the module itself, the curve is `train_curve`.
Rounds alternate; the numbers are medians of CPU time, on one thread.

Run: `python benchmarks/curve_training.py [--samples 19200] [--rounds 5]`.

Measured on a busy 2-core AMD EPYC (hence CPU time), torch 2.13.0+cpu, Python 3.11.7; CPU-seconds an epoch of 19,200
samples, medians of 3 rounds (in an earlier run of 2 rounds 0.96, 1.02 and 0.93):

    plain SGD       4.17
    polygon of 3    4.45   1.07 x plain
    polygon of 5    4.63   1.11 x plain
    Bezier curve    4.52   1.08 x plain

Verdict: an epoch of a curve costs up to a tenth more than one of plain training. Setting
up a curve and keeping the best bends are a few passes over the weights an epoch: they show in epochs of 50 steps.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from thalweg.objective import Objective
from thalweg.paths.curves import CurveKind, train_curve
from thalweg.training import shuffled_batches


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Linear(784, 2000), nn.ReLU(), nn.Linear(2000, 10))


def plain(objective: Objective) -> float:
    module = network(0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    begun = time.process_time()
    for inputs, targets in shuffled_batches(objective, 128, generator):
        optimizer.zero_grad()
        objective.reduced(module(inputs), targets).backward()
        optimizer.step()
    return time.process_time() - begun


def curve(objective: Objective, kind: CurveKind, bends: int) -> float:
    a, b = (objective.theta(network(seed)) for seed in (0, 1))
    generator = torch.Generator().manual_seed(0)
    begun = time.process_time()
    train_curve(objective, a, b, kind=kind, bends=bends, epochs=1, generator=generator)
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=19200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(options.samples, 784, generator=generator)
    targets = torch.randint(10, (options.samples,), generator=generator)
    objective = Objective(network(0), nn.CrossEntropyLoss(), (inputs, targets))
    kinds: dict[str, tuple[CurveKind, int]] = {
        "polygon of 3": ("polygon", 3),
        "polygon of 5": ("polygon", 5),
        "Bezier curve": ("bezier", 3),
    }
    rounds: dict[str, list[float]] = {"plain SGD": [], **{name: [] for name in kinds}}
    for _ in range(options.rounds):
        rounds["plain SGD"].append(plain(objective))
        for name, (kind, bends) in kinds.items():
            rounds[name].append(curve(objective, kind, bends))
    base = statistics.median(rounds["plain SGD"])
    for name, seconds in rounds.items():
        median = statistics.median(seconds)
        print(f"{name:14} {median:6.3f} s an epoch of {options.samples}   {median / base:.3f} x plain")


if __name__ == "__main__":
    main()
