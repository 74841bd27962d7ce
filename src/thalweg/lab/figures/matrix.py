"""Matrix: a map of values by row and column, such as similarities or a confusion matrix."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from thalweg.errors import ConfigError
from thalweg.lab.figures.figure import Figure
from thalweg.lab.figures.style import column as read
from thalweg.lab.figures.style import label, numbers, picture
from thalweg.lab.tables import Table

# Our choice: 300 cells take a pixel or two each on a screen; a longer side is averaged over blocks of neighbours.
_MAX_SIDE = 300
_MAX_NAMES = 24  # along an axis, our choice: more run into each other
# Each arm of the scale from zero outwards, in the colours that signs have elsewhere. Zero is the paper itself.
_POSITIVE = ("#FFFFFF", "#B9D9EC", "#4F9FCC", "#0072B2", "#003B5C")
_NEGATIVE = ("#FFFFFF", "#F6CDAF", "#E88D4D", "#D55E00", "#6E3000")
_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MISSING = "#DDE0E4"
_BAR = {
    **{"orientation": "h", "x": 0.5, "xanchor": "center", "y": 1.01, "yanchor": "bottom"},
    **{"len": 300, "lenmode": "pixels", "thickness": 10, "outlinewidth": 0},
}
_BORDER = {"color": "rgba(27,31,36,0.55)", "width": 0.7}


def matrix(  # noqa: PLR0913 - axes, values and scale are named columns, each with its default
    table: Table,
    *,
    id: str,  # noqa: A002 - the field's word
    title: str,
    caption: str,
    row: str = "row",
    column: str = "column",
    value: str = "value",
    low: float | None = None,
    high: float | None = None,
    x_title: str | None = None,
    y_title: str | None = None,
    breaks: Sequence[int] | None = None,
    show_values: bool = False,
) -> Figure:
    """Draw a matrix, the first row on top. Cells that are missing or not finite are left grey.

    Where values of both signs occur, white is zero, blue positive, orange negative, and equal magnitudes are equally
    strong; else colours run from white at the low end to blue. A side of more than 300 cells is averaged over blocks
    of neighbours. Cells are stored in single precision.

    Args:
        table: one row per cell. Rows and columns are numbers or texts, drawn in the order in which they appear.
        id: name of the figure.
        title: one line.
        caption: what to see.
        row: column of the rows' names.
        column: column of the columns' names.
        value: column of the values.
        low: value at the low end of the colours. Default: the least one.
        high: value at the high end. Default: the largest one.
        x_title: default the name of `column`.
        y_title: default the name of `row`.
        breaks: after how many rows and columns a group ends; the groups' blocks along the diagonal are outlined.
            Default: none.
        show_values: write the value into every cell, in place of the bar of colours.

    Returns:
        The figure.

    Raises:
        ConfigError: the table is empty or has two rows for one cell; a column is missing or not of numbers; the
            high end of the colours is not above the low one; or a break lies outside the matrix.
    """
    rows, columns, values = _cells(table, row, column, value)
    blocks = _blocks(breaks or (), *values.shape)
    down, across = (math.ceil(size / _MAX_SIDE) for size in values.shape)
    values = _averaged(_averaged(values, down).T, across).T
    rows, columns = _joined(rows, down), _joined(columns, across)
    least, largest = _ends(values, low, high)
    figure = picture(showlegend=False, height=520 if show_values else 560, plot_bgcolor=_MISSING)
    figure.add_heatmap(
        x=columns,
        y=rows,
        z=values.astype(np.float32),
        zmin=least,
        zmax=largest,
        colorscale=_colours(least, largest),
        showscale=not show_values,
        colorbar=_BAR | {"title": {"text": label(value), "side": "top"}},
        hoverongaps=False,
        hovertemplate=f"{label(y_title or row)} %{{y}}<br>{label(x_title or column)} %{{x}}"
        f"<br>{label(value)} %{{z:.4~g}}<extra></extra>",
        **({"text": _texts(values), "texttemplate": "%{text}"} if show_values else {}),
    )
    for first, last in blocks:
        sides = {"x0": first / across, "x1": last / across, "y0": first / down, "y1": last / down}
        # On an axis of categories, the n-th cell lies at n, counted from 0, and reaches half a cell to both sides.
        figure.add_shape(type="rect", line=_BORDER, **{k: v - 0.5 for k, v in sides.items()})
    figure.update_layout(
        xaxis=_axis(columns, x_title or column),
        yaxis=_axis(rows, y_title or row) | {"autorange": "reversed"} | _square(*values.shape),
    )
    return Figure(id, title, caption, figure)


def _cells(table: Table, row: str, column: str, value: str) -> tuple[list[str], list[str], np.ndarray]:
    """Names of the rows and of the columns in the order in which they appear, and the values, NaN where missing."""
    rows, columns = ({name: i for i, name in enumerate(dict.fromkeys(read(table, c)))} for c in (row, column))
    places = [(rows[r[row]], columns[r[column]]) for r in table]
    if len(set(places)) != len(table):
        raise ConfigError(
            f"Expected one row for each ({row}, {column}). Got {len(table)} rows for {len(set(places))} cells. "
            "Draw one matrix at a time."
        )
    found = numbers(table, value)
    values = np.full((len(rows), len(columns)), np.nan)
    values[tuple(zip(*places, strict=True))] = np.where(np.isfinite(found), found, np.nan)
    return [label(name) for name in rows], [label(name) for name in columns], values


def _averaged(values: np.ndarray, step: int) -> np.ndarray:
    """Average every `step` rows, over the cells that are there."""
    if step == 1:
        return values
    padded = np.pad(values, ((0, -len(values) % step), (0, 0)), constant_values=np.nan)
    stacked = padded.reshape(-1, step, values.shape[1])
    counts = np.isfinite(stacked).sum(axis=1)
    averages: np.ndarray = np.where(counts > 0, np.nansum(stacked, axis=1) / np.maximum(counts, 1), np.nan)
    return averages


def _joined(names: list[str], step: int) -> list[str]:
    blocks = [names[i : i + step] for i in range(0, len(names), step)]
    return [block[0] if len(block) == 1 else f"{block[0]} – {block[-1]}" for block in blocks]


def _ends(values: np.ndarray, low: float | None, high: float | None) -> tuple[float, float]:
    """Values at the ends of the colours; a scale of one value is widened by 1, away from a given end."""
    if low is not None and high is not None and not low < high:
        raise ConfigError(f"Expected colours from a low to a high value. Got {low} to {high}. Exchange them.")
    finite = values[np.isfinite(values)]
    least = low if low is not None else float(finite.min()) if finite.size else 0.0
    largest = high if high is not None else float(finite.max()) if finite.size else least + 1
    if least < largest:
        return least, largest
    return (least, least + 1) if high is None else (high - 1, high)


def _colours(least: float, largest: float) -> list[tuple[float, str]]:
    """Stops of the scale: strength goes by magnitude if zero lies between the ends, else from low to high."""
    if not least < 0 < largest:
        return list(zip(_STRENGTHS, _POSITIVE, strict=True))
    strongest = max(-least, largest)
    values = {least, largest, 0.0} | {sign * s * strongest for sign in (-1, 1) for s in _STRENGTHS}
    return [
        ((v - least) / (largest - least), _shade(_POSITIVE if v > 0 else _NEGATIVE, abs(v) / strongest))
        for v in sorted(values)
        if least <= v <= largest
    ]


def _shade(arm: Sequence[str], strength: float) -> str:
    """Colour on an arm at a strength in [0, 1], linear between its colours."""
    channels = [[int(colour[i : i + 2], 16) for colour in arm] for i in (1, 3, 5)]
    return "#" + "".join(f"{round(np.interp(strength, _STRENGTHS, channel)):02X}" for channel in channels)


def _blocks(breaks: Sequence[int], height: int, width: int) -> list[tuple[int, int]]:
    """Where each group starts and ends; none without breaks."""
    size = min(height, width)
    outside = [b for b in breaks if not 0 < b < size]
    if outside:
        raise ConfigError(
            f"Expected breaks from 1 to {size - 1}. Got {outside[0]}. Count the rows before each border."
        )
    return list(itertools.pairwise([0, *sorted(set(breaks)), size])) if breaks else []


def _texts(values: np.ndarray) -> list[list[str]]:
    def word(value: float) -> str:
        return "" if math.isnan(value) else (f"{value:.3g}" if value % 1 else f"{value:.0f}").replace("-", "−")

    return [[word(value) for value in row] for row in values.tolist()]


def _axis(names: list[str], title: str) -> dict[str, Any]:
    """Describe an axis of categories, of which as many are named as fit."""
    # If not all names fit, about a dozen are shown, a round number apart.
    steps = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    fewest = 1 if len(names) <= _MAX_NAMES else 2 * len(names) / _MAX_NAMES
    shown = names[:: next(step for step in steps if step >= fewest)]
    ticks = {"tickmode": "array", "tickvals": shown, "ticktext": shown}
    heading = {"text": label(title), "standoff": 18}  # else it runs into the names where a side is cut short
    return {"type": "category", "title": heading, "showgrid": False, "constrain": "domain"} | ticks


def _square(height: int, width: int) -> dict[str, Any]:
    """Make cells square where the matrix nearly is."""
    return {"scaleanchor": "x"} if 1 / 2 <= height / width <= 2 else {}
