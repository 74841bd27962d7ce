"""What `thalweg ensemble` shows: every ensemble beside its members, on the terminal and in the report."""

from pathlib import Path

from thalweg.cli.merge_page import (
    Rows,
    again_rows,
    cells,
    heads,
    kinds_of,
    page_section,
    ranked,
    splits_of,
    table,
)
from thalweg.cli.parts import Value
from thalweg.lab.figures import Figure, curves
from thalweg.lab.report import write_report

_COUNTED = (
    "Parameters and multiply-adds count the backbone once; multiply-adds are those of linear layers and convolutions "
    "for one sample."
)


def network_rows(record: Value) -> tuple[list[str], Rows]:
    """Give the table of networks and ensembles."""
    rows = [
        [row["name"], str(row["members"]), *cells(record, row), f"{row['parameters']:,}", f"{row['multiply_adds']:,}"]
        for row in record["rows"]
    ]
    return ["network", "members", *heads(record), "parameters", "multiply-adds"], rows


def write_page(path: Path, record: Value) -> None:
    """Write the report of an ensemble.

    Args:
        path: the file.
        record: everything in plain values.

    Raises:
        StoreError: the file cannot be written.
    """
    means = f"Of the ensembles the {record['average']} are averaged. {_COUNTED}"
    tables = [table("Networks and ensembles", *network_rows(record), means)]
    if record["file"]:
        caption = "WA(1) as one net, read back as its user would."
        tables.append(table("Measured again from the written file", *again_rows(record), caption))
    if record["notes"]:
        tables.append(table("Notes", ["note"], [[note] for note in record["notes"]]))
    figures = (*_grown(record), *ranked(record, [(row["name"], row) for row in record["rows"]]))
    shown = ("files", "own_layers", "average", "ridge", "fit_samples", "data", "test_data", "loss", "file")
    title = f"Ensembles of {len(record['files'])} networks"
    write_report(path, [page_section("ensemble", record, title, shown, figures, tables)])


def _grown(record: Value) -> list[Figure]:
    """Draw accuracy, or loss, over the number of networks."""
    kind, split = kinds_of(record)[-1], splits_of(record)[-1]
    points = [
        {"networks": count, kind: float(score[kind]), "ensemble": row["name"]}
        for row in record["rows"]
        if row["members"] > 1
        for count, score in enumerate(row["growth"][split], 1)
    ]
    return [
        curves(
            points,
            id="over-networks",
            title=f"{split.capitalize()} {kind}, by number of networks",
            caption="Each ensemble of the first networks alone; the first one is the backbone.",
            x="networks",
            y=kind,
            series="ensemble",
        )
    ]
