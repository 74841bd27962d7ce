"""Spectral density of a trained network by stochastic Lanczos quadrature: thalweg against the tools people use.

What: 10 probes × 50 steps, 500 products with the Hessian of the cross-entropy of a 784-256-256-10 ReLU network
(269,322 parameters, 5,000 samples: problem "mlp" of `eigenvalues.py`), float32, all data in one batch, from the same
network and tensors. Methods alternate within each round, with another seed and another first method in each; medians
(minima) of seconds. "× floor": in units of the arithmetic floor, products × one replay of a kept graph on the same
batch, measured in the same rounds. Errors of the outermost Ritz values are relative to λmax and λmin in float64
(ARPACK on plain double-backward products); those of the trace to the exact trace, beside its own standard error over
the probes, both relative to the exact one. For piecewise linear networks the diagonals of the Hessian and of the
Gauss-Newton matrix are the same, which gives the trace in closed form. Peak memory: growth of the maximum resident
size with at most 2 probes, one fresh process per method. curvlinops' row is its Lanczos alone (`fast_lanczos`, no
reorthogonalisation); its own density call runs `eigsh` for the bounds first. A row that raises says so.

Run: `python benchmarks/density.py [--rounds 1] [--threads 2] [--probes 10] [--steps 50] [--only WORD ...]`. Short:
`--probes 2 --rounds 3`. Rows of tools that are not installed are skipped, see `eigenvalues.py`.

Measured on 2 cores of an AMD EPYC, 2 threads, torch 2.13.0+cpu, Python 3.11.7, one round of `--probes 2 --steps 50
--no-smallest --no-memory`, load average 1.3: a fifth of the published size, in seconds; one replay 0.1345 s.

    thalweg                  13.41 (1.00 × floor)  λmax +1.1e-6  trace -8.2% (s.e. 10.8%)
    landscaper, try_cache    14.56 (1.08 × floor)  λmax -3.2e-6  trace -8.2% (10.9%)
    hessian-eigenthings      21.04 (1.56 × floor)  λmax -1.9e-8  trace -38.6% (19.6%)
    pyhessian 0.1            RuntimeError (calls a function that torch has removed)

Verdict: on the arithmetic floor; 1.09 times faster than the best tool (aim 1.15) and 1.57 times than
hessian-eigenthings (aim 1.7), in one round.
"""

import argparse
import importlib
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from curvature_problems import (
    Problem,
    arpack,
    environment,
    growth_mib,
    installed,
    load,
    paths,
    peak_memory,
    timed,
)
from eigenvalues import asdl_solver, curvlinops_operator, eigenthings_operator
from torch import Tensor, nn

from thalweg.probes import HessianOperator, spectral_density

OURS = "thalweg"
# Relative error of the largest Ritz value above which ours is wrong, if it took at least so many steps.
TOLERANCE, ENOUGH_STEPS = 1e-3, 20


@dataclass(frozen=True)
class Task:
    """A problem, and how much is asked for."""

    problem: Problem
    probes: int
    steps: int
    seed: int = 0


@dataclass(frozen=True)
class Quadrature:
    """Nodes and weights, each of shape (probes, steps)."""

    nodes: Tensor
    weights: Tensor


Method = Callable[[Task], Quadrature]


def ours(task: Task) -> Quadrature:
    objective = task.problem.objective()
    curvature = HessianOperator(objective, objective.theta())
    found = spectral_density(curvature, num_probes=task.probes, num_steps=task.steps, seed=task.seed)
    return Quadrature(found.nodes, found.weights)


def pyhessian(task: Task) -> Quadrature:
    """Try two steps first: version 0.1 raises at the end of its first probe under torch 2."""
    source = importlib.import_module("pyhessian.hessian")
    solver = source.hessian(task.problem.net, task.problem.loss, data=task.problem.whole[0], cuda=False)
    solver.density(iter=2, n_v=1)
    nodes, weights = solver.density(iter=task.steps, n_v=task.probes)
    return Quadrature(torch.tensor(nodes), torch.tensor(weights))


def landscaper(task: Task, *, cache: bool) -> Quadrature:
    """Its nodes are complex and its weights a matrix, of which the first row is meant."""
    from landscaper.hessian import PyHessian

    solver = PyHessian(task.problem.net, task.problem.loss, task.problem.whole, "cpu", try_cache=cache)
    nodes, weights = solver.density(iter=task.steps, n_v=task.probes)
    rows = [torch.tensor(probe[0]) for probe in weights]
    return Quadrature(torch.tensor(nodes).real, torch.stack(rows).real)


def eigenthings(task: Task) -> Quadrature:
    from hessian_eigenthings import spectral_density as density

    operator = eigenthings_operator(task.problem, task.problem.whole)
    found = density(operator, num_runs=task.probes, lanczos_steps=task.steps, seed=task.seed)
    return Quadrature(found.raw_eigenvalues, found.raw_weights)


def asdl(task: Task) -> Quadrature:
    from asdl.mvp import stochastic_lanczos_quadrature

    def product(vector: object) -> object:
        solver.forward_and_backward(hvp=True, vec=vector)
        return getattr(task.problem.net, solver.config.hvp_attr)

    solver = asdl_solver(task.problem)
    nodes, weights = stochastic_lanczos_quadrature(product, task.problem.net, n_v=task.probes, num_iter=task.steps)
    return Quadrature(torch.tensor(nodes), torch.tensor(weights))


def curvlinops(task: Task) -> Quadrature:
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    operator = curvlinops_operator(task.problem)
    runs = [fast_lanczos(operator, task.steps) for _ in range(task.probes)]
    return Quadrature(torch.stack([nodes for nodes, _ in runs]), torch.stack([v[0] ** 2 for _, v in runs]))


# Row -> package that it needs, and how it is called.
METHODS: dict[str, tuple[str, Method]] = {
    OURS: ("thalweg", ours),
    "pyhessian": ("pyhessian", pyhessian),
    "landscaper, try_cache": ("landscaper", lambda task: landscaper(task, cache=True)),
    "landscaper, default": ("landscaper", lambda task: landscaper(task, cache=False)),
    "hessian-eigenthings": ("hessian_eigenthings", eigenthings),
    "asdfghjkl": ("asdl", asdl),
    "curvlinops, fast_lanczos": ("curvlinops", curvlinops),
}


@dataclass(frozen=True)
class Truth:
    """In float64."""

    largest: float
    smallest: float
    trace: float


def exact_trace(problem: Problem) -> float:
    """Tr of the Gauss-Newton matrix of a ReLU network under a cross-entropy: the trace of its Hessian, too.

    For each sample Σ over layers of Tr(S B Bᵀ)·(|a|² + 1), with S = diag(p) - p pᵀ the curvature of the loss, B the
    derivative of the outputs with respect to what a layer gives, and a what it takes.
    """
    layers = [layer for layer in problem.net if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        taken, given = [problem.inputs], []
        for layer in layers:
            given.append(layer(taken[-1]))
            taken.append(given[-1].relu())
        chances = given[-1].softmax(1)
        curvature = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]
        slope = torch.eye(chances.shape[1]).to(chances).expand(len(chances), -1, -1)
        total = torch.zeros(len(chances)).to(chances)
        for place in reversed(range(len(layers))):
            inner = torch.einsum("nij,nik,njk->n", curvature, slope, slope)
            total += inner * (taken[place].square().sum(1) + 1)
            if place:
                slope = (slope @ layers[place].weight) * (given[place - 1] > 0)[:, None, :]
    return float(total.mean())


def truth(problem: Problem, *, with_smallest: bool) -> Truth:
    largest = arpack(problem, "LA", 1)[0]
    # Hundreds of products; the error is of the order of the square of the tolerance.
    smallest = arpack(problem, "SA", 1, tol=1e-4, ncv=64)[0] if with_smallest else math.nan
    found = Truth(largest, smallest, exact_trace(problem))
    print(f"float64: λmax {found.largest:.7g}, λmin {found.smallest:.7g}, trace {found.trace:.7g}", flush=True)
    return found


@dataclass
class Row:
    """What was measured of one method, round by round."""

    name: str
    mib: float
    seconds: list[float] = field(default_factory=list)
    errors: list[tuple[float, float, float, float]] = field(default_factory=list)
    failure: str = ""

    def add(self, found: Quadrature, exact: Truth, size: int) -> None:
        """Compare with the truth: outermost nodes, trace, standard error of the trace."""
        nodes, weights = found.nodes.double(), found.weights.double()
        traces = size * (nodes * weights).sum(1)
        spread = float(traces.std()) / math.sqrt(len(traces)) if len(traces) > 1 else math.nan
        ends = float(nodes.max()) / exact.largest - 1, float(nodes.min()) / exact.smallest - 1
        self.errors.append((*ends, float(traces.mean()) / exact.trace - 1, spread / exact.trace))

    def line(self, floor: float) -> str:
        """Describe the row in the table."""
        if not self.seconds:
            return f"{self.name:28} raises {self.failure}"
        largest, smallest, trace, spread = (max(column, key=abs) for column in zip(*self.errors, strict=True))
        middle = statistics.median(self.seconds)
        return (
            f"{self.name:28}{middle:9.2f} ({min(self.seconds):.2f}){middle / floor:9.2f}{largest:+11.1e}"
            f"{smallest:+11.1e}{trace:+10.1%} ({spread:.1%}){self.mib:8.0f}"
        )


def measure(task: Task, row: Row, exact: Truth) -> None:
    try:
        elapsed, found = timed(task.problem, lambda: METHODS[row.name][1](task), task.seed)
    except Exception as error:  # a tool may fail in any way: its row says so
        row.failure = f"{type(error).__name__}: {error}".split(". ")[0]
        return
    row.seconds.append(elapsed)
    row.add(found, exact, sum(task.problem.sizes))


def replays(problem: Problem, count: int = 5) -> list[float]:
    """Time single products from a graph that is kept: nothing that is exact in this precision takes less."""
    vector = problem.start(0, -1.0)
    slopes = problem.slopes(problem.whole[0], graph=True)
    return [timed(problem, lambda: problem.replay(slopes, vector, keep=True))[0] for _ in range(count)]


def compare(path: str, memories: dict[str, float], options: argparse.Namespace) -> None:
    exact = truth(load("mlp", path, torch.float64), with_smallest=not options.no_smallest)
    problem = load("mlp", path)
    rows = [Row(name, mib) for name, mib in memories.items()]
    clocks = replays(problem)
    for seed in range(options.rounds):
        first = seed % len(rows)
        for row in rows[first:] + rows[:first]:
            measure(Task(problem, options.probes, options.steps, seed), row, exact)
        clocks += replays(problem)
    replay = statistics.median(clocks)
    products = options.probes * options.steps
    print(f"{options.probes} probes × {options.steps} steps: {products} products, one replay {replay:.4f} s")
    print(f"arithmetic floor {products * replay:.2f} s (at the fastest replay {products * min(clocks):.2f} s)")
    print(f"{'method':28}{'seconds (min)':>16}{'× floor':>9}{'λmax':>11}{'λmin':>11}{'trace (s.e.)':>18}{'MiB':>8}")
    for row in sorted(rows, key=lambda row: min(row.seconds, default=math.inf)):
        print(row.line(products * replay), flush=True)
    ratios([row for row in rows if row.seconds], is_judged=options.steps >= ENOUGH_STEPS)


def ratios(rows: list[Row], *, is_judged: bool) -> None:
    mine = next((row for row in rows if row.name == OURS), None)
    if mine is None:
        raise SystemExit("Expected thalweg's density. Got none.")
    for row in rows:
        if row is not mine:
            ratio = statistics.median(row.seconds) / statistics.median(mine.seconds)
            print(f"  {row.name} / thalweg = {ratio:.2f} (minima: {min(row.seconds) / min(mine.seconds):.2f})")
    wrong = max(abs(errors[0]) for errors in mine.errors)
    if is_judged and wrong > TOLERANCE:
        raise SystemExit(f"Expected λmax to {TOLERANCE}. Got a relative error of {wrong:.1e} from thalweg.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--rounds", 1), ("--threads", 2), ("--probes", 10), ("--steps", 50)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--only", nargs="+", default=[""], help="words; rows with one of them, and thalweg's")
    parser.add_argument("--no-smallest", action="store_true", help="no error of λmin, whose reference takes minutes")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        path, name = options.memory_of
        package, action = METHODS[name]
        probes = min(2, options.probes)
        print(growth_mib(load("mlp", path), package, lambda problem: action(Task(problem, probes, options.steps))))
        return
    packages = {package for package, _ in METHODS.values()}
    names = [n for n in METHODS if n == OURS or any(word in n for word in options.only)]
    names = installed({name: METHODS[name][0] for name in names})
    print(environment(packages, options.threads), f"{options.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        path = paths(["mlp"], folder)["mlp"]
        asked = ("--threads", str(options.threads), "--probes", str(options.probes), "--steps", str(options.steps))
        memories = {
            name: math.nan if options.no_memory else peak_memory(__file__, *asked, "--memory-of", path, name)
            for name in names
        }
        compare(path, memories, options)


if __name__ == "__main__":
    main()
