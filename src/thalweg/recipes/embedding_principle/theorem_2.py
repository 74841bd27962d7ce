"""Theorem 2: K added neurons or channels make a critical point a K-dimensional affine subspace of them.

Counts as reproduced: at minima of 3- to 5-layer networks and of a convolutional one, the subspace has dimension
K, the gradient stays small all over it, the outputs stay, and the Hessian's corank grows by at least K.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from thalweg.lab.claims import Claim
from thalweg.lab.recipe import Context, Outcome, Preset, Recipe
from thalweg.lab.tables import Tables

if TYPE_CHECKING:
    import torch
    from torch import nn

    from thalweg.lab.figures import Figure
    from thalweg.objective import Objective
    from thalweg.training import CriticalPoint


class Theorem2Preset(Preset):
    """Parameters of the check of theorem 2. The paper proves it and runs no experiment: the numbers are ours."""

    hidden: tuple[tuple[int, ...], ...] = ((2, 2), (2, 2, 2), (2, 2, 2, 2))
    """Hidden widths of each fully-connected net: 3, 4 and 5 layers."""
    channels: tuple[int, int] = (2, 2)
    """Channels of the convolutional net."""
    num_digits: int = 500
    """Images that it is trained on."""
    added: tuple[int, ...] = (1, 2)
    """Units added to the hidden layers, in turn."""
    num_samples: int = 100
    """Points sampled from each subspace, with standard normal shifts of share."""
    num_hessians: int = 10
    """How many of them have their Hessian taken too."""
    learning_rate: float = 0.01
    """Learning rate of the Adam steps before the Newton ones."""
    steps: int = 1_000
    """Number of those Adam steps."""
    newton_steps: int = 200
    """Newton steps at most."""
    max_trials: int = 20
    """Starts at most for each net; many end at infinity, the first that ends at a minimum counts."""
    gradient_l1: float = 1e-10
    """Largest L1 norm of the gradient at the narrow critical point. Above float64 noise, so that ratios mean
    something."""


PAPER = Theorem2Preset()
CPU = PAPER.model_copy(update={"num_samples": 50, "num_hessians": 5})
QUICK = PAPER.model_copy(
    update={
        "hidden": ((2, 2), (2, 2, 2)),
        "num_samples": 20,
        "num_hessians": 3,
        "num_digits": 200,
        "channels": (1, 2),
    }
)


def run(preset: Theorem2Preset, context: Context) -> Outcome:
    """For each net: find a minimum, embed it, sample the subspace."""
    rows: list[dict[str, Any]] = []
    gradients: list[dict[str, Any]] = []
    arrays = {}
    nets = list(_nets(preset))
    for number, (name, objective, inputs) in enumerate(nets):

        def tell(text: str, number: int = number, name: str = name) -> None:
            context.progress(number / len(nets), f"{name}: {text}")

        point = _minimum(objective, preset, tell)
        if point is None:
            rows.append({"net": name, "found": False})
            continue
        row, norms = _subspace(name, objective, point, inputs, preset)
        rows.append(row)
        gradients += norms
        arrays[f"{name} theta"] = point.theta.numpy()
    found = [r for r in rows if r["found"]]
    missing = [r["net"] for r in rows if not r["found"]]
    measured: dict[str, object] = {
        "minima": {r["net"]: r["gradient_l1"] if r["found"] else None for r in rows},
        "dimension": {r["net"]: [r["dimension"], r["added"]] for r in found},
        "gradient": {r["net"]: r["worst_ratio"] for r in found},
        "outputs": {r["net"]: r["output_change"] for r in found},
        "corank": {r["net"]: [r["narrow_zero"], r["least_corank"], r["added"]] for r in found},
    }
    context.progress(1.0, f"{len(found)} nets" + (f", no minimum for {', '.join(missing)}" if missing else ""))
    inertias = [
        {"net": f"{r['net']}, {which}", **{sign: r[f"{which}_{sign}"] for sign in ("negative", "zero", "positive")}}
        for r in found
        for which in ("narrow", "wide")
    ]
    return Outcome(
        tables={"nets": rows, "gradients": gradients, "inertia": inertias}, arrays=arrays, measured=measured
    )


def _nets(preset: Theorem2Preset) -> "Iterator[tuple[str, Objective, torch.Tensor]]":
    """Fully-connected GELU nets on diabetes, a convolutional one on digits (odd or even)."""
    from torch import nn

    from thalweg.data import diabetes, digits
    from thalweg.nets import MLP
    from thalweg.objective import Objective

    data = diabetes()
    for hidden in preset.hidden:
        net = MLP([data.inputs.shape[1], *hidden, 1], activation="gelu").double()
        yield f"{len(hidden) + 1} layers", Objective(net, nn.MSELoss(), (data.inputs, data.targets)), data.inputs
    images = digits().select(preset.num_digits)
    parity = (2 * (images.targets % 2) - 1).to(images.inputs).unsqueeze(1)
    net_ = _convolutional(*preset.channels).double()
    yield "convolutional", Objective(net_, nn.MSELoss(), (images.inputs, parity)), images.inputs


def _convolutional(first: int, second: int) -> "nn.Module":
    """8×8 pixels, two convolutions that leave one position, one output."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, first, 3, stride=2),
        nn.GELU(),
        nn.Conv2d(first, second, 3),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(second, 1),
    )


def _minimum(objective: "Objective", preset: Theorem2Preset, tell: Any) -> "CriticalPoint | None":
    """Give the first trial that ends at a minimum at a finite place; None if none does."""
    import torch

    from thalweg.nets import gaussian_init_
    from thalweg.probes import inertia, spectrum
    from thalweg.training import minimise, polish, train

    for trial in range(preset.max_trials):
        tell(f"start {trial + 1}")
        generator = torch.Generator().manual_seed(preset.seed * preset.max_trials + trial)
        start = objective.theta(gaussian_init_(objective.module, 0.1, generator))
        warm = train(objective, start, learning_rate=preset.learning_rate, steps=preset.steps)
        end = minimise(objective, warm.theta, gradient_l1=preset.gradient_l1, max_steps=preset.newton_steps)
        point = polish(objective, end.theta, gradient_l1=preset.gradient_l1, max_steps=20)
        if point.status == "converged" and inertia(spectrum(objective, point.theta)).negative == 0:
            return point
    return None


def _subspace(
    name: str, objective: "Objective", point: "CriticalPoint", inputs: "torch.Tensor", preset: Theorem2Preset
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Embed a critical point and measure its affine subspace."""
    import numpy as np
    import torch

    from thalweg.embeddings import Embedding, critical_subspace, split_plan
    from thalweg.probes import inertia, spectrum
    from thalweg.structure import trace

    objective.space.write(point.theta, objective.module)
    view = trace(objective.module, inputs)
    widths = {g.name: g.size + preset.added[i % len(preset.added)] for i, g in enumerate(view.groups)}
    embedding = Embedding(view, objective.space, split_plan(view, widths))
    wide = type(objective)(embedding.wide(objective.module), objective.loss, list(objective.batches()))
    subspace = critical_subspace(embedding, point.theta)
    samples = subspace.sample(preset.num_samples, torch.Generator().manual_seed(preset.seed))
    norms = [float(wide.gradient(sample).abs().sum()) for sample in samples]
    reference = objective.outputs(point.theta)
    changes = [float((wide.outputs(s) - reference).abs().max() / reference.abs().max()) for s in samples]
    narrow_signs = inertia(spectrum(objective, point.theta))
    wide_signs = inertia(spectrum(wide, subspace.origin))
    coranks = [wide_signs.zero] + [inertia(spectrum(wide, s)).zero for s in samples[: preset.num_hessians]]
    row = {
        "net": name,
        "found": True,
        "loss": point.value,
        "gradient_l1": point.gradient_l1,
        "parameters": objective.num_params,
        "wide_parameters": wide.num_params,
        "added": embedding.plan.num_added,
        "dimension": subspace.dimension,
        "worst_ratio": float(np.max(norms)) / point.gradient_l1,  # a NaN stays one
        "output_change": float(np.max(changes)),
        "least_corank": min(coranks),
        "threshold": wide_signs.threshold,
    }
    for which, signs in (("narrow", narrow_signs), ("wide", wide_signs)):
        row |= {f"{which}_negative": signs.negative, f"{which}_zero": signs.zero, f"{which}_positive": signs.positive}
    ordered = sorted(norms)
    return row, [{"net": name, "sample": i + 1, "gradient": v / point.gradient_l1} for i, v in enumerate(ordered)]


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw the gradients over the subspaces, and the signs before and after."""
    from thalweg.lab.figures import curves, inertia_bars

    return [
        curves(
            tables["gradients"],
            id="gradients",
            title="The gradient all over the critical subspace",
            caption=(
                "L1 norm of the gradient at points sampled from each subspace, sorted, relative to that of the "
                "narrow critical point. It moves with the shares and stays of the same size."
            ),
            x="sample",
            y="gradient",
            series="net",
            log_y=True,
            y_title="gradient / that of the narrow point",
        ),
        inertia_bars(
            tables["inertia"],
            id="inertia",
            title="Signs of the Hessian's eigenvalues, narrow and wide",
            caption="The zeros grow by at least one for each added unit; no count falls.",
            x="net",
        ),
    ]


RECIPE = Recipe(
    name="embedding_principle/theorem_2",
    title="A critical point becomes an affine subspace of critical points",
    source="zhang2021embedding, theorem 2",
    version=1,
    presets={"paper": PAPER, "cpu": CPU, "quick": QUICK},
    claims=(
        Claim(
            "minima",
            "Deep and convolutional nets have minima to embed: L1 norm of the gradient.",
            "0",
            "at most 1e-10 and no negative eigenvalue, for every net, within 20 starts",
            lambda m: all(v is not None and v <= 1e-10 for v in m.values()),
        ),
        Claim(
            "dimension",
            "K added units give a K-dimensional affine subspace: dimension, K.",
            "dimension = K",
            "exact",
            lambda m: all(d == k for d, k in m.values()) if m else None,
        ),
        Claim(
            "gradient",
            "All its points are critical: largest L1 gradient over the samples, relative to the narrow point's.",
            "0 at an exact critical point",
            "at most 10 times the narrow point's (shares scale a gradient; theorem 1 for approximate points)",
            lambda m: all(v <= 10 for v in m.values()) if m else None,
        ),
        Claim(
            "outputs",
            "All its points compute the same function (proposition 1).",
            "0",
            "relative change of the outputs at most 1e-12 (float64 rounding)",
            lambda m: all(v <= 1e-12 for v in m.values()) if m else None,
        ),
        Claim(
            "corank",
            "The degree of degeneracy grows by at least K: zeros before, least after (embedded, sampled), K.",
            "zeros after >= zeros before + K",
            "exact, with eigenvalues within rounding noise (P·eps·max|λ|) counted as zero",
            lambda m: all(b >= a + k for a, b, k in m.values()) if m else None,
        ),
    ),
    run=run,
    figures=figures,
    num_threads=1,
    summary=(
        "Minima of fully-connected networks with 3 to 5 layers (on diabetes) and of a small convolutional one (on "
        "digits) are embedded by splitting neurons and channels. The shares of the outgoing weights are free as "
        "long as they sum to 1, so the embedded point lies on a plane of points with the same outputs, all of them "
        "critical."
    ),
)
