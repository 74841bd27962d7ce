"""Weight adjustment of one layer: the paper's pseudo-inverse against streamed normal equations.

What: W that minimises ‖W F - T‖ for 10,000 samples of 2,000 ReLU features (random weights on MNIST digits, so that
the Gram matrix is as ill-conditioned as real ones are) and 10 targets that these features fit in part. CPU and wall
seconds of one fit, its relative residual, and the largest weight. `numpy.linalg.pinv` in float32 is what the paper's
code computes at every point of a path, without a bias; thalweg fits one too.

Run: `OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 THALWEG_DATA=... python benchmarks/refit.py [--features 2000]
[--without-pinv]`, or `--memory [--samples 50000]` for 4,096 features drawn chunk by chunk, and the process's largest
resident size.

Measured on a busy 2-core AMD EPYC (load 3: CPU seconds count), one thread, torch 2.13.0+cpu, one run:

    10,000 x 2,000                CPU s     residual   max |W|
    thalweg, double                2.31  1.995706e-01    0.319     11 times faster than pinv
    thalweg, single, ridge 1e-4    1.33  1.995750e-01    0.291     19 times
    thalweg, single, ridge 1e-6    1.26  1.995706e-01    0.319     20 times
    numpy.linalg.pinv, float32    25.37  1.996426e-01    0.323

    50,000 x 4,096, --memory: 46 CPU s of sums, 2.4 to solve, largest resident size 0.82 GiB
"""

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from thalweg.data import mnist
from thalweg.matching import Gram, refit
from thalweg.structure.sites import Site

LIMIT_BYTES = 4 * 2**30


def problem(features: int) -> tuple[Tensor, Tensor]:
    """ReLU features of digits, and targets from other random features of the same digits."""
    images = mnist(num_samples=10_000).inputs.flatten(1)
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(784, width, generator=generator) / 28 for width in (features, 300)]
    last = torch.randn(300, 10, generator=generator) / 17
    return (images @ layers[0]).relu(), (images @ layers[1]).relu() @ last


def report(name: str, fit: Callable[[], tuple[Tensor, Tensor | None]], rows: Tensor, targets: Tensor) -> float:
    cpu, wall = time.process_time(), time.perf_counter()
    weight, bias = fit()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    found = rows.double() @ weight.double().T + (0 if bias is None else bias.double())
    residual = float((found - targets).norm() / targets.double().norm())
    print(f"{name:<28}{cpu:8.2f}{wall:8.2f}{residual:13.6e}{float(weight.abs().max()):10.3g}", flush=True)
    return cpu


def time_fits(features: int, with_pinv: bool) -> None:
    rows, targets = problem(features)
    blank = {"weight": torch.zeros(10, features), "bias": torch.zeros(10)}

    def ours(precision: str, ridge: float) -> Callable[[], tuple[Tensor, Tensor | None]]:
        def fit() -> tuple[Tensor, Tensor | None]:
            found = refit(Site("w", "b", 0), rows, targets, ridge=ridge, precision=precision, **blank)
            print(f"  ({found.status}, rank {found.rank} of {found.features}, residual says {found.residual:.6e})")
            return found.weight, found.bias

        return fit

    print(f"{len(rows):,} x {features:,}{'CPU s':>20}{'wall s':>8}{'residual':>13}{'max |W|':>10}")
    report("warming up", ours("double", 0.0), rows, targets)
    exact = report("thalweg, double", ours("double", 0.0), rows, targets)
    quick = report("thalweg, single, ridge 1e-4", ours("single", 1e-4), rows, targets)
    report("thalweg, single, ridge 1e-6", ours("single", 1e-6), rows, targets)
    if with_pinv:
        wide = rows.numpy().T
        old = report(
            "numpy.linalg.pinv, float32",
            lambda: (torch.from_numpy(targets.numpy().T @ np.linalg.pinv(wide)), None),
            rows,
            targets,
        )
        print(f"double is {old / exact:.0f} times faster than pinv, single {old / quick:.0f} times")


def measure_memory(samples: int, features: int) -> None:
    gram = Gram(features, 10, bias=True)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, features, generator=generator)
    cpu = time.process_time()
    for start in range(0, samples, 4096):
        drawn = torch.randn(min(4096, samples - start), 64, generator=generator)
        rows = (drawn @ mix + torch.randn(len(drawn), features, generator=generator)).relu()
        gram.add(rows, drawn[:, :10])
    summed = time.process_time() - cpu
    fit = gram.solve(1e-4)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{samples:,} x {features:,}: sums {summed:.0f} CPU s, solved in {time.process_time() - cpu - summed:.1f}, "
        f"residual {fit.residual:.3f}, largest resident size {peak / 2**30:.2f} GiB"
    )
    if peak > LIMIT_BYTES:
        raise SystemExit("more than 4 GiB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--features", type=int, default=2000)
    parser.add_argument("--without-pinv", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--samples", type=int, default=50_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory:
        measure_memory(given.samples, 4096)
    else:
        time_fits(given.features, not given.without_pinv)


if __name__ == "__main__":
    main()
