"""Inertia: how many eigenvalues are negative, zero and positive, as stacked bars."""

from thalweg.lab.figures.figure import Figure
from thalweg.lab.figures.style import SIGN_COLOURS, column, label, numbers, picture
from thalweg.lab.tables import Table


def inertia_bars(
    table: Table,
    *,
    id: str,  # noqa: A002 - the field's word
    title: str,
    caption: str,
    x: str = "width",
) -> Figure:
    """Draw the counts of negative, zero and positive eigenvalues, one bar per row.

    Args:
        table: one row per bar, with the columns `negative`, `zero`, `positive` and that of x.
        id: name of the figure.
        title: one line.
        caption: what to see.
        x: column that names the bars.

    Returns:
        The figure.

    Raises:
        ConfigError: the table is empty, or a column is missing or not of numbers.
    """
    names = [label(name) for name in column(table, x)]
    figure = picture(barmode="stack", bargap=0.35)
    for sign, colour in SIGN_COLOURS.items():
        counts = numbers(table, sign)
        figure.add_bar(
            x=names,
            y=counts,
            name=sign,
            text=[f"{count:g}" if count else "" for count in counts],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"color": "#FFFFFF"},
            marker={"color": colour},
            hovertemplate=f"{label(x)} %{{x}}: %{{y}} {sign}<extra></extra>",
        )
    figure.update_layout(
        xaxis={"type": "category", "title": {"text": label(x)}},
        yaxis={"title": {"text": "number of eigenvalues"}},
    )
    return Figure(id, title, caption, figure)
