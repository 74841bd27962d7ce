"""Width and depth: how far the worst point of a path lies below its ends, for wider and for deeper networks.

The paper's supplement A analyses both; its text is not at hand, and the main text states no result of it. What is
tested is what is known of such paths: in wider networks less is lost. Counts as reproduced: Spearman's correlation of
the width with minus the mean loss of accuracy is at least 0.8, for every method. Depth is reported without a claim.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from thalweg.lab.claims import Claim
from thalweg.lab.ranks import spearman
from thalweg.lab.recipe import Context, Outcome, Recipe
from thalweg.lab.tables import Table, Tables
from thalweg.recipes.low_loss_connection.endpoints import DataName, Task, TrainedPreset, endpoints, load, pairs_of

if TYPE_CHECKING:
    from torch import nn

    from thalweg.lab.figures import Figure

METHODS: Mapping[str, str] = {"linear": "Linear", "arc": "Arc", "ot": "OT", "linear+wa": "Linear + WA"}
"""Methods by name, and as in the paper's tables. The first two move all layers at once."""


class WidthAndDepthPreset(TrainedPreset):
    """Parameters of the measurement."""

    data: DataName = "cifar10"
    """Data set."""
    num_train: int = 50_000
    """Samples to train on."""
    epochs: int = 400
    """Passes over the data."""
    widths: tuple[int, ...] = (100, 500, 1_000, 2_000)
    """Widths of the networks with one hidden layer, with biases (those in the paper's code)."""
    deep: tuple[tuple[int, ...], ...] = (
        (6_144, 2_000),
        (6_144, 2_000, 1_000, 1_000),
        (6_144, 2_000, 1_000, 1_000, 1_000, 1_000),
    )
    """Hidden widths of the networks that differ in depth, without biases (those in the paper's code)."""
    num_networks: int = 3
    """Networks of each kind; three make three pairs."""
    num_measured: int = 10_000
    """Training samples, the first ones, that paths are fitted and measured on."""
    points: int = 21
    """Points of a profile, at least (the paper's code: 21 for one hidden layer)."""
    knots: int = 5
    """Stretches of a layer between two fits."""


PAPER = WidthAndDepthPreset()
CPU = PAPER.model_copy(
    update={
        "data": "mnist",
        "num_train": 10_000,
        "num_test": 5_000,
        "epochs": 10,
        "learning_rate": 0.05,
        "widths": (50, 125, 315, 800),
        "deep": ((200,), (200, 200), (200, 200, 200), (200, 200, 200, 200)),
        "num_measured": 5_000,
    }
)
QUICK = CPU.model_copy(
    update={
        "data": "digits",
        "num_train": 1_300,
        "num_test": 440,
        "epochs": 6,
        "learning_rate": 0.1,
        "batch_size": 64,
        "widths": (6, 12, 24, 48),
        "deep": ((24,), (24, 24)),
        "num_networks": 2,
        "num_measured": 600,
        "points": 5,
        "knots": 3,
    }
)


def run(preset: WidthAndDepthPreset, context: Context) -> Outcome:
    """Train networks of every width and depth, and connect their pairs by every method."""
    task = load(preset, context, flat=True)
    kinds: list[tuple[str, tuple[int, ...]]] = [("width", (width,)) for width in preset.widths]
    kinds += [("depth", hidden) for hidden in preset.deep]
    shares = [sum(hidden) for _, hidden in kinds]
    rows: Table = []
    for place, (series, hidden) in enumerate(kinds):

        def tell(x: float, text: str, place: int = place, hidden: tuple[int, ...] = hidden) -> None:
            done = (sum(shares[:place]) + shares[place] * x) / sum(shares)
            context.progress(done, f"{'-'.join(map(str, hidden))}: {text}")

        rows += [
            {"series": series, **row} for row in _kind(preset, context, task, hidden, tell, bias=series == "width")
        ]
    means = _means(rows)
    return Outcome(tables={"pairs": rows, "means": means}, measured=_measured(means))


def _kind(
    preset: WidthAndDepthPreset,
    context: Context,
    task: Task,
    hidden: tuple[int, ...],
    tell: Callable[[float, str], None],
    *,
    bias: bool,
) -> Table:
    """Train networks of one kind, and give one row for each pair and method."""
    from thalweg.paths.methods import Settings, connect
    from thalweg.paths.pair import Pair

    nets = endpoints(
        lambda: _net(hidden, task, bias=bias),
        task,
        preset,
        context,
        seeds=[preset.seed * 1_000 + k for k in range(preset.num_networks)],
        progress=lambda x, text: tell(0.5 * x, text),
    )
    objective = task.objective(nets[0], context, preset.num_measured)
    settings = Settings(knots=preset.knots, seed=preset.seed)
    pairs, rows = pairs_of(len(nets)), []
    for place, (first, second) in enumerate(pairs):
        pair = Pair.of(objective, nets[first], nets[second], fit_samples=preset.num_measured, seed=preset.seed)
        for step, (method, name) in enumerate(METHODS.items()):
            done = (place + step / len(METHODS)) / len(pairs)
            tell(0.5 + 0.5 * done, f"pair {place + 1} of {len(pairs)}, {name}")
            found = _loss(preset, context, task, connect(pair, method, settings), pair)
            rows.append({"width": hidden[0], "depth": len(hidden), "method": name, "pair": place, **found})
    return rows


def _net(hidden: Sequence[int], task: Task, *, bias: bool) -> "nn.Module":
    from thalweg.nets import MLP

    widths = (task.train[0].shape[1], *hidden, task.num_classes)
    return MLP(widths, "relu", bias=bias, output_bias=bias)


def _loss(preset: WidthAndDepthPreset, context: Context, task: Task, connection: Any, pair: Any) -> dict[str, Any]:
    """Give by how much the accuracy of the worst point is below that of the worse end, and the loss above."""
    from thalweg.paths import profile

    test = task.test_objective(pair.objective.module, context)
    seen = profile(connection.path, pair.objective, test=test, points=preset.points, refine=False)
    found: dict[str, Any] = {"t": seen.worst.t, "legs": len(connection.path.legs), "barrier": seen.barrier}
    for part, column in (("train", seen.train_accuracy), ("test", seen.test_accuracy)):
        assert column is not None  # noqa: S101 - targets are classes
        ends = min(float(column[0]), float(column[-1]))
        found |= {f"{part}_ends": ends, f"{part}_gap": ends - float(column.min())}
    return found


def _means(rows: Table) -> Table:
    """Average over the pairs, with the range."""
    groups: dict[tuple[str, int, int, str], Table] = {}
    for row in rows:
        groups.setdefault((row["series"], row["width"], row["depth"], row["method"]), []).append(row)
    return [
        {
            "series": series,
            "width": width,
            "depth": depth,
            "method": method,
            "pairs": len(own),
            "gap": mean(row["train_gap"] for row in own),
            "least": min(row["train_gap"] for row in own),
            "most": max(row["train_gap"] for row in own),
            "test_gap": mean(row["test_gap"] for row in own),
            "ends": mean(row["train_ends"] for row in own),
            "legs": max(row["legs"] for row in own),
        }
        for (series, width, depth, method), own in groups.items()
    ]


def _measured(means: Table) -> dict[str, Any]:
    """Correlate width and gap, method by method; only where there are at least four widths."""
    found = {}
    for name in METHODS.values():
        own = [row for row in means if row["series"] == "width" and row["method"] == name]
        if len(own) >= 4:
            found[name] = spearman([row["width"] for row in own], [-row["gap"] for row in own])
    return {"width": found} if found else {}


def figures(tables: Tables) -> "Sequence[Figure]":
    """Draw what is lost against the width, and against the depth."""
    from thalweg.lab.figures import curves

    words = "Training accuracy of the worse end less that of the worst point; means over the pairs, with their range."
    drawn = []
    for series, column, is_log, title in (
        ("width", "width", True, "What paths lose in wider networks"),
        ("depth", "depth", False, "What paths lose in deeper networks"),
    ):
        rows = [row for row in tables["means"] if row["series"] == series]
        if rows:
            drawn.append(
                curves(
                    rows,
                    id=f"gap-{series}",
                    title=title,
                    caption=words,
                    x=column,
                    y="gap",
                    series="method",
                    lower="least",
                    upper="most",
                    log_x=is_log,
                    x_title="hidden neurons" if is_log else "hidden layers",
                    y_title="loss of accuracy at the worst point",
                )
            )
    return drawn


RECIPE = Recipe(
    name="low_loss_connection/width_and_depth",
    title="Paths between wider and between deeper networks",
    source="anokhin2020lowloss, supplement A (named in sections 5.1 and 5.2; its text is not at hand)",
    version=1,
    presets={"paper": PAPER, "cpu": CPU, "quick": QUICK},
    claims=(
        Claim(
            "width",
            "The wider the hidden layer, the less is lost at the worst point: correlation, method by method.",
            "not at hand",
            "Spearman's correlation of the width with minus the mean loss of training accuracy at least 0.8, for "
            "every method (ours)",
            lambda m: all(value >= 0.8 for value in m.values()),
        ),
    ),
    run=run,
    figures=figures,
    summary=(
        "The theory behind these paths takes a layer's neurons as samples of a distribution: the more there are, the "
        "better a path that moves the distribution keeps what the network computes. So the loss along it should "
        "shrink with the width. With every further layer there is one more thing that moves."
    ),
)
