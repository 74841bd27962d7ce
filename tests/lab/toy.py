"""A package of toy recipes, written where a test wants it, so that spawned processes can import it too."""

import zlib
from pathlib import Path

import pytest

SOURCE = '''
"""A toy recipe."""
import os
import time
from thalweg.lab.claims import Claim
from thalweg.lab.recipe import Outcome, Preset, Recipe


class ToyPreset(Preset):
    widths: tuple[int, ...] = (2, 3)
    """Widths of the networks."""
    rate: float = 0.5
    """Learning rate."""


def run(preset, context):
    import numpy as np

    with open(os.path.join(os.path.dirname(__file__), "calls.txt"), "a") as calls:
        calls.write(f"{preset.seed}\\n")
    context.progress(0.5, "half")
    rows = [
        {"width": w, "eigenvalue": v, "threshold": 1e-8}
        for w in preset.widths
        for v in [*np.geomspace(5, 1e-3, 4 * w), *[1e-13 * (i % 3 - 1) for i in range(w)], -0.02, -0.4]
    ]
    measured = {"rank": len(preset.widths), "slope": float(preset.rate)}
    return Outcome({"spectra": rows}, {"values": np.array([r["eigenvalue"] for r in rows])}, measured)


def figures(tables):
    from thalweg.lab.figures import spectrum

    return [spectrum(tables["spectra"], id="spectra", title="Spectra", caption="Signed eigenvalues.")]


RECIPE = Recipe(
    name="toys/good",
    title="A toy that works",
    source="nobody2026toys, figure 1",
    version=1,
    presets={"paper": ToyPreset(widths=(2, 3, 4)), "cpu": ToyPreset(), "quick": ToyPreset(widths=(2,))},
    claims=(
        Claim("rank", "The rank is positive.", "1 or more", "rank >= 1 (theorem)", lambda m: m >= 1),
        Claim("slope", "The slope is a half.", "0.5", "within 1e-6 of 0.5 (ours)", lambda m: abs(m - 0.5) < 1e-6),
        Claim("depth", "Depth does not matter.", "equal", "only at paper size", lambda m: True),
    ),
    run=run,
    figures=figures,
)
'''

FAILING = (
    SOURCE.replace("toys/good", "toys/wrong")
    .replace("A toy that works", "A toy that is wrong")
    .replace('rank >= 1 (theorem)", lambda m: m >= 1', 'rank > 99 (ours)", lambda m: m > 99')
)
RAISING = SOURCE.replace("toys/good", "toys/raises").replace(
    '    context.progress(0.5, "half")\n', "    raise ArithmeticError('it diverged')\n"
)


def write_toys(folder: Path, package: str = "toys") -> Path:
    """Write a package with a good recipe, one whose claim fails, and one that raises."""
    home = folder / package
    home.mkdir()
    (home / "__init__.py").write_text("")
    for name, source in (("good", SOURCE), ("wrong", FAILING), ("raises", RAISING)):
        (home / f"{name}.py").write_text(source)
    return home


def calls(home: Path) -> list[str]:
    """Give the seeds of the runs that were really made."""
    found = home / "calls.txt"
    return found.read_text().split() if found.exists() else []


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A package of toy recipes of its own name, importable here and in spawned processes."""
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return write_toys(folder, f"toys_{zlib.crc32(request.node.nodeid.encode())}")
