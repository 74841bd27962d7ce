import base64
import dataclasses
import gzip
import hashlib
import html
import json
import re

import pytest
from markupsafe import escape

from thalweg.errors import StoreError
from thalweg.lab.figures import Figure, curves
from thalweg.lab.jobs import Job, perform
from thalweg.lab.report import Section, render, section_of, write_report

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
    return Section(manifest, (Figure(INJECTION, INJECTION, INJECTION, picture),), INJECTION)


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
