"""A figure: a Plotly picture with a title and a caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Figure:
    """A figure of a report.

    Args:
        id: short name, unique in its recipe.
        title: one line, plain text.
        caption: what is drawn and what to see in it, plain text.
        plotly: the picture. `figure.plotly.show()` opens it.
    """

    id: str
    title: str
    caption: str
    plotly: go.Figure
