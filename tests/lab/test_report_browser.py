"""The report as a browser sees it: from a file, without a network."""

import re
import shutil
import struct
import subprocess
import zlib

import numpy as np
import pytest
from tests.lab.test_report import NORMS, hostile, probe

from thalweg.lab.figures import curves, density, eigenvalue_intervals, inertia_bars, scatter_agreement
from thalweg.lab.jobs import Job, perform
from thalweg.lab.report import Section, section_of, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=20000",
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the PATH"),
]


def browse(page, tmp_path, *flags):
    """Open a page and give what the browser wrote on stdout and stderr."""
    profile = tmp_path / f"profile{len(list(tmp_path.glob('profile*')))}"
    words = [BROWSER, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@pytest.fixture
def run(toys, tmp_path):
    return perform(Job(f"{toys.name}.good:RECIPE", "cpu", {"seed": 0}, tmp_path / "store"))


@pytest.fixture
def sections(run):
    section = section_of(run)
    names = {"id": "f", "title": "Title", "caption": "Caption."}
    rows = [{"t": t, "v": 1 / t, "low": 0.5 / t, "high": 2 / t} for t in range(1, 900)]
    counts = [{"width": w, "negative": 1, "zero": w, "positive": 3} for w in (2, 3)]
    pairs = [{"predicted": 10.0**-i, "measured": 1.1 * 10.0**-i} for i in range(9)]
    more = (
        curves(rows, x="t", y="v", lower="low", upper="high", log_x=True, log_y=True, **names),
        inertia_bars(counts, **names),
        scatter_agreement(pairs, **names),
    )
    return [Section(section.manifest, section.figures + more), hostile(section)]


@pytest.fixture
def curvature(run):
    """A section as the probes make it: a table, a density on a bent axis, certified eigenvalues."""
    names = {"id": "f", "title": "Title", "caption": "Caption."}
    nets = ("a.pt", "b.pt")
    line = spectral(nets)
    tops = [
        {"net": n, "index": i, "eigenvalue": v, "lower": 0.9 * v, "upper": 1.1 * v, "converged": i < 3}
        for n in nets
        for i, v in enumerate((100.0, 30.0, 4.0), start=1)
    ]
    figures = (
        density(line, series="net", markers=tops, **names),
        eigenvalue_intervals(tops, series="net", **names),
    )
    section = probe(run, NORMS)
    return Section(section.manifest, figures, tables=section.tables)


def spectral(nets):
    """A bulk of width 0.01 and an outlier at 100 that one eigenvalue in a million makes."""
    grid = np.concatenate([-np.geomspace(3, 1e-4, 300), [0.0], np.geomspace(1e-4, 150, 900)])
    rows = []
    for shift, net in enumerate(nets, start=1):
        bulk = np.exp(-0.5 * (grid / (0.01 * shift)) ** 2) / (0.025 * shift)
        peak = 1e-6 * np.exp(-0.5 * ((grid - 100 / shift) / 0.5) ** 2) / 1.25
        rows += [
            {"net": net, "eigenvalue": x, "density": d, "lower": d / 2, "upper": 2 * d}
            for x, d in zip(grid.tolist(), (bulk + peak).tolist(), strict=True)
        ]
    return rows


def pixels(png):
    """Give the distinct rows of a PNG's data: enough to tell a drawn page from a blank one."""
    width, height = struct.unpack(">II", png[16:24])
    data, place = b"", 8
    while place < len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            data += png[place + 8 : place + 8 + size]
        place += size + 12
    raw = zlib.decompress(data)
    step = len(raw) // height
    return width, height, {raw[i * step : (i + 1) * step] for i in range(height)}


@pytest.mark.parametrize("size", ["1200,2000", "500,2000"])
def test_every_figure_is_drawn_without_an_error_or_a_request(sections, tmp_path, size):
    page = write_report(tmp_path / "report.html", sections)
    dom, log = browse(page, tmp_path, f"--window-size={size}", "--dump-dom")
    assert "CONSOLE" not in log
    assert not re.search(r"https?://(?!www\.w3\.org)", log)
    plots = re.findall(r'<div class="plot[^"]*\bdrawn\b[^"]*"', dom)
    assert len(plots) == 5
    assert all("js-plotly-plot" in plot for plot in plots)
    assert dom.count('class="main-svg"') >= 5
    assert dom.count('<table class="claims">') == 2
    assert "✓ holds" in dom


def test_a_console_error_would_be_seen(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('seen')</script>")
    assert "seen" in browse(page, tmp_path, "--dump-dom")[1]


def test_the_screenshot_is_not_blank(sections, tmp_path):
    page, shot = write_report(tmp_path / "report.html", sections), tmp_path / "shot.png"
    browse(page, tmp_path, "--window-size=1000,1600", f"--screenshot={shot}")
    width, height, rows = pixels(shot.read_bytes())
    assert (width, height) == (1000, 1600)
    assert len(rows) > 300


@pytest.mark.parametrize("size", ["1200,2000", "400,2000"])
def test_a_section_without_claims_shows_its_table_and_its_figures(curvature, tmp_path, size):
    page = write_report(tmp_path / "report.html", [curvature])
    dom, log = browse(page, tmp_path, f"--window-size={size}", "--dump-dom")
    assert "CONSOLE" not in log
    assert len(re.findall(r'<div class="plot[^"]*\bdrawn\b[^"]*"', dom)) == 2
    assert dom.count('<table class="data">') == 1
    assert "computed eigenvalues" in dom
    assert "a.pt, not converged" in dom
