"""Agreement: what theory predicts against what was measured."""

import numpy as np

from thalweg.lab.figures.figure import Figure
from thalweg.lab.figures.style import (
    MUTED,
    PALETTE,
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

_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "cross", "star")


def scatter_agreement(
    table: Table,
    *,
    id: str,  # noqa: A002 - the field's word
    title: str,
    caption: str,
    predicted: str = "predicted",
    measured: str = "measured",
    series: str | None = None,
) -> Figure:
    """Draw measured over predicted magnitudes, both logarithmic, with the line where they agree.

    A zero is drawn at a tenth of the least magnitude that is not zero; hovering tells the true values.

    Args:
        table: one row per comparison.
        id: name of the figure.
        title: one line.
        caption: what to see.
        predicted: column of the predictions.
        measured: column of the measurements.
        series: column that splits the rows into colours.

    Returns:
        The figure.

    Raises:
        ConfigError: the table is empty, or a column is missing or not of numbers.
    """
    everything = np.concatenate([numbers(table, predicted), numbers(table, measured)])
    floor = log_floor(everything)
    finite = drawn(everything[np.isfinite(everything)], floor)
    ends = [finite.min() / 1.5, finite.max() * 1.5] if finite.size else [floor, 1.0]
    figure = picture(showlegend=True)
    figure.add_scatter(
        x=ends,
        y=ends,
        mode="lines",
        name="agreement",
        line={"color": MUTED, "width": 1.2, "dash": "dash"},
        hoverinfo="skip",
    )
    for place, (name, rows) in enumerate(groups(table, series).items()):
        x, y = numbers(rows, predicted), numbers(rows, measured)
        kept = thinned(x, y, is_log=True)
        heading = "runs" if series is None else label(name)
        figure.add_scatter(
            x=drawn(x[kept], floor),
            y=drawn(y[kept], floor),
            customdata=np.stack([x[kept], y[kept]], axis=1),
            mode="markers",
            name=heading if isinstance(name, str) else f"{series} {heading}",
            marker={
                "color": PALETTE[place % len(PALETTE)],
                "symbol": _SYMBOLS[place % len(_SYMBOLS)],
                "size": 8,
                "opacity": 0.8,
            },
            hovertemplate="predicted %{customdata[0]:.4g}<br>measured %{customdata[1]:.4g}<extra></extra>",
        )
    figure.update_layout(xaxis=log_axis(predicted, finite), yaxis=log_axis(measured, finite))
    return Figure(id, title, caption, figure)
