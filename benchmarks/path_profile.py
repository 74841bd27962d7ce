"""Profile of a path: thalweg against one net at a time, with a loader and with tensors in memory.

What, in float32, losses and accuracies at every point, equal ones asserted:

- "linear": 61 points of a straight path of 784-2000-10 on 10,000 images (random ones: time does not depend on them);
- "late": 21 points of the leg of 784-1024-512-10 on which only the last two layers move, on 2,000 samples;
- "swaps": a path of legs that swap two of 2,000 units each, 2 points a leg, on 1,000 samples. Not paid for in full by
  the plain ways: some legs are run and the time scaled up.

Ways: *loader* is how the authors do it (a net is built at t, its state loaded, and a `DataLoader` with batches of 128
and no workers is read); *memory* is the same mathematics on tensors in memory, one forward pass of all the data for
each t; *loop* is thalweg's sweep without reuse. CPU s: processor time of the process.

Run: `python benchmarks/path_profile.py [--rounds 1] [--threads 2] [--legs 200] [--only linear]`.

Measured with one thread on a busy machine (load 8), one round, CPU s; the plain ways from 2 or 3
of the points, scaled up ("late" in full: 3.3 to 3.7); to be repeated on a quiet machine, with the loader:

    linear   thalweg  9.8   memory 57.8    5.9 ×
    late     thalweg  0.56  memory  4.4    7.8 ×
    swaps    thalweg 0.034 a point   memory 0.101    3.0 ×
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from thalweg.objective import Objective
from thalweg.paths import LazyLeg, Path, blend_leg, linear, profile
from thalweg.paths.leg import Point
from thalweg.space import Space

State = dict[str, Tensor]
Scores = tuple[Tensor, Tensor]


def net_of(*widths: int) -> nn.Sequential:
    """Make a ReLU net from a fixed seed."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=(2 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1, generator=generator)
    return net


class Problem:
    """A net, data, a path, and the ways to its profile."""

    def __init__(self, net: nn.Module, num_samples: int, path: Callable[[Space, Tensor], Path], points: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.net = net
        self.inputs = torch.rand(num_samples, 784, generator=generator)
        self.targets = torch.randint(0, 10, (num_samples,), generator=generator)
        self.objective = Objective(net, nn.CrossEntropyLoss(), (self.inputs, self.targets))
        theta = self.objective.theta()
        self.path = path(self.objective.space, theta)
        self.points = points
        self.times = self.path.grid(points)

    def thalweg(self, *, reuse: bool = True) -> Scores:
        """Profile it."""
        found = profile(self.path, self.objective, points=self.points, refine=False, reuse=reuse)
        assert found.train_accuracy is not None  # noqa: S101
        return found.train_loss, found.train_accuracy

    def loop(self) -> Scores:
        """Profile it without reuse."""
        return self.thalweg(reuse=False)

    def loader(self, times: tuple[float, ...] | None = None) -> Scores:
        """Load each net and read a loader."""
        data = DataLoader(TensorDataset(self.inputs, self.targets), batch_size=128)
        return self._one_by_one(times, lambda: ((x, y) for x, y in data))

    def memory(self, times: tuple[float, ...] | None = None) -> Scores:
        """Load each net and run it on all the data."""
        return self._one_by_one(times, lambda: iter([(self.inputs, self.targets)]))

    def _one_by_one(self, times: tuple[float, ...] | None, batches: Callable[[], object]) -> Scores:
        losses, accuracies = [], []
        total = nn.CrossEntropyLoss(reduction="sum")
        with torch.no_grad():
            for t in times or self.times:
                self.net.load_state_dict(dict(self.path.parameters(t)))
                loss, right = 0.0, 0
                for inputs, targets in batches():  # type: ignore[attr-defined]
                    outputs = self.net(inputs)
                    loss += float(total(outputs, targets))
                    right += int((outputs.argmax(1) == targets).sum())
                losses.append(loss / len(self.targets))
                accuracies.append(right / len(self.targets))
        return torch.tensor(losses, dtype=torch.float64), torch.tensor(accuracies, dtype=torch.float64)


class Swapped(Point):
    """A net of two layers whose first `count` pairs of hidden units are swapped."""

    def __init__(self, parameters: State, count: int) -> None:
        self._parameters, self._count = parameters, count

    def parameters(self) -> State:
        """Make it."""
        order = torch.arange(len(self._parameters["0.bias"]))
        pairs = torch.arange(2 * self._count).view(-1, 2)
        order[pairs[:, 0]], order[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
        first, bias = self._parameters["0.weight"][order], self._parameters["0.bias"][order]
        second = self._parameters["2.weight"][:, order]
        return {"0.weight": first, "0.bias": bias, "2.weight": second, "2.bias": self._parameters["2.bias"]}


def straight(space: Space, theta: Tensor) -> Path:
    """Go straight to another net."""
    generator = torch.Generator().manual_seed(2)
    return linear(space, theta, theta[torch.randperm(len(theta), generator=generator)])


def late(space: Space, theta: Tensor) -> Path:
    """Move all but the first layer."""
    start, other = space.parameters(theta), space.parameters(theta + 0.02)
    end = {name: start[name] if name.startswith("0.") else other[name] for name in space.names}
    return Path(space, (blend_leg("the last two layers", start, end),))


def swaps(num_legs: int) -> Callable[[Space, Tensor], Path]:
    """Swap two units in each leg."""

    def made(space: Space, theta: Tensor) -> Path:
        start = space.parameters(theta)
        points = [Swapped(start, count) for count in range(num_legs + 1)]
        legs = tuple(LazyLeg("swap", a, b) for a, b in pairwise(points))
        return Path(space, legs)

    return made


def timed(way: Callable[[], Scores]) -> tuple[float, float, Scores]:
    """Give seconds, CPU seconds and the result."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    result = way()
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


def compared(name: str, problem: Problem, rounds: int, every: int = 1) -> None:
    """Run all ways by turns and print their medians."""
    times = problem.times[::every]
    ways: dict[str, Callable[[], Scores]] = {
        "thalweg": problem.thalweg,
        "loop": problem.loop,
        "memory": lambda: problem.memory(times),
        "loader": lambda: problem.loader(times),
    }
    if every > 1:
        del ways["loop"]
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        reference: Scores | None = None
        for way, run in ways.items():
            seconds, cpu, (losses, accuracies) = timed(run)
            scale = len(problem.times) / len(losses)
            taken[way].append((seconds * scale, cpu * scale))
            shown = losses[::every] if len(losses) == len(problem.times) else losses
            right = accuracies[::every] if len(losses) == len(problem.times) else accuracies
            reference = reference or (shown, right)
            torch.testing.assert_close(shown, reference[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(right, reference[1], rtol=0, atol=1e-3)
    print(f"{name}: {len(problem.times)} points, {len(problem.targets)} samples")
    base = statistics.median(cpu for _, cpu in taken["thalweg"])
    for way, found in taken.items():
        wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"    {way:8} {wall:8.2f} s {cpu:8.2f} CPU s   {cpu / base:6.1f} ×")


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--legs", type=int, default=200)
    parser.add_argument("--only", choices=("linear", "late", "swaps"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only in (None, "linear"):
        compared("linear", Problem(net_of(784, 2000, 10), 10_000, straight, 61), options.rounds)
    if options.only in (None, "late"):
        compared("late", Problem(net_of(784, 1024, 512, 10), 2_000, late, 21), options.rounds)
    if options.only in (None, "swaps"):
        path = swaps(min(options.legs, 999))
        compared("swaps", Problem(net_of(784, 2000, 10), 1_000, path, 2 * options.legs), options.rounds, every=40)


if __name__ == "__main__":
    main()
