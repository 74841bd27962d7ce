"""Trained networks that benchmarks look at, float64 references of their curvature, clocks and memory.

No benchmark by itself: `eigenvalues.py` and `density.py` import it.
"""

import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import io
import math
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from thalweg.objective import Objective
from thalweg.probes import HessianOperator, eigenpairs

SAME = 1e-6  # two independent references agree to this
Batches = Sequence[tuple[Tensor, Tensor]]


class Problem:
    """One trained network on one data set."""

    def __init__(self, net: nn.Module, inputs: Tensor, targets: Tensor, batch: int) -> None:
        self.net, self.inputs, self.targets = net.eval(), inputs, targets
        self.loss = nn.CrossEntropyLoss()
        self.params = list(net.parameters())
        self.sizes = [p.numel() for p in self.params]
        self.whole = [(inputs, targets)]
        self.batches = list(zip(inputs.split(batch), targets.split(batch), strict=True))

    def objective(self) -> Objective:
        """Give it as thalweg takes it."""
        return Objective(self.net, self.loss, (self.inputs, self.targets))

    def slopes(self, batch: tuple[Tensor, Tensor], *, graph: bool = False) -> tuple[Tensor, ...]:
        """Compute the gradient on one batch."""
        return torch.autograd.grad(self.loss(self.net(batch[0]), batch[1]), self.params, create_graph=graph)

    def replay(self, slopes: Sequence[Tensor], vector: Tensor, *, keep: bool) -> Tensor:
        """Multiply with the derivative of a gradient whose graph is there."""
        parts = [v.view_as(p) for v, p in zip(vector.split(self.sizes), self.params, strict=True)]
        found = torch.autograd.grad(slopes, self.params, parts, retain_graph=keep)
        return torch.cat([f.reshape(-1) for f in found])

    def product(self, vector: Tensor, batches: Batches) -> Tensor:
        """Multiply with the Hessian, plainly: every gradient is recomputed."""
        total = torch.zeros_like(vector)
        for batch in batches:
            slopes = self.slopes(batch, graph=True)
            total += self.replay(slopes, vector, keep=False) * (len(batch[1]) / len(self.targets))
        return total

    def start(self, seed: int, low: float) -> Tensor:
        """Uniform in (low, 1)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(sum(self.sizes), generator=generator).mul_(1 - low).add_(low)

    def clean(self) -> None:
        """Free what a tool left in `.grad`, graphs among it."""
        self.net.zero_grad(set_to_none=True)
        gc.collect()


def initialised(net: nn.Sequential, generator: torch.Generator) -> nn.Sequential:
    """Draw the weights as torch's layers do, from a generator."""
    for layer in net:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            bound = 1 / math.sqrt(layer.weight[0].numel())
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return net


def trained(net: nn.Module, inputs: Tensor, targets: Tensor, plan: tuple[int, int, float]) -> None:
    steps, batch, rate = plan
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(net.parameters(), lr=rate)
    for _ in range(steps):
        chosen = torch.randint(0, len(targets), (batch,), generator=generator)
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(inputs[chosen]), targets[chosen]).backward()
        optimiser.step()


def mlp_net() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def mlp_data(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    chosen = torch.randint(0, len(classes), (5000,), generator=generator)
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)[chosen]
    inputs = nn.functional.interpolate(images, size=28, mode="bilinear").flatten(1)
    return inputs + 0.15 * torch.randn(inputs.shape, generator=generator), torch.tensor(classes)[chosen]


def conv_net() -> nn.Sequential:
    def block(channels: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)

    last = (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(*block(3), *block(64), *last)


def conv_data(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    targets = torch.randint(0, 10, (500,), generator=generator)
    colours = 0.5 * torch.randn(10, 3, 1, 1, generator=generator)
    patterns = nn.functional.interpolate(torch.randn(10, 3, 8, 8, generator=generator), size=32)
    noise = 0.5 * torch.randn(500, 3, 32, 32, generator=generator)
    return noise + colours[targets] + patterns[targets], targets


# Name -> network, data, (steps, batch, rate) of training, samples of one of the batches.
PROBLEMS = {
    "mlp": (mlp_net, mlp_data, (150, 512, 1e-3), 500),
    "conv": (conv_net, conv_data, (23, 100, 1e-3), 100),
}


def prepare(name: str, path: str) -> None:
    """Train and save, so that no process that is measured has trained."""
    build, data, plan, _ = PROBLEMS[name]
    generator = torch.Generator().manual_seed(0)
    inputs, targets = data(generator)
    net = initialised(build(), generator)
    trained(net, inputs, targets, plan)
    torch.save({"net": net.state_dict(), "inputs": inputs, "targets": targets}, path)


def load(name: str, path: str, dtype: torch.dtype = torch.float32) -> Problem:
    build, _, _, batch = PROBLEMS[name]
    saved = torch.load(path, weights_only=True)
    net = build()
    net.load_state_dict(saved["net"])
    return Problem(net.to(dtype), saved["inputs"].to(dtype), saved["targets"], batch)


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call it."""
        self.calls += 1
        return self.function(*args, **options)


@contextlib.contextmanager
def quiet(seed: int) -> Iterator[None]:
    """Seed the global generator, which the tools draw from, and swallow progress bars and warnings."""
    silent = io.StringIO()
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            yield


def timed(problem: Problem, action: Callable[[], Any], seed: int = 0) -> tuple[float, Any]:
    problem.clean()
    with quiet(seed):
        start = time.perf_counter()
        answer = action()
        elapsed = time.perf_counter() - start
    return elapsed, answer


def units(problem: Problem) -> dict[str, float]:
    """Time one gradient and one product of each kind, on all data."""
    vector = problem.start(0, -1.0)
    batch = problem.whole[0]
    slopes = problem.slopes(batch, graph=True)
    objective = problem.objective()
    operator = HessianOperator(objective, objective.theta())
    operator.product(vector)
    actions = {
        "one gradient, one batch": lambda: problem.slopes(batch),
        "one product, recomputed, one batch": lambda: problem.product(vector, problem.whole),
        "one product, recomputed, in batches": lambda: problem.product(vector, problem.batches),
        "one product, graph replayed, one batch": lambda: problem.replay(slopes, vector, keep=True),
        "one product, thalweg's tapes": lambda: operator.product(vector),
    }
    return {name: timed(problem, action)[0] for name, action in actions.items()}


def reference(problem: Problem, *, is_own: bool = False) -> list[float]:
    """λ1 and λ2 in float64, by ARPACK on plain products and by thalweg, which must agree; or λ1 by thalweg alone."""
    if is_own:
        found = eigenpairs(objective := problem.objective(), objective.theta(), tolerance=1e-6)
        value, bound = float(found.values[0]), float(found.residuals[0])
        print(f"reference, float64, thalweg's own: {value:.8g}, certain to ±{bound:.1e}", flush=True)
        return [value]
    values = arpack(problem, "LA", 2)
    found = eigenpairs(objective := problem.objective(), objective.theta(), 2, tolerance=1e-7)
    apart = max(abs(float(a) / b - 1) for a, b in zip(found.values, values, strict=True))
    print(
        f"reference, float64: {values[0]:.8g}, {values[1]:.8g}; ARPACK and thalweg differ by {apart:.1e}", flush=True
    )
    if apart > SAME:
        raise SystemExit(f"Expected two references that agree to {SAME}. Got {found.values} and {values}.")
    return values


def arpack(problem: Problem, which: str, count: int, *, tol: float = 1e-6, ncv: int | None = None) -> list[float]:
    """Extreme eigenvalues by decreasing size, in float64, on plain products; none of thalweg takes part."""
    size = sum(problem.sizes)

    def multiply(vector: np.ndarray) -> np.ndarray:
        return problem.product(torch.from_numpy(vector.reshape(-1).copy()), problem.batches).numpy()

    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    start = problem.start(0, -1.0).double().numpy()
    values = eigsh(operator, k=count, which=which, ncv=ncv, tol=tol, v0=start, return_eigenvectors=False)
    return sorted((float(v) for v in values), key=abs, reverse=True)


def growth_mib(problem: Problem, package: str, action: Callable[[Problem], Any]) -> float:
    """Growth of this process's maximum resident size; the package is imported and torch has run before."""
    with quiet(0):
        importlib.import_module(package)
        problem.slopes((problem.inputs[:4], problem.targets[:4]))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        action(problem)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def peak_memory(script: str, *arguments: str) -> float:
    """Call a script in a process of its own and read the number that it prints last; NaN if it fails."""
    command = [sys.executable, script, *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(answer.stdout.split()[-1]) if answer.returncode == 0 else math.nan


def paths(names: Sequence[str], folder: str) -> dict[str, str]:
    """Train and save each problem in a process of its own: on Linux a child starts with its parent's peak memory."""
    found = {}
    for name in names:
        found[name] = f"{folder}/{name}.pt"
        subprocess.run([sys.executable, __file__, name, found[name]], check=True)
    return found


def installed(packages: dict[str, str]) -> list[str]:
    """Names of the rows whose package is there."""
    missing = sorted({p for p in packages.values() if importlib.util.find_spec(p) is None})
    if missing:
        print(f"not installed, rows skipped: {', '.join(missing)}")
    return [name for name, package in packages.items() if package not in missing]


def environment(packages: set[str], threads: int) -> str:
    """What a record of a run states."""
    owners = importlib.metadata.packages_distributions()
    found = {owners[p][0] for p in {"torch", *packages} if p in owners}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(found, key=str.lower))
    load_average = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return f"{versions}, Python {sys.version.split()[0]}, load average {load_average}, {threads} threads,"


if __name__ == "__main__":
    prepare(sys.argv[1], sys.argv[2])
