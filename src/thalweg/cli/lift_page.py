"""The page of `thalweg lift --report`: sizes of all layers before and after, and how the checkpoint is loaded."""

import shlex
import sys
from pathlib import Path
from typing import Any

from thalweg.cli.lift import layer_rows
from thalweg.lab.figures import Figure, ranking
from thalweg.lab.report import Section, TextTable, write_report


def write_page(path: Path, record: dict[str, Any]) -> None:
    """Write the page.

    Args:
        path: the file.
        record: what was done, in plain values, with `started` and `seconds`.

    Raises:
        StoreError: the file cannot be written.
    """
    from thalweg.lab.runs.environment import current_environment
    from thalweg.lab.runs.run import SCHEMA_VERSION, Manifest

    sizes = record["parameters"]
    shown = ("file", "bytes", "padded", "output_change", "example")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        id="",
        recipe="lift",
        reference="",
        title=f"{record['file']}: {sizes['before']:,} parameters lifted to {sizes['after']:,}",
        source="",
        summary=f"Outputs change by {record['output_change']:.1e} (relative).",
        version=1,
        preset="",
        parameters={key: record[key] for key in shown},
        status="finished",
        device="cpu",
        environment=current_environment(),
        started=record["started"],
        seconds=record["seconds"],
        command=shlex.join(["thalweg", *sys.argv[1:]]),
        claims=(),
        checksums={},
    )
    note = "" if record["layers"] else "No figures: no layer was lifted."
    listings = {"Loading it in plain PyTorch": "\n".join(record["load"])}
    write_report(path, [Section(manifest, _figures(record), note, tuple(_tables(record)), listings)])


def _tables(record: dict[str, Any]) -> list[TextTable]:
    heads, rows = layer_rows(record["layers"])
    caption = (
        "Lifted: weights and biases of the relaxed layer. The share that is local counts the weights that read an "
        "input through the kernel; the others are 0 before training."
    )
    found = [TextTable("Lifted layers", tuple(heads), tuple(map(tuple, rows)), caption)]
    if record["kept"]:
        found.append(TextTable("Kept as they are", ("layer", "why"), tuple(record["kept"].items())))
    return found


def _figures(record: dict[str, Any]) -> tuple[Figure, ...]:
    rows = [
        {"layer": layer["name"] or "(all)", "parameters": layer["parameters"][key], "form": form}
        for layer in record["layers"]
        for key, form in (("before", "shared"), ("after", "lifted"))
    ]
    if not rows:
        return ()
    figure = ranking(
        rows,
        id="parameters",
        title="Parameters of each layer",
        caption="On a logarithmic scale: what weights and biases of a layer were, and what they are lifted.",
        name="layer",
        value="parameters",
        series="form",
        log_x=True,
    )
    return (figure,)
