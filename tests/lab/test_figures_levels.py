"""matrix and levels: maps of a matrix, and critical points by width and loss."""

import json
import math
import random

import numpy as np
import pytest

from thalweg.errors import ConfigError
from thalweg.lab.figures import levels, matrix

NAMES = {"id": "f", "title": "Title", "caption": "Caption."}


def cells(values, rows=None, columns=None):
    return [
        {"row": (rows or range(len(values)))[i], "column": (columns or range(len(row)))[j], "value": value}
        for i, row in enumerate(values)
        for j, value in enumerate(row)
    ]


def heat(table, **options):
    return matrix(table, **NAMES, **options).plotly.data[0]


def shades(trace):
    """Colour of a value, as the trace draws it."""

    def rgb(colour):
        return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]

    places, colours = zip(*trace.colorscale, strict=True)

    def of(value):
        place = (value - trace.zmin) / (trace.zmax - trace.zmin)
        return tuple(float(np.interp(place, places, [rgb(c)[k] for c in colours])) for k in range(3))

    return of


def test_cells_lie_at_their_names_in_the_order_of_appearance_the_first_row_on_top():
    table = cells([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], rows=["b", "a"], columns=[7, 3, 5])
    figure = matrix(table, **NAMES).plotly
    assert (list(figure.data[0].y), list(figure.data[0].x)) == (["b", "a"], ["7", "3", "5"])
    np.testing.assert_array_equal(figure.data[0].z, [[1, 2, 3], [4, 5, 6]])
    assert (figure.layout.yaxis.autorange, figure.layout.yaxis.type) == ("reversed", "category")


def test_a_shuffled_table_has_the_same_cells():
    table = cells([[1.0, 2.0], [3.0, 4.0]])
    random.Random(1).shuffle(table)
    trace = heat(table)
    drawn = {(r, c): trace.z[i][j] for i, r in enumerate(trace.y) for j, c in enumerate(trace.x)}
    assert drawn == {(str(cell["row"]), str(cell["column"])): cell["value"] for cell in table}


def test_zero_is_white_and_equal_magnitudes_are_equally_far_along_their_arm():
    trace = heat(cells([[-0.5, 0.0], [0.25, 1.0]]))
    shade, symmetric = shades(trace), shades(heat(cells([[-1.0, 1.0]])))
    assert (trace.zmin, trace.zmax) == (-0.5, 1.0)
    assert shade(0.0) == (255, 255, 255)
    for value in (-0.5, -0.2, 0.3, 1.0):
        np.testing.assert_allclose(shade(value), symmetric(value), atol=1.0)
    assert shade(-0.5)[0] > shade(-0.5)[2]
    assert shade(0.5)[0] < shade(0.5)[2]


def test_values_of_one_sign_run_from_white_at_the_low_end():
    shade = shades(heat(cells([[0.0, 3.0], [1.0, 10.0]])))
    assert shade(0.0) == (255, 255, 255)
    assert sum(shade(10.0)) < sum(shade(3.0)) < sum(shade(1.0))


def test_the_ends_of_the_colours_can_be_given():
    trace = heat(cells([[0.2, 0.4]]), low=-1.0, high=1.0)
    assert (trace.zmin, trace.zmax) == (-1.0, 1.0)
    assert shades(trace)(0.0) == (255, 255, 255)


@pytest.mark.parametrize("options", [{}, {"low": 2.0}, {"high": 2.0}, {"low": 5.0}, {"high": -5.0}])
def test_one_value_everywhere_has_a_scale_too(options):
    trace = heat(cells([[2.0, 2.0]]), **options)
    assert trace.zmin < trace.zmax
    assert all(getattr(trace, f"z{'min' if name == 'low' else 'max'}") == end for name, end in options.items())


def test_missing_cells_and_what_is_not_finite_are_left_out():
    table = cells([[1.0, None, "nan"], [2.0, math.inf, 3.0]])[:-1]
    trace = heat(table, show_values=True)
    np.testing.assert_array_equal(np.isnan(trace.z), [[False, True, True], [False, True, True]])
    assert trace.text[0][1] == ""
    assert (trace.zmin, trace.zmax) == (1.0, 2.0)
    json.loads(matrix(table, **NAMES).plotly.to_json())


def test_a_matrix_of_nothing_finite_is_drawn_too():
    trace = heat(cells([[math.nan, None]]))
    assert (trace.zmin, trace.zmax) == (0.0, 1.0)


def test_values_are_written_in_place_of_the_bar():
    trace = heat(cells([[12, -0.25], [0, 1234.5678]]), show_values=True)
    assert [list(row) for row in trace.text] == [["12", "−0.25"], ["0", "1.23e+03"]]
    assert trace.showscale is False
    assert heat(cells([[1, 2]])).text is None


def test_breaks_outline_the_blocks_along_the_diagonal():
    figure = matrix(cells(np.eye(5).tolist()), breaks=[3, 4], **NAMES).plotly
    assert [(s.x0, s.x1, s.y0, s.y1) for s in figure.layout.shapes] == [
        (-0.5, 2.5, -0.5, 2.5),
        (2.5, 3.5, 2.5, 3.5),
        (3.5, 4.5, 3.5, 4.5),
    ]
    assert matrix(cells(np.eye(5).tolist()), **NAMES).plotly.layout.shapes == ()


def test_a_long_side_is_averaged_over_neighbours_as_a_plain_loop_does():
    values = np.random.default_rng(0).normal(size=(601, 2))
    values[0, 0] = np.nan
    figure = matrix(cells(values.tolist()), breaks=[1], **NAMES).plotly
    slow = [[np.nanmean(values[i : i + 3, j]) for j in range(2)] for i in range(0, 601, 3)]
    np.testing.assert_allclose(figure.data[0].z, slow, rtol=1e-6)
    assert list(figure.data[0].y)[:2] == ["0 – 2", "3 – 5"]
    assert figure.data[0].y[-1] == "600"
    assert figure.layout.shapes[0].y1 == pytest.approx(1 / 3 - 0.5)


def test_a_picture_of_300_by_300_stays_small_and_names_a_dozen():
    values = np.random.default_rng(0).uniform(-1, 1, size=(300, 300)).round(3)
    figure = matrix(cells(values.tolist()), **NAMES).plotly
    assert figure.data[0].z.dtype == np.float32
    assert len(figure.to_json()) < 7 * 300 * 300  # bytes: 4 of a cell in base 64, with its slashes escaped
    assert list(figure.layout.xaxis.tickvals) == [str(i) for i in range(0, 300, 50)]


def test_names_are_escaped():
    trace = heat(cells([[1.0]], rows=["<b>a"], columns=["x & y"]))
    assert (trace.y[0], trace.x[0]) == ("&lt;b&gt;a", "x &amp; y")


def test_two_rows_for_one_cell_are_refused():
    with pytest.raises(ConfigError, match=r"Expected one row for each \(row, column\)\. Got 4 rows for 2 cells"):
        matrix(cells([[1.0, 2.0]]) * 2, **NAMES)


def test_colours_from_high_to_low_are_refused():
    with pytest.raises(ConfigError, match=r"from a low to a high value\. Got 1\.0 to 1\.0"):
        matrix(cells([[1.0]]), low=1.0, high=1.0, **NAMES)


@pytest.mark.parametrize("place", [0, 2, -1])
def test_breaks_outside_are_refused(place):
    with pytest.raises(ConfigError, match=f"Expected breaks from 1 to 1. Got {place}"):
        matrix(cells(np.eye(2).tolist()), breaks=[place], **NAMES)


def test_an_empty_matrix_a_missing_column_and_texts_are_refused():
    with pytest.raises(ConfigError, match="Expected a table with rows"):
        matrix([], **NAMES)
    with pytest.raises(ConfigError, match="Expected the column 'other'"):
        matrix(cells([[1.0]]), value="other", **NAMES)
    with pytest.raises(ConfigError, match="Expected numbers in the column 'value'"):
        matrix(cells([["much"]]), **NAMES)


def node(key, width, loss, degeneracy=0, index=0, **more):
    return {"id": key, "width": width, "loss": loss, "degeneracy": degeneracy, "index": index, **more}


CHAIN = [node("a1", 1, 0.109), node("a2", 2, 0.109, 1, 1), node("a3", 3, 0.109, 2, 2)]
MIRRORS = [node("b", 2, 0.07), node("c", 2, 0.07), node("b3", 3, 0.07, 1, 1), node("c3", 3, 0.07, 1, 1)]
BOTTOM = node("z", 3, 1e-30)
NODES = [*CHAIN, *MIRRORS, BOTTOM]
EDGES = [{"from": a, "to": b} for a, b in (("a1", "a2"), ("a2", "a3"), ("a1", "a3"), ("b", "b3"), ("c", "c3"))]


def parts(figure):
    """Trace of lines, of points, of labels."""
    lines = [t for t in figure.data if t.mode == "lines"]
    points = next(t for t in figure.data if t.mode == "markers+text")
    return lines, points, next(t for t in figure.data if t.mode == "text")


def spots(figure):
    _, points, _ = parts(figure)
    return {row["id"]: (x, y) for row, x, y in zip(NODES, points.x, points.y, strict=True)}


def test_points_stand_in_the_column_of_their_width_at_their_loss():
    figure = levels(NODES, EDGES, **NAMES).plotly
    for row in NODES:
        x, y = spots(figure)[row["id"]]
        assert round(x) == row["width"] - 1
        assert y == row["loss"]
    assert list(figure.layout.xaxis.ticktext) == ["1", "2", "3"]


def test_points_of_one_level_stand_side_by_side():
    places = spots(levels(NODES, EDGES, **NAMES).plotly)
    assert abs(places["b"][0] - places["c"][0]) >= 0.15
    assert places["b"][0] + places["c"][0] == pytest.approx(2.0)
    assert places["z"][0] == 2.0


def test_many_points_of_one_level_stay_in_their_column():
    rows = [node(i, 1, 0.5) for i in range(30)] + [node("far", 2, 0.0)]
    points = parts(levels(rows, [], **NAMES).plotly)[1]
    assert len({round(x, 9) for x in points.x[:30]}) == 30
    assert max(abs(x) for x in points.x[:30]) < 0.4


def test_lines_run_from_each_point_to_what_it_is_embedded_as_and_implied_ones_are_left_out():
    figure = levels(NODES, EDGES, **NAMES).plotly
    (line,), places = parts(figure)[0], spots(figure)
    ends = [i for i, x in enumerate(line.x) if x is None]
    starts = [0, *(i + 1 for i in ends[:-1])]
    drawn = {((line.x[a], line.y[a]), (line.x[b - 1], line.y[b - 1])) for a, b in zip(starts, ends, strict=True)}
    wanted = {(places[a], places[b]) for a, b in (("a1", "a2"), ("a2", "a3"), ("b", "b3"), ("c", "c3"))}
    np.testing.assert_allclose(sorted(drawn), sorted(wanted), atol=1e-12)


def test_lines_are_drawn_in_the_order_of_the_table():
    """So that the figure is the same whatever the hashes of its ids."""
    rows = [node(f"{kind}{i}", width, float(i)) for kind, width in (("a", 1), ("b", 2)) for i in range(10)]
    for order in (range(10), [7, 2, 9, 0, 5, 1, 8, 3, 6, 4]):
        edges = [{"from": f"a{i}", "to": f"b{i}"} for i in order]
        (line,) = parts(levels(rows, [*edges, edges[0]], **NAMES).plotly)[0]
        assert [y for y in line.y if y is not None][::2] == [float(i) for i in order]


def test_lines_of_one_level_are_bent_apart():
    figure = levels(NODES, EDGES, **NAMES).plotly
    (line,) = parts(figure)[0]
    heights = {y for y in line.y if y is not None and 0.06 < y < 0.08}
    assert min(heights) < 0.0695
    assert max(heights) > 0.0705


def test_symbols_tell_minima_from_saddles_and_hollow_markers_are_new():
    rows = [node("m", 1, 1.0), node("s", 1, 0.0, 3, 2, is_new=True)]
    figure = levels(rows, [], **NAMES).plotly
    _, points, _ = parts(figure)
    assert list(points.marker.symbol) == ["circle", "diamond"]
    assert points.marker.color[1] == "#FFFFFF" != points.marker.color[0]
    assert points.marker.line.color[0] == points.marker.line.color[1] == points.marker.color[0]
    assert [text.strip("</b>") for text in points.text] == ["0", "3"]
    assert "3 zero, 2 negative" in points.customdata[1]
    names = [t.name for t in figure.data if t.name]
    assert names == ["from width 1", "minimum", "saddle", "not in the paper"]


def test_the_colour_is_that_of_the_least_width():
    figure = levels(NODES, EDGES, **NAMES).plotly
    colours = dict(zip([row["id"] for row in NODES], parts(figure)[1].marker.color, strict=True))
    assert colours["a1"] == colours["a2"] == colours["a3"]
    assert len({colours[key] for key in ("a1", "b", "z")}) == 3
    assert colours["b"] == colours["c3"]


def test_points_that_are_no_embedded_ones_are_labelled():
    rows = [*NODES[:-1], node("z", 3, 1e-30), node("<n>", 3, 0.05, label="<new>")]
    labels = parts(levels(rows, EDGES, **NAMES).plotly)[2]
    assert [text.replace("<br>", "").strip() for text in labels.text] == [
        "0.109",
        "0.07",
        "0.07",
        "≈ 0",
        "&lt;new&gt;",
    ]


def test_zero_losses_have_a_place_on_a_logarithmic_axis():
    figure = levels([*NODES[:-1], node("z", 3, 0.0)], EDGES, log_y=True, **NAMES).plotly
    lowest = min(parts(figure)[1].y)
    axis = figure.layout.yaxis
    assert lowest == pytest.approx(0.109e-6)
    assert axis.range[0] < math.log10(lowest)
    assert (axis.ticktext[0], axis.tickvals[0]) == ("≈ 0", pytest.approx(lowest))
    assert "loss 0<br>" in parts(figure)[1].customdata[-1]


def test_a_logarithmic_axis_without_zeros_names_only_powers():
    axis = levels([node(1, 1, 1.0), node(2, 2, 1e-3)], [], log_y=True, **NAMES).plotly.layout.yaxis
    assert axis.ticktext is None


def test_one_point_and_all_zero_losses_are_drawn():
    for log_y in (False, True):
        json.loads(levels([node(1, 4, 0.0)], [], log_y=log_y, **NAMES).plotly.to_json())


@pytest.mark.parametrize(
    ("rows", "edges", "message"),
    [
        ([], [], "Expected a table with rows"),
        ([*CHAIN, CHAIN[0]], [], "Expected nodes with different ids. Got 'a1' twice"),
        ([{"id": 1, "width": 1}], [], "Expected the column 'loss'"),
        ([node(1, 1, "high")], [], "Expected numbers in the column 'loss'"),
        ([node(1, 1, None)], [], "Expected finite numbers in the column 'loss'"),
        (CHAIN, [{"from": "a1", "to": "b"}], "Expected edges between nodes. Got 'b'"),
        (CHAIN, [{"from": "a2", "to": "a1"}], "Expected edges to wider nets. Got 'a2' of width 2 to 'a1' of width 1"),
        (CHAIN, [{"from": "a1"}], "Expected the column 'to'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(rows, edges, message):
    with pytest.raises(ConfigError, match=message):
        levels(rows, edges, **NAMES)
