"""population: gradient steps of 200 trials at once, against one at a time, and against the speed of tanh itself.

The problem is that of figure 4: two-layer tanh nets of widths 1, 2, 3 on 50 points, float64, full-batch gradient
descent. A step is one step of all 200 trials. All sides are timed in turn in one run on one thread; `limit` is what
the compiled tanh alone would allow, its throughput measured in the same run. Serial PyTorch is `torch.optim.SGD` on
one trial, extrapolated to 200.

Run: `python benchmarks/population.py [--rounds 5]`.

Measured on an idle machine, 5 rounds, one thread of a 2-core AMD EPYC (AVX2), torch 2.13.0+cpu, numba 0.68.1, Python
3.11.7; steps per CPU-second:

    width   compiled   func   serial   limit    of the limit   x serial
    1       11,252     159    6.6      25,167   45 %           1,715
    2       6,699      148    6.8      11,471   58 %           982
    3       4,232      129    6.9      6,660    64 %           616

Verdict: `thalweg run embedding_principle/figure_4 paper`, 600 trials x 300,000 steps with polish, catalogue and
report, takes 1 min 29 s of wall time on both cores there, imports included; serial PyTorch would take 37 CPU-hours.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from thalweg.compiled.functions import TANH, activate
from thalweg.data import three_tanh
from thalweg.nets import two_layer
from thalweg.objective import Objective
from thalweg.training import train_population

TRIALS, POINTS = 200, 50


def tanh_rate() -> float:
    """Values of tanh a second, by the compiled loop on a row that fits the first cache."""
    z = np.linspace(-3, 3, 1600)
    h, d = np.empty_like(z), np.empty_like(z)
    activate(TANH, z, h, d, len(z))
    begun = time.process_time()
    for _ in range(5000):
        activate(TANH, z, h, d, len(z))
    return 5000 * len(z) / (time.process_time() - begun)


def population(width: int, engine: str, steps: int) -> Callable[[], float]:
    data = three_tanh(POINTS)
    objective = Objective(two_layer(width).double(), nn.MSELoss(), (data.inputs, data.targets))
    generator = torch.Generator().manual_seed(0)
    starts = width**-1.5 * torch.randn(TRIALS, objective.num_params, generator=generator, dtype=torch.float64)

    def measure() -> float:
        begun = time.process_time()
        train_population(
            objective, starts, learning_rate=0.002, steps=steps, record=[steps], engine=engine, workers=1
        )
        return steps / (time.process_time() - begun)

    return measure


def serial(width: int, steps: int) -> Callable[[], float]:
    data = three_tanh(POINTS)

    def measure() -> float:
        net = two_layer(width).double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.002)
        begun = time.process_time()
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(data.inputs), data.targets)
            loss.backward()
            optimizer.step()
        return steps / (time.process_time() - begun) / TRIALS

    return measure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for width in (1, 2, 3):
        sides = {
            "compiled": population(width, "compiled", 4000),
            "func": population(width, "func", 60),
            "serial": serial(width, 300),
        }
        for measure in sides.values():
            measure()  # compiles, fills caches
        found: dict[str, list[float]] = {name: [] for name in (*sides, "limit")}
        for _ in range(rounds):
            found["limit"].append(tanh_rate() / (TRIALS * POINTS * width))
            for name, measure in sides.items():
                found[name].append(measure())
        middle = {name: statistics.median(values) for name, values in found.items()}
        line = ", ".join(f"{name} {value:,.1f}" for name, value in middle.items())
        share, gain = middle["compiled"] / middle["limit"], middle["compiled"] / middle["serial"]
        print(f"width {width}, steps per CPU-second: {line}; {share:.0%} of the limit, {gain:,.0f} x serial")


if __name__ == "__main__":
    main()
