"""histograms: a panel for each name, bars coloured by sign."""

import pytest

from thalweg.errors import ConfigError
from thalweg.lab.figures import histograms
from thalweg.lab.figures.style import SIGN_COLOURS

NAMES = {"id": "f", "title": "Title", "caption": "Caption."}


def bins(layer, *counts):
    edges = [(-1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
    return [
        {"panel": layer, "low": low, "high": high, "count": c} for (low, high), c in zip(edges, counts, strict=True)
    ]


def test_each_panel_has_its_axes_and_tells_the_share_of_negative_values():
    figure = histograms([*bins("0: a<i>", 3, 1, 0), *bins("1: b", 1, 2, 1)], **NAMES, x_title="bias").plotly
    assert [note.text for note in figure.layout.annotations] == [
        "0: a&lt;i&gt; (75% negative)",
        "1: b (25% negative)",
    ]
    assert [(bar.name, bar.xaxis, list(bar.y)) for bar in figure.data] == [
        ("negative", "x", [3]),
        ("positive", "x", [1]),
        ("negative", "x2", [1]),
        ("zero", "x2", [1]),
        ("positive", "x2", [2]),
    ]
    assert figure.data[3].marker.color == SIGN_COLOURS["zero"]
    assert [bar.name for bar in figure.data if bar.showlegend] == ["negative", "positive", "zero"]
    assert figure.layout.xaxis2.title.text == "bias"


def test_panels_do_not_overlap():
    figure = histograms([row for k in range(13) for row in bins(str(k), 1, 1, 1)], **NAMES).plotly
    boxes = [
        (*figure.layout[f"xaxis{k or ''}"].domain, *figure.layout[f"yaxis{k or ''}"].domain)
        for k in (0, *range(2, 14))
    ]
    for k, one in enumerate(boxes):
        assert 0 <= one[0] < one[1] <= 1
        assert 0 <= one[2] < one[3] <= 1
        for two in boxes[:k]:
            assert one[1] <= two[0] or two[1] <= one[0] or one[3] <= two[2] or two[3] <= one[2]


@pytest.mark.parametrize(("table", "message"), [([], "Got an empty one"), ([{"panel": "a"}], "column 'low'")])
def test_a_table_that_cannot_be_drawn_is_refused(table, message):
    with pytest.raises(ConfigError, match=message):
        histograms(table, **NAMES)
