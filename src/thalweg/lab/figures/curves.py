"""Curves: one line per series, on linear or logarithmic axes, with a band if the table has one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from thalweg.lab.figures.figure import Figure
from thalweg.lab.figures.style import DASHES, PALETTE, groups, label, log_axis, numbers, picture, thinned
from thalweg.lab.tables import Table

if TYPE_CHECKING:
    import plotly.graph_objects as go


def curves(  # noqa: PLR0913 - axes, series and band are named columns, each with its default
    table: Table,
    *,
    id: str,  # noqa: A002 - the field's word
    title: str,
    caption: str,
    x: str,
    y: str,
    series: str | None = None,
    lower: str | None = None,
    upper: str | None = None,
    log_x: bool = False,
    log_y: bool = False,
    x_title: str | None = None,
    y_title: str | None = None,
) -> Figure:
    """Draw y over x, one line per value of the series' column.

    Args:
        table: one row per point, in the order of the line.
        id: name of the figure.
        title: one line.
        caption: what to see.
        x: column of the positions.
        y: column of the heights.
        series: column that splits the rows into lines; None draws one.
        lower: column of the band's lower edge; with `upper`, or not at all.
        upper: column of the band's upper edge.
        log_x: logarithmic positions.
        log_y: logarithmic heights; points at or below 0 are left out.
        x_title: default the column's name.
        y_title: default the column's name.

    Returns:
        The figure.

    Raises:
        ConfigError: the table is empty, or a column is missing or not of numbers.
    """
    lines = groups(table, series)
    figure = picture(showlegend=series is not None)
    for place, (name, rows) in enumerate(lines.items()):
        positions, heights = numbers(rows, x), numbers(rows, y)
        kept = thinned(positions, heights, is_log=log_x)
        positions, heights = positions[kept], heights[kept]
        if lower is not None and upper is not None:
            draw_band(figure, place, positions, numbers(rows, lower)[kept], numbers(rows, upper)[kept])
        heading = label(name) if isinstance(name, str) else f"{series} {label(name)}"
        figure.add_scatter(
            x=positions,
            y=np.where(heights > 0, heights, np.nan) if log_y else heights,
            mode="lines+markers" if len(positions) <= 12 else "lines",
            name=heading,
            legendgroup=str(place),
            line={"color": PALETTE[place % len(PALETTE)], "width": 2, "dash": _dash(place)},
            hovertemplate=f"%{{x}}: %{{y:.4g}}<extra>{heading}</extra>",
        )
    x_text, y_text = x_title or x, y_title or y
    figure.update_layout(
        xaxis=log_axis(x_text, numbers(table, x)) if log_x else {"title": {"text": x_text}},
        yaxis=log_axis(y_text, numbers(table, y)) if log_y else {"title": {"text": y_text}},
    )
    return Figure(id, title, caption, figure)


def _dash(place: int) -> str:
    """Change the dash when the colours start again, so that no two of 49 lines look alike."""
    return DASHES[place // len(PALETTE) % len(DASHES)]


def draw_band(figure: go.Figure, place: int, positions: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """Shade what lies between two lines, in the colour of a series."""
    colour = PALETTE[place % len(PALETTE)]
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    figure.add_scatter(
        x=np.concatenate([positions, positions[::-1]]),
        y=np.concatenate([high, low[::-1]]),
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.15)",
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=str(place),
    )
