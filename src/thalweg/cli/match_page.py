"""The page of `thalweg match`: heat maps ordered by match, how well units are met, all layers with all."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.cli.match_record import earlier_rows, layer_rows, number
from thalweg.cli.parts import Value
from thalweg.lab.figures import Figure, curves, matrix, ranking
from thalweg.lab.report import Section, TextTable, write_report

if TYPE_CHECKING:
    from thalweg.teacher_student import LayerMatch, Match

# Chosen by us: cells of all heat maps together, so that the page stays below some ten MB, and the sides of one.
_CELLS, _LEAST_SIDE, _MOST_SIDE = 600_000, 40, 240
_SHOWN_UNITS = 5  # of each layer in the table of the least matched


def write_page(path: Path, record: Value, found: "Match") -> None:
    """Write the report of a match.

    Args:
        path: the file.
        record: everything but the matrices, in plain values.
        found: the match.

    Raises:
        StoreError: the file cannot be written.
    """
    from thalweg.lab.runs.environment import current_environment
    from thalweg.lab.runs.run import SCHEMA_VERSION, Manifest

    a, b = (Path(record[key]).name for key in "ab")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        id="",
        recipe="match",
        reference="",
        title=f"Units of {a} met in {b}",
        source="",
        summary=f"On {record['data']}.",
        version=1,
        preset="",
        parameters={key: record[key] for key in ("a", "b", "earlier", "data", "layers_by", "file") if record[key]},
        status="finished",
        device=record["device"],
        environment=current_environment(),
        started=record["started"],
        seconds=record["seconds"],
        command=record["command"],
        claims=(),
        checksums={},
    )
    write_report(path, [Section(manifest, tuple(_figures(record, found)), tables=tuple(_tables(record, found)))])


def _tables(record: Value, found: "Match") -> list[TextTable]:
    caption = (
        "Of each unit of A, the unit of B that correlates best. Mean best: of ρ, over A's units that vary; ≥ 0.9: "
        "share of them met so well; distinct: different units of B among the best; one-to-one: mean ρ of the "
        "assignment of largest total; margin: best less second best; dead: units of A / of B that never vary; B "
        "alone: units of B whose best ρ is below 0.5."
    )
    tables = [_table("Layers", *layer_rows(record), caption)]
    if record["earlier"]:
        words = "Of the units that are best now: mean best ρ then, and their mean rank then (0 is first, 1 is last)."
        tables.append(_table("Did the winners lead?", *earlier_rows(record), words))
    compared = [[_pair(layer), layer.compared, f"{layer.num_rows:,}"] for layer in found.layers if layer.compared]
    if compared:
        words = "Samples: every input, and every position that is compared."
        tables.append(_table("Positions", ["layers", "compared by", "samples"], compared, words))
    if record["skipped"]:
        tables.append(_table("Not compared", ["what", "why"], [list(item) for item in record["skipped"].items()]))
    least = [row for layer in found.layers for row in _least_matched(layer)]
    words = f"Of each layer up to {_SHOWN_UNITS} living units of A, the worst first; the .json has all of them."
    heads = ["layers", "unit of A", "best in B", "ρ", "second best", "margin"]
    return [*tables, _table("Units of A that are met least", heads, least, words)]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> TextTable:
    return TextTable(title, tuple(columns), tuple(tuple(row) for row in rows), caption)


def _least_matched(layer: "LayerMatch") -> list[list[str]]:
    living = [int(unit) for unit in layer.order_a.flip(0) if layer.alive_a[unit]]
    columns = [values.tolist() for values in (layer.best, layer.rho, layer.runner_up, layer.margin)]
    return [
        [_pair(layer), str(unit), str(columns[0][unit]), *(number(column[unit]) for column in columns[1:])]
        for unit in living[:_SHOWN_UNITS]
    ]


def _pair(layer: "LayerMatch") -> str:
    return layer.a if layer.a == layer.b else f"{layer.a} = {layer.b}"


def _figures(record: Value, found: "Match") -> list[Figure]:
    figures = [_summary(found), _sorted_curves(found)]
    if record["table"]:
        figures.append(_all_layers(record))
    if len(record["earlier"]) > 1:
        figures += _histories(record, found)
    side = int(math.sqrt(_CELLS / len(found.layers)))
    side = max(_LEAST_SIDE, min(_MOST_SIDE, side))
    return [figure for figure in figures if figure is not None] + [
        heat_map(layer, place, side)
        for place, layer in enumerate(found.layers)
        if layer.alive_a.any() and layer.alive_b.any()
    ]


def _summary(found: "Match") -> Figure | None:
    kinds = {"mean best ρ": "mean_best", "one-to-one": "one_to_one", "share with ρ ≥ 0.9": "covered"}
    rows = [
        {"layer": _pair(layer), "value": float(getattr(layer, key)), "what": what}
        for what, key in kinds.items()
        for layer in found.layers
        if not math.isnan(float(getattr(layer, key)))
    ]
    caption = "1 on every line: each unit of A has its counterpart in B."
    if not rows:
        return None
    return ranking(
        rows,
        id="layers",
        title="How well layers are met",
        caption=caption,
        name="layer",
        series="what",
        x_title="ρ, share",
    )


def _sorted_curves(found: "Match") -> Figure | None:
    rows: list[dict[str, Any]] = []
    for layer in found.layers:
        values = layer.rho[layer.alive_a].sort(descending=True).values.tolist()
        rows += [{"share": (i + 1) / len(values), "rho": v, "layer": _pair(layer)} for i, v in enumerate(values)]
    caption = "Units of A by falling correlation with their best unit of B. A line along the top: all are met."
    if not rows:
        return None
    return curves(
        rows,
        id="best",
        title="Best correlation of A's units",
        caption=caption,
        x="share",
        y="rho",
        series="layer",
        x_title="share of A's units",
        y_title="best ρ",
    )


def _all_layers(record: Value) -> Figure:
    cells = [{**cell, "mean_best": float(cell["mean_best"])} for cell in record["table"]]
    return matrix(
        cells,
        id="all-layers",
        title="Every layer of A with every layer of B",
        caption="Mean best ρ. Of each row, the best one is compared in detail.",
        row="a",
        column="b",
        value="mean_best",
        low=0.0,
        high=1.0,
        x_title="layers of B",
        y_title="layers of A",
        show_values=len(cells) <= 150,
    )


def _histories(record: Value, found: "Match") -> list[Figure]:
    figures = []
    words = {"mean_best": "mean best ρ", "mean_rank": "mean rank of the final winners"}
    for key, text in words.items():
        rows = [
            {"time": time, "value": float(value), "layer": _pair(layer)}
            for layer, facts in zip(found.layers, record["layers"], strict=True)
            for time, value in enumerate(
                [*facts[f"earlier_{key}"], facts["mean_best"] if key == "mean_best" else 0.0]
            )
        ]
        caption = "The earlier checkpoints in the order in which they were named, then B itself."
        options: Any = {"x": "time", "y": "value", "series": "layer", "x_title": "checkpoint", "y_title": text}
        figures.append(curves(rows, id=f"earlier-{key}", title=text.capitalize(), caption=caption, **options))
    return figures


def heat_map(layer: "LayerMatch", place: int, side: int) -> Figure:
    """Draw the correlations of a layer, both networks' units ordered by match.

    Args:
        layer: which.
        place: its number on the page.
        side: rows and columns that are drawn, at most.
    """
    ours = [unit for unit in layer.order_a.tolist() if layer.alive_a[unit]]
    theirs = [unit for unit in layer.order_b.tolist() if layer.alive_b[unit]]
    note = ""
    if max(len(ours), len(theirs)) > side:
        ours, theirs = _chosen(ours, side), _kept(layer, _chosen(ours, side), theirs, side)
        note = f" {len(ours)} of A's units and {len(theirs)} of B's are drawn."
    values = layer.correlation.tolist()
    cells = [{"b": f"{b}", "a": f"{a}", "ρ": values[b][a]} for b in theirs for a in ours]
    size = f"{len(layer.order_a):,} units of A, {len(layer.order_b):,} of B"
    return matrix(
        cells,
        id=f"match-{place}",
        title=f"Layer {_pair(layer)}: {size}",
        caption="A's units by falling best ρ, B's by the unit of A that each is nearest to; dead ones are left "
        f"out. A diagonal: units are met one by one.{note}",
        row="b",
        column="a",
        value="ρ",
        low=-1.0 if min(cell["ρ"] for cell in cells) < 0 else 0.0,
        high=1.0,
        x_title="unit of A",
        y_title="unit of B",
    )


def _chosen(order: list[int], side: int) -> list[int]:
    """Take evenly spaced ones."""
    return order if len(order) <= side else [order[i * len(order) // side] for i in range(side)]


def _kept(layer: "LayerMatch", ours: list[int], theirs: list[int], side: int) -> list[int]:
    """Of B, take first the best of those that are drawn of A, then evenly spaced others."""
    if len(theirs) <= side:
        return theirs
    best = layer.best.tolist()
    winners = {best[unit] for unit in ours}
    others = [unit for unit in theirs if unit not in winners]
    taken = winners | set(_chosen(others, side - len(winners)) if len(winners) < side else ())
    return [unit for unit in theirs if unit in taken]
