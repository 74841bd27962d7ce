"""What `thalweg train` shows: one row for each seed, and the report's curves over the epochs."""

from collections.abc import Sequence
from pathlib import Path

from thalweg.cli.parts import Value
from thalweg.lab.figures import Figure, curves
from thalweg.lab.report import Section, TextTable, write_report

_SHOWN = (
    *("data", "test_data", "loss", "epochs", "batch_size", "optimizer", "learning_rate", "momentum", "weight_decay"),
    *("schedule", "augment"),
)

_CAPTION = "Measured at the end in eval mode: BatchNorm with its running statistics, no dropout, no augmentation."


def is_page(path: Path) -> bool:
    """Say whether a file is a page that `write_page` wrote."""
    try:
        return _CAPTION in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def summary(rows: Sequence[Value]) -> tuple[list[str], list[list[str]]]:
    """Give the table of the seeds.

    Args:
        rows: the record of each.
    """
    heads, columns = ["seed"], [[str(row["seed"]) for row in rows]]
    for kind in ("train", "test"):
        measured = [row[kind] or {"loss": None, "accuracy": None} for row in rows]
        for name, digits in (("loss", ".6g"), ("accuracy", ".4f")):
            values = [one[name] for one in measured]
            if any(value is not None for value in values):  # test data may have been given for some seeds alone
                heads.append(f"{kind} {name}")
                columns.append(["–" if value is None else f"{value:{digits}}" for value in values])
    heads.append("seconds")
    columns.append([f"{row['seconds']:.1f}" for row in rows])
    return heads, [list(cells) for cells in zip(*columns, strict=True)]


def write_page(path: Path, record: Value) -> None:
    """Write the report: the seeds, and loss and accuracy over the epochs.

    Args:
        path: the file.
        record: everything in plain values.

    Raises:
        StoreError: the file cannot be written.
    """
    from thalweg.lab.runs.environment import Environment
    from thalweg.lab.runs.run import SCHEMA_VERSION, Manifest

    rows = record["seeds"]
    count = f"{len(rows)} seeds" if len(rows) > 1 else f"seed {rows[0]['seed']}"
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        id="",
        recipe="train",
        reference="",
        title=f"{record['net']}: {count}",
        source="",
        summary=f"Trained on {record['data']}; loss: {record['loss']}.",
        version=1,
        preset="",
        parameters={key: record[key] for key in _SHOWN if record[key] is not None},
        status="finished",
        device=record["device"],
        environment=Environment(**record["environment"]),
        started=record["started"],
        seconds=record["seconds"],
        command=record["command"],
        claims=(),
        checksums={},
    )
    heads, cells = summary(rows)
    table = TextTable(
        "Seeds",
        (*heads, "checkpoint"),
        tuple((*line, row["file"]) for line, row in zip(cells, rows, strict=True)),
        _CAPTION,
    )
    write_report(path, [Section(manifest, tuple(_figures(rows)), tables=(table,))])


def _figures(rows: Sequence[Value]) -> list[Figure]:
    found = []
    for key, name in (("losses", "loss"), ("accuracies", "accuracy")):
        if rows[0][key] is None:
            continue
        points = [
            {"epoch": epoch, name: value, "seed": f"seed {row['seed']}"}
            for row in rows
            for epoch, value in enumerate(row[key], 1)
        ]
        found.append(
            curves(
                points,
                id=f"{name}-over-epochs",
                title=f"{name.capitalize()} over the epochs",
                caption="Mean over the mini-batches of each epoch while the weights moved, in train mode.",
                x="epoch",
                y=name,
                series="seed",
                log_y=name == "loss" and all(point[name] > 0 for point in points),
            )
        )
    return found
