"""What `thalweg reduce --data` shows: the trade-off on the terminal, and the report's tables and figures."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg.cli.network import Network
from thalweg.cli.parts import Value
from thalweg.cli.reduce import group_rows
from thalweg.lab.figures import Figure, curves, matrix
from thalweg.lab.report import Section, TextTable, write_report

if TYPE_CHECKING:
    from thalweg.embeddings import Merge, Reduced, TradeOff, TradeOffPoint

_MOST_GROUPS = 4
"""Groups with a column or a picture of their own, at most; chosen by us: what a page holds."""

_MOST_UNITS = 400
"""Units of a similarity matrix, at most; of more every so-manieth is drawn. Chosen by us: 160,000 cells, about what a
screen can show."""

Rows = list[list[str]]


def distinct_points(record: Value) -> list[Value]:
    """Give the points of the curve that differ, the widest first; levels that changed nothing are left out."""
    found: dict[Any, Value] = {}
    for point in record["points"]:
        found.setdefault((*point["widths"].items(), point["loss"], point["agreement"]), point)
    return sorted(found.values(), key=lambda p: (-p["units"], -p["agreement"]))


def curve_rows(record: Value, *, is_whole: bool) -> tuple[list[str], Rows]:
    """Give the table of the trade-off.

    Args:
        record: everything in plain values.
        is_whole: show the points that another one outdoes, too; else the network as it is, the frontier, along which
            units and agreement both fall, and what was chosen.
    """
    names = list(record["widths"]) if len(record["widths"]) <= _MOST_GROUPS else []
    has_accuracy = record["chosen"]["accuracy"] is not None
    heads = ["similarity", "amplitude", "units", *names, "parameters", "loss"]
    heads += ["accuracy"] * has_accuracy + ["agreement", "largest change", ""]
    rows = []
    for number, point in enumerate(distinct_points(record)):
        similar = "as it is" if not number else "equal"
        same = all(point[key] == record["chosen"][key] for key in ("widths", "loss", "agreement"))
        if number and point["is_dominated"] and not (is_whole or same):
            continue
        row = [similar if point["similarity"] is None else f"{point['similarity']:g}", f"{point['amplitude']:g}"]
        row += [str(point["units"]), *(str(point["widths"][name]) for name in names)]
        row += [f"{point['parameters']:,}", f"{point['loss']:.6g}"]
        row += [f"{point['accuracy']:.4f}"] if has_accuracy else []
        row += [f"{point['agreement']:.4f}", f"{point['max_change']:.2g}"]
        rows.append([*row, "chosen" if same else "dominated" if point["is_dominated"] else ""])
    return heads, rows


def again_rows(record: Value) -> tuple[list[str], Rows]:
    """Give the table of what was measured from the written file."""
    rows = []
    for name, words in (("data", record["data"]), ("test", record["test_data"])):
        if name in record["measured"]:
            before, after = (record["measured"][name][k] for k in ("before", "after"))
            row = [words, f"{before['loss']:.6g}", f"{after['loss']:.6g}"]
            row += [_fraction(before["accuracy"]), _fraction(after["accuracy"]), f"{after['agreement']:.4f}"]
            rows.append(row)
    return ["data", "loss before", "after", "accuracy before", "after", "agreement"], rows


def _fraction(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def write_page(
    path: Path, record: Value, curve: "TradeOff", chosen: "TradeOffPoint", network: Network, result: "Reduced"
) -> None:
    """Write the report: the curve, the groups, and how similar their units are.

    Args:
        path: the file.
        record: everything in plain values.
        curve: the trade-off.
        chosen: the point that was written.
        network: before.
        result: after.

    Raises:
        StoreError: the file cannot be written.
    """
    from thalweg.lab.runs.environment import current_environment
    from thalweg.lab.runs.run import SCHEMA_VERSION, Manifest

    shown = ("data", "test_data", "loss", "rule", "file")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        id="",
        recipe="reduce",
        reference="",
        title=f"{record['file']}: {curve.before.num_units} units reduced to {chosen.num_units}",
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
    figures = (*_curves(record), *_matrices(curve, network, result))
    write_report(path, [Section(manifest, figures, tables=tuple(_tables(record, result)))])


def _tables(record: Value, result: "Reduced") -> list[TextTable]:
    heads, rows = group_rows(result)
    merges = result.reduction.merges
    grouped = [[*row, _sizes(merges[row[0]]) if row[0] in merges else "–"] for row in rows]
    kind = record["chosen"]["kind"]
    meaning = (
        "Agreement: the fraction of samples that get the same prediction as before."
        if kind == "predictions"
        else "Agreement: the share of the variance of the outputs before that the outputs after explain."
    )
    named, points = curve_rows(record, is_whole=True)
    named, points = ["note", *named[:-1]], [[row[-1], *row[:-1]] for row in points]
    again, measured = again_rows(record)
    kept = [[name, reason] for name, reason in record["kept"].items()]
    found = [
        _table("Width against agreement", named, points, f"{meaning} Levels that changed nothing are left out."),
        _table("Measured again from the written file", again, measured, "Read back as its user would."),
        _table("Groups", [*heads, "sizes of the clusters"], grouped, "5 × 3: three clusters of five units each."),
    ]
    return [*found, _table("Kept at their width", ["group", "why"], kept, "")] if kept else found


def _table(title: str, heads: Sequence[str], rows: Rows, caption: str) -> TextTable:
    return TextTable(title, tuple(heads), tuple(tuple(row) for row in rows), caption)


def _sizes(merge: "Merge") -> str:
    counts = Counter(np.bincount(merge.labels[merge.labels >= 0], minlength=merge.after).tolist())
    return ", ".join(f"{size} × {count}" if count > 1 else str(size) for size, count in sorted(counts.items())[::-1])


def _curves(record: Value) -> list[Figure]:
    points = sorted(record["points"], key=lambda p: p["units"])
    amplitudes = sorted({p["amplitude"] for p in points})
    found = []
    titles = {"agreement": "Agreement with the network before", "loss": "Loss", "accuracy": "Accuracy"}
    for key, title in titles.items():
        if record["chosen"][key] is None:
            continue
        rows = [
            {"units": p["units"], key: p[key], "curve": f"amplitude {a:g}"}
            for a in amplitudes
            for p in points
            if p["amplitude"] == a
        ]
        if key == "agreement":
            best = [p for p in points if not p["is_dominated"]]
            rows += [{"units": p["units"], key: p[key], "curve": "frontier"} for p in best]
        caption = (
            "One point for every level of similarity. The frontier leaves out points that another one outdoes: fewer "
            "units and more agreement."
            if key == "agreement"
            else "One point for every level of similarity."
        )
        found.append(
            curves(
                rows,
                id=f"over-units-{key}",
                title=f"{title}, by width",
                caption=caption,
                x="units",
                y=key,
                series="curve",
                x_title="units of all groups",
            )
        )
    return found


def _matrices(curve: "TradeOff", network: Network, result: "Reduced") -> list[Figure]:
    """Draw the similarity of the units of the largest groups that were reduced, cluster by cluster."""
    from thalweg.embeddings import similarity_matrix

    state = {**dict(network.module.named_parameters()), **dict(network.module.named_buffers())}
    merges = result.reduction.merges
    largest = sorted(merges, key=lambda name: -merges[name].before)[:_MOST_GROUPS]
    found = []
    for number, name in enumerate(largest):
        order, breaks = _ordered(merges[name])
        step = -(-len(order) // _MOST_UNITS)
        alike = similarity_matrix(curve.view, state, name)[np.ix_(order[::step], order[::step])]
        units = order[::step].tolist()
        cells = [
            {"row": row, "column": column, "value": round(float(alike[i, j]), 3)}
            for i, row in enumerate(units)
            for j, column in enumerate(units)
        ]
        few = f" Every {step}th unit is drawn." if step > 1 else ""
        caption = (
            "Units that were merged stand together, the largest clusters first, then those that stay alone, then "
            f"those that were dropped.{few} 1: the incoming vectors are the same (of the same direction, where only "
            "ReLU-like operations follow)."
        )
        found.append(
            matrix(
                cells,
                id=f"similarity-{number}",
                title=f"Similarity of the units of {name}",
                caption=caption,
                low=-1.0,
                high=1.0,
                x_title="unit",
                y_title="unit",
                breaks=sorted({b // step for b in breaks} - {0, len(units)}),
            )
        )
    return found


def _ordered(merge: "Merge") -> tuple[np.ndarray, list[int]]:
    """Give the units cluster by cluster, and where clusters of two and more end, and those that stay alone."""
    sizes = np.bincount(merge.labels[merge.labels >= 0], minlength=merge.after)
    size = np.where(merge.labels >= 0, sizes[np.maximum(merge.labels, 0)], 0)
    order = np.lexsort((np.arange(len(size)), merge.labels, -size))
    kinds = [(int(size[u]), int(merge.labels[u]) if size[u] > 1 else -1) for u in order]
    return order, [place for place in range(1, len(kinds)) if kinds[place] != kinds[place - 1]]
