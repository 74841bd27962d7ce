"""Figure 3, middle and right: gradient and curvature where a network is lifted, and after it trained on.

Counts as reproduced: both rise and fall with the relax time, and training in the relaxed space lowers them.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thalweg.lab.claims import Claim
from thalweg.lab.parts import Share, averages, part
from thalweg.lab.recipe import Context, Outcome, Recipe
from thalweg.lab.tables import Table, Tables
from thalweg.recipes.needle_in_the_haystack import relax
from thalweg.recipes.needle_in_the_haystack.images import Images
from thalweg.recipes.needle_in_the_haystack.measures import CNN_COST, sizes
from thalweg.recipes.needle_in_the_haystack.protocol import (
    Protocol,
    ProtocolPreset,
    Relaxed,
    derived,
    loaded,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from thalweg.lab.figures import Figure

_FEW = 100  # samples of which the gradients are compared, chosen by us
MEASURES = {"gradient": "norm of the gradient", "curvature": "largest eigenvalue of the Hessian"}


class SharpnessPreset(ProtocolPreset):
    """Parameters of the measurement: those of the protocol, and how it is measured."""

    measured_samples: int = 2_000
    """Training samples, the first ones, that gradient and Hessian are of (ours: the paper does not say)."""
    tolerance: float = 0.01
    """Relative error of the eigenvalue at which the search ends (ours)."""
    most_products: int = 60
    """Products with the Hessian for one eigenvalue, at most (ours)."""


PAPER = derived(SharpnessPreset, relax.PAPER)
PAPER_ADAM, PAPER_ALEXNET = derived(SharpnessPreset, relax.PAPER_ADAM), derived(SharpnessPreset, relax.PAPER_ALEXNET)
CPU = derived(SharpnessPreset, relax.CPU)
QUICK = derived(SharpnessPreset, relax.QUICK, measured_samples=200, relaxed_epochs=3)


def run(preset: SharpnessPreset, context: Context) -> Outcome:
    """Run the protocol, and measure each network where it is lifted and at its end."""
    images = loaded(preset, context)
    data = images.name
    rows: Table = []
    shares = Share(context).split([1.0] * len(preset.seeds))
    for seed, share in zip(preset.seeds, shares, strict=True):
        protocol = Protocol(preset, context, seed, images)
        context.progress(share.start, sizes(protocol, [("fc", time) for time in preset.times]))
        weights = [CNN_COST * preset.epochs, *[preset.relaxed_epochs] * len(preset.times)]
        parts = share.split(weights)
        snapshots, _ = protocol.convolutional(next(parts), preset.times)
        for time in preset.times:
            own = next(parts)

            def compute(
                folder: "Path | None",
                time: int = time,
                own: Share = own,
                protocol: Protocol = protocol,
                states: "dict[int, dict[str, Tensor]]" = snapshots,
            ) -> dict[str, Any]:
                made = protocol.relaxed(states[time], time, "fc", own, folder, with_start=True)
                return {"rows": _both(preset, protocol, made)}

            rows += part(context, f"{seed}-{time}", data, compute)["rows"]
    by_time = averages(rows, ("relax_time", "when"), tuple(MEASURES))
    measured = {"projected": max(row["gradient_error"] for row in rows if row["when"] == "start")}
    if preset.data != "digits":  # neither of a size nor of a kind at which the paper looks
        measured |= _measured(by_time, is_converged=all(row["is_converged"] for row in rows))
    return Outcome(tables={"sharpness": rows, "by_time": by_time}, measured=measured)


def _both(preset: SharpnessPreset, protocol: Protocol, made: Relaxed) -> Table:
    """Measure a network at its start and its end."""
    from thalweg.probes import eigenpairs, gradient_norm

    images = protocol.images.first(preset.measured_samples)
    rows: Table = []
    for when in ("end", "start"):  # the module stands at its end
        if when == "start":
            made.module.load_state_dict(dict(made.start))
        objective = images.objective(made.module, protocol.context)
        theta = objective.theta()
        found = eigenpairs(objective, theta, tolerance=preset.tolerance, max_products=preset.most_products)
        gradient = gradient_norm(objective, theta)
        rows.append(
            {
                "seed": protocol.seed,
                "relax_time": made.time,
                "when": when,
                "loss": gradient.value,
                "gradient": gradient.l2,
                "curvature": float(found.values[0]),
                "curvature_residual": float(found.residuals[0]),
                "is_converged": bool(found.converged[0]),
                "gradient_error": _gradient_error(protocol, made, images) if when == "start" else None,
            }
        )
    return rows[::-1]


def _gradient_error(protocol: Protocol, made: Relaxed, images: Images) -> float:
    """Hold Φᵀ of the gradient where a network was lifted against the convolutional network's own, in double.

    Returns:
        The Euclidean norm of the difference, in that of the gradient.
    """
    net = protocol.build().double().eval()
    net.load_state_dict(made.lifting.nearest(made.start))
    twin = copy.deepcopy(made.module).double()
    few = Images((images.train[0][:_FEW].double(), images.train[1][:_FEW]), images.test, images.num_classes)
    own, lifted = (few.objective(module, protocol.context) for module in (net, twin))
    gradient = own.gradient(own.theta())
    return float((made.lifting.adjoint(lifted.gradient(lifted.theta())) - gradient).norm() / gradient.norm())


def _measured(by_time: Table, *, is_converged: bool = True) -> dict[str, Any]:
    """Measure the claims: where the peaks are, and how far training lowers them there and beside it.

    Curvature counts only if the search for every eigenvalue converged.
    """
    start = {row["relax_time"]: row for row in by_time if row["when"] == "start"}
    end = {row["relax_time"]: row for row in by_time if row["when"] == "end"}
    times = sorted(start)
    measured: dict[str, Any] = {}
    for name in MEASURES:
        if name == "curvature" and not is_converged:
            continue
        peak = max(times, key=lambda time: float(start[time][name]))
        measured[f"{name}_peak"] = {"peak": peak, "first": times[0], "last": times[-1]}
        place = times.index(peak)
        around = times[max(0, place - 1) : place + 2]
        measured[f"{name}_falls"] = min(start[time][name] / end[time][name] for time in around)
    return measured


def _is_between(measured: dict[str, int]) -> bool:
    return measured["first"] < measured["peak"] < measured["last"]


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw both measures over the relax time, before and after training."""
    from thalweg.lab.figures import curves

    words = {"start": "where it is lifted", "end": "after training on"}
    rows = [{**row, "when": words[row["when"]], "place": row["relax_time"] + 1} for row in tables["by_time"]]
    return [
        curves(
            rows,
            id=name,
            title=f"Over the relax time: the {title}",
            caption="On the same training samples, before and after training in the relaxed space.",
            x="place",
            y=name,
            series="when",
            lower=f"{name}_least",
            upper=f"{name}_most",
            log_x=True,
            log_y=True,
            x_title="relax time in epochs + 1",
            y_title=title,
        )
        for name, title in MEASURES.items()
    ]


def _claims() -> tuple[Claim, ...]:
    found = []
    for name, title in MEASURES.items():
        found += [
            Claim(
                f"{name}_peak",
                f"The {title} where a network is lifted rises with the relax time, then falls: where it is largest.",
                "at about epoch 20 of 150",
                "neither at the first nor at the last relax time",
                _is_between,
            ),
            Claim(
                f"{name}_falls",
                f"Training in the relaxed space lowers the {title}: least ratio of before to after.",
                "about 10",
                "at least 3 at its peak and at the relax times beside it",
                lambda m: m >= 3,
            ),
        ]
    return tuple(found)


RECIPE = Recipe(
    name="needle_in_the_haystack/sharpness",
    title="Gradient and curvature at the relax time, before and after",
    source="dascoli2019finding, figure 3",
    version=2,
    presets={
        "paper": PAPER,
        "paper_adam": PAPER_ADAM,
        "paper_alexnet": PAPER_ALEXNET,
        "cpu": CPU,
        "quick": QUICK,
    },
    claims=(
        Claim(
            "projected",
            "The gradient where a network is lifted, summed over tied weights, is the convolutional network's: "
            "relative difference.",
            "0: the chain rule",
            "at most 1e-10 in double precision, at every relax time",
            lambda m: m <= 1e-10,
        ),
        *_claims(),
    ),
    run=run,
    figures=figures,
    summary=(
        "The norm of the gradient and the largest eigenvalue of the Hessian of the training loss tell how steep and "
        "how narrow the landscape is where a network leaves the convolutional subspace, and where it ends."
    ),
)
