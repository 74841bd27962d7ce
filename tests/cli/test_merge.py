"""`thalweg merge`: what it prints is what plain PyTorch finds in the file, and every fault is one line."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from tests.cli.user import loaded, refused, user_folder
from torch import nn

from thalweg.cli.app import main

__all__ = ["user_folder"]
pytestmark = pytest.mark.usefixtures("user_folder")

OWN = """
import torch
from torch import nn
_g = torch.Generator().manual_seed(3)
X = torch.randn(120, 3, generator=_g)
Y = (X[:, 0] * X[:, 1] > 0).long() + (X[:, 2] > 1).long()
both = {"train": (X, Y), "test": (X + 0.1, Y)}
numbers = (X, X[:, :2] @ torch.ones(2, 3))
images = (torch.randn(40, 1, 6, 6, generator=_g), torch.randint(0, 3, (40,), generator=_g))

def net(hidden=16):
    return nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 3))

def deep():
    return nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))

def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)
    )

def flat():
    return nn.Sequential(nn.Linear(3, 3))
"""


@functools.cache
def own(name: str):
    space: dict = {}
    exec(OWN, space)
    return space[name]


@functools.cache
def states(name: str) -> tuple[dict[str, torch.Tensor], ...]:
    """Give the states of two networks, a little trained."""
    found, generator = [], torch.Generator().manual_seed(5)
    x, y = own("images") if name == "cnn" else own("both")["train"]
    for _ in range(2):
        module = own(name)()
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))
        step = torch.optim.Adam(module.parameters(), lr=0.03)
        for _ in range(30):
            step.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            step.step()
        found.append({key: t.clone() for key, t in module.state_dict().items()})
    return tuple(found)


@pytest.fixture(autouse=True)
def own_files(user_folder):
    Path("own.py").write_text(OWN)
    for name in ("net", "deep", "cnn", "flat"):
        for file, state in zip((f"{name}-a.pt", f"{name}-b.pt"), states(name), strict=True):
            torch.save(state, file)
    yield
    sys.modules.pop("own", None)


def printed(words: str, capsys) -> list[str]:
    code = main(words.split())
    out, err = capsys.readouterr()
    assert code == 0, err
    return out.splitlines()


def built(name: str, file: str) -> nn.Module:
    """Build a net and load a checkpoint, as its user would without thalweg."""
    module = own(name)()
    module.load_state_dict(loaded(file), strict=True)
    return module.eval()


def test_steps_are_printed_and_the_file_is_measured_again(capsys):
    lines = printed("merge net-a.pt net-b.pt --model own.py:net --data own.py:both", capsys)
    assert lines[0] == "120 samples of own.py:both, train; loss: cross_entropy (default for class labels)"
    assert lines[1].split() == ["NETWORK", "TRAIN", "LOSS", "TRAIN", "ACCURACY", "TEST", "LOSS", "TEST", "ACCURACY"]
    steps = [line.split("  ")[0] for line in lines[2:7]]
    assert steps == ["A", "B", "midpoint", "aligned by weights", "aligned by weights, repaired"]
    wrote = lines.index("wrote net-a-merged.safetensors; measured again from it:")
    assert lines[wrote + 2].split()[1:] == lines[6].split()[-4:]
    assert "Units of B that change their place" in Path("net-a-merged.html").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [("net", "--data own.py:both"), ("cnn", "--data own.py:images --out m.pt --match activations --at 0.4")],
)
def test_what_is_printed_is_what_plain_torch_finds_in_the_file(name, words, capsys):
    line = f"merge {name}-a.pt {name}-b.pt --model own.py:{name} {words} --json"
    record = json.loads(printed(line, capsys)[-1])
    module = built(name, record["file"])
    x, y = own("images") if name == "cnn" else own("both")["train"]
    with torch.no_grad():
        outputs = module(x)
    found = record["measured"]["train"]
    assert found["accuracy"] == pytest.approx(float((outputs.argmax(1) == y).double().mean()), abs=1e-9)
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, y)), rel=1e-5)
    assert record["steps"][-1]["train"]["loss"] == pytest.approx(found["loss"], rel=1e-6)
    a = built(name, f"{name}-a.pt")
    with torch.no_grad():
        assert record["steps"][0]["train"]["loss"] == pytest.approx(float(nn.functional.cross_entropy(a(x), y)))


def test_a_network_with_itself_is_the_network(capsys):
    words = "merge deep-a.pt deep-a.pt --model own.py:deep --data own.py:both --method joint --out m.pt --json"
    record = json.loads(printed(words, capsys)[-1])
    for key, tensor in loaded("m.pt").items():
        torch.testing.assert_close(tensor, loaded("deep-a.pt")[key], rtol=0, atol=1e-4)
    assert [step["words"] for step in record["steps"]] == ["A", "B", "midpoint", "joint fit"]
    assert record["moved"] == {"0": [0, 9], "2": [0, 8]}


def test_numbers_have_no_accuracy_and_few_samples_are_told(capsys):
    words = "merge deep-a.pt deep-b.pt --model own.py:deep --data own.py:numbers --method joint --fit-samples 12"
    lines = printed(words, capsys)
    assert "ACCURACY" not in lines[1]
    assert any("at worst 12 samples for 10 features" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("net-a.pt none.pt", "Got none.pt: No such file"),
        ("net-a.pt deep-b.pt", "Got in deep-b.pt: "),
        ("net-a.pt wide.pt", "Got in wide.pt: "),
        ("net-a.pt nan.pt", "NaN or infinity"),
        ("net-a.pt net-b.pt --match names", "Expected --match weights, activations, straight-through, none"),
        ("net-a.pt net-b.pt --method mean", "Expected --method midpoint, joint"),
        ("net-a.pt net-b.pt --at 1", "Expected --at between 0 and 1"),
        ("net-a.pt net-b.pt --out net-b.pt --force", "Expected --out to differ from the checkpoint"),
        ("net-a.pt net-b.pt --report page.txt", "--report ending in .html"),
        ("flat-a.pt flat-b.pt", "Expected a network with interchangeable units"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(words, message, capsys):
    torch.save(own("net")(17).state_dict(), "wide.pt")
    nan = {key: tensor.clone() for key, tensor in states("net")[1].items()}
    nan["0.weight"][0] = torch.nan
    torch.save(nan, "nan.pt")
    model = "flat" if words.startswith("flat") else "net"
    assert message in refused(f"merge {words} --model own.py:{model} --data own.py:both", capsys)
