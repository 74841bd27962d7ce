"""Histograms: one small panel for each name, its bars coloured by the sign of what they count."""

import math
from typing import TYPE_CHECKING

import numpy as np

from thalweg.errors import ConfigError
from thalweg.lab.figures.figure import Figure
from thalweg.lab.figures.style import MUTED, SIGN_COLOURS, groups, label, numbers, picture
from thalweg.lab.tables import Table

if TYPE_CHECKING:
    import plotly.graph_objects as go

_COLUMNS, _ROW, _FRAME = 4, 160, 110  # panels in a row, pixels of a row and of all around; chosen by us
_GAP, _HEAD, _FOOT = 0.06, 0.12, 0.24  # of a panel's place: beside it, for its heading, for its axis; chosen by us
_THIN = 0.4  # width of the bar of exact zeros in that of the narrowest bin; chosen by us


def histograms(
    table: Table,
    *,
    id: str,  # noqa: A002 - the field's word
    title: str,
    caption: str,
    panel: str = "panel",
    x_title: str = "value",
) -> Figure:
    """Draw counts in bins, negative and positive ones in two colours, a panel for each name.

    Args:
        table: one row per bin, with the columns `low`, `high` and `count`. A bin whose edges are equal counts values
            that are exactly there; no other has 0 within.
        id: name of the figure.
        title: one line.
        caption: what to see.
        panel: column that splits the rows into panels, the first one on the upper left.
        x_title: what is counted.

    Returns:
        The figure. Every panel tells the share of negative values.

    Raises:
        ConfigError: the table is empty, a column is missing or not of numbers, or 0 lies within a bin.
    """
    split = groups(table, panel)
    rows = math.ceil(len(split) / _COLUMNS)
    figure = picture(panels=1, height=_ROW * rows + _FRAME, barmode="overlay", showlegend=True)
    shown: set[str] = set()
    for place, (name, bins) in enumerate(split.items()):
        lows, highs, counts = (numbers(bins, key) for key in ("low", "high", "count"))
        if ((lows < 0) & (highs > 0)).any():
            raise ConfigError(
                f"Expected bins that end at 0 or begin there. Got one around it in {name!r}. Make 0 an edge."
            )
        thin = _THIN * min((highs - lows)[highs > lows], default=1.0)
        total = counts.sum() or 1.0
        masks = {
            "negative": (lows < highs) & (highs <= 0),
            "zero": lows == highs,
            "positive": (lows < highs) & (lows >= 0),
        }
        for sign, mask in masks.items():
            if not counts[mask].any():
                continue
            figure.add_bar(
                x=((lows + highs) / 2)[mask],
                y=counts[mask],
                width=np.where(lows == highs, thin, highs - lows)[mask],
                name=sign,
                legendgroup=sign,
                showlegend=sign not in shown,
                marker={"color": SIGN_COLOURS[sign]},
                xaxis=f"x{place + 1}",
                yaxis=f"y{place + 1}",
                hovertemplate=f"%{{x:.3g}}: %{{y}}<extra>{label(name)}, {sign}</extra>",
            )
            shown.add(sign)
        share = counts[masks["negative"]].sum() / total
        heading = f"{label(name)} ({share:.0%} negative)"
        _add_panel(figure, place, rows, heading, x_title if place + _COLUMNS >= len(split) else "")
    return Figure(id, title, caption, figure)


def _add_panel(figure: "go.Figure", place: int, rows: int, heading: str, x_title: str) -> None:
    """Give a panel its axes and its heading, by its place in reading order."""
    row, column = divmod(place, _COLUMNS)
    width, height = 1 / _COLUMNS, 1 / rows
    left, top = column * width, 1 - row * height
    across = [left + _GAP * width, left + (1 - _GAP) * width - 0.02]
    upward = [top - height * (1 - _FOOT), top - height * _HEAD]
    figure.update_layout(
        {
            f"xaxis{place + 1}": {
                "domain": across,
                "anchor": f"y{place + 1}",
                "title": {"text": x_title},
                "nticks": 5,
            },
            f"yaxis{place + 1}": {"domain": upward, "anchor": f"x{place + 1}", "nticks": 3},
        }
    )
    figure.add_annotation(
        text=heading,
        x=across[0],
        y=upward[1],
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="bottom",
        showarrow=False,
        font={"size": 11, "color": MUTED},
    )
