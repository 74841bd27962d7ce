"""Top Hessian eigenvalue of a trained network to 1e-3: thalweg against the tools people use.

What: λ1 of the cross-entropy of (mlp) 784-256-256-10 ReLU, 269,322 parameters, 5,000 samples: scikit-learn's digits
upsampled to 28×28 plus noise of 0.15, after 150 steps of Adam; (conv) three 64-channel convolutions, ReLU, two
max-pools, a global average and a linear layer, 76,298 parameters, 500 samples of 3×32×32 with class structure, after
23 steps of Adam. Every tool starts from the same float32 network and tensors and is asked for 1e-3; what it sets up
counts. "in batches" is a list of 10×500 (mlp) or 5×100 (conv) samples, else all are one batch. Methods alternate
within each round, with another seed and another first method in each; medians (minima) of seconds; "× grad": in
units of one gradient on one batch, measured in the same rounds; error: the largest over the rounds against float64,
"MISSES" above 1e-3. Products are passes over the full data. Reference: ARPACK on a plain float64 double-backward
product, and thalweg's own pairs to 1e-7, which must agree to 1e-6. Peak memory: growth of the maximum resident size,
one fresh process per method. "power, re-implemented" is the METHOD of hessian-eigenthings up to 2021, which no
registry has: power iteration on recomputed products, uniform(0, 1) start, no momentum, stops at a relative change of
1e-3. loss-landscape-3d returns two directions and no values: the quotient of its first is taken after the clock.

Run: `python benchmarks/eigenvalues.py [--rounds 3] [--threads 2] [--problems mlp conv] [--only WORD ...]`. Rows of
tools that are not installed are skipped (pyhessian, hessian-eigenthings, curvlinops-for-pytorch, asdfghjkl,
landscaper, loss-landscape-3d; `pip install --no-deps` where one asks for torchvision).

Measured on 2 cores of an AMD EPYC, 2 threads, torch 2.13.0+cpu, Python 3.11.7. mlp: 5 rounds, load average 1 to 2.4;
median (minimum). conv: one round, `--own-reference --no-memory`, three rows. One gradient 0.115 s and 1.28 s; one
product recomputed 2.36 and (in batches) 1.83 gradients, on thalweg's tapes 1.28 and 0.86.

    mlp                                          seconds (min)   × grad  products    error  MiB
    thalweg                                      0.752 (0.561)      6.5       3.1  -2.7e-4  131
    pyhessian                                    1.060 (0.964)      9.2       6.0  -9.2e-4  137
    landscaper, try_cache                        1.097 (0.909)      9.6       6.0  -9.2e-4  131
    power, re-implemented                        1.681 (1.499)     14.6       7.0  -3.9e-4  158
    asdfghjkl, power                             1.765 (1.265)     15.4       6.0  -2.8e-4  160
    hessian-eigenthings, Lanczos, 10 steps       2.455 (2.347)     21.4      10.0  +1.5e-6  158
    hessian-eigenthings, power                   2.708 (2.030)     23.6       9.0  -2.7e-6  163
    curvlinops + eigsh, ncv=6                    2.748 (2.673)     23.9       7.0  -2.3e-6  261
    hessian-eigenthings, Lanczos, 20 steps       4.828 (4.697)     42.0      20.0  +1.9e-6  178
    curvlinops + eigsh, defaults                 9.550 (9.048)     83.1      21.0  -1.8e-6  289
    loss-landscape-3d                            0.511 (0.476)      4.4       2.0  -5.3e-1   96  MISSES, no word
    hessian-eigenthings, k=1, defaults           0.528 (0.522)      4.6       2.0  -5.3e-1  133  MISSES, says so
    conv
    thalweg                                      6.09               4.8       3.4  -2.3e-4
    power, re-implemented, in batches           15.87              12.4       7.0  -3.2e-4
    pyhessian, in batches                       21.10              16.5       9.0  -1.2e-3       MISSES

Verdict: mlp: 1.4 times (minima: 1.7) faster than the fastest tool within 1e-3, 6.4 times than hessian-eigenthings
asked for accuracy, 12.7 times than curvlinops' defaults; twice the fastest tool was aimed at and is missed. conv: 2.6
times faster than the fastest within 1e-3, where three times was aimed at.
"""

import argparse
import functools
import importlib
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from curvature_problems import (
    PROBLEMS,
    Batches,
    Counted,
    Problem,
    environment,
    growth_mib,
    installed,
    load,
    paths,
    peak_memory,
    reference,
    timed,
    units,
)
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from thalweg.probes import eigenpairs

TOLERANCE = 1e-3


@dataclass
class Answer:
    """What a tool returned: a value, or a direction without one; products where they could be counted."""

    value: float | Tensor
    products: float
    said: str = ""


def ours(problem: Problem, seed: int) -> Answer:
    found = eigenpairs(objective := problem.objective(), objective.theta(), seed=seed)
    value, error = float(found.values[0]), float(found.errors[0])
    bound = float(found.residuals[0]) / value
    said = f"rel. bound {bound:.1e}, estimate {error / value:.1e}, {found.work.gradients:.1f} gradients"
    return Answer(value, found.work.products, said if found.converged[0] else "NOT CONVERGED, " + said)


def power(problem: Problem, seed: int, *, in_batches: bool) -> Answer:
    """Run the method of hessian-eigenthings (2021), re-implemented: see the head of this file."""
    batches = problem.batches if in_batches else problem.whole
    vector, before = problem.start(seed, 0.0), 0.0
    vector /= vector.norm()
    for step in range(1, 101):  # noqa: B007 - the number of products
        image = problem.product(vector, batches)
        value = float(vector @ image)
        if before and abs(value - before) < TOLERANCE * abs(value):
            break
        vector, before = image / image.norm(), value
    return Answer(value, step)


def pyhessian(problem: Problem, seed: int, *, in_batches: bool) -> Answer:
    source = importlib.import_module("pyhessian.hessian")
    if in_batches:
        solver = source.hessian(problem.net, problem.loss, dataloader=problem.batches, cuda=False)
        count = solver.dataloader_hv_product = Counted(solver.dataloader_hv_product)
        return Answer(solver.eigenvalues(tol=TOLERANCE)[0][0], count.calls)
    with mock.patch.object(source, "hessian_vector_product", Counted(source.hessian_vector_product)) as count:
        solver = source.hessian(problem.net, problem.loss, data=problem.whole[0], cuda=False)
        return Answer(solver.eigenvalues(tol=TOLERANCE)[0][0], count.calls)


def landscaper(problem: Problem, seed: int, *, in_batches: bool, cache: bool) -> Answer:
    from landscaper.hessian import PyHessian

    batches = problem.batches if in_batches else problem.whole
    solver = PyHessian(problem.net, problem.loss, batches, "cpu", try_cache=cache)
    solver.hv_product = Counted(solver.hv_product)
    return Answer(solver.eigenvalues(tol=TOLERANCE)[0][0], solver.hv_product.calls)


def eigenthings_operator(problem: Problem, batches: Batches) -> Any:
    import hessian_eigenthings as het

    return het.HessianOperator(problem.net, batches, het.supervised_loss(problem.loss))


def eigenthings(problem: Problem, seed: int, *, steps: int | None, in_batches: bool = False) -> Answer:
    from hessian_eigenthings import lanczos

    operator = eigenthings_operator(problem, problem.batches if in_batches else problem.whole)
    options = {} if steps is None else {"max_iter": steps, "tol": TOLERANCE, "which": "LA"}
    found = lanczos(operator, k=1, seed=seed, **options)
    bound = float(found.residuals[0] / found.eigenvalues[0])
    said = f"residual {bound:.1e}, converged={bool(found.converged[0])}"
    return Answer(float(found.eigenvalues[0]), found.iterations, said)


def eigenthings_power(problem: Problem, seed: int) -> Answer:
    from hessian_eigenthings import power_iteration_one

    operator = eigenthings_operator(problem, problem.whole)
    value, _, residual, products, converged = power_iteration_one(operator, tol=TOLERANCE, seed=seed)
    return Answer(value, products, f"residual {residual / value:.1e}, converged={converged}")


def curvlinops_operator(problem: Problem, *, in_batches: bool = False, check: bool = False) -> Any:
    from curvlinops import HessianLinearOperator

    batches = problem.batches if in_batches else problem.whole
    return HessianLinearOperator(problem.net, problem.loss, problem.params, batches, check_deterministic=check)


def curvlinops(problem: Problem, seed: int, *, check: bool, ncv: int | None, in_batches: bool = False) -> Answer:
    operator = curvlinops_operator(problem, in_batches=in_batches, check=check).to_scipy()
    multiply = Counted(operator.matvec)
    counting = LinearOperator(operator.shape, matvec=multiply, dtype=operator.dtype)
    start = problem.start(seed, -1.0).double().numpy()  # ARPACK's own start, from our seed
    values = eigsh(counting, k=1, which="LA", tol=TOLERANCE, ncv=ncv, v0=start, return_eigenvectors=False)
    return Answer(float(values[0]), multiply.calls, "and 2 products of its check" if check else "")


def asdl_solver(problem: Problem) -> Any:
    from asdl.hessian import HessianConfig, HessianMaker

    solver = HessianMaker(problem.net, HessianConfig())
    solver.setup_loss_call(problem.loss, solver.setup_model_call(problem.net, problem.inputs), problem.targets)
    solver.forward_and_backward = Counted(solver.forward_and_backward)
    return solver


def asdl(problem: Problem, seed: int) -> Answer:
    solver = asdl_solver(problem)
    return Answer(solver.hessian_eig(tol=TOLERANCE)[0][0], solver.forward_and_backward.calls)


def loss_landscape_3d(problem: Problem, seed: int) -> Answer:
    source = importlib.import_module("loss_landscape_3d.directions")
    with mock.patch.object(source, "compute_hvp", Counted(source.compute_hvp)) as count:
        first = source.generate_hessian_directions(problem.net, problem.whole, problem.loss, tol=TOLERANCE)[0]
    return Answer(torch.cat([part.reshape(-1) for part in first.values()]), count.calls, "no value; two directions")


OURS, METHOD = "thalweg", "power, re-implemented"
ACCURATE, DEFAULTS = "hessian-eigenthings, Lanczos, 20 steps", "curvlinops + eigsh, defaults"
# Row -> package that it needs, and how it is called.
METHODS: dict[str, tuple[str, Callable[[Problem, int], Answer]]] = {
    OURS: ("thalweg", ours),
    METHOD: ("torch", functools.partial(power, in_batches=False)),
    METHOD + ", in batches": ("torch", functools.partial(power, in_batches=True)),
    "pyhessian": ("pyhessian", functools.partial(pyhessian, in_batches=False)),
    "pyhessian, in batches": ("pyhessian", functools.partial(pyhessian, in_batches=True)),
    "landscaper, try_cache": ("landscaper", functools.partial(landscaper, in_batches=False, cache=True)),
    "landscaper, in batches": ("landscaper", functools.partial(landscaper, in_batches=True, cache=False)),
    "asdfghjkl, power": ("asdl", asdl),
    "loss-landscape-3d": ("loss_landscape_3d", loss_landscape_3d),
    "hessian-eigenthings, Lanczos, k=1, defaults": (
        "hessian_eigenthings",
        functools.partial(eigenthings, steps=None),
    ),
    "hessian-eigenthings, Lanczos, 10 steps": ("hessian_eigenthings", functools.partial(eigenthings, steps=10)),
    "hessian-eigenthings, 10 steps, in batches": (
        "hessian_eigenthings",
        functools.partial(eigenthings, steps=10, in_batches=True),
    ),
    ACCURATE: ("hessian_eigenthings", functools.partial(eigenthings, steps=20)),
    "hessian-eigenthings, power": ("hessian_eigenthings", eigenthings_power),
    "curvlinops + eigsh, ncv=6": ("curvlinops", functools.partial(curvlinops, check=False, ncv=6)),
    "curvlinops + eigsh, ncv=6, in batches": (
        "curvlinops",
        functools.partial(curvlinops, check=False, ncv=6, in_batches=True),
    ),
    DEFAULTS: ("curvlinops", functools.partial(curvlinops, check=True, ncv=None)),
}


@dataclass
class Row:
    """What was measured of one method, round by round."""

    name: str
    mib: float
    seconds: list[float]
    errors: list[float]
    answer: Answer | None = None
    failure: str = ""

    @property
    def median(self) -> float:
        """Middle of the seconds."""
        return statistics.median(self.seconds)

    @property
    def error(self) -> float:
        """The largest of all rounds, with its sign."""
        return max(self.errors, key=abs)

    @property
    def is_within(self) -> bool:
        """No round was off by more than the tolerance."""
        return abs(self.error) <= TOLERANCE

    def line(self, gradient: float) -> str:
        """Describe the row in the table."""
        if self.answer is None or not self.seconds:
            return f"{self.name:44} fails: {self.failure}"
        said = "; ".join(s for s in ("" if self.is_within else "MISSES", self.answer.said) if s)
        return (
            f"{self.name:44}{self.median:9.3f} ({min(self.seconds):.3f}){self.median / gradient:9.1f}"
            f"{self.answer.products:10.1f}{self.error:+11.1e}{self.mib:8.0f}  {said}"
        )


def measure(problem: Problem, row: Row, truth: float, seed: int) -> None:
    try:
        elapsed, row.answer = timed(problem, lambda: METHODS[row.name][1](problem, seed), seed)
    except Exception as error:  # a tool may fail in any way: its row says so
        row.failure = f"{type(error).__name__}: {error}"[:120]
        return
    value = row.answer.value
    if isinstance(value, Tensor):
        direction = value / value.norm()
        value = float(direction @ problem.product(direction, problem.whole))
    row.seconds.append(elapsed)
    row.errors.append(value / truth - 1)


def compare(name: str, path: str, memories: dict[str, float], rounds: int, *, is_own: bool) -> None:
    values = reference(load(name, path, torch.float64), is_own=is_own)
    problem = load(name, path)
    rows = [Row(method, mib, [], []) for method, mib in memories.items()]
    clocks: dict[str, list[float]] = {}
    for seed in range(rounds):
        for unit, seconds in units(problem).items():
            clocks.setdefault(unit, []).append(seconds)
        first = seed % len(rows)
        for row in rows[first:] + rows[:first]:
            measure(problem, row, values[0], seed)
    with torch.no_grad():
        loss = float(problem.loss(problem.net(problem.inputs), problem.targets))
    print(f"{name}: {sum(problem.sizes):,} parameters, {len(problem.targets):,} samples, loss {loss:.3g}, float32")
    gradient = statistics.median(next(iter(clocks.values())))
    for unit, times in clocks.items():
        middle = statistics.median(times)
        print(f"  {unit:40}{middle:9.4f} s ({min(times):.4f}){middle / gradient:8.2f} gradients")
    print(f"{'method':44}{'seconds (min)':>17}{'× grad':>9}{'products':>10}{'error':>11}{'MiB':>8}")
    for row in sorted(rows, key=lambda row: row.median if row.seconds else float("inf")):
        print(row.line(gradient), flush=True)
    ratios([row for row in rows if row.seconds])


def ratios(rows: list[Row]) -> None:
    """Print what the issue asks for: another tool's seconds over ours."""
    found = {row.name: row for row in rows}
    mine = found.pop(OURS, None)
    if mine is None:
        return
    within = [row for row in found.values() if row.is_within]
    groups = {
        "fastest peer within 1e-3": within,
        "fastest released tool within 1e-3": [row for row in within if not row.name.startswith(METHOD)],
        "fastest of all, whatever it returns": list(found.values()),
        "curvlinops, defaults": [row for row in found.values() if row.name == DEFAULTS],
        "hessian-eigenthings, accurate": [row for row in found.values() if row.name == ACCURATE],
    }
    for label, group in groups.items():
        if group:
            best = min(group, key=lambda row: row.median)
            least = min(best.seconds) / min(mine.seconds)
            print(f"  {label} / thalweg = {best.median / mine.median:.2f} (minima: {least:.2f})  [{best.name}]")
    if not mine.is_within:
        raise SystemExit(f"Expected an error of at most {TOLERANCE}. Got {mine.error:.1e} from thalweg.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--only", nargs="+", default=[""], help="words; rows with one of them, and thalweg's")
    parser.add_argument("--own-reference", action="store_true", help="no ARPACK in float64, which takes minutes")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        name, path, method = options.memory_of
        package, action = METHODS[method]
        print(growth_mib(load(name, path), package, lambda problem: action(problem, 0)))
        return
    packages = {package for package, _ in METHODS.values()}
    names = [n for n in METHODS if n == OURS or any(word in n for word in options.only)]
    names = installed({name: METHODS[name][0] for name in names})
    print(environment(packages, options.threads), f"{options.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        saved = paths(options.problems, folder)
        flags = ("--threads", str(options.threads))
        memories: dict[str, dict[str, float]] = {problem: {} for problem in saved}
        for problem, path in saved.items():
            for method in names:
                arguments = (*flags, "--memory-of", problem, path, method)
                known = float("nan") if options.no_memory else peak_memory(__file__, *arguments)
                memories[problem][method] = known
        for problem, path in saved.items():
            print()
            compare(problem, path, memories[problem], options.rounds, is_own=options.own_reference)


if __name__ == "__main__":
    main()
