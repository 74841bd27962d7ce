import json
from pathlib import Path

import pytest

from thalweg.cli.app import main


@pytest.fixture
def stored(toys, tmp_path, monkeypatch, capsys):
    """Two finished runs and a failed one in ./thalweg-runs; their ids."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("THALWEG_RUNS", raising=False)
    ids = []
    for recipe in ("good", "wrong"):
        main(["run", f"{toys.name}.{recipe}:RECIPE", "quick", "--json", "--no-report"])
        ids.append(json.loads(capsys.readouterr().out)["run"])
    main(["run", f"{toys.name}.raises:RECIPE", "quick"])
    capsys.readouterr()
    return ids


def test_runs_are_listed_with_what_became_of_them(stored, capsys):
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["RECIPE", "toys/good", "toys/wrong", "toys/raises"]
    assert "finished  2 hold, 1 untested" in lines[1]
    assert "failed" in lines[3]


def test_runs_as_json_are_one_object(stored, capsys):
    assert main(["runs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["store", "runs", "damaged"]
    assert [run["run"] for run in found["runs"]][:2] == stored
    assert found["runs"][1]["claims"] == {"rank": "fails", "slope": "holds", "depth": "untested"}


def test_damaged_runs_are_skipped_and_named(stored, capsys):
    Path(f"thalweg-runs/objects/{stored[0][:2]}/{stored[0]}/tables.json").write_text("{}")
    assert main(["runs"]) == 0
    out, err = capsys.readouterr()
    assert stored[0][:12] not in out
    assert err.startswith("warning: Expected a whole run. Got ")
    assert stored[0] in err


def test_an_empty_store_has_no_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["runs", "--out", "nothing"]) == 0
    assert capsys.readouterr().out.startswith("No runs in ")
    assert not Path("nothing").exists()


def test_a_report_shows_every_finished_run_or_those_asked_for(stored, capsys):
    assert main(["report"]) == 0
    everything = Path(capsys.readouterr().out.removeprefix("report: ").strip()).read_text()
    assert main(["report", stored[1][:10], "--out", "one.html"]) == 0
    one = Path("one.html").read_text()
    assert ("A toy that works" in everything, "A toy that is wrong" in everything) == (True, True)
    assert ("A toy that works" in one, "A toy that is wrong" in one) == (False, True)


def test_a_report_of_nothing_is_refused(tmp_path, capsys):
    assert main(["report", "--store", str(tmp_path)]) == 2
    assert "error: Expected finished runs in " in capsys.readouterr().err


def test_a_report_of_an_unknown_run_is_refused(stored, capsys):
    assert main(["report", "zz"]) == 2
    assert "Expected the first digits of one run's id. Got 'zz', which 0 runs" in capsys.readouterr().err
