"""student_training: an epoch of students on their teacher's outputs, fused against a plain loop.

What: fully connected students, ten times as wide as their teachers, batches of 64, float32, one thread. CPU seconds:

- theirs: the authors' tuned loop, written anew: modules in lists, MSELoss, SGD with zero_grad, a DataLoader without
  workers over a TensorDataset, of which the last, smaller batch is dropped so that both take as many steps;
- ours: `train_students`, fused; and with autograd;
- products alone: forward, backward and update as bare matrix products of contiguous matrices: the floor;
- several students, wall seconds: five by the authors' loop, five in one call one after another, and five in one call
  side by side, as many at a time as the machine has cores.

They alternate within each round; medians; the first round warms up.

Run: `python benchmarks/student_training.py [--rounds 5] [--size small] [--norm after_relu]`.

Measured on an idle x86-64 server (16 cores, AVX-512), torch 2.11.0, Python 3.12.3, one thread, n = 7 rounds, CPU
seconds:

    small   theirs 0.503   ours 0.200   autograd 0.368   products alone 0.146   5 in one call 0.979   5 calls 0.978
    large   theirs 1.793   ours 1.520   autograd 2.019   products alone 1.326

2.52 times for the small one, where the products allow 3.43 at most (the goal of 4 lies below the floor), and 1.18
times for the large one, where they allow 1.35 (the goal was 1.3). Ours takes 1.37 and 1.15 of the floor. Several
students in one call cost what they cost one by one: their products are too large for a common one to gain.

That was before students learned side by side. On a shared machine with 2 cores (AVX2), torch 2.13.0, medians of 5
rounds (3 for the large one), in CPU seconds, and in wall seconds for five students:

    small         theirs 1.190   ours 0.521 (2.28 times)   products alone 0.420 (2.83)
                  five: 7.36     2 at a time 1.97 (3.74)   one by one 2.79 (2.64)
    with BatchNorm        1.477   ours 0.789 (1.87)         products alone 0.437
                  five: 9.33     2 at a time 3.94 (2.37)   one by one 4.36 (2.14)
    large         theirs 6.067   ours 4.341 (1.40)         products alone 4.751 (1.28)

That large products alone take longer than ours, whose rows are padded, says that they are a floor for plain matrices
only, and that the machine is noisy: an earlier run the same day gave 2.41 times for the small one and 1.14 for the
large one, whose products allowed 3.49 and 1.17.
"""

import argparse
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from thalweg.data import FiniteSet
from thalweg.nets import relu_mlp, teacher_init_, widened
from thalweg.teacher_student import train_students

BATCH, RATE, SEEDS = 64, 0.05, 5
SIZES = {"small": ((10, 15, 20, 25), 20_000), "large": ((50, 75, 100, 125), 10_000)}


class Model(nn.Module):
    """The authors' form: linear layers in a list, each followed by a ReLU, and one more at the end."""

    def __init__(self, widths: list[int], *, has_norm: bool = False) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.layers = nn.ModuleList([nn.Linear(old, new) for old, new in pairs])
        self.relus = nn.ModuleList([nn.ReLU() for _ in pairs[1:]])
        norms = [nn.BatchNorm1d(new, affine=False) if has_norm else nn.Identity() for _, new in pairs[:-1]]
        self.norms = nn.ModuleList(norms)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layers."""
        for layer, relu, norm in zip(self.layers, self.relus, self.norms, strict=False):
            x = norm(relu(layer(x)))
        made: torch.Tensor = self.layers[-1](x)
        return made


def theirs(teacher: Model, student: Model, inputs: torch.Tensor) -> None:
    loader = DataLoader(TensorDataset(inputs), batch_size=BATCH, shuffle=True, drop_last=True, num_workers=0)
    optimizer, loss_of = torch.optim.SGD(student.parameters(), lr=RATE), nn.MSELoss()
    student.train()
    for (x,) in loader:
        optimizer.zero_grad()
        with torch.no_grad():
            target = teacher(x)
        loss_of(student(x), target).backward()
        optimizer.step()


def floor(widths: list[int], steps: int) -> None:
    """The products of `steps` steps: forward, backward but to the inputs, and update, with nothing between them."""
    weights = [torch.randn(new, old) * 0.01 for old, new in itertools.pairwise(widths)]
    h = [torch.randn(BATCH, width) for width in widths]
    g = [torch.randn(BATCH, width) for width in widths]
    outs, backs = [torch.empty_like(x) for x in h], [torch.empty_like(x) for x in g]
    for _ in range(steps):
        for k, weight in enumerate(weights):
            torch.mm(h[k], weight.t(), out=outs[k + 1])
        for k in reversed(range(len(weights))):
            if k:
                torch.mm(g[k + 1], weights[k], out=backs[k])
            weights[k].addmm_(g[k + 1].t(), h[k], alpha=-1e-9)


def medians(actions: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Time all of them in each round, after one that warms up; print and give the medians."""
    times: dict[str, list[float]] = {key: [] for key in actions}
    for _ in range(rounds + 1):
        for key, action in actions.items():
            start = clock()
            action()
            times[key].append(clock() - start)
    found = {key: statistics.median(row[1:]) for key, row in times.items()}
    unit = "CPU s" if clock is time.process_time else "wall s"
    first = next(iter(found.values()))
    for key, value in found.items():
        least, most = min(times[key][1:]), max(times[key][1:])
        print(f"{key:>20} {value:8.3f} {unit}   {first / value:5.2f} times   (least {least:.3f}, most {most:.3f})")
    return found


def copied(module: nn.Module, widths: list[int], *, has_norm: bool = False) -> Model:
    """The same weights in the authors' form."""
    made = Model(widths, has_norm=has_norm)
    values = [p.detach() for p in module.parameters()]
    with torch.no_grad():
        for param, value in zip(made.parameters(), values, strict=True):
            param.copy_(value)
    return made


def compare(name: str, rounds: int, norm: Literal["none", "after_relu"]) -> None:
    hidden, samples = SIZES[name]
    steps = samples // BATCH
    teacher = relu_mlp(hidden)
    teacher_init_(teacher, torch.Generator().manual_seed(0))
    students: list[nn.Module] = []
    for seed in range(SEEDS):
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(seed)
            students.append(widened(teacher, norm=norm))
    inputs = 10 * torch.randn(samples, 20, generator=torch.Generator().manual_seed(0))
    narrow, wide = [20, *hidden, 100], [20, *(10 * width for width in hidden), 100]
    slow_teacher, slow = copied(teacher, narrow), copied(students[0], wide, has_norm=norm != "none")

    def ours(count: int, engine: str = "fused", workers: int = 1) -> None:
        sources = [FiniteSet(inputs, seed=k) for k in range(count)]
        found = train_students(
            [teacher] * count, students[:count], sources, steps=steps, engine=engine, workers=workers
        )
        if any(fall.status != "done" for fall in found):
            raise SystemExit("Expected trainings that end finite. Got one that diverged. Its time tells nothing.")

    def theirs_for_each() -> None:
        for _ in range(SEEDS):
            theirs(slow_teacher, slow, inputs)

    print(f"\n{name}: {samples:,} samples, student {'-'.join(map(str, wide))}, BatchNorm: {norm}")
    alone: dict[str, Callable[[], object]] = {
        "theirs": lambda: theirs(slow_teacher, slow, inputs),
        "ours": lambda: ours(1),
        "ours, autograd": lambda: ours(1, "autograd"),
        "products alone": lambda: floor(wide, steps),
    }
    found = medians(alone, rounds, time.process_time)
    flops = 2 * samples * (3 * sum(a * b for a, b in itertools.pairwise(wide)) - wide[0] * wide[1])
    print(
        f"the products run at {flops / found['products alone'] / 1e9:.0f} GFLOP/s; ours takes "
        f"{found['ours'] / found['products alone']:.2f} of them"
    )
    cores = min(os.cpu_count() or 1, SEEDS)
    several: dict[str, Callable[[], object]] = {
        f"theirs, {SEEDS} students": theirs_for_each,
        "ours, one by one": lambda: ours(SEEDS),
        f"ours, {cores} at a time": lambda: ours(SEEDS, workers=cores),
    }
    medians(several, rounds, time.perf_counter)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=[*SIZES, "both"], default="both")
    parser.add_argument("--norm", choices=["none", "after_relu"], default="none", help="the students' BatchNorm")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"load average at the start: {os.getloadavg()[0]:.1f}")
    for name in SIZES if given.size == "both" else [given.size]:
        compare(name, given.rounds, given.norm)


if __name__ == "__main__":
    main()
