"""Figures of lab 2, drawn from its tables."""

from typing import TYPE_CHECKING, Any

from thalweg.lab.tables import Table

if TYPE_CHECKING:
    from thalweg.lab.figures import Figure


def training_figures(rows: Table) -> "list[Figure]":
    """Draw training loss and test accuracy over the epochs, network by network, for the first seed."""
    from thalweg.lab.figures import curves

    seed = rows[0]["seed"]
    drawn = [{**row, "series": named(row), "place": row["epoch"] + 1} for row in rows if row["seed"] == seed]
    shared: dict[str, Any] = {"x": "place", "series": "series", "log_x": True, "x_title": "epochs + 1"}
    return [
        curves(
            drawn,
            id="training-loss",
            title="Training loss, with the constraints and without",
            caption="Cross-entropy on all training images. e…@t: lifted after t epochs, its own epochs counted.",
            y="train_loss",
            log_y=True,
            y_title="training loss",
            **shared,
        ),
        curves(
            drawn,
            id="test-accuracy",
            title="Test accuracy along training, with the constraints and without",
            caption="The same networks on the test images.",
            y="test_accuracy",
            y_title="test accuracy",
            **shared,
        ),
    ]


def accuracy_figures(by_time: Table) -> "list[Figure]":
    """Draw the accuracies at the end over the relax time, and what the weights give by themselves."""
    from thalweg.lab.figures import curves

    relaxed = [row for row in by_time if row["relax_time"] is not None]
    levels = [
        {**level, "relax_time": row["relax_time"]}
        for level in by_time
        if level["relax_time"] is None
        for row in relaxed
        if row["network"] == relaxed[0]["network"]
    ]
    rows = [{**row, "place": row["relax_time"] + 1} for row in (*relaxed, *levels)]
    shared: dict[str, Any] = {"x": "place", "log_x": True, "x_title": "relax time in epochs + 1"}
    found = [
        curves(
            rows,
            id="final-accuracy",
            title="When to leave: test accuracy at the end over the relax time",
            caption="Means over networks with their range, at the end; levels: networks that were not relaxed.",
            y="test_accuracy",
            series="network",
            lower="test_accuracy_least",
            upper="test_accuracy_most",
            y_title="test accuracy",
            **shared,
        )
    ]
    parts = {"test_accuracy": "all weights", "local_alone": "local alone", "off_local_alone": "off-local alone"}
    masked = [
        {"place": row["relax_time"] + 1, "weights": words, "accuracy": row[name]}
        for name, words in parts.items()
        for row in relaxed
        if "local_alone" in row
    ]
    if masked:
        found.append(
            curves(
                masked,
                id="masked",
                title="What local and off-local weights give, together and alone",
                caption="Test accuracy at the end with the other weights of the lifted layers set to 0.",
                y="accuracy",
                series="weights",
                y_title="test accuracy",
                **shared,
            )
        )
    return found


def deviation_figures(by_time: Table) -> "list[Figure]":
    """Draw how far relaxed networks go: over the relax time, the loss at the start, and against accuracy."""
    from thalweg.lab.figures import curves

    rows = [{**row, "place": row["relax_time"] + 1} for row in by_time if row["relax_time"] is not None]
    dense = [row for row in rows if row["delta"] > 0]
    found = []
    for x, title, words in (
        ("place", "How far relaxed networks go, over the relax time", "relax time in epochs + 1"),
        (
            "start_train_loss",
            "How far relaxed networks go, over their loss at the start",
            "training loss at the start",
        ),
    ):
        if dense:
            found.append(
                curves(
                    _ordered(dense if x == "place" else [*dense, *_from_scratch(by_time)], x),
                    id=f"deviation-{x.replace('_', '-')}",
                    title=title,
                    caption="δ = ‖off-local weights‖ / ‖all parameters‖ at the end of training, means over networks.",
                    x=x,
                    y="delta",
                    series="network",
                    log_x=x == "place",
                    x_title=words,
                    y_title="δ",
                )
            )
    if dense:
        found.append(
            curves(
                _ordered([*dense, *_from_scratch(by_time)], "delta"),
                id="deviation-accuracy",
                title="Accuracy against the distance from the convolutional networks",
                caption="Test accuracy at the end over δ; each point is a relax time.",
                x="delta",
                y="test_accuracy",
                series="network",
                x_title="δ",
                y_title="test accuracy",
            )
        )
    found.append(
        curves(
            [row for row in rows if row["sharing"] > 0],
            id="sharing",
            title="How far tied weights drift apart",
            caption="Variance of local weights about the mean of those that were one weight, in their mean square.",
            x="place",
            y="sharing",
            series="network",
            log_x=True,
            log_y=True,
            x_title="relax time in epochs + 1",
            y_title="violation of weight sharing",
        )
    )
    return found


def filter_figures(rows: Table) -> "list[Figure]":
    """Draw the first-layer filters before and after training."""
    from thalweg.lab.figures import matrix

    groups: dict[tuple[Any, Any], Table] = {}
    for row in rows:
        groups.setdefault((row["relax_time"], row["when"]), []).append(row)
    words = {"start": "before training", "end": "at the end"}
    named_times = {time: "from scratch" if time is None else f"lifted at epoch {time}" for time, _ in groups}
    return [
        matrix(
            cells,
            id=f"filter-{'scratch' if time is None else time}-{when}",
            title=f"A unit of the first layer, {named_times[time]}: {words[when]}",
            caption="log10 of the size of its weights on the first channel of the image; grey is 0.",
            x_title="pixel across",
            y_title="pixel down",
        )
        for (time, when), cells in groups.items()
        if any(cell["value"] is not None for cell in cells)
    ]


def named(row: dict[str, Any]) -> str:
    """Name a network in a legend: eFCN@3 is one that was lifted after 3 epochs."""
    return str(row["network"]) if row["relax_time"] is None else f"{row['network']}@{row['relax_time']}"


def _from_scratch(by_time: Table) -> Table:
    """Give the rows of unconstrained networks that were not lifted."""
    return [row for row in by_time if row["relax_time"] is None and row.get("delta", 0.0) > 0]


def _ordered(rows: Table, column: str) -> Table:
    """Order rows by a column."""
    return sorted(rows, key=lambda row: float(row[column]))
