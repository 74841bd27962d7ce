"""ranking: values of each name as dots on a line of its own."""

import math

import pytest

from thalweg.errors import ConfigError
from thalweg.lab.figures import ranking
from thalweg.lab.figures.style import PALETTE

NAMES = {"id": "f", "title": "Title", "caption": "Caption."}
TABLE = [
    {"name": "b", "value": 0.5, "split": "train", "open": False},
    {"name": "a<i>", "value": 0.9, "split": "train", "open": False},
    {"name": "b", "value": 0.4, "split": "test", "open": True},
]


def test_dots_stand_at_their_names_the_first_on_top():
    figure = ranking(TABLE, **NAMES, series="split", hollow="open").plotly
    assert list(figure.layout.yaxis.categoryarray) == ["a&lt;i&gt;", "b"]
    train, test = figure.data
    assert (list(train.x), list(train.y)) == ([0.5, 0.9], ["b", "a&lt;i&gt;"])
    assert (list(test.x), list(test.marker.symbol)) == ([0.4], ["diamond-open"])
    assert (train.marker.color, test.marker.color) == PALETTE[:2]


def test_a_reference_has_the_colour_of_its_series_and_its_text_stays_inside():
    lines = [{"label": "ends", "value": 0.95, "series": "test"}, {"label": "chance", "value": 0.1}]
    figure = ranking(TABLE, **NAMES, series="split", references=lines).plotly
    assert [shape.x0 for shape in figure.layout.shapes] == [0.95, 0.1]
    assert figure.layout.shapes[0].line.color == PALETTE[1]
    assert [(note.text, note.xanchor) for note in figure.layout.annotations] == [
        ("ends", "right"),
        ("chance", "left"),
    ]


def test_on_a_logarithmic_axis_what_is_not_positive_is_left_out():
    table = [{"name": "a", "value": 1e-3}, {"name": "b", "value": 0.0}, {"name": "c", "value": None}]
    figure = ranking(table, **NAMES, log_x=True, x_title="loss").plotly
    assert figure.layout.xaxis.type == "log"
    assert [math.isfinite(x) for x in figure.data[0].x] == [True, False, False]


@pytest.mark.parametrize(("table", "message"), [([], "Got an empty one"), ([{"name": "a"}], "column 'value'")])
def test_a_table_that_cannot_be_drawn_is_refused(table, message):
    with pytest.raises(ConfigError, match=message):
        ranking(table, **NAMES)
