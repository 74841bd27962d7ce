"""Spectral densities: how many eigenvalues lie where, from the bulk at zero to outliers far away."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from thalweg.errors import ConfigError
from thalweg.lab.figures.curves import draw_band
from thalweg.lab.figures.figure import Figure
from thalweg.lab.figures.style import DASHES, MAX_POINTS, PALETTE, groups, label, log_axis, numbers, picture
from thalweg.lab.tables import Table

if TYPE_CHECKING:
    import plotly.graph_objects as go

_DECADES = 10
"""Powers of ten shown below the highest density. Chosen by us: one eigenvalue among 1e8 is still in the picture,
and what a smooth kernel leaves between two peaks, down to 1e-300, is not."""

_STRETCH = 20.0
"""How many times as far as the bulk an eigenvalue lies before the axis is bent. Chosen by us: up to there, the bulk
takes more than a twentieth of a straight axis and can be read."""

_BULK = 0.9  # fraction of the eigenvalues that are the bulk; chosen by us, as outliers are few

_APART = 0.08  # how far apart labels stay, as a fraction of the axis; chosen by us, so that a telephone shows them


@dataclass(frozen=True)
class _Axis:
    """Positions of eigenvalues: as they are, or sign(λ)·log10(1 + |λ|/unit), straight near 0 and logarithmic beyond.

    Args:
        unit: where the axis bends, in units of the eigenvalue; None leaves it straight.
    """

    unit: float | None

    def place(self, values: np.ndarray) -> np.ndarray:
        """Give the positions of eigenvalues."""
        if self.unit is None:
            return values
        bent: np.ndarray = np.sign(values) * np.log10(1 + np.abs(values) / self.unit)
        return bent

    def layout(self, title: str, values: np.ndarray) -> dict[str, Any]:
        """Describe the axis; a bent one is labelled at 0 and at powers of ten."""
        axis: dict[str, Any] = {"title": {"text": title}}
        if self.unit is None:
            return axis
        ends = self.place(np.array([min(values.min(), 0.0), max(values.max(), 0.0)]))
        bend, apart, labels = round(math.log10(self.unit)), _APART * (ends[1] - ends[0]), {0.0: "0"}
        for sign, mark, end in ((1, "", ends[1]), (-1, "−", -ends[0])):
            for power in range(math.floor(bend + end), bend - 1, -1):
                place = sign * math.log10(1 + 10.0**power / self.unit)
                if abs(place) <= end and all(abs(place - other) >= apart for other in labels):
                    labels[place] = f"{mark}10<sup>{str(power).replace('-', '−')}</sup>"
        at = sorted(labels)
        return axis | {"tickvals": at, "ticktext": [labels[place] for place in at], "tickangle": 0}


def density(  # noqa: PLR0913 - every column has its name, with a default
    table: Table,
    *,
    id: str,  # noqa: A002 - the field's word
    title: str,
    caption: str,
    x: str = "eigenvalue",
    y: str = "density",
    lower: str | None = "lower",
    upper: str | None = "upper",
    series: str | None = None,
    markers: Table = (),  # type: ignore[assignment]  # an empty table that no call can change
    scale: Literal["auto", "linear", "symlog"] = "auto",
) -> Figure:
    """Draw spectral densities on a logarithmic axis over the eigenvalue, with their confidence bands.

    A bulk near 0 and outliers far from it are both seen: where the farthest eigenvalue lies 20 times as far
    from 0 as nine tenths of the mass, the axis is bent, straight near 0 and logarithmic beyond. The density
    stays that per unit of the eigenvalue. What lies ten decades below the highest density is not shown.

    Args:
        table: one row per point of the line, in the order of the eigenvalues.
        id: name of the figure.
        title: one line.
        caption: what to see.
        x: column of the eigenvalues.
        y: column of the densities.
        lower: column of the band's lower edge; None, as for `upper`, draws no band.
        upper: column of the band's upper edge.
        series: column that splits the rows into lines: checkpoints, or layers.
        markers: eigenvalues that are known by themselves, one row each with the columns of x and of the series;
            drawn as ticks at the foot of the picture.
        scale: "linear" and "symlog" settle the axis of the eigenvalue.

    Returns:
        The figure.

    Raises:
        ConfigError: the table is empty, or a column is missing or not of numbers, or no density is positive.
    """
    heights = numbers(table, y)
    top = heights[np.isfinite(heights)].max(initial=0.0)
    if top <= 0:
        raise ConfigError(f"Expected a positive density in the column {y!r}. Got none. Check what the run stores.")
    floor = float(top) * 10.0**-_DECADES
    lines, known = groups(table, series), groups(markers, series) if markers else {}
    axis = _axis(scale, lines, x, y, numbers(markers, x) if markers else np.empty(0))
    figure = picture(showlegend=series is not None or bool(markers))
    for place, (name, rows) in enumerate(lines.items()):
        heading = label(name) if isinstance(name, str) else f"{series} {label(name)}"
        _draw_line(figure, place, rows, (x, y, lower, upper), axis, floor, heading or "density")
    for name, rows in known.items():
        _draw_marks(figure, list(lines).index(name) if name in lines else len(lines), numbers(rows, x), axis, floor)
    everything = np.concatenate([numbers(t, x) for t in (table, markers) if t])
    shown = heights[heights > floor]
    figure.update_layout(
        xaxis=axis.layout(label(x), everything[np.isfinite(everything)]),
        yaxis=log_axis(label(y), shown, range=[math.log10(shown.min()) - 0.9, math.log10(top) + 0.3]),
    )
    return Figure(id, title, caption, figure)


def _axis(scale: str, lines: dict[Any, Table], x: str, y: str, marked: np.ndarray) -> _Axis:
    """Bend the axis where the bulk would not be seen on a straight one."""
    bulks, farthest = [], float(np.abs(marked[np.isfinite(marked)]).max(initial=0.0))
    for rows in lines.values():
        values, heights = numbers(rows, x), numbers(rows, y)
        kept = np.isfinite(values) & np.isfinite(heights)
        values, mass = values[kept], np.maximum(heights[kept], 0)
        if len(values) < 2 or not mass.any():
            continue
        mass = mass * np.abs(np.gradient(values))
        distance = np.abs(values)
        order = np.argsort(distance)
        beyond = np.searchsorted(np.cumsum(mass[order]) / mass.sum(), _BULK).clip(max=len(values) - 1)
        finest = distance[distance > 0].min(initial=np.inf)  # a bulk within one step of the grid
        bulks.append(float(max(distance[order][beyond], finest)))
        farthest = max(farthest, float(np.abs(values).max()))
    bulk = min(filter(math.isfinite, bulks), default=0.0)
    if scale == "linear" or not bulk or (scale == "auto" and farthest < _STRETCH * bulk):
        return _Axis(None)
    return _Axis(10.0 ** math.floor(math.log10(bulk)))


def _draw_line(
    figure: go.Figure,
    place: int,
    rows: Table,
    columns: tuple[str, str, str | None, str | None],
    axis: _Axis,
    floor: float,
    heading: str,
) -> None:
    x, y, lower, upper = columns
    values, heights = numbers(rows, x), numbers(rows, y)
    positions = axis.place(values)
    kept = _outlined(positions, heights)
    lowest = floor / 10  # below the picture: the line leaves it, and comes back
    if lower is not None and upper is not None:
        low, high = (np.maximum(numbers(rows, name)[kept], lowest) for name in (lower, upper))
        draw_band(figure, place, positions[kept], low, high)
    figure.add_scatter(
        x=positions[kept],
        y=np.maximum(heights[kept], lowest),
        customdata=np.stack([values[kept], heights[kept]], axis=1),
        mode="lines",
        name=heading,
        legendgroup=str(place),
        line={
            "color": PALETTE[place % len(PALETTE)],
            "width": 1.8,
            "dash": DASHES[place // len(PALETTE) % len(DASHES)],
        },
        hovertemplate=f"λ = %{{customdata[0]:.4g}}: %{{customdata[1]:.3g}}<extra>{heading}</extra>",
    )


def _draw_marks(figure: go.Figure, place: int, values: np.ndarray, axis: _Axis, floor: float) -> None:
    values = values[np.isfinite(values)]
    shown = [t for t in figure.data if t.mode == "lines" and t.customdata is not None]
    heights = np.concatenate([np.asarray(t.customdata)[:, 1] for t in shown])
    foot = float(heights[heights > floor].min()) * 10**-0.55  # between the lowest density and the axis
    figure.add_scatter(
        x=axis.place(values),
        y=np.full(len(values), foot),
        customdata=values,
        mode="markers",
        name="computed eigenvalues",
        legendgroup="computed eigenvalues",
        showlegend=not any(t.name == "computed eigenvalues" for t in figure.data),
        marker={
            "symbol": "line-ns-open",
            "size": 14,
            "color": PALETTE[place % len(PALETTE)],
            "line": {"width": 1.6, "color": PALETTE[place % len(PALETTE)]},
        },
        hovertemplate="λ = %{customdata:.4g}<extra>computed</extra>",
    )


def _outlined(positions: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Choose at most `MAX_POINTS` points so that no peak is lost: the least and the greatest of every stretch."""
    if len(positions) <= MAX_POINTS:
        return np.arange(len(positions))
    finite = np.where(np.isfinite(heights), heights, 0.0)
    start, end = positions.min(), positions.max()
    stretch = ((positions - start) / (end - start or 1.0) * (MAX_POINTS // 2 - 2)).astype(int)
    kept = {0, len(positions) - 1}
    for number in np.unique(stretch):
        members = np.flatnonzero(stretch == number)
        kept |= {int(members[np.argmin(finite[members])]), int(members[np.argmax(finite[members])])}
    return np.array(sorted(kept))
