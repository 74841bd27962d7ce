"""Eigenvalues with the intervals that hold them, checkpoint beside checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg.lab.figures.figure import Figure
from thalweg.lab.figures.style import PALETTE, column, groups, label, log_axis, numbers, picture
from thalweg.lab.tables import Table

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star", "cross", "x")
_SPREAD = 0.5
"""How far apart the series of one number stand, at most, in numbers. Chosen by us: half is left as the gap."""

_DECADES = 100.0  # greatest over least from which the axis is logarithmic; chosen by us, two decades


def eigenvalue_intervals(  # noqa: PLR0913 - every column has its name, with a default
    table: Table,
    *,
    id: str,  # noqa: A002 - the field's word
    title: str,
    caption: str,
    value: str = "eigenvalue",
    lower: str = "lower",
    upper: str = "upper",
    converged: str | None = "converged",
    index: str | None = "index",
    series: str | None = None,
) -> Figure:
    """Draw eigenvalues as points with the intervals that are certified to hold them.

    One that did not converge is hollow and named so. The axis is logarithmic where all intervals are positive
    and reach over two decades.

    Args:
        table: one row per eigenvalue.
        id: name of the figure.
        title: one line.
        caption: what to see.
        value: column of the eigenvalues.
        lower: column of the intervals' lower ends; where it is None or NaN, no interval is drawn.
        upper: column of the upper ends.
        converged: column that says whether the solver converged; None counts all as converged.
        index: column of the places 1, 2, …; None counts the rows of each series.
        series: column that splits the rows, e.g. by checkpoint; they stand side by side.

    Returns:
        The figure.

    Raises:
        ConfigError: the table is empty, or a column is missing or not of numbers.
    """
    lines = groups(table, series)
    figure = picture(showlegend=series is not None or (converged is not None and not all(column(table, converged))))
    for place, (name, rows) in enumerate(lines.items()):
        at = numbers(rows, index) if index is not None else np.arange(1.0, len(rows) + 1)
        shift = (place - (len(lines) - 1) / 2) * _SPREAD / max(len(lines) - 1, 1)
        heading = (label(name) if isinstance(name, str) else f"{series} {label(name)}") or "eigenvalue"
        is_converged = np.array([bool(c) for c in column(rows, converged)] if converged else [True] * len(rows))
        ends = np.stack([numbers(rows, part) for part in (value, lower, upper)])
        for member, words, ending in (
            (is_converged, heading, ""),
            (~is_converged, f"{heading}, not converged", "-open"),
        ):
            if member.any():
                _draw_points(figure, place, at[member], shift, ends[:, member], words, ending)
    everything = np.concatenate([numbers(table, part) for part in (value, lower, upper)])
    everything = everything[np.isfinite(everything)]
    is_log = everything.size > 0 and everything.min() > 0 and everything.max() >= _DECADES * everything.min()
    places = np.unique(np.concatenate([t.customdata[:, 3] for t in figure.data])).tolist()
    figure.update_layout(
        xaxis={
            "title": {"text": "number of the eigenvalue"},
            "tickvals": places,
            "ticktext": [f"{p:g}" for p in places],
            "range": [min(places) - 0.6, max(places) + 0.6],
        },
        yaxis=log_axis(label(value), everything) if is_log else {"title": {"text": label(value)}, "zeroline": True},
    )
    return Figure(id, title, caption, figure)


def _draw_points(
    figure: go.Figure, place: int, at: np.ndarray, shift: float, ends: np.ndarray, heading: str, ending: str
) -> None:
    value, lower, upper = ends
    colour = PALETTE[place % len(PALETTE)]
    bars: dict[str, Any] = {
        "type": "data",
        "symmetric": False,
        "array": np.nan_to_num(upper - value).clip(min=0),
        "arrayminus": np.nan_to_num(value - lower).clip(min=0),
        "thickness": 1.6,
        "width": 5,
    }
    figure.add_scatter(
        x=at + shift,
        y=value,
        error_y=bars,
        customdata=np.stack([value, lower, upper, at], axis=1),
        mode="markers",
        name=heading,
        marker={
            "color": colour,
            "symbol": _SYMBOLS[place % len(_SYMBOLS)] + ending,
            "size": 9,
            "line": {"width": 2, "color": colour},
        },
        hovertemplate=(
            "λ<sub>%{customdata[3]}</sub> = %{customdata[0]:.6g}<br>"
            f"in [%{{customdata[1]:.6g}}, %{{customdata[2]:.6g}}]<extra>{heading}</extra>"
        ),
    )
