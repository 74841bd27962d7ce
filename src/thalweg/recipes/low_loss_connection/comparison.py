"""Comparison: the rows of tables 1 and 2, measured on several pairs, and what their claims are about."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from thalweg.lab.tables import Table, Tables

if TYPE_CHECKING:
    import torch

    from thalweg.lab.figures import Figure
    from thalweg.paths.leg import Leg
    from thalweg.paths.methods import Connection, Settings
    from thalweg.paths.pair import Pair
    from thalweg.paths.panel import Own, PanelRow

Ends = tuple[dict[str, float], dict[str, float]]
"""Accuracies of both ends, by the data."""

NAMES: Mapping[str, str] = {
    "linear": "Linear",
    "arc": "Arc",
    "linear+butterfly": "Linear + B-fly",
    "arc+butterfly": "Arc + B-fly",
    "iaf": "IAF flow",
    "bijection": "RealNVP bijection",
    "linear+wa": "Linear + WA",
    "arc+wa": "Arc + WA",
    "ot": "OT",
    "ot+wa": "OT + WA",
    "polygon-3": "Garipov (3)",
    "polygon-5": "Garipov (5)",
}
"""Rows of the paper's tables by the method's name; all others are ours."""

STEPS = (40, 160)
"""Steps of the two grids on which the largest step in theta is taken, on each leg of a path."""


def rows_of(place: int, measured: "Sequence[PanelRow]") -> Table:
    """Give one row for each method on one pair.

    Args:
        place: number of the pair.
        measured: of the panel.

    Returns:
        Rows with accuracies as fractions; of a method that does not apply, the reason.
    """
    rows = []
    for row in measured:
        values = row.values()
        start: dict[str, Any] = {"pair": place, "method": row.method, "row": NAMES.get(row.method, row.method)}
        if row.connection is None:
            rows.append(start | {"status": row.status, "reason": row.reason})
            continue
        kept = ["worst_train_accuracy", "worst_test_accuracy", "met_train_accuracy", "met_test_accuracy"]
        kept += ["worst_train_loss", "worst_t", "barrier", "legs", "length", "connect_seconds", "seconds"]
        rows.append(start | {"status": row.status} | {key: values[key] for key in kept})
    return rows


def profile_rows(place: int, measured: "Sequence[PanelRow]") -> Table:
    """Give loss and accuracy along every path of one pair."""
    found = []
    for row in measured:
        if row.profile is not None:
            name = NAMES.get(row.method, row.method)
            found += [{"pair": place, "row": name, **point} for point in row.profile.rows()]
    return found


def summary(rows: Table, paper: Mapping[str, tuple[float, float]]) -> Table:
    """Average over pairs: one row for each method, beside the paper's numbers.

    Args:
        rows: of all pairs.
        paper: row -> train and test accuracy in percent.

    Returns:
        Means and standard deviations over pairs, as fractions; "met" up to where B's function is reached.
    """
    found = []
    for name in dict.fromkeys(str(row["row"]) for row in rows):
        own = [row for row in rows if row["row"] == name and "worst_train_accuracy" in row]
        if not own:
            continue
        line: dict[str, Any] = {"row": name, "pairs": len(own)}
        for part in ("train", "test"):
            for kind in ("met", "worst"):
                values = [float(row[f"{kind}_{part}_accuracy"]) for row in own]
                line[f"{part} ({kind})"] = mean(values)
                if kind == "met":
                    line[f"{part} sd"] = stdev(values) if len(values) > 1 else 0.0
            line[f"paper {part}"] = paper[name][part == "test"] / 100 if name in paper else None
        line["legs"] = max(int(row["legs"]) for row in own)
        line["length"] = mean(float(row["length"]) for row in own)
        line["seconds"] = mean(float(row["connect_seconds"]) for row in own)
        found.append(line)
    return found


def ends_row(
    pairs: "Sequence[tuple[dict[str, float], dict[str, float]]]", paper: tuple[float, float]
) -> dict[str, Any]:
    """Give the row of the end points: means over pairs of the mean of both ends."""
    line: dict[str, Any] = {"row": "End points", "pairs": len(pairs)}
    for part in ("train", "test"):
        values = [mean(end[part] for end in ends) for ends in pairs]
        line[f"{part} (met)"] = line[f"{part} (worst)"] = mean(values)
        line[f"{part} sd"] = stdev(values) if len(values) > 1 else 0.0
        line[f"paper {part}"] = paper[part == "test"] / 100
    return line | {"legs": 0, "length": 0.0, "seconds": 0.0}


def step_ratio(connection: "Connection") -> float:
    """Give the largest step in theta on a fine grid of t over that on a coarse one, at worst over all legs.

    A leg that jumps has a step that does not shrink with the grid. Joints need no grid: legs meet to the bit.
    """
    path, worst = connection.path, 0.0
    for leg in path.legs:
        blends = leg.moving()
        if blends is not None and all(blend.kind == "linear" for blend in blends.values()):
            worst = max(worst, STEPS[0] / STEPS[1])  # a straight line: every step is its length over their number
            continue
        coarse, fine = (_largest_step(leg, count) for count in STEPS)
        worst = max(worst, fine / coarse if coarse > 0 else 0.0)
    return worst


def _largest_step(leg: "Leg", count: int) -> float:
    largest, before = 0.0, leg.parameters(0.0)
    for k in range(1, count + 1):
        now = leg.parameters(k / count)
        squares = sum(float((now[n] - before[n]).square().sum()) for n in now if now[n] is not before[n])
        largest, before = max(largest, squares**0.5), now
    return largest


def ends_are_exact(pair: "Pair", measured: "Sequence[PanelRow]") -> bool:
    """Say whether every path begins at A and ends at B, bit for bit."""
    return all(
        bool((row.connection.path.at(0.0) == pair.theta_a).all())
        and bool((row.connection.path.at(1.0) == pair.theta_b).all())
        for row in measured
        if row.connection is not None
    )


def end_accuracies(measured: "Sequence[PanelRow]") -> Ends:
    """Read the accuracy of both ends off the first profile."""
    found = next(row.profile for row in measured if row.profile is not None)
    columns: dict[str, torch.Tensor | None] = {"train": found.train_accuracy, "test": found.test_accuracy}
    ends = [{k: float(c[at]) for k, c in columns.items() if c is not None} for at in (0, -1)]
    return ends[0], ends[1]


def drawn(tables: Tables, *, subject: str) -> "list[Figure]":
    """Draw the table as dots beside the ends, and the accuracy along the paths of the first pair."""
    from thalweg.lab.figures import curves
    from thalweg.lab.figures.ranking import ranking

    ends = next(row for row in tables["table"] if row["row"] == "End points")
    dots = [
        {"row": row["row"], "accuracy": row[f"{part} (met)"], "data": part}
        for row in tables["table"]
        if row["row"] != "End points"
        for part in ("train", "test")
    ]
    first = [row for row in tables["profiles"] if row["pair"] == 0]
    return [
        ranking(
            dots,
            id="ranking",
            title=f"{subject}: accuracy at the worst point of each path",
            caption=(
                "Means over the pairs, up to the point where B's function is reached. The lines are the end points "
                f"(train {ends['train (met)']:.2%}, test {ends['test (met)']:.2%})."
            ),
            name="row",
            value="accuracy",
            series="data",
            references=[
                {"label": f"ends, {part}", "value": ends[f"{part} (met)"], "series": part}
                for part in ("train", "test")
            ],
        ),
        curves(
            first,
            id="along-train",
            title="Training accuracy along the paths of the first pair",
            caption="The whole of each path; where units are permuted at the end, that is its second half.",
            x="t",
            y="train_accuracy",
            series="row",
            y_title="training accuracy",
        ),
        curves(
            first,
            id="along-test",
            title="Test accuracy along the paths of the first pair",
            caption="As above, on the test data.",
            x="t",
            y="test_accuracy",
            series="row",
            y_title="test accuracy",
        ),
    ]


def measure(
    pair: "Pair",
    methods: Sequence[str],
    *,
    own: "Mapping[str, Own]",
    on: Any = None,
    test: Any,
    points: int,
    settings: "Settings",
    progress: Callable[[float, str], None],
) -> "tuple[PanelRow, ...]":
    """Run the panel on one pair."""
    from thalweg.paths.panel import panel

    return panel(pair, methods, own=own, on=on, test=test, points=points, settings=settings, progress=progress)
