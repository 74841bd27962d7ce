"""What `thalweg connect` shows: the panel on the terminal, and the report's tables and figures."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from thalweg.cli.connect_apart import TOLERANCE, layer_rows, width_rows
from thalweg.cli.parts import Value
from thalweg.lab.figures import Figure, curves, ranking
from thalweg.lab.report import Section, TextTable, write_report

_MOST_CURVES = 6
"""Methods whose profiles are drawn, at most; chosen by us: what a picture holds."""

_SPREAD = 20.0
"""Ratio of the largest to the least loss from which an axis is logarithmic; chosen by us."""

Rows = list[list[str]]


def best_of(rows: Sequence[Value]) -> str | None:
    """Name the best method; None if none was measured. Of equals, the first."""
    best: Value | None = None
    for row in rows:
        best = row if is_better(row, best) else best
    return best["method"] if best is not None else None


def is_better(row: Value, other: Value | None) -> bool:
    """Say whether a method beats another: by worst training accuracy, then by worst training loss.

    Test data never choose. Both are of the whole path, up to B itself.
    """
    return row["status"] == "measured" and (other is None or _rank(row) < _rank(other))


def _rank(row: Value) -> tuple[float, float]:
    accuracy, loss = row["values"]["worst_train_accuracy"], float(row["values"]["worst_train_loss"])
    return (0.0 if accuracy is None else -float(accuracy)), (math.inf if math.isnan(loss) else loss)


def has_accuracy(record: Value) -> bool:
    """Say whether targets are classes."""
    return record["a"]["train_accuracy"] is not None


def rule(record: Value) -> str:
    """Say how the best was chosen."""
    if has_accuracy(record):
        return "the highest worst train accuracy over the whole path, then the lowest worst train loss"
    return "the lowest worst train loss over the whole path"


def end_words(record: Value) -> list[str]:
    """Give a line for A, one for B, and one that says how statistics are set along a path, if there are any."""
    found = []
    for name in ("a", "b"):
        end = record[name]
        parts = [_end(end, "train", "train")]
        if record["test_data"]:
            parts.append(_end(end, "test", "test"))
        found.append(f"{name.upper()} {end['file']}: {'; '.join(parts)}")
    if not record["statistics"].startswith("none"):
        found.append(f"BatchNorm statistics: {record['statistics']}")
    return found


def _end(end: Value, split: str, word: str) -> str:
    accuracy = end[f"{split}_accuracy"]
    told = f"{word} loss {float(end[f'{split}_loss']):.6g}"
    return told if accuracy is None else f"{told}, accuracy {accuracy:.4f}"


def summary(record: Value) -> tuple[list[str], Rows]:
    """Give the table of what was measured: worst values up to B's function, and up to B itself."""
    kind = "accuracy" if has_accuracy(record) else "loss"
    splits = ["train", *(["test"] if record["test_data"] else [])]
    heads = ["method", *(f"{split} {way}" for split in splits for way in ("to f(B)", "to B"))]
    heads += ["worst loss", "at t", "barrier", "legs", "length", "seconds", "MB", ""]
    rows = []
    for row in record["rows"]:
        if row["status"] != "measured":
            continue
        values = row["values"]
        cells = [row["method"]]
        for split in splits:
            cells += [_value(worst(row, split, kind, is_whole=is_whole), kind) for is_whole in (False, True)]
        cells += [_loss(values["worst_train_loss"]), f"{float(values['worst_t']):.3f}", _loss(values["barrier"])]
        cells += [str(values["legs"]), f"{float(values['length']):.4g}", f"{float(values['seconds']):.1f}"]
        rows.append([*cells, _memory(values["peak_bytes"]), "best" if row["method"] == record["best"] else ""])
    return heads, rows


def worst(row: Value, split: str, kind: str, *, is_whole: bool) -> float | None:
    """Give the worst value of a profile.

    Args:
        row: of a method that was measured.
        split: "train" or "test".
        kind: "accuracy" or "loss".
        is_whole: up to B itself; else up to where B's function is reached.
    """
    name = f"{split}_{kind}"
    points = [p for p in row["profile"] if is_whole or p["t"] <= row["meets"]]
    values = [float(p[name]) for p in points if p.get(name) is not None]
    if not values:
        return None
    return min(values) if kind == "accuracy" else max(values)


def remarks(rows: Sequence[Value]) -> Iterator[tuple[str, str, str]]:
    """Give method, kind and text of what did not apply or failed, then of what a user should know."""
    for row in rows:
        if row["status"] != "measured":
            yield row["method"], row["status"], row["reason"]
    for row in rows:
        for note in row.get("notes", ()):
            yield row["method"], "note", note
        if row.get("finite", "finite") != "finite":
            yield row["method"], "note", row["finite"]


def _value(value: float | None, kind: str) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if kind == "accuracy" else _loss(value)


def _loss(value: Any) -> str:
    return f"{float(value):.4g}"


def _memory(count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / 2**20:.0f}"


def profiles_csv(rows: Sequence[Value]) -> bytes:
    """Write every point of every profile as a table."""
    columns = ["method", "t", "leg", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerows({"method": row["method"], **point} for point in row.get("profile", ()))
    return text.getvalue().encode()


def write_page(path: Path, record: Value) -> None:
    """Write the report.

    Args:
        path: the file.
        record: everything in plain values.

    Raises:
        StoreError: the file cannot be written.
    """
    from thalweg.lab.runs.environment import Environment
    from thalweg.lab.runs.run import SCHEMA_VERSION, Manifest

    shown = ("data", "test_data", "loss", "statistics", "best")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        id="",
        recipe="connect",
        reference="",
        title=f"{record['a']['file']} connected to {record['b']['file']}",
        source="",
        summary=f"{len(measured_rows(record))} paths on {record['data']}; loss: {record['loss']}.",
        version=1,
        preset="",
        parameters={key: record[key] for key in shown if record[key] is not None} | record["settings"],
        status="finished",
        device=record["device"],
        environment=Environment(**record["environment"]),
        started=record["started"],
        seconds=record["seconds"],
        command=record["command"],
        claims=(),
        checksums={},
    )
    write_report(path, [Section(manifest, tuple(_figures(record)), tables=tuple(_tables(record)))])


def measured_rows(record: Value) -> list[Value]:
    """Give the rows with a profile."""
    return [row for row in record["rows"] if row["status"] == "measured"]


def _tables(record: Value) -> list[TextTable]:
    ends = [[f"{name.upper()}: {record[name]['file']}", *_end_cells(record[name])] for name in ("a", "b")]
    columns = ("checkpoint", "train loss", "train accuracy", "test loss", "test accuracy")
    heads, rows = summary(record)
    meaning = (
        "Worst values over a path. To f(B): up to where the function of B is reached, its units in the order of "
        "A's; to B: up to B itself, weight by weight. Barrier: height of the train loss above the straight line "
        f"between the losses of the ends. Best: {rule(record)}; test data do not choose."
    )
    listed = [[r["method"], r["words"], r["source"]] for r in record["rows"]]
    told = [list(remark) for remark in remarks(record["rows"])]
    found = [
        _table("The two ends", columns, ends, f"At t = 0 and t = 1. Statistics: {record['statistics']}."),
        _table("The panel", [*heads[:1], "note", *heads[1:-1]], [[r[0], r[-1], *r[1:-1]] for r in rows], meaning),
        _table("Methods", ("method", "what it does", "source"), listed, ""),
    ]
    if told:
        found.insert(2, _table("To know", ("method", "kind", "text"), told, ""))
    if "apart" in record:
        layers = (
            "One layer alone goes straight from one network's to the other's: greatest rise of the train loss. "
            "Mended: how much lower the loss is at the midpoint of the whole line when this layer is fitted there."
        )
        width = (
            "Both networks in one with more units: so many units of B, those farthest from A's, get places of their "
            f"own until the straight line has a barrier of at most {TOLERANCE:g}."
        )
        found.append(_table("The straight line, layer by layer", *layer_rows(record["apart"]), layers))
        found.append(_table("Connectivity width", *width_rows(record["apart"]), width))
    return found


def _end_cells(end: Value) -> list[str]:
    kinds = [(split, kind) for split in ("train", "test") for kind in ("loss", "accuracy")]
    values = [(end[f"{split}_{kind}"], kind) for split, kind in kinds]
    return [_value(None if value is None else float(value), kind) for value, kind in values]


def _table(title: str, heads: Sequence[str], rows: Rows, caption: str) -> TextTable:
    return TextTable(title, tuple(heads), tuple(tuple(row) for row in rows), caption)


def _figures(record: Value) -> Iterator[Figure]:
    rows = measured_rows(record)
    if not rows:
        return
    yield _ranked(record, rows)
    few = _few(rows)
    yield _profiles(few, "train", "loss")
    splits = ["train", *(["test"] if record["test_data"] else [])]
    if has_accuracy(record):
        for split in splits:
            yield _profiles(few, split, "accuracy")
    elif record["test_data"]:
        yield _profiles(few, "test", "loss")


def _few(rows: Sequence[Value]) -> list[Value]:
    """Choose the best few, in the order of the table; the straight line is always among them."""
    line = [row for row in rows if row["method"] == "linear"]
    others = sorted((row for row in rows if row not in line), key=_rank)[: _MOST_CURVES - len(line)]
    return [row for row in rows if row in line or row in others]


def _ranked(record: Value, rows: Sequence[Value]) -> Figure:
    kind = "accuracy" if has_accuracy(record) else "loss"
    splits = ["train", *(["test"] if record["test_data"] else [])]
    table, lines = [], []
    for split in splits:
        for row in rows:
            whole, met = (worst(row, split, kind, is_whole=is_whole) for is_whole in (True, False))
            table.append({"method": row["method"], "value": whole, "split": split, "is_met": False})
            if met != whole:
                table.append({"method": row["method"], "value": met, "split": split, "is_met": True})
        ends = [float(record[name][f"{split}_{kind}"]) for name in ("a", "b")]
        worse = min(ends) if kind == "accuracy" else max(ends)
        lines.append({"label": f"{split}, worse end", "value": worse, "series": split})
    return ranking(
        table,
        id="ranking",
        title=f"Worst {kind} along the path of each method",
        caption="Filled: up to B itself. Hollow, where it differs: up to where B's function is reached. Dashed: the "
        "worse of the two ends, which no path can beat.",
        name="method",
        value="value",
        series="split",
        hollow="is_met",
        references=lines,
        log_x=kind == "loss" and _is_spread([row["value"] for row in table]),
        x_title=f"worst {kind}",
    )


def _profiles(rows: Sequence[Value], split: str, kind: str) -> Figure:
    name = f"{split}_{kind}"
    table = [{"t": p["t"], name: p.get(name), "method": row["method"]} for row in rows for p in row["profile"]]
    permuted = [row["method"] for row in rows if row["meets"] < 1]
    caption = "The straight line and the best paths; t = 0 is A, t = 1 is B."
    if permuted:
        caption += f" From t = 0.5 on B's units are permuted, and B's function should stay: {', '.join(permuted)}."
    return curves(
        table,
        id=f"profile-{split}-{kind}",
        title=f"{split.capitalize()} {kind} along the paths",
        caption=caption,
        x="t",
        y=name,
        series="method",
        log_y=kind == "loss" and _is_spread([p[name] for p in table]),
        x_title="t",
        y_title=f"{split} {kind}",
    )


def _is_spread(values: Sequence[Any]) -> bool:
    found = [float(v) for v in values if v is not None and math.isfinite(float(v))]
    return bool(found) and min(found) > 0 and max(found) / min(found) > _SPREAD
