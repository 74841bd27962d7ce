"""Figures 1 and 4 and the measurement of escape: claims that can fail, and runs that go on after a kill."""

import os
import signal
import subprocess
import sys
import time

import pytest

from thalweg.lab.jobs import Job, perform
from thalweg.lab.runs.store import Store
from thalweg.recipes.embedding_principle import escape, figure_1, figure_4

SMALL = {"num_trials": 6, "steps": 1500, "seed": 0}


def job(root, **changes):
    parameters = figure_4.QUICK.parameters() | SMALL | changes
    return Job("embedding_principle/figure_4", "quick", parameters, root)


def catalogue_of(run):
    tables = run.tables()
    return [tables[name] for name in ("entries", "images", "nodes", "edges", "counts", "loss")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return catalogue_of(perform(job(tmp_path_factory.mktemp("whole"))))


@pytest.mark.parametrize("moment", [0.2, 0.5, 0.93])
def test_an_interrupted_run_of_figure_4_ends_with_the_same_catalogue(moment, tmp_path, whole, monkeypatch):
    monkeypatch.setattr("thalweg.training.population._TELL_SECONDS", 0.0)

    def stop(fraction: float, text: str) -> None:
        if fraction >= moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform(job(tmp_path), stop)
    assert Store(tmp_path).runs().runs == ()
    fractions: list[float] = []
    run = perform(job(tmp_path), lambda fraction, text: fractions.append(fraction))
    assert catalogue_of(run) == whole
    assert not (tmp_path / "partial" / run.id).exists()


def test_a_killed_run_of_figure_4_ends_with_the_same_catalogue(tmp_path, whole):
    words = ["run", "embedding_principle/figure_4", "quick", "num_trials=6", "steps=1500", "--out", str(tmp_path)]
    code = "import sys; from thalweg.cli.app import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("partial/*/population-*")):
        time.sleep(0.05)
        if process.poll() is not None:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("partial/*/population-*.safetensors"))
    assert catalogue_of(perform(job(tmp_path))) == whole


def checks(recipe):
    return {claim.id: claim.check for claim in recipe.claims}


def test_each_claim_of_figure_4_can_fail():
    wrong = {
        "levels": {"met": [0.109, None, 0.0698, 0.0], "further": []},
        "mirror": [True, False],
        "origin": [1, 2, 2, 2],
        "degeneracy": [2, 1, 1, 1],
        "saddles": [2, 1, 0, 0],
        "critical": 2e-10,
    }
    assert set(wrong) == set(checks(figure_4.RECIPE))
    assert not any(checks(figure_4.RECIPE)[name](value) for name, value in wrong.items())


def test_each_claim_of_figure_1_can_fail():
    wrong = {"plateau": 0.04, "narrow_output": 0.3, "escape": 2e-3, "wide_output": 0.2}
    assert set(wrong) == set(checks(figure_1.RECIPE))
    assert not any(checks(figure_1.RECIPE)[name](value) for name, value in wrong.items())


def test_each_claim_of_escape_can_fail():
    wrong = {
        "directions": [[2, 1], [4, 2]],
        "law": 1e-5,
        "left": 0.9,
        "predicted": 1.6,
        "growth": {"width 4": 1.3},
    }
    assert set(wrong) == set(checks(escape.RECIPE))
    assert not any(checks(escape.RECIPE)[name](value) for name, value in wrong.items())


def test_a_search_that_meets_too_little_fails_and_leaves_the_rest_untested(tmp_path):
    run = perform(job(tmp_path, widths=[1, 2], num_trials=2, steps=200))
    verdicts = {claim.id: claim.verdict for claim in run.manifest.claims}
    assert verdicts["levels"] == "fails"
    assert {verdicts[name] for name in ("mirror", "origin", "degeneracy", "saddles")} == {"untested"}


def test_the_recipe_of_the_text_does_not_leave_the_plateau_and_says_so(tmp_path):
    parameters = figure_1.PAPER.parameters() | {"width": 30, "steps": 4000, "narrow_trials": 4}
    run = perform(Job("embedding_principle/figure_1", "paper", parameters, tmp_path))
    verdicts = {claim.id: claim.verdict for claim in run.manifest.claims}
    assert verdicts["escape"] == "fails"
    assert verdicts["wide_output"] == "untested"
