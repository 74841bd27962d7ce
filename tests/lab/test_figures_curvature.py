"""Spectral densities and certified eigenvalues as pictures."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thalweg.errors import ConfigError
from thalweg.lab.figures import density, eigenvalue_intervals
from thalweg.lab.figures.style import MAX_POINTS

NAMES = {"id": "f", "title": "Title", "caption": "Caption."}
INJECTION = "</script><script>alert(1)</script>"


def bulk(width=0.01, farthest=1.0, count=801, net="a"):
    """A Gaussian bulk on an even grid."""
    grid = np.linspace(-farthest, farthest, count)
    heights = np.exp(-0.5 * (grid / width) ** 2) / (width * math.sqrt(2 * math.pi))
    return [
        {"net": net, "eigenvalue": x, "density": d, "lower": 0.5 * d, "upper": 2 * d}
        for x, d in zip(grid.tolist(), heights.tolist(), strict=True)
    ]


def lines(figure):
    return [t for t in figure.plotly.data if t.mode == "lines" and t.fill is None]


def marks(figure):
    return [t for t in figure.plotly.data if t.mode == "markers"]


def tops(net="a", values=(3.0, 2.0, 1.0), **more):
    return [
        {"net": net, "index": i, "eigenvalue": v, "lower": v - 0.1, "upper": v + 0.2, "converged": True} | more
        for i, v in enumerate(values, start=1)
    ]


def test_a_density_is_drawn_on_a_logarithmic_axis_with_its_band():
    rows = bulk(width=1.0, farthest=3.0, count=101)
    figure = density(rows, **NAMES)
    (line,) = lines(figure)
    assert figure.plotly.layout.yaxis.type == "log"
    np.testing.assert_array_equal(line.x, [r["eigenvalue"] for r in rows])
    np.testing.assert_array_equal(line.y, [r["density"] for r in rows])
    band = next(t for t in figure.plotly.data if t.fill == "toself")
    assert (band.y[0], band.y[-1]) == (rows[0]["upper"], rows[0]["lower"])


def test_without_edges_there_is_no_band():
    assert len(density(bulk(), lower=None, upper=None, **NAMES).plotly.data) == 1


def test_checkpoints_are_overlaid_in_colours_of_their_own():
    figure = density(bulk(net="a") + bulk(net="b"), series="net", **NAMES)
    assert [line.name for line in lines(figure)] == ["a", "b"]
    assert len({line.line.color for line in lines(figure)}) == 2
    assert figure.plotly.layout.showlegend


def test_a_bulk_that_a_straight_axis_shows_is_left_on_it():
    axis = density(bulk(width=1.0, farthest=3.0), **NAMES).plotly.layout.xaxis
    assert axis.tickvals is None


def test_an_axis_is_bent_so_that_the_bulk_and_an_outlier_are_both_seen():
    rows = bulk(width=0.01, farthest=0.05)
    figure = density(rows, markers=[{"eigenvalue": 100.0}], **NAMES)
    (line,), (mark,) = lines(figure), marks(figure)
    width = line.x[-1] - line.x[0]
    assert 0.1 < width / (mark.x[0] - line.x[0]) < 0.9
    np.testing.assert_allclose(line.customdata[:, 0], [rows[i]["eigenvalue"] for i in kept(line, rows)], rtol=1e-12)
    assert mark.customdata[0] == 100.0


def kept(line, rows):
    values = [r["eigenvalue"] for r in rows]
    return [values.index(v) for v in line.customdata[:, 0]]


def test_a_bent_axis_is_labelled_with_eigenvalues_at_their_places():
    figure = density(bulk(width=0.01, farthest=0.5), markers=[{"eigenvalue": 100.0}], scale="symlog", **NAMES)
    axis = figure.plotly.layout.xaxis
    labels = dict(zip(axis.ticktext, axis.tickvals, strict=True))
    assert labels["0"] == 0.0
    assert labels["10<sup>2</sup>"] == pytest.approx(math.log10(1 + 100 / 0.01), rel=1e-12)
    assert labels["−10<sup>−1</sup>"] == pytest.approx(-math.log10(1 + 0.1 / 0.01), rel=1e-12)
    assert len(labels) <= 12


@given(st.floats(1e-6, 1e3), st.floats(1.0, 1e8))
def test_bent_places_keep_the_order_and_the_sign(width, stretch):
    figure = density(bulk(width=width, farthest=3 * width, count=41), markers=[
        {"eigenvalue": -width * stretch}, {"eigenvalue": width * stretch},
    ], scale="symlog", **NAMES)  # fmt: skip
    (line,), (mark,) = lines(figure), marks(figure)
    assert (np.diff(line.x) > 0).all()
    assert mark.x[0] < 0 < mark.x[1]
    assert abs(line.x[20]) < 1e-9


def test_the_scale_can_be_settled():
    rows = bulk(width=0.001, farthest=1.0)
    assert density(rows, **NAMES).plotly.layout.xaxis.tickvals is not None
    assert density(rows, scale="linear", **NAMES).plotly.layout.xaxis.tickvals is None


def test_a_sharp_peak_among_many_points_is_kept():
    rows = bulk(width=1.0, farthest=3.0, count=20_001)
    rows[18_003]["density"] = 7.0
    (line,) = lines(density(rows, **NAMES))
    assert len(line.x) <= MAX_POINTS
    assert 7.0 in line.y
    assert (line.x[0], line.x[-1]) == (-3.0, 3.0)


def test_what_is_next_to_nothing_does_not_stretch_the_axis():
    rows = bulk(width=0.01, farthest=1.0)  # e^-5000 at the ends, and so 0
    figure = density(rows, **NAMES)
    low, high = figure.plotly.layout.yaxis.range
    assert 10 <= high - low <= 12
    assert min(lines(figure)[0].y) > 0


def test_computed_eigenvalues_stand_at_the_foot_in_the_colour_of_their_checkpoint():
    rows = bulk(net="a") + bulk(net="b")
    markers = [{"net": n, "eigenvalue": v} for n in "ab" for v in (0.5, 0.25)]
    figure = density(rows, series="net", markers=markers, scale="linear", **NAMES)
    one, two = marks(figure)
    assert [one.marker.color, two.marker.color] == [line.line.color for line in lines(figure)]
    assert list(one.x) == [0.5, 0.25]
    assert (one.showlegend, two.showlegend) == (True, False)
    assert figure.plotly.layout.yaxis.range[0] < math.log10(one.y[0]) < math.log10(min(lines(figure)[0].y)) + 2


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([], "Expected a table with rows to draw"),
        ([{"eigenvalue": 0.0, "density": 0.0, "lower": 0.0, "upper": 0.0}], "Expected a positive density"),
        ([{"eigenvalue": 0.0, "density": "nan", "lower": 0.0, "upper": 0.0}], "Expected a positive density"),
        ([{"eigenvalue": 0.0, "density": 1.0}], "Expected the column 'lower'"),
        ([{"eigenvalue": "far", "density": 1.0, "lower": 1.0, "upper": 1.0}], "Expected numbers in the column"),
    ],
)
def test_a_density_that_cannot_be_drawn_is_refused(table, words):
    with pytest.raises(ConfigError, match=words):
        density(table, **NAMES)


def test_a_single_point_is_drawn():
    rows = [{"eigenvalue": 1.0, "density": 1.0, "lower": 1.0, "upper": 1.0}]
    assert list(lines(density(rows, **NAMES))[0].x) == [1.0]


def test_an_eigenvalue_is_a_point_with_its_interval():
    (points,) = eigenvalue_intervals(tops(), **NAMES).plotly.data
    assert (list(points.x), list(points.y)) == ([1, 2, 3], [3.0, 2.0, 1.0])
    np.testing.assert_allclose(points.error_y.array, [0.2] * 3, rtol=1e-12)
    np.testing.assert_allclose(points.error_y.arrayminus, [0.1] * 3, rtol=1e-12)
    np.testing.assert_array_equal(points.customdata[0], [3.0, 2.9, 3.2, 1])


def test_checkpoints_stand_side_by_side_at_the_same_number():
    figure = eigenvalue_intervals(tops("a") + tops("b") + tops("c"), series="net", **NAMES).plotly
    assert [t.name for t in figure.data] == ["a", "b", "c"]
    assert [t.x[0] for t in figure.data] == [0.75, 1.0, 1.25]
    assert len({t.marker.symbol for t in figure.data}) == len({t.marker.color for t in figure.data}) == 3
    assert list(figure.layout.xaxis.tickvals) == [1, 2, 3]


def test_an_eigenvalue_that_did_not_converge_is_hollow_and_named_so():
    rows = tops()
    rows[2]["converged"] = False
    whole, hollow = eigenvalue_intervals(rows, **NAMES).plotly.data
    assert (whole.marker.symbol, hollow.marker.symbol) == ("circle", "circle-open")
    assert whole.marker.color == hollow.marker.color
    assert (hollow.name, list(hollow.x)) == ("eigenvalue, not converged", [3])


def test_the_legend_of_one_checkpoint_is_shown_only_to_name_what_did_not_converge():
    assert not eigenvalue_intervals(tops(), **NAMES).plotly.layout.showlegend
    assert eigenvalue_intervals(tops(converged=False), **NAMES).plotly.layout.showlegend


def test_without_an_interval_there_is_no_bar():
    (points,) = eigenvalue_intervals(tops(lower=None, upper="nan"), **NAMES).plotly.data
    assert list(points.error_y.array) == list(points.error_y.arrayminus) == [0.0] * 3


@pytest.mark.parametrize(
    ("values", "kind"),
    [((100.0, 10.0, 0.5), "log"), ((3.0, 2.0, 1.0), None), ((100.0, 0.5, -2.0), None), ((100.0, 1.0, 0.1), None)],
)
def test_the_axis_is_logarithmic_over_two_decades_of_positive_intervals(values, kind):
    assert eigenvalue_intervals(tops(values=values), **NAMES).plotly.layout.yaxis.type == kind


def test_numbers_are_counted_where_no_column_has_them():
    rows = [{"eigenvalue": v, "lower": v, "upper": v} for v in (2.0, 1.0)]
    (points,) = eigenvalue_intervals(rows, index=None, converged=None, **NAMES).plotly.data
    assert list(points.x) == [1, 2]


@pytest.mark.parametrize("draw", [eigenvalue_intervals, density])
def test_a_name_from_a_table_is_escaped(draw):
    rows = [row | {"density": 1.0} for row in tops(INJECTION)]
    text = draw(rows, series="net", **NAMES).plotly.to_json()
    assert "alert(1)" in text
    assert "<script" not in json.dumps(json.loads(text)["data"])


def test_a_missing_column_of_eigenvalues_is_refused():
    with pytest.raises(ConfigError, match=r"Expected the column 'upper' in every row"):
        eigenvalue_intervals([{"index": 1, "eigenvalue": 1.0, "lower": 1.0, "converged": True}], **NAMES)
