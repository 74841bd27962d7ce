import json
from pathlib import Path

import pytest
from tests.lab.toy import calls

from thalweg.cli.app import main
from thalweg.lab.catalogue import find_recipes


@pytest.fixture(autouse=True)
def folder(toys, tmp_path, monkeypatch):
    """Work in an empty folder, with the toys as the built-in recipes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("THALWEG_RUNS", raising=False)
    for module in ("lab.catalogue", "cli.recipes"):
        monkeypatch.setattr(f"thalweg.{module}.find_recipes", lambda: find_recipes(toys.name))
    return tmp_path


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_tour_runs_every_recipe_in_its_quick_size_and_ends_with_one_report(toys, capsys, workers):
    (toys / "raises.py").unlink()
    assert main(["tour", "--workers", workers]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["VERDICT", "RECIPE", "CLAIM"]
    assert lines[-2].startswith("2 of 2 recipes: 3 of 4 tested claims hold, 2 untested")
    page = Path(lines[-1].removeprefix("report: ")).read_text()
    assert "A toy that works" in page
    assert page.count('class="plot"') == 2
    assert len(calls(toys)) == 2


def test_a_tour_whose_claims_hold_exits_0(toys):
    (toys / "raises.py").unlink()
    (toys / "wrong.py").unlink()
    assert main(["tour"]) == 0


def test_a_recipe_that_raises_is_told_and_the_others_go_on(capsys):
    assert main(["tour"]) == 1
    out, err = capsys.readouterr()
    assert "2 of 3 recipes" in out
    assert "internal error: ArithmeticError: it diverged." in err


def test_the_tour_as_json_has_one_object_per_recipe(toys, capsys):
    (toys / "raises.py").unlink()
    assert main(["tour", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert [r["recipe"] for r in found["recipes"]] == ["toys/good", "toys/wrong"]
    assert Path(found["report"]).is_file()


def test_the_report_opens_where_asked(toys, monkeypatch):
    (toys / "raises.py").unlink()
    (toys / "wrong.py").unlink()
    opened = []
    monkeypatch.setattr("typer.launch", opened.append)
    assert main(["tour"]) == 0
    assert opened == []
    assert main(["tour", "--open"]) == 0
    assert opened[0].startswith("file://")


def test_recipes_are_listed_with_their_presets(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert "toys/good    A toy that works     nobody2026toys, figure 1  paper cpu quick  3" in out
    assert "Run one: thalweg run toys/good quick" in out
