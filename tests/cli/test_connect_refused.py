"""`thalweg connect` given what it cannot use: one line, and nothing is written."""

import sys
from pathlib import Path

import pytest
import torch
from tests.cli.test_connect import OWN, own, states
from tests.cli.user import refused, user_folder

__all__ = ["user_folder"]
pytestmark = pytest.mark.usefixtures("user_folder")

RUN = "connect a.pt b.pt --model own.py:net --data own.py:pair"


@pytest.fixture(autouse=True)
def own_files(user_folder):
    Path("own.py").write_text(OWN)
    for name in "ab":
        torch.save(states()[name], f"{name}.pt")
    torch.save({n: t * torch.nan if n == "2.bias" else t for n, t in states()["b"].items()}, "nan.pt")
    torch.save({n: t * 1e30 for n, t in states()["b"].items()}, "huge.pt")
    torch.save(own("net")(9).state_dict(), "wider.pt")
    torch.save(own("other")().state_dict(), "other.pt")
    Path("empty.pt").touch()
    Path("full").mkdir()
    Path("full/report.html").write_text("mine")
    for number, file in enumerate(("panel.json", "profiles.csv")):
        Path(f"full-{number}").mkdir()
        Path(f"full-{number}", file).write_text("mine")
    Path("taken").write_text("a file")
    yield
    sys.modules.pop("own", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods liner", "Did you mean 'linear'?"),
        ("--methods linear,", "Expected --methods closed, all, or names"),
        ("--permutation swap", "Did you mean 'swaps'?"),
        ("--curve-learning-rate 0", "Expected a positive --curve-learning-rate"),
        ("--save arc --methods linear", "methods that are measured"),
        ("--flow none.safetensors", "none.safetensors"),
        ("--flow a.pt", "Expected a map of units"),
        ("--out full", "Use --force"),
        ("--out full-0", "which has a panel.json. Use --force"),
        ("--out full-1", "which has a profiles.csv. Use --force"),
        ("--out taken", "Expected a folder that can be written"),
        ("--device gpu", "Expected a device"),
        ("--split test", "which has no test"),
        ("--data own.py:none", "Expected at least one sample"),
        ("--data own.py:nan", "Expected finite inputs"),
        ("--data own.py:bad_labels", "Expected class labels from 0 to 2"),
        ("--data own.py:missing", "Expected 'missing' in 'own.py'"),
        ("--model own.py:other", "Got a.pt with 2 missing: 4.weight"),
        ("--loss crossentropy", "Did you mean 'cross_entropy'?"),
    ],
)
def test_a_wrong_option_is_one_line_and_nothing_is_written(words, message, capsys):
    assert message in refused(f"{RUN} {words}", capsys)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("a.pt missing.pt", "missing.pt"),
        ("missing.pt b.pt", "missing.pt"),
        ("a.pt empty.pt", "empty.pt, which is empty"),
        ("a.pt nan.pt", "nan.pt with NaN or infinity in 2.bias"),
        ("a.pt huge.pt", "Expected a finite loss at huge.pt"),
        ("a.pt wider.pt", "Got wider.pt with 3 of another shape"),
        ("a.pt other.pt", "Got other.pt with 2 unexpected: 4.weight"),
        ("own.py b.pt", "own.py"),
    ],
)
def test_a_wrong_checkpoint_is_named_and_nothing_is_written(files, message, capsys):
    assert message in refused(RUN.replace("a.pt b.pt", files), capsys)
