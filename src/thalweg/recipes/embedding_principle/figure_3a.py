"""Figure 3(a): a minimum of a width-2 tanh net, embedded into widths 3 and 4, becomes a degenerate saddle.

Counts as reproduced: the signs of all Hessian eigenvalues, exactly, and their sizes as read off the figure.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from thalweg.lab.claims import Claim
from thalweg.lab.recipe import Context, Outcome, Preset, Recipe
from thalweg.lab.tables import Tables

if TYPE_CHECKING:
    from torch import Tensor

    from thalweg.embeddings import Embedding
    from thalweg.lab.figures import Figure
    from thalweg.objective import Objective
    from thalweg.training import CriticalPoint

COUNTS = {"2": [0, 0, 6], "3": [1, 1, 7], "4": [2, 2, 8]}
"""(negative, zero, positive) eigenvalues at each width, from the figure."""

LOG_SIZES = {
    "2": [1.55, 0.19, -0.02, -0.27, -1.48, -4.18],
    "3": [1.26, 0.14, 0.13, -0.09, -0.17, -1.50, -1.95, -4.18],
    "4": [1.25, 0.16, 0.13, -0.01, -0.37, -1.46, -1.80, -1.96, -4.49, -4.55],
}
"""log10 |λ| of the eigenvalues that are not zero, largest first, read off the figure."""

MSE = 0.0697915
"""Mean squared error at the width-2 minimum, found by Levenberg–Marquardt from 60 random starts."""


class Figure3aPreset(Preset):
    """Parameters of figure 3(a)."""

    num_points: int = 50
    """Training points on [-15, 15]."""
    optimizer: Literal["gd", "adam"] = "gd"
    """Full-batch optimizer that finds the narrow critical point."""
    learning_rate: float = 0.005
    """Its learning rate; on the mean squared error."""
    steps: int = 300_000
    """Its number of steps."""
    variance_exponent: float = 3.0
    """All parameters start from N(0, 1/m^this), m the width."""
    num_trials: int = 3
    """Trainings, with seeds counted up from `seed`; the polished point of least loss is embedded."""
    gradient_l1: float = 1e-12
    """The polish stops at this L1 norm of the gradient (the paper's own point has 7.15e-15)."""
    threshold: float = 1e-11
    """An eigenvalue within ± this counts as zero: the dashed line of the figure."""
    split: tuple[tuple[int, ...], ...] = ((0, 1, 0), (0, 1, 0, 1))
    """For each wide net, the narrow neuron that each of its neurons copies; neuron 0 is the one of least |w|."""
    shares: tuple[tuple[float, ...], ...] = ((0.5, 1.0, 0.5), (0.5, 0.5, 0.5, 0.5))
    """The share of its outgoing weight that each neuron takes; those of one narrow neuron sum to 1."""


PAPER = Figure3aPreset()
CPU = PAPER.model_copy(update={"optimizer": "adam", "learning_rate": 0.02, "steps": 20_000, "num_trials": 4})
QUICK = CPU.model_copy(update={"steps": 5_000, "num_trials": 2})


def run(preset: Figure3aPreset, context: Context) -> Outcome:
    """Train, polish, embed, and take all eigenvalues."""
    import numpy as np

    from thalweg.embeddings import Split

    for parents, shares in zip(preset.split, preset.shares, strict=True):
        Split(2, np.array(parents), np.array(shares))  # a broken plan is refused before any training
    objective, loss_rows, point = _critical_point(preset, context)
    context.progress(0.9, "embedding")
    stages = [(objective, point.theta)]
    for embedding in _embeddings(preset, objective, point):
        wide = _landscape(embedding.wide(_filled(objective, point.theta)), preset)
        stages.append((wide, embedding.apply(point.theta)))
    outputs = [landscape.outputs(theta) for landscape, theta in stages]
    spectra, inertias, norms = _curvature(stages, preset)
    counts = {str(row["width"]): [row["negative"], row["zero"], row["positive"]] for row in inertias}
    measured = {
        "loss": 2 * point.value,
        "critical": point.gradient_l1,
        "counts": counts,
        "sizes": _log_sizes(spectra),
        "outputs": float(np.max([float((o - outputs[0]).abs().max() / outputs[0].abs().max()) for o in outputs])),
        "gradient": norms,
        "irreversible": list(counts.values()),
    }
    targets = next(iter(objective.batches()))[1]
    drawn = {**{f"width {r['width']}": o for r, o in zip(inertias, outputs, strict=True)}, "data": targets}
    output_rows = [
        {"x": x, "output": y, "network": name}
        for name, values in drawn.items()
        for x, y in zip(_xs(preset), values[:, 0].tolist(), strict=True)
    ]
    return Outcome(
        tables={"loss": loss_rows, "spectra": spectra, "inertia": inertias, "outputs": output_rows},
        arrays={"theta": point.theta.numpy(), "raw_theta": point.raw_theta.numpy()},
        measured=measured,
    )


def _curvature(
    stages: "Sequence[tuple[Objective, Tensor]]", preset: Figure3aPreset
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[float]]:
    """Give rows of eigenvalues, rows of their signs, and the gradient's L1 norm, one stage for each width."""
    from thalweg.probes import gradient_norm, inertia
    from thalweg.probes import spectrum as spectrum_of

    spectra, inertias, norms = [], [], []
    for landscape, theta in stages:
        width = landscape.num_params // 3
        values = spectrum_of(landscape, theta).eigenvalues
        signs = inertia(values, preset.threshold)
        spectra += [{"width": width, "eigenvalue": v, "threshold": preset.threshold} for v in values.tolist()]
        inertias.append({"width": width, "negative": signs.negative, "zero": signs.zero, "positive": signs.positive})
        norms.append(gradient_norm(landscape, theta).l1)
    return spectra, inertias, norms


def _log_sizes(spectra: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Give log10 |λ| of the eigenvalues that are not zero, largest first, for each width."""
    sizes: dict[str, list[float]] = {}
    for row in spectra:
        if abs(row["eigenvalue"]) > row["threshold"]:
            sizes.setdefault(f"{row['width']}", []).append(round(math.log10(abs(row["eigenvalue"])), 4))
    return {width: sorted(values, reverse=True) for width, values in sizes.items()}


def _xs(preset: Figure3aPreset) -> list[float]:
    from thalweg.data import three_tanh

    xs: list[float] = three_tanh(preset.num_points).inputs[:, 0].tolist()
    return xs


def _landscape(module: Any, preset: Figure3aPreset) -> "Objective":
    """Half the mean squared error: the Hessian that the figure shows is that of 1/(2n) Σ."""
    from thalweg.data import three_tanh
    from thalweg.objective import Objective

    data = three_tanh(preset.num_points)
    return Objective(module, lambda o, t: ((o - t) ** 2).mean() / 2, (data.inputs, data.targets))


def _filled(objective: "Objective", theta: Any) -> Any:
    objective.space.write(theta, objective.module)
    return objective.module


def _critical_point(
    preset: Figure3aPreset, context: Context
) -> "tuple[Objective, list[dict[str, Any]], CriticalPoint]":
    """Train several times from a small start, polish each end, keep the one of least loss."""
    import torch
    from torch import nn

    from thalweg.data import three_tanh
    from thalweg.nets import gaussian_init_, two_layer
    from thalweg.objective import Objective
    from thalweg.training import polish, train

    data = three_tanh(preset.num_points)
    net = two_layer(2).double()
    objective = _landscape(net, preset)
    trained = Objective(net, nn.MSELoss(), (data.inputs, data.targets))
    points: list[CriticalPoint] = []
    rows: list[dict[str, Any]] = []
    for trial in range(preset.num_trials):
        generator = torch.Generator().manual_seed(preset.seed + trial)
        start = objective.space.theta(gaussian_init_(net, 2.0**-preset.variance_exponent, generator))

        def tell(step: int, loss: float, trial: int = trial) -> None:
            done = (trial + step / preset.steps) / preset.num_trials
            context.progress(0.9 * done, f"training {trial + 1} of {preset.num_trials}: loss {loss:.4g}")

        result = train(
            trained,
            start,
            learning_rate=preset.learning_rate,
            steps=preset.steps,
            optimizer=preset.optimizer,
            progress=tell,
        )
        steps, losses = result.steps.tolist(), result.losses.tolist()
        rows += [
            {"step": s, "loss": v, "trial": f"seed {preset.seed + trial}"} for s, v in zip(steps, losses, strict=True)
        ]
        points.append(polish(objective, result.theta, gradient_l1=preset.gradient_l1))
    return objective, rows, min(points, key=lambda p: p.value)


def _embeddings(preset: Figure3aPreset, objective: "Objective", point: "CriticalPoint") -> "list[Embedding]":
    """One plan for each wide net; narrow neurons are numbered by |w|, the shallow one first."""
    import torch

    from thalweg.embeddings import Embedding, split_plan
    from thalweg.structure import trace

    inputs = next(iter(objective.batches()))[0]
    view = trace(_filled(objective, point.theta), inputs)
    group = view.groups[0].name
    order = torch.argsort(objective.space.parameters(point.theta)["layers.0.weight"][:, 0].abs()).tolist()
    made = []
    for parents, shares in zip(preset.split, preset.shares, strict=True):
        plan = split_plan(view, {}, parents={group: [order[p] for p in parents]}, shares={group: list(shares)})
        made.append(Embedding(view, objective.space, plan))
    return made


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw the spectra, their signs, the functions and the trainings."""
    from thalweg.lab.figures import curves, inertia_bars, spectrum

    return [
        spectrum(
            tables["spectra"],
            id="spectra",
            title="Hessian eigenvalues of one minimum, embedded",
            caption=(
                "All eigenvalues of the Hessian at the width-2 minimum and at its embeddings into widths 3 and 4. "
                "Each added neuron adds one zero and turns one direction of the minimum downhill: the minimum "
                "becomes a saddle that a wider net can leave."
            ),
        ),
        inertia_bars(
            tables["inertia"],
            id="inertia",
            title="Signs of the eigenvalues",
            caption="No count ever falls when a network is widened (irreversibility).",
        ),
        curves(
            tables["outputs"],
            id="outputs",
            title="The same function at every width",
            caption="The data, and the outputs of the three networks, which lie on top of each other.",
            x="x",
            y="output",
            series="network",
        ),
        curves(
            tables["loss"],
            id="loss",
            title="Training of the narrow net",
            caption="Mean squared error from small initialisation; the ends are polished to critical points.",
            x="step",
            y="loss",
            series="trial",
            log_x=True,
            log_y=True,
        ),
    ]


def _sizes_agree(measured: Mapping[str, Sequence[float]]) -> bool:
    """Compare log10 |λ|, largest first; the figure can be read to 0.03 decades."""
    for width, expected in LOG_SIZES.items():
        mine = list(measured[width])
        if len(mine) != len(expected) or any(abs(a - b) > 0.03 for a, b in zip(mine, expected, strict=True)):
            return False
    return True


def _never_falls(counts: Sequence[Sequence[int]]) -> bool:
    return all(b >= a for one, two in pairwise(counts) for a, b in zip(one, two, strict=True))


RECIPE = Recipe(
    name="embedding_principle/figure_3a",
    title="A minimum becomes a saddle when the network is widened",
    source="zhang2021embedding, figure 3(a)",
    version=1,
    presets={"paper": PAPER, "cpu": CPU, "quick": QUICK},
    claims=(
        Claim(
            "loss",
            "The width-2 tanh net has a minimum that it is trained to.",
            "0.0697915 (mean squared error)",
            "within 1 % of the minimum that Levenberg-Marquardt finds",
            lambda m: abs(m / MSE - 1) <= 0.01,
        ),
        Claim(
            "critical",
            "The point is critical.",
            "7.15e-15 (L1 norm of the gradient)",
            "at most 1e-12 (float64 noise for 6 parameters is about 1e-14)",
            lambda m: m <= 1e-12,
        ),
        Claim(
            "counts",
            "One neuron more turns the minimum into a saddle: negative, zero, positive eigenvalues by width.",
            "0/0/6, 1/1/7, 2/2/8",
            "exact, at the figure's threshold of 1e-11",
            lambda m: m == COUNTS,
        ),
        Claim(
            "sizes",
            "The eigenvalues have the sizes that the figure shows.",
            "24 values of log10 |λ| read off the figure",
            "each within 0.03 decades, to which a plotted point can be read",
            _sizes_agree,
        ),
        Claim(
            "outputs",
            "The embedded nets compute the same function (proposition 1).",
            "0",
            "relative change of the outputs at most 1e-12 (float64 rounding)",
            lambda m: m <= 1e-12,
        ),
        Claim(
            "gradient",
            "Embedded critical points are critical (theorem 1): L1 norm of the gradient at widths 2, 3, 4.",
            "0 at all widths",
            "at most 10 times that of the narrow point, and at most 1e-12",
            lambda m: all(v <= 1e-12 and v <= 10 * max(m[0], 1e-15) for v in m),
        ),
        Claim(
            "irreversible",
            "The numbers of negative, zero and positive eigenvalues never decrease (zhang2022hierarchical).",
            "never",
            "exact, by the irreversibility theorem",
            _never_falls,
        ),
    ),
    run=run,
    figures=figures,
    num_threads=1,
    summary=(
        "A width-2 tanh network is trained on 50 points of a sum of three tanh steps until it stands at a minimum. "
        "Splitting its neurons carries that very point into networks of width 3 and 4, which compute the same "
        "function. There the point is no minimum any more: every added neuron brings one flat direction and one "
        "downhill one."
    ),
)
