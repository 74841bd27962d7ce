"""Plane: the heights of a two-dimensional slice as a map with contour lines, and named points on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg.errors import ConfigError
from thalweg.lab.figures.figure import Figure
from thalweg.lab.figures.style import INK, column, label, numbers, picture
from thalweg.lab.tables import Table

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Our choice: over more than two decades a linear scale shows the largest values only.
_LOG_DECADES = 2.0
_NUM_LEVELS = 20  # contour lines, at most; our choice: more run together on a small map


def plane(  # noqa: PLR0913 - axes, heights, points and scale are named columns, each with its default
    table: Table,
    *,
    id: str,  # noqa: A002 - the field's word
    title: str,
    caption: str,
    x: str = "a",
    y: str = "b",
    z: str = "loss",
    markers: Table | None = None,
    name: str = "name",
    log_z: bool | None = None,
    x_title: str | None = None,
    y_title: str | None = None,
    z_title: str | None = None,
) -> Figure:
    """Draw z over the plane of x and y. Points whose z is not finite, or missing, are left white.

    Args:
        table: one row per grid point, in any order.
        id: name of the figure.
        title: one line.
        caption: what to see.
        x: column of the first coordinate.
        y: column of the second coordinate.
        z: column of the heights.
        markers: points to mark, one per row, with the columns of x, y and `name`; None marks none.
        name: column of the markers' names.
        log_z: logarithmic colours, which leave out what is not positive. Default: if all finite heights are
            positive and span more than two decades.
        x_title: default the column's name.
        y_title: default the column's name.
        z_title: default the column's name.

    Returns:
        The figure.

    Raises:
        ConfigError: the table is empty or has two rows for one point, or a column is missing or not of numbers.
    """
    xs, ys, heights = _on_grid(table, x, y, z)
    is_log = _spans_decades(heights) if log_z is None else log_z
    z_text = z_title or z
    figure = picture(showlegend=False)
    figure.add_contour(
        x=xs,
        y=ys,
        z=_logarithms(heights) if is_log else np.where(np.isfinite(heights), heights, np.nan),
        customdata=heights,
        colorscale="Viridis",
        contours={"coloring": "heatmap"},
        ncontours=_NUM_LEVELS,
        line={"width": 0.6, "color": "rgba(255,255,255,0.6)"},
        colorbar=_colour_bar(z_text, heights, is_log=is_log),
        hovertemplate=f"({label(x)}, {label(y)}) = (%{{x:.4g}}, %{{y:.4g}})"
        f"<br>{label(z_text)} %{{customdata:.4g}}<extra></extra>",
    )
    if markers:
        _mark(figure, markers, x, y, name)
    figure.update_layout(
        xaxis={"title": {"text": label(x_title or x)}, "showgrid": False},
        yaxis={"title": {"text": label(y_title or y)}, "showgrid": False},
    )
    return Figure(id, title, caption, figure)


def _on_grid(table: Table, x: str, y: str, z: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort the rows into a grid: the distinct x, the distinct y, and heights of shape (y, x), NaN where missing."""
    (xs, across), (ys, up) = (np.unique(numbers(table, c), return_inverse=True) for c in (x, y))
    heights = np.full((len(ys), len(xs)), np.nan)
    places = set(zip(across.tolist(), up.tolist(), strict=True))
    if len(places) != len(table):
        raise ConfigError(
            f"Expected one row for each ({x}, {y}). Got {len(table)} rows for {len(places)} points. "
            "Draw one slice at a time."
        )
    heights[up, across] = numbers(table, z)
    return xs, ys, heights


def _spans_decades(heights: np.ndarray) -> bool:
    finite = heights[np.isfinite(heights)]
    return bool(finite.size and finite.min() > 0 and finite.max() > 10**_LOG_DECADES * finite.min())


def _logarithms(heights: np.ndarray) -> np.ndarray:
    is_drawn = np.isfinite(heights) & (heights > 0)
    logarithms: np.ndarray = np.log10(np.where(is_drawn, heights, np.nan))
    return logarithms


def _colour_bar(title: str, heights: np.ndarray, *, is_log: bool) -> dict[str, Any]:
    bar: dict[str, Any] = {"title": {"text": label(title), "side": "right"}, "outlinewidth": 0, "thickness": 14}
    logarithms = _logarithms(heights)
    if not is_log or not np.isfinite(logarithms).any():
        return bar
    low, high = math.floor(np.nanmin(logarithms)), math.ceil(np.nanmax(logarithms))
    powers = list(range(low, high + 1, max(1, math.ceil((high - low) / 6))))
    return bar | {"tickvals": powers, "ticktext": [f"10<sup>{power}</sup>".replace("-", "−") for power in powers]}


def _mark(figure: go.Figure, markers: Table, x: str, y: str, name: str) -> None:
    names, xs, ys = [label(text) for text in column(markers, name)], numbers(markers, x), numbers(markers, y)
    figure.add_scatter(
        x=xs,
        y=ys,
        mode="markers",
        text=names,
        marker={"color": "#FFFFFF", "size": 9, "line": {"color": INK, "width": 1.5}},
        hovertemplate="%{text} (%{x:.4g}, %{y:.4g})<extra></extra>",
    )
    for text, across, up in zip(names, xs.tolist(), ys.tolist(), strict=True):
        # On a ground of its own, a name can be read on any colour of the map.
        ground = {"bgcolor": "rgba(255,255,255,0.75)", "borderpad": 1, "font": {"color": INK, "size": 12}}
        figure.add_annotation(x=across, y=up, text=text, showarrow=False, yshift=16, **ground)
