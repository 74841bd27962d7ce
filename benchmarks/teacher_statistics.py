"""Statistics of the large teacher (50-75-100-125) and its student (×10): ρ, and β* with H*, float32, one thread.

What: CPU seconds, alternated within each round; medians; the first round warms up.

- ρ of all layers on 192 samples, and on 1,024: `correlations`;
- by pairs: the usual way on 192 samples, written anew: the correlation matrix, then for each teacher node a list of
  a dict for each student, sorted;
- β*, D* on 192 samples: `modulation`;
- by samples: the usual way on the same, written anew: the identity pushed back through gates and weights with a row
  for the biases, as tensors with one matrix for each sample, β* too (in the student and the teacher).

Peak memory: the largest resident size of a process that does one of them, less that of one which only builds.

Run: `python benchmarks/teacher_statistics.py [--rounds 3]`; it needs 2 GB of memory.

Measured on a CPU (AVX2, 2 cores, load average 0.4), torch 2.13.0, Python 3.11.7, one thread; n = 3 rounds, medians
with least and most, CPU seconds:

    rho 192       0.034   (0.031 to 0.036)
    rho 1024      0.151   (0.144 to 0.172)
    by pairs      1.315   (1.116 to 1.345)
    beta          2.542   (2.536 to 2.559)
    by samples    3.881   (3.776 to 4.190)

By pairs takes 38 times ours on the same 192 samples, and 8.7 times ours on 1,024. The authors' own times, recorded on
such a machine at another time, are 1.76 s (51 and 11.6 times ours) and 32.7 s (12.9 times ours). By samples takes 1.5
times ours only: it is a better way than the authors' own. Peak memory is 0.15 GB above the process that only builds,
by samples 0.44 GB (the authors' recorded 3.2 GB in all).

On a server (16 cores, AVX-512) 0.016, 0.068, 0.734, 1.017 and 1.303 s.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from thalweg.nets import relu_mlp, teacher_init_, widened
from thalweg.teacher_student import chain, correlations, modulation

RECORDED = {"by pairs": 1.76, "by samples": 32.7}  # CPU seconds of the authors' own code on one thread, facts.md §4


def prepared() -> tuple[nn.Module, nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        teacher = teacher_init_(relu_mlp((50, 75, 100, 125)), torch.Generator().manual_seed(0))
        student = widened(teacher)
    return teacher, student, 10 * torch.randn(1024, 20, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_pairs(teacher: nn.Module, student: nn.Module, x: Tensor) -> list[Tensor]:
    found = []
    for f, f_star in zip(chain(student).trace(x).activations, chain(teacher).trace(x).activations, strict=True):
        a, b = f - f.mean(0), f_star - f_star.mean(0)
        rho = (a / (a.norm(dim=0) + 1e-10)).T @ (b / (b.norm(dim=0) + 1e-10))
        listed = []
        for node in range(rho.shape[1]):
            rows = [{"student": i, "rho": value.item()} for i, value in enumerate(rho[:, node])]
            listed.append(sorted(rows, key=lambda row: -row["rho"]))
        found.append(rho)
    return found


def factor_tensors(net: nn.Module, x: Tensor) -> list[Tensor]:
    """[A, b] of each layer, a matrix for each sample, from the input."""
    read = chain(net)
    trace = read.trace(x)
    weight = torch.cat([read.head.weight, read.head.bias.unsqueeze(1)], 1)
    back = torch.eye(len(weight)).expand(len(x), -1, -1) @ weight
    found = [back]
    for layer, gate in zip(reversed(read.layers[1:]), reversed(trace.gates[1:]), strict=True):
        whole = torch.cat([layer.linear.weight, layer.linear.bias.unsqueeze(1)], 1)
        last = torch.zeros_like(whole[:1])
        last[0, -1] = 1.0
        gates = torch.cat([gate.float(), torch.ones(len(x), 1)], 1)
        back = (back * gates.unsqueeze(1)) @ torch.cat([whole, last])
        found.append(back)
    return found[::-1]


@torch.no_grad()
def by_samples(teacher: nn.Module, student: nn.Module, x: Tensor) -> list[Tensor]:
    found = []
    for star, own in zip(factor_tensors(teacher, x), factor_tensors(student, x), strict=True):
        found.append(torch.bmm(own.transpose(1, 2), star).mean(0)[:-1, :-1])
    return found


def require_equal(teacher: nn.Module, student: nn.Module, x: Tensor) -> None:
    rho = zip(correlations(teacher, student, x), by_pairs(teacher, student, x), strict=True)
    gap = max(float((ours - usual).abs().max()) for ours, usual in rho)
    stars = zip(modulation(teacher, student, x), by_samples(teacher, student, x), strict=True)
    share = max(float((ours.beta_star - usual).abs().max() / usual.abs().max()) for ours, usual in stars)
    print(f"largest difference: rho {gap:.1e}, beta* {share:.1e} of its largest entry")
    if gap > 1e-4 or share > 1e-4:
        raise SystemExit("Expected the same statistics from both. Got others.")


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    made = action()
    elapsed = time.process_time() - start
    del made
    return elapsed


def peak(kind: str) -> int:
    command = [sys.executable, __file__, "--peak", kind]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", choices=("nothing", "beta", "by samples"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    teacher, student, x = prepared()
    few = x[:192]
    actions: dict[str, Callable[[], object]] = {
        "rho 192": lambda: correlations(teacher, student, few),
        "rho 1024": lambda: correlations(teacher, student, x),
        "by pairs": lambda: by_pairs(teacher, student, few),
        "beta": lambda: modulation(teacher, student, few),
        "by samples": lambda: by_samples(teacher, student, few),
    }
    if given.peak is not None:
        if given.peak != "nothing":
            actions[given.peak]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"load average at the start: {os.getloadavg()[0]:.1f}")
    # Before anything large is made here: on Linux a child starts with its parent's largest size.
    base = peak("nothing")
    for kind in ("beta", "by samples"):
        print(f"{kind:>12} peak memory {(peak(kind) - base) * 1024 / 1e9:.2f} GB above {base * 1024 / 1e9:.2f} GB")
    require_equal(teacher, student, few)
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(given.rounds + 1):
        for name, action in actions.items():
            times[name].append(seconds(action))
    found = {name: statistics.median(row[1:]) for name, row in times.items()}
    for name, value in found.items():
        print(f"{name:>12} {value:8.3f} CPU s   (least {min(times[name][1:]):.3f}, most {max(times[name][1:]):.3f})")
    for ours, usual in (("rho 192", "by pairs"), ("rho 1024", "by pairs"), ("beta", "by samples")):
        print(f"{usual} takes {found[usual] / found[ours]:.1f} times {ours}; ", end="")
        print(f"the authors' recorded {RECORDED[usual]} s are {RECORDED[usual] / found[ours]:.1f} times it")


if __name__ == "__main__":
    main()
