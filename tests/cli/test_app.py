import importlib
import inspect
import json
import os
import subprocess
import sys

import pytest

import thalweg
from thalweg.cli import app
from thalweg.cli.app import main

CHECK = """
import sys, time
from thalweg.cli.app import main
code = main(sys.argv[1:])
heavy = {"torch", "plotly", "sklearn", "scipy"} & set(sys.modules)
print(code, sorted(heavy), time.process_time() < 1.0)
"""


@pytest.mark.parametrize("words", [["--help"], ["recipes"], ["run", "--help"], ["runs"], ["--version"]])
def test_what_only_lists_loads_nothing_heavy_and_answers_at_once(words, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def ending() -> str:
        asked = [sys.executable, "-c", CHECK, *words]
        done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[-1]

    for _ in range(2):  # once more, for a first start, which compiles the modules, or a machine that was held up
        found = ending()
        assert found.startswith("0 [] ")
        if found == "0 [] True":
            return
    pytest.fail("twice a second of processor time or more")


@pytest.mark.parametrize("name", app.COMMANDS)
def test_the_summary_of_a_command_is_the_first_line_of_its_docstring(name):
    command = getattr(importlib.import_module(f"thalweg.cli.{name}"), name)
    assert inspect.getdoc(command).split("\n\n")[0] == app.COMMANDS[name]


def test_help_loads_no_command(tmp_path):
    code = "import sys; from thalweg.cli.app import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1]
    assert not [name for name in app.COMMANDS if f"'thalweg.cli.{name}'" in loaded]
    assert "'pydantic'" not in loaded


def test_help_names_every_command_and_the_exit_codes(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in app.COMMANDS)
    assert "Exit codes" in out


@pytest.mark.parametrize("name", app.COMMANDS)
def test_every_command_has_its_help(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"thalweg {name}" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"thalweg {thalweg.__version__}\n"


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    assert "Commands" in capsys.readouterr().out


def test_our_own_fault_is_one_line_that_says_how_to_see_more(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("THALWEG_DEBUG", raising=False)
    monkeypatch.setattr("thalweg.cli.runs.store_at", lambda folder: 1 / 0)
    assert main(["runs"]) == 1
    expected = "internal error: ZeroDivisionError: division by zero. Run it with --debug to see more.\n"
    assert capsys.readouterr().err == expected


def test_recipes_as_json(capsys):
    assert main(["recipes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["recipes"]
    assert "embedding_principle/figure_3a" in [recipe["name"] for recipe in found]
