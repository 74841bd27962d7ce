import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.lab.toy import SOURCE, calls

from thalweg.cli.app import main

CLAIM_KEYS = ["id", "sentence", "measured", "expected", "criterion", "verdict"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in an empty folder, whose ./thalweg-runs is the store."""
    monkeypatch.chdir(tmp_path)
    for name in ("THALWEG_RUNS", "THALWEG_DATA", "THALWEG_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(toys, *words, recipe="good"):
    return main(["run", f"{toys.name}.{recipe}:RECIPE", *words])


def test_a_run_prints_its_claims_and_the_path_of_its_report(toys, capsys):
    assert run(toys, "quick") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["VERDICT", "CLAIM", "MEASURED", "EXPECTED", "CRITERION"]
    assert lines[1].startswith("✓ holds     The rank is positive.")
    assert "toys/good quick: 2 of 2 tested claims hold, 1 untested" in lines[4]
    assert Path(lines[5].removeprefix("report: ")).is_file()
    assert "half" in err
    assert "\x1b" not in out + err


def test_a_second_run_is_read_from_the_store_unless_forced(toys):
    for words, number in (((), 1), ((), 1), (("--force",), 2), (("seed=5",), 3)):
        assert run(toys, "quick", "--no-report", *words) == 0
        assert len(calls(toys)) == number


def test_the_last_line_of_json_is_one_object(toys, capsys):
    assert run(toys, "quick", "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == ["recipe", "preset", "run", "seconds", "claims", "report"]
    assert (found["recipe"], found["preset"], len(found["run"])) == ("toys/good", "quick", 64)
    assert isinstance(found["seconds"], float)
    assert [list(claim) for claim in found["claims"]] == [CLAIM_KEYS] * 3
    assert [(c["measured"], c["verdict"]) for c in found["claims"]] == [
        (1, "holds"),
        (0.5, "holds"),
        (None, "untested"),
    ]
    assert Path(found["report"]).is_file()


def test_without_a_report_none_is_written(toys, capsys):
    assert run(toys, "quick", "--json", "--no-report") == 0
    assert json.loads(capsys.readouterr().out)["report"] is None
    assert not Path("thalweg-runs/reports").exists()


def test_a_claim_that_fails_exits_3(toys, capsys):
    assert run(toys, "quick", recipe="wrong") == 3
    assert "✗ fails" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["1", "2"])
def test_several_seeds_give_one_row_per_claim(toys, capsys, workers):
    assert run(toys, "quick", "--seeds", "3", "--workers", workers) == 0
    out = capsys.readouterr().out
    assert "✓ holds     The rank is positive.   3 of 3 seeds hold" in out
    assert sorted(calls(toys)) == ["0", "1", "2"]


def test_several_seeds_as_json_list_the_runs_and_what_each_measured(toys, capsys):
    assert run(toys, "quick", "--seeds", "2", "--json", recipe="wrong") == 3
    found = json.loads(capsys.readouterr().out)
    assert len(found["run"]) == 2
    assert [list(claim) for claim in found["claims"]] == [CLAIM_KEYS] * 3
    assert (found["claims"][0]["measured"], found["claims"][0]["verdict"]) == ([1, 1], "fails")


def test_the_default_preset_is_cpu_and_words_change_it(toys, capsys):
    assert run(toys, "widths=[2,3,4]", "rate=1e-3", "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["preset"], [c["measured"] for c in found["claims"]]) == ("cpu", [3, 0.001, None])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "widths: [2, 3, 4]\nrate: 9"),
        ("a.toml", "widths = [2, 3, 4]\nrate = 9"),
        ("a.json", '{"widths": [2, 3, 4], "rate": 9}'),
    ],
)
def test_a_file_changes_the_preset_and_words_change_the_file(toys, capsys, name, text):
    Path(name).write_text(text)
    assert run(toys, "quick", "rate=0.5", "-c", name, "--json") == 0
    assert [c["measured"] for c in json.loads(capsys.readouterr().out)["claims"]] == [3, 0.5, None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["widht=2"], "error: widht: Expected one of seed, widths, rate. Got 'widht'. Did you mean 'widths'?"),
        (["rate=fast"], "error: rate: Expected a valid number, unable to parse string as a number. Got 'fast'."),
        (["seed=-1"], "error: seed: Expected greater than or equal to 0. Got -1."),
        (["widths=[2,x]"], "error: widths.1: Expected a valid integer, unable to parse"),
        (["rate=[1"], "error: Expected a value after '='. Got 'rate=[1'."),
        (["quick", "rate"], "error: Expected key=value after the preset. Got 'rate'."),
        (["quik"], "error: Expected one of the presets paper, cpu, quick. Got 'quik'. Did you mean 'quick'?"),
        (["-c", "no.yaml"], "error: Expected a readable .yaml file. Got [Errno 2] No such file"),
        (["-c", "a.ini"], "error: Expected a .yaml, .toml or .json file. Got 'a.ini'."),
        (["-c", "list.json"], "error: Expected names and values in list.json. Got list."),
        (["-c", "torn.toml"], "error: Expected a readable .toml file. Got"),
        (["--device", "gpu"], "error: Expected a device: cpu, cuda, cuda:1 or mps. Got 'gpu'."),
        (["--out", "file"], "error: Expected a place that can be written. Got file: "),
    ],
)
def test_wrong_input_is_one_clear_line_and_exits_2(toys, capsys, words, message):
    Path("list.json").write_text("[1]")
    Path("torn.toml").write_text("rate = ")
    Path("file").write_text("")
    assert run(toys, *words) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert line.startswith(message)
    assert out == ""
    assert calls(toys) == []


def test_every_wrong_field_has_its_line(toys, capsys):
    assert run(toys, "widht=2", "rate=fast") == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_an_unknown_recipe_is_wrong_input(capsys):
    assert main(["run", "embedding_principle/figure_none"]) == 2
    assert "error: Expected the name of a recipe. Got 'embedding_principle/figure_none'." in capsys.readouterr().err


@pytest.mark.parametrize("words", [["run", "x", "--seeds", "0"], ["run", "x", "--wrong"], ["runn"], ["run"]])
def test_a_usage_error_exits_2(capsys, words):
    assert main(words) == 2


def test_a_recipe_that_raises_is_one_line_with_the_place_of_its_traceback(toys, capsys):
    assert run(toys, "quick", recipe="raises") == 1
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert line.startswith("internal error: ArithmeticError: it diverged. The traceback is in ")
    assert Path(line.rsplit(" ", 1)[1].removesuffix(".")).is_file()
    assert "Traceback" not in err


@pytest.mark.parametrize("way", ["flag", "variable"])
def test_debugging_shows_the_traceback(toys, capsys, monkeypatch, way):
    if way == "variable":
        monkeypatch.setenv("THALWEG_DEBUG", "1")
    assert run(toys, "quick", *(["--debug"] if way == "flag" else []), recipe="raises") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_user_runs_their_own_recipe_from_their_folder(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("my_own_figure.py").write_text(SOURCE)
    assert main(["run", "my_own_figure:RECIPE", "quick"]) == 0


def test_the_data_root_comes_from_the_option_or_the_environment(toys, folder, capsys, monkeypatch):
    source = SOURCE.replace('"rank": len(preset.widths)', '"rank": str(context.data_root)')
    (toys / "data.py").write_text(source)
    for words in (["--data-root", str(folder)], []):
        run(toys, "quick", "--force", "--json", *words, recipe="data")
        assert json.loads(capsys.readouterr().out)["claims"][0]["measured"] == str(folder)
        monkeypatch.setenv("THALWEG_DATA", str(folder))
    assert run(toys, "--data-root", "nowhere") == 2


def test_on_a_terminal_the_claims_are_a_table(toys, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(toys, "quick", "--no-report") == 0
    assert "───" in capsys.readouterr().out


def test_ctrl_c_exits_130_and_the_same_command_goes_on(toys):
    slow = SOURCE.replace("    context.progress", "    preset.seed and time.sleep(60)\n    context.progress")
    (toys / "slow.py").write_text(slow)
    code = "import sys; from thalweg.cli.app import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "run", f"{toys.name}.slow:RECIPE", "quick", "--seeds", "2"]
    environment = os.environ | {"PYTHONPATH": str(toys.parent)}
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while len(calls(toys)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted: state kept; run the same command again to resume"
    assert run(toys, "quick", "--no-report", recipe="slow") == 0
    assert calls(toys) == ["0", "1"]
