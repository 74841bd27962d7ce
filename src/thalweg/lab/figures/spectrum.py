"""Spectra: signed eigenvalues by magnitude on a logarithmic axis, one panel per width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg.lab.figures.figure import Figure
from thalweg.lab.figures.style import (
    MUTED,
    SIGN_COLOURS,
    SIGN_SYMBOLS,
    drawn,
    groups,
    label,
    log_axis,
    log_floor,
    numbers,
    picture,
    thinned,
)
from thalweg.lab.tables import Table

if TYPE_CHECKING:
    import plotly.graph_objects as go


def spectrum(
    table: Table,
    *,
    id: str,  # noqa: A002 - the field's word
    title: str,
    caption: str,
    value: str = "eigenvalue",
    threshold: str | None = "threshold",
    panel: str | None = "width",
) -> Figure:
    """Draw eigenvalues from the most positive to the most negative, by magnitude, coloured by sign.

    An eigenvalue whose magnitude is at most the threshold counts as zero.

    Args:
        table: one row per eigenvalue.
        id: name of the figure.
        title: one line.
        caption: what to see.
        value: column of the eigenvalues.
        threshold: column of the threshold, constant within a panel; None counts by the exact sign.
        panel: column that splits the rows into panels, e.g. the width; None draws one panel.

    Returns:
        The figure.

    Raises:
        ConfigError: the table is empty, or a column is missing or not of numbers.
    """
    panels = groups(table, panel)
    everything = numbers(table, value)
    floor = log_floor(everything)
    figure = picture(len(panels))
    axis = log_axis("|eigenvalue|", drawn(everything, floor))
    for place, (name, rows) in enumerate(panels.items(), start=1):
        cutoff = float(numbers(rows, threshold)[0]) if threshold else 0.0
        _draw_panel(figure, place, numbers(rows, value), cutoff, floor)
        _lay_out(figure, place, len(panels), axis, f"{panel} {label(name)}" if panel else "")
    _show_each_name_once(figure)
    return Figure(id, title, caption, figure)


def _draw_panel(figure: go.Figure, place: int, values: np.ndarray, cutoff: float, floor: float) -> None:
    values = np.sort(values[np.isfinite(values)])[::-1]
    index = np.arange(1, len(values) + 1)
    is_zero = np.abs(values) <= cutoff
    members = {
        "positive": (values > 0) & ~is_zero,
        "zero": is_zero,
        "negative": (values < 0) & ~is_zero,
    }
    for sign, member in members.items():
        x, y = index[member], values[member]
        if not len(x):
            continue
        kept = thinned(x, y)
        figure.add_scatter(
            x=x[kept],
            y=drawn(y[kept], floor),
            customdata=y[kept],
            mode="markers",
            name=sign,
            legendgroup=sign,
            marker={"color": SIGN_COLOURS[sign], "symbol": SIGN_SYMBOLS[sign], "size": 7},
            hovertemplate=f"{sign} %{{x}}: %{{customdata:.3e}}<extra></extra>",
            xaxis=f"x{place}",
            yaxis=f"y{place}",
        )
    if cutoff > 0 and len(values):
        figure.add_scatter(
            x=[0.5, len(values) + 0.5],
            y=[cutoff, cutoff],
            mode="lines",
            name="threshold",
            legendgroup="threshold",
            line={"color": MUTED, "width": 1.2, "dash": "dash"},
            hovertemplate=f"threshold {cutoff:.1e}<extra></extra>",
            xaxis=f"x{place}",
            yaxis=f"y{place}",
        )


def _show_each_name_once(figure: go.Figure) -> None:
    seen: set[str] = set()
    for trace in figure.data:
        trace.showlegend = trace.name not in seen
        seen.add(trace.name)


def _lay_out(figure: go.Figure, place: int, panels: int, axis: dict[str, Any], heading: str) -> None:
    gap = 0.04
    width = (1 - gap * (panels - 1)) / panels
    start = (place - 1) * (width + gap)
    end = start + width
    is_first = place == 1
    axes: dict[str, Any] = {
        f"xaxis{place}": {"title": {"text": "index"}, "domain": [start, end], "anchor": f"y{place}"},
        f"yaxis{place}": axis | {"anchor": f"x{place}"},
    }
    if not is_first:
        axes[f"yaxis{place}"] |= {
            "matches": "y",
            "showticklabels": False,
            "title": {"text": ""},
        }
    figure.update_layout(**axes)
    if heading:
        centre = {"x": (start + end) / 2, "y": 1, "xanchor": "center", "yanchor": "bottom"}
        figure.add_annotation(text=heading, xref="paper", yref="paper", showarrow=False, font={"size": 13}, **centre)
        figure.update_layout(legend={"y": 1.08})
