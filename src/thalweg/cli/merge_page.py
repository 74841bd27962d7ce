"""What `thalweg merge` shows: the steps of a merge on the terminal, and the report's tables and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thalweg.cli.parts import Value
from thalweg.lab.figures import Figure
from thalweg.lab.figures.ranking import ranking
from thalweg.lab.report import Section, TextTable, write_report

Rows = list[list[str]]


def splits_of(record: Value) -> list[str]:
    """List the splits that were measured."""
    return ["train", *(["test"] if record["test_data"] else [])]


def kinds_of(record: Value) -> list[str]:
    """List what was measured: loss, and accuracy where targets are classes."""
    return ["loss", *(["accuracy"] if record["measured"]["train"]["accuracy"] is not None else [])]


def cells(record: Value, row: Mapping[str, Any]) -> list[str]:
    """Give the cells of a row of measurements, split by split."""
    return [worded(row[split][kind], kind) for split in splits_of(record) for kind in kinds_of(record)]


def heads(record: Value) -> list[str]:
    """Give their headings."""
    return [f"{split} {kind}" for split in splits_of(record) for kind in kinds_of(record)]


def worded(value: Any, kind: str) -> str:
    """Word a loss or an accuracy."""
    if value is None:
        return "–"
    return f"{float(value):.4f}" if kind == "accuracy" else f"{float(value):.6g}"


def step_rows(record: Value) -> tuple[list[str], Rows]:
    """Give the table of the steps of a merge."""
    return ["network", *heads(record)], [[step["words"], *cells(record, step)] for step in record["steps"]]


def again_rows(record: Value) -> tuple[list[str], Rows]:
    """Give the table of what was measured from the written file."""
    return ["file", *heads(record)], [[Path(record["file"]).name, *cells(record, record["measured"])]]


def ranked(record: Value, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[Figure, ...]:
    """Draw losses and accuracies of networks by name.

    Args:
        record: everything in plain values.
        rows: name, and measurements by split.
    """
    found = []
    for kind in reversed(kinds_of(record)):
        table = [
            {"network": name, kind: float(row[split][kind]), "data": split}
            for split in splits_of(record)
            for name, row in rows
        ]
        caption = "Measured on all of the data, each network in eval mode."
        options: Any = {"name": "network", "value": kind, "series": "data"}
        found.append(ranking(table, id=f"networks-{kind}", title=kind.capitalize(), caption=caption, **options))
    return tuple(found)


def page_section(
    command: str,
    record: Value,
    title: str,
    shown: Sequence[str],
    figures: Sequence[Figure],
    tables: Sequence[TextTable],
) -> Section:
    """Make the one section of a command's page.

    Args:
        command: its name.
        record: everything in plain values.
        title: of the page.
        shown: keys of the record that are shown as parameters.
        figures: its pictures.
        tables: its tables.
    """
    from thalweg.lab.runs.environment import current_environment
    from thalweg.lab.runs.run import SCHEMA_VERSION, Manifest

    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        id="",
        recipe=command,
        reference="",
        title=title,
        source="",
        summary=f"On {record['data']}; loss: {record['loss']}.",
        version=1,
        preset="",
        parameters={key: record[key] for key in shown if record[key] is not None},
        status="finished",
        device=record["device"],
        environment=current_environment(),
        started=record["started"],
        seconds=record["seconds"],
        command=record["command"],
        claims=(),
        checksums={},
    )
    return Section(manifest, tuple(figures), tables=tuple(tables))


def table(title: str, columns: Sequence[str], rows: Rows, caption: str = "") -> TextTable:
    """Make a table of a report."""
    return TextTable(title, tuple(columns), tuple(tuple(row) for row in rows), caption)


def write_page(path: Path, record: Value) -> None:
    """Write the report of a merge.

    Args:
        path: the file.
        record: everything in plain values.

    Raises:
        StoreError: the file cannot be written.
    """
    notes = "; ".join(record["notes"])
    tables = [
        table("Networks", *step_rows(record), f"{notes[:1].upper()}{notes[1:]}." if notes else ""),
        table("Measured again from the written file", *again_rows(record), "Read back as its user would."),
    ]
    if record["moved"]:
        moved = [[name, str(count), str(size)] for name, (count, size) in record["moved"].items()]
        tables.append(table("Units of B that change their place", ["group", "moved", "of"], moved))
    figures = ranked(record, [(step["words"], step) for step in record["steps"]])
    shown = ("a", "b", "data", "test_data", "loss", "match", "method", "at", "repair", "file")
    title = f"{Path(record['a']).name} and {Path(record['b']).name} merged"
    write_report(path, [page_section("merge", record, title, shown, figures, tables)])
