"""Escape: how long gradient descent stays at an embedded saddle, against the number of negative eigenvalues.

The paper suggests that wider nets leave embedded critical points more easily, because more directions lead down; it
does not measure it. Here the width-1 optimum is embedded into wider nets, perturbed, and left.

What to expect was worked out before any run. At equal shares the m copies have outgoing weights a/m, and the Hessian
along differences of copies is B/m, B a 2 x 2 matrix of the narrow net with one negative eigenvalue: m - 1 negative
eigenvalues, all equal to min B / m. So more directions lead down, but each of them m times less steeply, and the time
to leave grows like m.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thalweg.lab.claims import Claim
from thalweg.lab.recipe import Context, Outcome, Preset, Recipe
from thalweg.lab.tables import Tables

if TYPE_CHECKING:
    from torch import Tensor

    from thalweg.lab.figures import Figure
    from thalweg.objective import Objective


class EscapePreset(Preset):
    """Parameters of the measurement; all are ours."""

    widths: tuple[int, ...] = (2, 3, 4, 6, 8, 12)
    """Widths that the width-1 optimum is embedded into, in equal shares."""
    num_trials: int = 100
    """Perturbations of each."""
    num_points: int = 50
    """Training points on [-15, 15]."""
    perturbation: float = 3e-3
    """Standard deviation of the Gaussian that is added to every parameter."""
    learning_rate: float = 0.008
    """Of gradient descent on the mean squared error; below 2/230, with the largest curvature at width 2."""
    steps_per_width: int = 50_000
    """Number of steps, times the width: about twice the time that the eigenvalues lead to expect."""
    drop: float = 1e-3
    """A trial has left when the loss is this fraction below that of the saddle."""
    narrow_trials: int = 16
    """Trainings (Adam, 6,000 steps at 0.01) that find the width-1 optimum; the best is polished."""


PAPER = EscapePreset()
CPU = PAPER.model_copy(update={"num_trials": 40, "widths": (2, 3, 4, 6, 8)})
QUICK = PAPER.model_copy(update={"num_trials": 10, "widths": (2, 4)})


def run(preset: EscapePreset, context: Context) -> Outcome:
    """Embed, perturb, leave; compare the time with what the eigenvalues predict."""
    import torch

    narrow = _narrow_optimum(preset, context)
    trials: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for place, width in enumerate(preset.widths):
        found, row = _at(preset, context, place, width, narrow)
        trials += found
        rows.append(row)
    left = [t for t in trials if t["steps"] is not None]
    ratios = torch.tensor([t["steps"] / t["predicted"] for t in left], dtype=torch.float64)
    scaled = torch.tensor([row["least"] * row["width"] for row in rows], dtype=torch.float64)
    medians = {row["width"]: row["steps"] for row in rows if row["steps"] is not None}
    measured: dict[str, Any] = {
        "directions": [[row["width"], row["negative"]] for row in rows],
        "law": float(scaled.min() / scaled.max() - 1) if bool((scaled < 0).all()) else None,
        "left": len(left) / len(trials),
    }
    if left:
        measured["predicted"] = float(ratios.median())
    if len(medians) == len(rows):
        first = rows[0]["width"]
        growth = {w: medians[w] / medians[first] / (w / first) for w in medians if w != first}
        measured["growth"] = {f"width {w}": round(g, 3) for w, g in growth.items()}
    return Outcome(tables={"trials": left, "widths": rows}, measured=measured)


def _landscape(width: int, preset: EscapePreset) -> "Objective":
    from torch import nn

    from thalweg.data import three_tanh
    from thalweg.nets import two_layer
    from thalweg.objective import Objective

    data = three_tanh(preset.num_points)
    return Objective(two_layer(width).double(), nn.MSELoss(), (data.inputs, data.targets))


def _narrow_optimum(preset: EscapePreset, context: Context) -> "Tensor":
    import torch

    from thalweg.training import polish_all, train_population

    context.progress(0.0, "optimum of width 1")
    objective = _landscape(1, preset)
    generator = torch.Generator().manual_seed(preset.seed + 1000)
    starts = torch.randn(preset.narrow_trials, objective.num_params, generator=generator, dtype=torch.float64)
    trained = train_population(objective, starts, learning_rate=0.01, steps=6_000, optimizer="adam")
    points = polish_all(objective, trained.thetas)
    return points.thetas[int(points.values.argmin())]


def _at(
    preset: EscapePreset, context: Context, place: int, width: int, narrow: "Tensor"
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Leave the saddle of one width: one row for each trial, and one for the width."""
    import torch

    from thalweg.embeddings import Embedding, split_plan
    from thalweg.probes import inertia, spectrum
    from thalweg.structure import trace
    from thalweg.training import train_population

    objective, source = _landscape(width, preset), _landscape(1, preset)
    view = trace(source.module, next(iter(source.batches()))[0])
    plan = split_plan(view, {view.groups[0].name: width})
    saddle = Embedding(view, source.space, plan).apply(narrow)
    level = float(objective.value(saddle))
    eigen = spectrum(objective, saddle, vectors=True)
    signs = inertia(eigen)
    generator = torch.Generator().manual_seed(preset.seed + place)
    shape = (preset.num_trials, objective.num_params)
    moves = preset.perturbation * torch.randn(shape, generator=generator, dtype=torch.float64)

    total = preset.steps_per_width * width
    shares = [w**2 for w in preset.widths]  # of the work: steps times units

    def tell(step: int, rate: float) -> None:
        done = (sum(shares[:place]) + shares[place] * step / total) / sum(shares)
        context.progress(done, f"width {width}: step {step:,} of {total:,}, {rate:,.0f} steps/s")

    trained = train_population(
        objective,
        saddle + moves,
        learning_rate=preset.learning_rate,
        steps=total,
        record=max(1, total // 2000),
        keep=context.folder,
        progress=tell,
    )
    bound = level * (1 - preset.drop)
    assert eigen.eigenvectors is not None  # noqa: S101 - asked for
    predicted = _predicted(eigen.eigenvalues, moves @ eigen.eigenvectors, level - bound, preset)
    below = trained.losses <= bound
    steps = [int(trained.steps[row.nonzero()[0]]) if bool(row.any()) else None for row in below]
    found = [
        {"width": width, "negative": signs.negative, "steps": s, "predicted": p, "net": f"width {width}"}
        for s, p in zip(steps, predicted, strict=True)
    ]
    ordered = sorted(s for s in steps if s is not None)
    middle = ordered[len(ordered) // 2] if len(ordered) > len(steps) / 2 else None
    row = {
        "width": width,
        "negative": signs.negative,
        "zero": signs.zero,
        "least": float(eigen.eigenvalues.min()),
        "steps": middle,
        "predicted": sorted(predicted)[len(predicted) // 2],
    }
    return found, row


def _predicted(values: "Tensor", moves: "Tensor", fall: float, preset: EscapePreset) -> list[float]:
    """Steps after which ½ Σ λ_i c_i² (1 - ηλ_i)^{2t} has fallen by `fall`, by bisection, for each row of c."""
    import torch

    rates = torch.log((1 - preset.learning_rate * values).abs()) * 2
    result = []
    for row in moves:
        low, high = 0.0, 1e7

        def loss(time: float, row: "Tensor" = row) -> float:
            return float((0.5 * values * row.square() * torch.exp((rates * time).clamp(max=600.0))).sum())

        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if loss(middle) <= -fall else (middle, high)
        result.append(high)
    return result


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw the time against the width, and against the prediction."""
    from thalweg.lab.figures import curves, scatter_agreement

    drawn = []
    rows = [row for row in tables["widths"] if row["steps"] is not None]
    if rows:
        both = [
            {"negative": row["negative"], "steps": row[column], "which": name}
            for column, name in (("steps", "measured"), ("predicted", "predicted from the Hessian"))
            for row in rows
        ]
        drawn.append(
            curves(
                both,
                id="escape",
                title="More directions lead down, and leaving takes longer",
                caption=(
                    "Median number of gradient steps until the loss is 0.1 % below the saddle's. Each added neuron "
                    "adds a negative eigenvalue; at equal shares all of them shrink like one over the width."
                ),
                x="negative",
                y="steps",
                series="which",
                x_title="negative eigenvalues of the saddle",
                y_title="steps to leave",
            )
        )
    if tables["trials"]:
        drawn.append(
            scatter_agreement(
                tables["trials"],
                id="agreement",
                title="The quadratic model at the saddle tells the time to leave it",
                caption="One point for each perturbation: steps to leave, predicted from eigenvalues and measured.",
                measured="steps",
                series="net",
            )
        )
    return drawn


def _one_less(measured: Sequence[Sequence[int]]) -> bool:
    return all(negative == width - 1 for width, negative in measured)


def _near_one(measured: Mapping[str, float]) -> bool:
    return all(abs(ratio - 1) <= 0.25 for ratio in measured.values())


RECIPE = Recipe(
    name="embedding_principle/escape",
    title="How long training stays at an embedded saddle",
    source="zhang2021embedding (a suggestion of its discussion; the measurement is ours)",
    version=1,
    presets={"paper": PAPER, "cpu": CPU, "quick": QUICK},
    claims=(
        Claim(
            "directions",
            "Embedded into width m, the width-1 optimum has m - 1 negative eigenvalues.",
            "m - 1",
            "exact",
            _one_less,
        ),
        Claim(
            "law",
            "At equal shares the most negative eigenvalue is one over the width: spread of width times eigenvalue.",
            "0",
            "at most 1e-6, relative",
            lambda m: m <= 1e-6,
        ),
        Claim(
            "left",
            "Every perturbed saddle is left: share of trials.",
            "1",
            "at least 0.95 within the steps",
            lambda m: m >= 0.95,
        ),
        Claim(
            "predicted",
            "The quadratic model at the saddle predicts the time to leave it: median of measured over predicted.",
            "1",
            "between 2/3 and 3/2",
            lambda m: 2 / 3 <= m <= 3 / 2,
        ),
        Claim(
            "growth",
            "The time to leave grows like the width, although more directions lead down: against that law.",
            "1 at every width",
            "within 25 % at every width",
            _near_one,
        ),
    ),
    run=run,
    figures=figures,
    summary=(
        "Wider nets have more directions that lead down from an embedded critical point, which suggests that they "
        "leave it sooner. Measured, and predicted by the Hessian: at equal shares every added neuron makes "
        "all these directions flatter, and leaving takes longer in proportion to the width."
    ),
)
