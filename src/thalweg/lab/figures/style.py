"""The house style: one template, colours that a colour-blind reader tells apart, short series."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg.errors import ConfigError
from thalweg.lab.tables import Table

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito's palette (Color Universal Design, 2008), without its yellow, too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
SIGN_COLOURS = {"negative": "#D55E00", "zero": "#8A8F98", "positive": "#0072B2"}
SIGN_SYMBOLS = {"negative": "triangle-down", "zero": "circle-open", "positive": "triangle-up"}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
INK, MUTED, GRID = "#1B1F24", "#57606A", "#E8EAED"
FONT = "Inter, 'Source Sans 3', 'Segoe UI', system-ui, -apple-system, Helvetica, Arial, sans-serif"
MAX_POINTS = 500


def house_template() -> go.layout.Template:
    """Build the template: white ground, light grid, dark ink, legend above the picture."""
    import plotly.graph_objects as go

    axis = {
        "showline": True,
        "linecolor": INK,
        "linewidth": 1,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": INK,
        "gridcolor": GRID,
        "zeroline": False,
        "automargin": True,
        "title": {"font": {"size": 14}, "standoff": 8},
        "tickfont": {"size": 12, "color": MUTED},
    }
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": INK},
            "paper_bgcolor": "#FFFFFF",
            "plot_bgcolor": "#FFFFFF",
            "colorway": PALETTE,
            "margin": {"l": 56, "r": 16, "t": 48, "b": 48},
            "xaxis": axis,
            "yaxis": axis,
            "legend": legend | {"font": {"size": 12}, "bgcolor": "rgba(255,255,255,0)"},
            "hoverlabel": {"font": {"family": FONT, "size": 12}},
            "height": 420,
        }
    )


def picture(panels: int = 1, **layout: Any) -> go.Figure:
    """Start an empty picture in the house style.

    Args:
        panels: number of panels side by side; the report stacks them on a narrow screen.
        layout: further layout of Plotly.
    """
    import plotly.graph_objects as go

    return go.Figure(layout={"template": house_template(), "meta": {"panels": panels}} | layout)


def log_axis(title: str, *values: np.ndarray, **more: Any) -> dict[str, Any]:
    """Describe a logarithmic axis; over two decades and more, about six powers of ten are labelled.

    Args:
        title: of the axis.
        values: what is drawn along it.
        more: further properties of Plotly.
    """
    axis: dict[str, Any] = {"type": "log", "title": {"text": title}, "exponentformat": "power"}
    drawn_values = np.concatenate([np.ravel(v) for v in values]) if values else np.empty(0)
    drawn_values = drawn_values[np.isfinite(drawn_values) & (drawn_values > 0)]
    if drawn_values.size:
        decades = math.log10(drawn_values.max() / drawn_values.min())
        if decades >= 2:
            axis["dtick"] = math.ceil(decades / 6)
    return axis | more


def label(value: object) -> str:
    """Word a table's value for a picture: Plotly reads markup in texts, so it is escaped."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return html.escape(text, quote=False)


def column(table: Table, name: str) -> list[Any]:
    """Read a column off a table.

    Raises:
        ConfigError: the table is empty, or a row lacks the column.
    """
    if not table:
        raise ConfigError("Expected a table with rows to draw. Got an empty one. Store rows in the run.")
    missing = [i for i, row in enumerate(table) if name not in row]
    if missing:
        raise ConfigError(
            f"Expected the column {name!r} in every row. Got a row {missing[0]} with only "
            f"{', '.join(table[missing[0]])}. Name the column that the run stores."
        )
    return [row[name] for row in table]


def numbers(table: Table, name: str) -> np.ndarray:
    """Read a column of numbers off a table, "nan" and "inf" among them; None becomes NaN.

    Raises:
        ConfigError: the column is missing or holds something else.
    """
    values = column(table, name)
    try:
        return np.array([math.nan if v is None else float(v) for v in values])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Expected numbers in the column {name!r}. Got {error}. Draw another column.") from error


def groups(table: Table, name: str | None) -> dict[Any, Table]:
    """Split a table by the values of a column, in the order of their first row; None keeps it whole.

    Raises:
        ConfigError: the column is missing.
    """
    if name is None:
        return {"": table}
    split: dict[Any, Table] = {}
    for value, row in zip(column(table, name), table, strict=True):
        split.setdefault(value, []).append(row)
    return split


def drawn(values: np.ndarray, floor: float) -> np.ndarray:
    """Lift the magnitudes to a floor, so that a zero has a place on a logarithmic axis."""
    lifted: np.ndarray = np.maximum(np.abs(values), floor)
    return lifted


def log_floor(*values: np.ndarray) -> float:
    """Choose where zeros are drawn on a logarithmic axis: a tenth of the least magnitude that is not zero.

    Example:
        >>> log_floor(np.array([0.0, -0.5]), np.array([2.0]))
        0.05
    """
    magnitudes = np.abs(np.concatenate([np.ravel(v) for v in values]))
    magnitudes = magnitudes[np.isfinite(magnitudes) & (magnitudes > 0)]
    return float(magnitudes.min()) / 10 if magnitudes.size else 1e-16


def thinned(x: np.ndarray, *ys: np.ndarray, is_log: bool = False) -> np.ndarray:
    """Choose at most `MAX_POINTS` points of a series, evenly along the axis as drawn.

    The ends, and the extremes of each y, are always among them.

    Args:
        x: positions.
        ys: the series drawn over them.
        is_log: whether the axis of x is logarithmic.

    Returns:
        Indices of the chosen points, increasing.
    """
    if len(x) <= MAX_POINTS:
        return np.arange(len(x))
    kept = {0, len(x) - 1}
    for y in ys:
        if np.isfinite(y).any():
            kept |= {int(np.nanargmin(y)), int(np.nanargmax(y))}
    budget = MAX_POINTS - len(kept)
    position = np.log(x) if is_log and (x > 0).all() else x
    if np.isfinite(position).all() and (np.diff(position) > 0).all():
        even = np.searchsorted(position, np.linspace(position[0], position[-1], budget))
    else:
        even = np.linspace(0, len(x) - 1, budget).round().astype(int)
    return np.array(sorted(kept | set(even.tolist())))
