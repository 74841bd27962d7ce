"""What `thalweg probe` measures at one point: each part on its own, kept on disk as soon as it is whole."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from thalweg.cli.parts import Parts, Value, digest
from thalweg.errors import ConfigError
from thalweg.lab.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from thalweg.objective import Objective
    from thalweg.probes import Eigenpairs, Examination, GradientNorm, Slice, Work

LARGEST_DENSE = 5000
"""Parameters up to which all eigenvalues are taken. Chosen by us: 200 MB and a minute on two cores in float64."""

NEAR_ZERO = 1e-2
"""Share of the largest |λ| that counts as near zero where not all eigenvalues are taken; chosen by us: two decades
below the sharpest direction, which 50 Lanczos steps resolve in most networks."""

Axes = Literal["1d", "2d"]


@dataclass(frozen=True)
class Wishes:
    """What is to be measured; everything that changes a number.

    Args:
        eigen: number of largest eigenvalues.
        negative: number of smallest eigenvalues.
        tolerance: of each of them.
        density: whether to estimate the spectral density.
        num_probes: of the density.
        num_steps: of the density.
        trace: whether to estimate the trace.
        degeneracy: whether to count negative, zero and positive eigenvalues.
        layers: whether to look at every layer's own block.
        slice: "1d" or "2d", or none.
        directions: "random", "eigen", "through" or "pca".
        span: how far a slice goes to each side, in units of its directions.
        points: of a slice along each axis.
        seed: of everything that is drawn.
    """

    eigen: int
    negative: int
    tolerance: float
    density: bool
    num_probes: int
    num_steps: int
    trace: bool
    degeneracy: bool
    layers: bool
    slice: Axes | None
    directions: str
    span: float
    points: int
    seed: int


@dataclass(frozen=True)
class Point:
    """A point of a landscape, with what tells it from others.

    Args:
        name: of its checkpoint.
        step: of its training, if its name says so.
        objective: the landscape.
        test: on test data, for slices.
        theta: the point.
        examination: loss and accuracy there.
        gradient: norms there.
        gradient_seconds: what one gradient took.
        landscape: what tells its landscape from others: a hash of data, loss, coordinates and buffers.
        test_landscape: the same of the test data; empty without them.
    """

    name: str
    step: int | None
    objective: "Objective"
    test: "Objective | None"
    theta: "Tensor"
    examination: "Examination"
    gradient: "GradientNorm"
    gradient_seconds: float
    landscape: str
    test_landscape: str

    @property
    def fingerprint(self) -> str:
        """Name the point and its landscape: data, weights, loss and gradient, to the last bit."""
        facts = [self.examination.loss, self.gradient.value, self.gradient.l1, self.gradient.l2]
        places = [digest([self.theta]), str(self.objective.dtype), str(self.objective.device)]
        return f"{self.landscape} {[value.hex() for value in facts]} {places}"


@dataclass(frozen=True)
class _Part:
    """One thing to measure: its key in the result, what decides it, its cost in gradients, how to compute it."""

    key: str
    options: Mapping[str, Any]
    cost: float
    compute: Callable[[Progress], Value]


def measure(point: Point, wishes: Wishes, parts: Parts, progress: Progress) -> Value:
    """Measure all that is wished for at one point; what is on disk already is not computed again.

    Args:
        point: where.
        wishes: what.
        parts: where results are kept.
        progress: called as progress(fraction, text).

    Returns:
        Plain values by part.
    """
    todo = _todo(point, wishes, parts.workers)
    total, done = sum(part.cost for part in todo) or 1.0, 0.0
    found: Value = {"name": point.name, "step": point.step, **_facts(point)}
    for part in todo:

        def inner(fraction: float, text: str, part: _Part = part, before: float = done) -> None:
            progress((before + fraction * part.cost) / total, f"{point.name}, {part.key.replace('_', ' ')}: {text}")

        identity = {"point": point.fingerprint, "part": part.key, "options": dict(part.options)}
        found[part.key] = parts.kept(identity, lambda part=part, inner=inner: part.compute(inner))  # type: ignore[misc]
        done += part.cost
        progress(done / total, f"{point.name}, {part.key.replace('_', ' ')} done")
    if "slice" in found:  # names decide nothing, and are not kept
        found["slice"]["markers"] = [{"a": 0.0, "b": 0.0, "name": point.name}]
    return found


def cost_of(point: Point, wishes: Wishes, *, is_last: bool) -> float:
    """Estimate the work at one point, in gradients; at the last, with that of a slice through all of them."""
    return sum(part.cost for part in _todo(point, wishes, 1)) + (slice_cost(wishes) if is_last else 0.0)


def slice_cost(wishes: Wishes) -> float:
    """Estimate the work of a slice, in gradients."""
    axes = {None: 0, "1d": 1, "2d": 2}[wishes.slice]
    return _LOSS * math.prod([wishes.points] * axes)


def _facts(point: Point) -> Value:
    return {
        "parameters": point.objective.num_params,
        "loss": point.examination.loss,
        "accuracy": point.examination.accuracy,
        "samples": point.examination.num_samples,
        "gradient": asdict(point.gradient),
        "gradient_seconds": point.gradient_seconds,
    }


# Rough costs in gradients, for the progress and the estimate: a product with its share of recording, a point of a
# slice, products until an eigenvalue of either end is there, a column of a dense Hessian. Chosen by us after
# trained networks.
_PRODUCT, _LOSS, _LARGEST, _SMALLEST, _COLUMN = 2.0, 0.45, 6.0, 80.0, 0.1


def _todo(point: Point, wishes: Wishes, workers: int) -> list[_Part]:
    found: list[_Part] = []
    options: dict[str, Any]
    search: dict[str, Any] = {"tolerance": wishes.tolerance, "seed": wishes.seed}
    for key, which, count, each in (
        ("largest", "largest", wishes.eigen, _LARGEST),
        ("smallest", "smallest", wishes.negative, _SMALLEST),
    ):
        if count:
            options = {"num_pairs": count, "which": which, **search}
            compute = _partial(_extremes, point, options)
            found.append(_Part(key, options, each * _PRODUCT * (count + 1) / 2, compute))
    walk: dict[str, Any] = {"num_probes": wishes.num_probes, "num_steps": wishes.num_steps, "seed": wishes.seed}
    products = float(wishes.num_probes * wishes.num_steps)
    if wishes.density:
        found.append(_Part("density", walk, products * _PRODUCT, _partial(_density, point, walk)))
    if wishes.trace:
        found.append(
            _Part("trace", {"seed": wishes.seed}, 20 * _PRODUCT, _partial(_trace, point, {"seed": wishes.seed}))
        )
    if wishes.degeneracy:
        options = dict(walk) if point.objective.num_params > LARGEST_DENSE else {}
        cost = products if options else _COLUMN * point.objective.num_params
        found.append(_Part("degeneracy", options, cost * _PRODUCT, _partial(_degeneracy, point, options)))
    if wishes.layers:
        options = {**search, **(walk if wishes.density else {})}
        cost = (products if wishes.density else _LARGEST) * len(_layers(point)) * _PRODUCT
        found.append(_Part("layers", options, cost, _partial(_by_layer, point, options)))
    if wishes.slice and wishes.directions in ("random", "eigen"):
        options = {"axes": wishes.slice, "directions": wishes.directions, "span": wishes.span}
        options |= {"points": wishes.points, "seed": wishes.seed, "test": point.test_landscape}
        compute = _partial(_slice, point, {**options, "workers": workers})
        found.append(_Part("slice", options, slice_cost(wishes), compute))
    return found


def _partial(
    function: Callable[[Point, Mapping[str, Any], Progress], Value], point: Point, options: Mapping[str, Any]
) -> Callable[[Progress], Value]:
    return lambda progress: function(point, options, progress)


def _extremes(point: Point, options: Mapping[str, Any], progress: Progress) -> Value:
    from thalweg.probes import eigenpairs

    return in_plain_values(eigenpairs(point.objective, point.theta, progress=progress, **options))


def in_plain_values(found: "Eigenpairs") -> Value:
    """Give eigenvalues and their certificates without the vectors."""
    return {
        "values": found.values.tolist(),
        "residuals": found.residuals.tolist(),
        "errors": found.errors.tolist(),
        "converged": list(found.converged),
        "tolerance": found.tolerance,
        "method": found.method,
        "seconds": found.seconds,
        **_spent(found.work),
    }


def _spent(work: "Work") -> Value:
    return {"gradients": round(work.gradients, 3), "products": round(work.products, 3)}


def _density(point: Point, options: Mapping[str, Any], progress: Progress) -> Value:
    from thalweg.probes import HessianOperator

    return _density_of(HessianOperator(point.objective, point.theta), options, progress)


def _density_of(curvature: Any, options: Mapping[str, Any], progress: Progress) -> Value:
    from thalweg.probes import spectral_density

    found = spectral_density(curvature, progress=progress, **options)
    curve = found.curve()
    lines = zip(
        *(c.tolist() for c in (curve.eigenvalues, curve.mean, curve.lower, curve.upper)),
        strict=True,
    )
    names = ("eigenvalue", "density", "lower", "upper")
    return {
        "curve": [dict(zip(names, line, strict=True)) for line in lines],
        "kernel_width": curve.kernel_width,
        "confidence": curve.confidence,
        "extremes": list(found.extremes),
        "residuals": list(found.residuals),
        "trace": asdict(found.trace),
        "near_zero": asdict(found.near_zero(NEAR_ZERO * max(map(abs, found.extremes)))),
        "nodes": found.nodes.tolist(),
        "weights": found.weights.tolist(),
        "seconds": found.seconds,
        **_spent(found.work),
    }


def _trace(point: Point, options: Mapping[str, Any], progress: Progress) -> Value:
    from thalweg.probes import HessianOperator, hessian_trace

    found = hessian_trace(HessianOperator(point.objective, point.theta), progress=progress, **options)
    return {
        "value": found.value,
        "standard_error": found.standard_error,
        "seconds": found.seconds,
        **_spent(found.work),
    }


def _degeneracy(point: Point, options: Mapping[str, Any], progress: Progress) -> Value:
    """Count signs in float64 where all eigenvalues can be had, else estimate the share near zero."""
    import torch

    from thalweg.probes import inertia, spectrum

    if options:
        near = _density(point, options, progress)
        return {"near_zero": near["near_zero"], "extremes": near["extremes"], "seconds": near["seconds"]}
    progress(0.0, "all eigenvalues, in float64")
    found = spectrum(point.objective.in_dtype(torch.float64), point.theta.double())
    return {**asdict(inertia(found)), "eigenvalues": found.eigenvalues.tolist(), "seconds": found.seconds}


def _layers(point: Point) -> dict[str, tuple[str, ...]]:
    from thalweg.probes import layers

    return layers(point.objective.space)


def _by_layer(point: Point, options: Mapping[str, Any], progress: Progress) -> Value:
    from thalweg.probes import HessianOperator, eigenpairs_of

    found, blocks = [], _layers(point)
    search = {k: v for k, v in options.items() if k in ("tolerance", "seed")}
    walk = {k: v for k, v in options.items() if k not in ("tolerance",)}
    for place, (name, names) in enumerate(blocks.items()):

        def inner(fraction: float, text: str, place: int = place, name: str = name) -> None:
            progress((place + fraction) / len(blocks), f"{name}, {text}")

        curvature = HessianOperator(point.objective, point.theta, block=names)
        row: Value = {"layer": name, "parameters": curvature.size, "gradient": float(curvature.gradient.norm())}
        row["largest"] = in_plain_values(eigenpairs_of(curvature, progress=inner, **search))
        if "num_probes" in walk:
            row["density"] = _density_of(curvature, walk, inner)
        found.append(row)
    return {"layers": found}


def _slice(point: Point, options: Mapping[str, Any], progress: Progress) -> Value:
    import torch

    from thalweg.probes import eigenpairs, line, orthogonalized, plane, random_direction

    count = int(options["axes"][0])
    if options["directions"] == "eigen":
        pairs = eigenpairs(point.objective, point.theta, count, tolerance=0.01, seed=options["seed"])
        directions = pairs.vectors
        doubt = "" if all(pairs.converged) else ", which did not converge"
        words = f"unit eigenvectors of the largest eigenvalues{doubt}"
    else:
        generator = torch.Generator().manual_seed(options["seed"])
        drawn = [random_direction(point.objective, point.theta, generator=generator) for _ in range(count)]
        directions = torch.stack(drawn)
        if not bool((directions != 0).any(1).all()):
            raise ConfigError(
                f"Expected weights with filters that are not zero, for random directions. Got none at {point.name}. "
                "Take --directions eigen."
            )
        if count == 2 and point.objective.num_params > count:
            directions = orthogonalized(directions)
        words = "random, each filter as long as the network's own (Li et al. 2018); biases and norms stay"
    half = options["points"] // 2
    coordinates = torch.arange(-half, half + 1, dtype=torch.float64) / max(half, 1) * options["span"]
    walk: Any = {"coordinates": coordinates, "test": point.test, "workers": options["workers"], "progress": progress}
    if count == 1:
        found = line(point.objective, point.theta, directions[0], **walk)
    else:
        found = plane(point.objective, point.theta, directions, **walk)
    return slice_values(found, words, [])


def slice_values(found: "Slice", directions: str, markers: Sequence[Value]) -> Value:
    """Give a slice as plain values.

    Args:
        found: the slice.
        directions: how they were chosen, in words.
        markers: named points on it, with their coordinates a and b.
    """
    return {
        "axes": [axis.tolist() for axis in found.axes],
        "rows": found.rows(),
        "directions": directions,
        "markers": list(markers),
        "lengths": [float(direction.norm()) for direction in found.directions],
        "not_finite": found.num_not_finite,
        "batchnorm": found.batchnorm,
        "method": found.method,
        "seconds": found.seconds,
    }
