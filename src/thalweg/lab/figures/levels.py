"""Levels: critical points by width and loss, and which wider ones are embedded narrower ones."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg.errors import ConfigError
from thalweg.lab.figures.figure import Figure
from thalweg.lab.figures.style import INK, MUTED, PALETTE, column, drawn, label, log_axis, numbers, picture
from thalweg.lab.tables import Table

if TYPE_CHECKING:
    import plotly.graph_objects as go

# All our choice. Points of a column that lie nearer than this fraction of the height stand side by side, so far apart
# (a column is 1 wide) unless they are too many for the room that it has; where they stand closer than a label is,
# every other label is written below its point.
_NEAR, _APART, _ROOM, _LABEL = 0.09, 0.2, 0.7, 0.15
# Points of one level: the lines that leave them are bent apart by this fraction of the height.
_SAME, _BEND = 0.004, 0.025
# On a logarithmic axis, what lies this far below the largest loss counts as zero and is drawn there.
_FLOOR = 1e-6
_SIZE = 19
_LINE = "#AEB5BE"


@dataclass(frozen=True)
class _Point:
    """A critical point of a width, and how it is drawn."""

    width: float
    loss: float
    y: float
    degeneracy: int
    index: int
    text: str
    is_new: bool


@dataclass(frozen=True)
class _Place:
    """Where a point stands: across, upwards on the axis as drawn, and how far its lines are bent."""

    x: float
    height: float
    bend: float
    is_label_below: bool


def levels(
    nodes: Table,
    edges: Table,
    *,
    id: str,  # noqa: A002 - the field's word
    title: str,
    caption: str,
    log_y: bool = False,
    x_title: str = "width",
    y_title: str = "loss",
) -> Figure:
    """Draw critical points in one column per width, at their losses, with a line from each to what it is embedded as.

    Circles are minima, diamonds saddles (with negative eigenvalues); hollow ones are new. The colour tells the least
    width at which a point exists, the number in it its degeneracy. Points that would cover each other stand side
    by side.

    Args:
        nodes: one row per critical point and width, with the columns `id`, `width`, `loss`, `degeneracy` (zero
            eigenvalues) and `index` (negative ones); and, if wanted, `label` (written at points that are not embedded
            ones, default the loss to three digits) and `is_new` (not in the paper, default False).
        edges: one row per embedding, with the columns `from` and `to`: ids of nodes, the wider one second. Those that
            two others imply are not drawn.
        id: name of the figure.
        title: one line.
        caption: what to see.
        log_y: logarithmic losses; what lies more than six decades below the largest is drawn there, as zero.
        x_title: of the columns.
        y_title: of the losses.

    Returns:
        The figure.

    Raises:
        ConfigError: there are no nodes, two share an id, a column is missing or not of numbers, or an edge names an
            unknown node or does not lead to a wider one.

    Source:
        zhang2021embedding, figure 4. Departures: every width has a column, not the widest alone; minima and saddles
        differ; points that the paper does not list can be shown as such.
    """
    points = _points(nodes, log_y=log_y)
    links = _links(edges, points)
    widths = sorted({p.width for p in points.values()})
    origins = {key: widths.index(_origin(key, points, links)) for key in points}
    places = _places(points, {k: math.log10(p.y) if log_y else p.y for k, p in points.items()}, origins)
    figure = picture(height=600)
    if links:
        _draw_links(figure, links, places, log_y=log_y)
    _draw_points(figure, points, places, origins)
    _draw_labels(figure, [(places[k], p) for k, p in points.items() if k not in {wide for _, wide in links}])
    _draw_legend(figure, points.values(), {origin: widths[origin] for origin in sorted(set(origins.values()))})
    figure.update_layout(
        xaxis=_columns(x_title, widths),
        yaxis=_heights(y_title, points.values(), log_y=log_y),
        shapes=[_band(i) for i in range(0, len(widths), 2)],
    )
    return Figure(id, title, caption, figure)


def _points(nodes: Table, *, log_y: bool) -> dict[object, _Point]:
    """Nodes by id."""
    ids = column(nodes, "id")
    if len(set(ids)) < len(ids):
        twice = next(name for name, count in Counter(ids).items() if count > 1)
        raise ConfigError(f"Expected nodes with different ids. Got {twice!r} twice. Name each appearance of a point.")
    widths, losses, zeros, negatives = (_finite(nodes, c) for c in ("width", "loss", "degeneracy", "index"))
    zero = float(losses.max()) * _FLOOR or _FLOOR
    heights = drawn(losses, zero) if log_y else losses
    return {
        name: _Point(
            *(float(widths[i]), float(losses[i]), float(heights[i]), int(zeros[i]), int(negatives[i])),
            text=label(row.get("label", f"{losses[i]:.3g}" if losses[i] > zero else "≈ 0")),
            is_new=bool(row.get("is_new", False)),
        )
        for i, (name, row) in enumerate(zip(ids, nodes, strict=True))
    }


def _finite(nodes: Table, name: str) -> np.ndarray:
    values = numbers(nodes, name)
    if not np.isfinite(values).all():
        raise ConfigError(f"Expected finite numbers in the column {name!r}. Got {values}. Leave such nodes out.")
    return values


def _links(edges: Table, points: Mapping[object, _Point]) -> list[tuple[object, object]]:
    """Edges as pairs of ids, in the order of the table, without those that two others imply."""
    pairs = list(zip(column(edges, "from"), column(edges, "to"), strict=True)) if edges else []
    for a, b in pairs:
        unknown = [end for end in (a, b) if end not in points]
        if unknown:
            raise ConfigError(f"Expected edges between nodes. Got {unknown[0]!r}. Add its node or drop the edge.")
        if not points[a].width < points[b].width:
            raise ConfigError(
                f"Expected edges to wider nets. Got {a!r} of width {points[a].width:g} to {b!r} of width "
                f"{points[b].width:g}. Turn it round."
            )
    known = dict.fromkeys(pairs)
    return [(a, c) for a, c in known if not any((a, b) in known and (b, c) in known for b in points)]


def _origin(key: object, points: Mapping[object, _Point], links: list[tuple[object, object]]) -> float:
    """Least width at which a point exists."""
    return min([points[key].width, *(_origin(a, points, links) for a, b in links if b == key)])


def _places(
    points: Mapping[object, _Point], heights: Mapping[object, float], origins: Mapping[object, int]
) -> dict[object, _Place]:
    """Place the points so that none covers another, nor a line one that leaves from the same level."""
    span = (max(heights.values()) - min(heights.values())) or 1.0
    places: dict[object, _Place] = {}
    for middle, width in enumerate(sorted({p.width for p in points.values()})):
        inside = sorted((key for key, p in points.items() if p.width == width), key=lambda key: heights[key])
        for row in _runs(inside, heights, _NEAR * span):
            row.sort(key=lambda key: (origins[key], heights[key]))
            apart = min(_APART, _ROOM / max(len(row) - 1, 1))
            for i, key in enumerate(row):
                level = [other for other in row if abs(heights[other] - heights[key]) <= _SAME * span]
                bend = (level.index(key) - (len(level) - 1) / 2) * 2 * _BEND * span
                x = middle + (i - (len(row) - 1) / 2) * apart
                places[key] = _Place(x, heights[key], bend, apart < _LABEL and i % 2 == 1)
    return places


def _runs(ordered: list[object], heights: Mapping[object, float], near: float) -> list[list[object]]:
    """Cut an ascending list where neighbours are not near."""
    cuts = [i for i, (a, b) in enumerate(itertools.pairwise(ordered), 1) if heights[b] - heights[a] > near]
    return [ordered[a:b] for a, b in itertools.pairwise([0, *cuts, len(ordered)])]


def _draw_links(
    figure: go.Figure, links: list[tuple[object, object]], places: Mapping[object, _Place], *, log_y: bool
) -> None:
    across: list[float | None] = []
    up: list[float | None] = []
    for a, b in ((places[a], places[b]) for a, b in links):
        for t in np.linspace(0, 1, 21 if a.bend else 2).tolist():
            across.append(a.x + t * (b.x - a.x))
            height = a.height + t * (b.height - a.height) + a.bend * math.sin(math.pi * t)
            up.append(10**height if log_y else height)
        across.append(None)
        up.append(None)
    line = {"color": _LINE, "width": 1.5}
    figure.add_scatter(x=across, y=up, mode="lines", line=line, hoverinfo="skip", name="embedded as", legendrank=1001)


def _draw_points(
    figure: go.Figure,
    points: Mapping[object, _Point],
    places: Mapping[object, _Place],
    origins: Mapping[object, int],
) -> None:
    """Markers with the degeneracy in them."""
    colours = {key: PALETTE[origin % len(PALETTE)] for key, origin in origins.items()}
    figure.add_scatter(
        x=[places[key].x for key in points],
        y=[p.y for p in points.values()],
        mode="markers+text",
        marker={
            "symbol": [_symbol(p) for p in points.values()],
            "color": ["#FFFFFF" if p.is_new else colours[key] for key, p in points.items()],
            "size": [_SIZE + 3 if p.index else _SIZE for p in points.values()],
            "line": {"color": [colours[key] for key in points], "width": 2},
        },
        text=[f"<b>{p.degeneracy}</b>" for p in points.values()],
        textposition="middle center",
        textfont={"size": 11, "color": [colours[k] if p.is_new else "#FFFFFF" for k, p in points.items()]},
        customdata=[_hover(p) for p in points.values()],
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
    )


def _symbol(point: _Point) -> str:
    return "diamond" if point.index else "circle"


def _hover(point: _Point) -> str:
    return (
        f"{point.text}<br>width {point.width:g}, {'saddle' if point.index else 'minimum'}<br>loss {point.loss:.6g}"
        f"<br>eigenvalues: {point.degeneracy} zero, {point.index} negative"
    )


def _draw_labels(figure: go.Figure, roots: list[tuple[_Place, _Point]]) -> None:
    figure.add_scatter(
        x=[place.x for place, _ in roots],
        y=[point.y for _, point in roots],
        mode="text",
        # An empty line stands for the marker, which the text would touch.
        text=[f"<br>{p.text}" if place.is_label_below else f"{p.text}<br> " for place, p in roots],
        textposition=["bottom center" if place.is_label_below else "top center" for place, _ in roots],
        textfont={"size": 12, "color": INK},
        hoverinfo="skip",
        showlegend=False,
    )


def _draw_legend(figure: go.Figure, points: Iterable[_Point], widths: Mapping[int, float]) -> None:
    """Name what colours, symbols and hollow markers mean, each only where it occurs."""
    entries = [
        (f"from width {width:g}", {"symbol": "square", "color": PALETTE[place % len(PALETTE)], "size": 11})
        for place, width in widths.items()
    ]
    found = list(points)
    solid = {"color": MUTED, "size": 11}
    if any(not p.index for p in found):
        entries.append(("minimum", solid | {"symbol": "circle"}))
    if any(p.index for p in found):
        entries.append(("saddle", solid | {"symbol": "diamond"}))
    if any(p.is_new for p in found):
        hollow = {"color": "#FFFFFF", "size": 10, "line": {"color": MUTED, "width": 2}}
        entries.append(("not in the paper", hollow | {"symbol": "circle"}))
    for name, marker in entries:
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=name)
    note = {"text": "number in a point: its degeneracy", "font": {"size": 12, "color": MUTED}}
    below = {"xref": "paper", "yref": "paper", "x": 1, "y": 0, "xanchor": "right", "yanchor": "top", "yshift": -26}
    figure.add_annotation(showarrow=False, **note, **below)


def _columns(title: str, widths: list[float]) -> dict[str, Any]:
    return {
        "title": {"text": label(title)},
        "tickvals": list(range(len(widths))),
        "ticktext": [f"{width:g}" for width in widths],
        "range": [-0.5, len(widths) - 0.5],
        "showgrid": False,
    }


def _heights(title: str, points: Iterable[_Point], *, log_y: bool) -> dict[str, Any]:
    """Describe the axis of losses; the place of zero is named on a logarithmic one."""
    found = list(points)
    ys = np.array([p.y for p in found])
    if not log_y:
        room = 0.09 * (float(ys.max() - ys.min()) or 1.0)
        return {"title": {"text": label(title)}, "range": [float(ys.min()) - room / 2, float(ys.max()) + room]}
    low, high = math.log10(ys.min()), math.log10(ys.max())
    room = 0.09 * ((high - low) or 1.0)
    axis = log_axis(label(title), ys) | {"range": [low - room / 2, high + room]}
    if all(p.y == p.loss for p in found):
        return axis
    powers = range(math.floor(low) + 1, math.floor(high) + 1)
    texts = ["≈ 0", *(f"10<sup>{power}</sup>".replace("-", "−") for power in powers)]
    return axis | {"tickvals": [10**low, *(10.0**power for power in powers)], "ticktext": texts}


def _band(place: int) -> dict[str, Any]:
    """Tint every other column."""
    sides = {"x0": place - 0.5, "x1": place + 0.5, "y0": 0, "y1": 1, "yref": "paper"}
    return {"type": "rect", "layer": "below", "fillcolor": "#F4F6F8", "line": {"width": 0}} | sides
