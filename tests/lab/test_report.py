import base64
import dataclasses
import gzip
import hashlib
import html
import json
import re

import pytest
from markupsafe import escape

from thalweg.errors import ConfigError, StoreError
from thalweg.lab.figures import Figure, curves
from thalweg.lab.jobs import Job, perform
from thalweg.lab.report import Section, TextTable, render, section_of, write_report

INJECTION = "</script><script>alert(1)</script>\u2028&"


@pytest.fixture
def run(toys, tmp_path):
    return perform(Job(f"{toys.name}.good:RECIPE", "quick", {"seed": 0}, tmp_path / "store"))


def hostile(section):
    """A section in which every text is an attempt to break out."""
    claims = tuple(
        dataclasses.replace(
            c, sentence=INJECTION, measured={INJECTION: [INJECTION]}, expected=INJECTION, criterion=INJECTION
        )
        for c in section.manifest.claims
    )
    manifest = dataclasses.replace(
        section.manifest,
        claims=claims,
        title=INJECTION,
        summary=INJECTION,
        source=INJECTION,
        command=INJECTION,
        parameters={INJECTION: INJECTION},
    )
    rows = [{"t": 0, "v": 1.0, "net": INJECTION}]
    picture = curves(rows, id="c", title="", caption="", x="t", y="v", series="net", x_title=INJECTION).plotly
    table = TextTable(INJECTION, (INJECTION, INJECTION), ((INJECTION, INJECTION),), INJECTION)
    return Section(manifest, (Figure(INJECTION, INJECTION, INJECTION, picture),), INJECTION, (table,))


def probe(run, *tables):
    """A section of a command that holds nothing against a paper."""
    manifest = dataclasses.replace(
        run.manifest,
        recipe="probe",
        reference="",
        title="What net.pt is like",
        source="",
        summary="",
        preset="",
        parameters={"checkpoint": "net.pt", "data": "iris"},
        claims=(),
        command="thalweg probe net.pt --data iris",
    )
    return Section(manifest, (), tables=tables)


NORMS = TextTable(
    "Norms of the gradient",
    ("checkpoint", "l2", "λ"),
    (("a.pt", "0.31", "[1.2, 1.3]"), ("b.pt", "–", "2.1e-05")),
    "At the point of each checkpoint.",
)


def test_the_report_shows_claims_configuration_environment_and_command(run):
    page = render([section_of(run)])
    for text in ("A toy that works", "The rank is positive.", "within 1e-6 of 0.5 (ours)", "✓ holds", "– untested"):
        assert text in page
    for text in (
        '<th scope="row">widths</th>',
        '<th scope="row">torch</th>',
        str(escape(run.manifest.command)),
        run.id,
    ):
        assert text in page


def test_nothing_breaks_out_whatever_the_texts_hold(run):
    page = render([hostile(section_of(run))] * 2)
    assert page.count("<script>") == 1  # the page's own
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    for data in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL):
        assert json.loads(data)["data"]
        assert not set(data) & set("<>&\u2028")


def test_the_policy_forbids_the_network_and_names_the_only_two_scripts(run):
    page = render([section_of(run)])
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split(";")[1]
    packed = re.search(r'id="plotly-code">([^<]*)<', page).group(1)
    boot = re.search(r"<script>(.*?)</script>", page, re.DOTALL).group(1)
    for code in (gzip.decompress(base64.b64decode(packed)), boot.encode()):
        assert base64.b64encode(hashlib.sha256(code).digest()).decode() in policy
    assert not re.search(r'(src|href)="(?!#)', page.replace(packed, ""))


def test_plotly_is_embedded_once_for_many_figures_and_not_at_all_for_none(run):
    section = section_of(run)
    many, none = render([section] * 3), render([Section(run.manifest, ())])
    assert (many.count('id="plotly-code"'), many.count('class="plot"')) == (1, 3)
    assert "plotly-code" not in none.replace('unpacked("plotly-code")', "")


def test_the_same_runs_give_the_same_bytes(run):
    assert render([section_of(run)]) == render([section_of(run)])


def test_a_recipe_of_another_version_leaves_a_note_in_place_of_figures(run):
    older = dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, version=7))
    section = section_of(older)
    assert section.note == "No figures: The run is of version 7, its recipe now of version 1."
    assert section.note in render([section])


def test_a_recipe_that_is_gone_or_cannot_draw_leaves_a_note(run):
    gone = dataclasses.replace(run.manifest, reference="gone_module:RECIPE")
    assert section_of(dataclasses.replace(run, manifest=gone)).note.startswith("No figures: ConfigError")


def test_the_report_is_written_whole_or_not_at_all(run, tmp_path):
    path = tmp_path / "deep" / "report.html"
    assert write_report(path, [section_of(run)]) == path
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"Expected a place that can be written. Got .*/file/report.html"):
        write_report(tmp_path / "file" / "report.html", [section_of(run)])


def test_a_table_is_drawn_in_its_order_with_numbers_to_the_right_and_its_caption(run):
    page = render([probe(run, NORMS)])
    assert "<h3>Norms of the gradient</h3>" in page
    assert re.findall(r"<td[^>]*>([^<]*)</td>", page)[:6] == ["a.pt", "0.31", "[1.2, 1.3]", "b.pt", "–", "2.1e-05"]
    heads = (
        '<th scope="col">checkpoint</th><th scope="col" class="number">l2</th><th scope="col" class="number">λ</th>'
    )
    assert heads in page
    assert '<p class="caption">At the point of each checkpoint.</p>' in page


def test_tables_stand_above_the_figures(run):
    page = render([dataclasses.replace(section_of(run), tables=(NORMS,))])
    assert page.index('class="claims"') < page.index('class="data"') < page.index("<figure>")


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ConfigError, match=r"Expected 2 cells in every row of 'T'. Got 1: \('x',\)."):
        TextTable("T", ("a", "b"), (("x",),))


@pytest.mark.parametrize(
    ("cells", "is_number"),
    [
        (("1", "−2.5e-3", "–"), True),
        (("[0.1, 0.2]", "< 1e-6"), True),
        (("1.2 ± 0.1", "3 × 10⁻⁵"), True),
        (("nan", "inf"), True),
        (("12 samples",), False),
        (("net.pt", "2"), False),
        (("", ""), False),
    ],
)
def test_a_column_is_of_numbers_if_every_cell_is_one_or_none(cells, is_number):
    assert TextTable("T", ("a",), tuple((c,) for c in cells)).are_numbers == (is_number,)


def test_a_run_without_claims_speaks_of_no_paper(run):
    page = render([probe(run, NORMS)])
    for text in ("This run computes", "What the paper says", "preset", "seed", "stored runs", "recipe version"):
        assert text not in page
    assert '<ul class="tally">' not in page
    for text in ('<p class="source">probe</p>', "thalweg probe net.pt --data iris", ">checkpoint</th><td>net.pt<"):
        assert text in page


def test_a_run_with_claims_and_no_source_speaks_of_no_paper(run):
    manifest = dataclasses.replace(run.manifest, source="", summary="")
    page = render([Section(manifest, ())])
    assert "What was expected, and what was measured" in page
    assert "This run computes" not in page


def test_a_recipe_and_a_command_stand_in_one_report(run):
    page = render([section_of(run), probe(run, NORMS)])
    assert "What net.pt is like</a>" in page
    assert "This run computes nobody2026toys, figure 1 again" in page
