import base64
import json

import numpy as np
import pytest

from thalweg.errors import ConfigError
from thalweg.lab.figures import curves, inertia_bars, scatter_agreement, spectrum
from thalweg.lab.figures.style import MAX_POINTS, thinned

NAMES = {"id": "f", "title": "Title", "caption": "Caption."}
INJECTION = "</script><script>alert(1)</script>"


def eigenvalues(width, values, threshold=1e-8):
    return [{"width": width, "eigenvalue": v, "threshold": threshold} for v in values]


def traces(figure, name):
    return [trace for trace in figure.plotly.data if trace.name == name]


def test_eigenvalues_are_parted_by_sign_and_threshold_in_sorted_order():
    figure = spectrum(eigenvalues(2, [-0.5, 3.0, 1e-12, 1.0, -1e-13]), **NAMES)
    (positive,), (zero,), (negative,) = (traces(figure, n) for n in ("positive", "zero", "negative"))
    assert (list(positive.x), list(positive.y)) == ([1, 2], [3.0, 1.0])
    assert (list(zero.x), list(zero.customdata)) == ([3, 4], [1e-12, -1e-13])
    assert (list(negative.x), list(negative.y), list(negative.customdata)) == ([5], [0.5], [-0.5])
    assert list(traces(figure, "threshold")[0].y) == [1e-8, 1e-8]


def test_each_width_has_its_panel_and_the_legend_names_each_sign_once():
    figure = spectrum(eigenvalues(2, [1.0, -1.0]) + eigenvalues(3, [2.0, 0.0, -1.0]), **NAMES)
    assert figure.plotly.layout.meta == {"panels": 2}
    assert [a.text for a in figure.plotly.layout.annotations] == ["width 2", "width 3"]
    assert [t.name for t in figure.plotly.data if t.showlegend] == [
        "positive", "negative", "threshold", "zero",
    ]  # fmt: skip


def test_an_exact_zero_has_a_place_on_the_logarithmic_axis():
    (zero,) = traces(spectrum(eigenvalues(2, [0.5, 0.0]), **NAMES), "zero")
    assert (zero.y[0], zero.customdata[0]) == (0.05, 0.0)


def test_curves_are_split_into_series_with_their_band():
    rows = [{"step": s, "loss": 1 / s, "low": 0.5 / s, "high": 2 / s, "net": n} for n in "ab" for s in range(1, 20)]
    figure = curves(rows, x="step", y="loss", series="net", lower="low", upper="high", log_y=True, **NAMES)
    assert [t.name for t in figure.plotly.data if t.fill is None] == ["a", "b"]
    band = next(t for t in figure.plotly.data if t.fill == "toself")
    assert (band.y[0], band.y[-1]) == (2.0, 0.5)
    assert figure.plotly.layout.yaxis.type == "log"


def test_a_logarithmic_curve_leaves_out_what_is_not_positive_and_reads_stored_nan():
    rows = [{"t": i, "v": v} for i, v in enumerate([1.0, 0.0, "nan", None, "inf"])]
    y = curves(rows, x="t", y="v", log_y=True, **NAMES).plotly.data[0].y
    np.testing.assert_array_equal(y, [1.0, np.nan, np.nan, np.nan, np.inf])


def test_inertia_is_stacked_with_its_counts():
    rows = [{"width": w, "negative": 1, "zero": w, "positive": 3} for w in (2, 3)]
    figure = inertia_bars(rows, **NAMES).plotly
    assert figure.layout.barmode == "stack"
    assert {bar.name: list(bar.y) for bar in figure.data} == {
        "negative": [1, 1], "zero": [2, 3], "positive": [3, 3],
    }  # fmt: skip


def test_agreement_is_drawn_with_the_diagonal():
    rows = [{"predicted": 1.0, "measured": 1.1}, {"predicted": 0.0, "measured": 1e-3}]
    diagonal, points = scatter_agreement(rows, **NAMES).plotly.data
    assert list(diagonal.x) == list(diagonal.y)
    assert (points.x[1], list(points.customdata[1])) == (1e-4, [0.0, 1e-3])


@pytest.mark.parametrize("is_log", [False, True])
def test_a_long_series_is_thinned_and_keeps_its_ends_and_extremes(is_log):
    x = np.geomspace(1, 1e6, 100_000)
    y = np.sin(np.log(x))
    y[77_777], y[55_555] = 9.0, -9.0
    kept = thinned(x, y, is_log=is_log)
    assert len(kept) <= MAX_POINTS
    assert {0, 77_777, 55_555, 99_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()


def test_a_series_that_goes_back_is_thinned_too():
    angle = np.linspace(0, 6, 5000)
    assert 400 < len(thinned(np.cos(angle), np.sin(angle))) <= MAX_POINTS


def test_every_drawn_series_is_short():
    figure = spectrum(eigenvalues(2, np.geomspace(1, 1e-3, 4000).tolist()), **NAMES)
    assert all(len(trace.x) <= MAX_POINTS for trace in figure.plotly.data)


def test_a_label_from_a_table_is_escaped():
    rows = [{"t": 0, "v": 1.0, "net": INJECTION}]
    text = curves(rows, x="t", y="v", series="net", **NAMES).plotly.to_json()
    assert "alert(1)" in text
    assert "<script" not in json.dumps(json.loads(text)["data"])


def test_an_empty_table_is_refused():
    with pytest.raises(ConfigError, match=r"Expected a table with rows to draw. Got an empty one"):
        inertia_bars([], **NAMES)


def test_a_missing_column_is_refused():
    with pytest.raises(ConfigError, match=r"Expected the column 'v' in every row. Got a row 1 with only t"):
        curves([{"t": 0, "v": 1}, {"t": 1}], x="t", y="v", **NAMES)


def test_a_column_of_texts_is_refused():
    with pytest.raises(ConfigError, match=r"Expected numbers in the column 'v'. Got could not convert"):
        curves([{"t": 0, "v": "much"}], x="t", y="v", **NAMES)


def test_arrays_travel_as_base64():
    figure = spectrum(eigenvalues(2, [2.0, 1.0]), **NAMES)
    sent = json.loads(figure.plotly.to_json())["data"][0]["y"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(sent["bdata"]), sent["dtype"]), [2.0, 1.0])
