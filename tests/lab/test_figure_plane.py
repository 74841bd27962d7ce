"""plane: a slice as a map."""

import json
import random

import numpy as np
import pytest

from thalweg.errors import ConfigError
from thalweg.lab.figures.plane import plane

NAMES = {"id": "f", "title": "Title", "caption": "Caption."}


def grid(height=lambda a, b: 1.0 + a * a + 3 * b):
    return [{"a": a, "b": b, "loss": height(a, b)} for a in (-1.0, 0.0, 2.0) for b in (0.0, 0.5)]


def test_heights_lie_at_their_coordinates_whatever_the_order_of_rows():
    table = grid()
    random.Random(0).shuffle(table)
    (contour,) = plane(table, **NAMES).plotly.data
    assert (list(contour.x), list(contour.y)) == ([-1.0, 0.0, 2.0], [0.0, 0.5])
    np.testing.assert_array_equal(contour.z, [[2.0, 1.0, 5.0], [3.5, 2.5, 6.5]])


def test_colours_are_logarithmic_over_more_than_two_decades():
    tables = (grid(lambda a, b, top=top: top ** ((a + 1) / 3)) for top in (100.0, 1e4))
    narrow, wide = (plane(table, **NAMES).plotly.data[0] for table in tables)
    np.testing.assert_allclose(narrow.z[0], [1.0, 100 ** (1 / 3), 100.0])
    np.testing.assert_allclose(wide.z[0], [0.0, 4 / 3, 4.0], atol=1e-12)
    assert list(wide.colorbar.tickvals) == [0, 1, 2, 3, 4]
    assert wide.colorbar.ticktext[4] == "10<sup>4</sup>"
    np.testing.assert_allclose(wide.customdata[0][2], 1e4)


def test_a_height_that_is_not_positive_keeps_the_scale_linear_unless_asked():
    table = grid(lambda a, b: 1000.0 * a)
    assert plane(table, **NAMES).plotly.data[0].z[0][0] == -1000.0
    np.testing.assert_array_equal(
        np.isnan(plane(table, log_z=True, **NAMES).plotly.data[0].z[0]), [True, True, False]
    )


def test_what_is_not_finite_or_missing_is_left_white():
    table = grid()[:-1]
    table[0]["loss"], table[1]["loss"], table[2]["loss"] = float("inf"), "nan", None
    contour = plane(table, **NAMES).plotly.data[0]
    np.testing.assert_array_equal(np.isnan(contour.z), [[True, True, False], [True, False, True]])
    json.loads(plane(table, **NAMES).plotly.to_json())


def test_nothing_finite_is_drawn_too():
    plane(grid(lambda a, b: float("nan")), log_z=True, **NAMES)


def test_points_are_marked_and_their_names_escaped():
    markers = [{"a": 0.0, "b": 0.5, "name": "<b>start"}, {"a": 2.0, "b": 0.0, "name": "end"}]
    figure = plane(grid(), markers=markers, x_title="along", **NAMES).plotly
    (_, points) = figure.data
    assert list(points.text) == ["&lt;b&gt;start", "end"]
    assert [(a.text, a.x, a.y) for a in figure.layout.annotations][1] == ("end", 2.0, 0.0)
    assert (list(points.x), list(points.y)) == ([0.0, 2.0], [0.5, 0.0])
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("along", "b")


def test_other_columns_are_drawn_by_name():
    table = [{"u": 0, "v": 0, "test_loss": 1.0}, {"u": 1, "v": 0, "test_loss": 2.0}]
    contour = plane(table, x="u", y="v", z="test_loss", **NAMES).plotly.data[0]
    assert contour.colorbar.title.text == "test_loss"


def test_two_rows_for_one_point_are_refused():
    with pytest.raises(ConfigError, match=r"Expected one row for each \(a, b\). Got 12 rows for 6 points"):
        plane(grid() + grid(), **NAMES)


def test_an_empty_table_and_a_missing_column_are_refused():
    with pytest.raises(ConfigError, match="Expected a table with rows"):
        plane([], **NAMES)
    with pytest.raises(ConfigError, match="Expected the column 'accuracy'"):
        plane(grid(), z="accuracy", **NAMES)
