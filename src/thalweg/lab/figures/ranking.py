"""Ranking: one line per name with its values as dots, and lines across that all are held against."""

import numpy as np

from thalweg.lab.figures.figure import Figure
from thalweg.lab.figures.style import MUTED, PALETTE, column, groups, label, log_axis, numbers, picture
from thalweg.lab.tables import Table

_SYMBOLS = ("circle", "diamond", "square", "triangle-up")
_ROW, _FRAME = 26, 150  # pixels of a name, and of all around them; chosen by us


def ranking(  # noqa: PLR0913 - names, values and series are named columns, each with its default
    table: Table,
    *,
    id: str,  # noqa: A002 - the field's word
    title: str,
    caption: str,
    name: str = "name",
    value: str = "value",
    series: str | None = None,
    hollow: str | None = None,
    references: Table | None = None,
    log_x: bool = False,
    x_title: str | None = None,
) -> Figure:
    """Draw the values of each name as dots on a line of its own, the first name on top.

    Args:
        table: one row per dot.
        id: name of the figure.
        title: one line.
        caption: what to see.
        name: column of the names.
        value: column of the values.
        series: column that splits the dots into colours; None draws one.
        hollow: column that says which dots are hollow; None fills all.
        references: lines across, with the columns `label` and `value`; one with a `series`, too, has its colour.
        log_x: logarithmic values; what is not positive is left out.
        x_title: default the column's name.

    Returns:
        The figure.

    Raises:
        ConfigError: the table is empty, or a column is missing or not of numbers.
    """
    names = list(dict.fromkeys(label(n) for n in column(table, name)))
    figure = picture(height=_ROW * len(names) + _FRAME, showlegend=series is not None)
    split = groups(table, series)
    for place, (heading, rows) in enumerate(split.items()):
        colour = PALETTE[place % len(PALETTE)]
        values = numbers(rows, value)
        opened = [bool(h) for h in column(rows, hollow)] if hollow is not None else [False] * len(rows)
        symbol = _SYMBOLS[place % len(_SYMBOLS)]
        figure.add_scatter(
            x=np.where(values > 0, values, np.nan) if log_x else values,
            y=[label(n) for n in column(rows, name)],
            mode="markers",
            name=label(heading) or "values",
            marker={
                "color": colour,
                "symbol": [f"{symbol}-open" if is_open else symbol for is_open in opened],
                "size": 10,
                "line": {"color": colour, "width": 2},
            },
            hovertemplate=f"%{{y}}: %{{x:.4g}}<extra>{label(heading)}</extra>",
        )
    colours = {heading: PALETTE[place % len(PALETTE)] for place, heading in enumerate(split)}
    everything = numbers(table, value)
    finite = everything[np.isfinite(everything)]
    middle = (finite.min() + finite.max()) / 2 if finite.size else 0.0
    for place, line in enumerate(references or []):
        side = "left" if float(line["value"]) > middle else "right"  # a text beside a line stays in the picture
        figure.add_vline(
            x=float(line["value"]),
            line={"color": colours.get(line.get("series"), MUTED), "width": 1.4, "dash": "dash"},
            annotation={
                "text": label(line["label"]),
                "font": {"size": 11, "color": MUTED},
                "yanchor": "bottom",
                "yshift": 14 * place,
            },
            annotation_position=f"bottom {side}",
        )
    heading = x_title or value
    figure.update_layout(
        xaxis=log_axis(heading, everything) if log_x else {"title": {"text": heading}},
        yaxis={"type": "category", "categoryorder": "array", "categoryarray": names[::-1], "title": {"text": ""}},
    )
    return Figure(id, title, caption, figure)
