"""`thalweg match`: what it prints and writes is what plain PyTorch finds, and every fault is one line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.user import refused, user_folder
from torch import nn

from thalweg.cli.app import main
from thalweg.cli.match import layers_of
from thalweg.errors import ConfigError

__all__ = ["user_folder"]
pytestmark = pytest.mark.usefixtures("user_folder")

OWN = """
import torch
from torch import nn
_g = torch.Generator().manual_seed(3)
X = torch.randn(120, 3, generator=_g)
data = (X, (X[:, 0] > 0).long())
odd = ({"x": X}, X[:, 0] > 0)
bad = (X * float("nan"), (X[:, 0] > 0).long())
four = (torch.randn(9, 4, generator=_g), torch.zeros(9))

def net(hidden=6, other=5):
    return nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, other), nn.ReLU(), nn.Linear(other, 2))

def shallow():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

def four_inputs():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
"""
WORDS = "match a.pt b.pt --model own.py:net --data own.py:data"


def own(name: str, *arguments: int, seed: int = 0) -> nn.Module:
    space: dict = {}
    exec(OWN, space)
    net, generator = space[name](*arguments), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=generator) + 0.1)
    return net


@pytest.fixture(autouse=True)
def own_files(user_folder):
    Path("own.py").write_text(OWN)
    for file, net in {
        "a.pt": own("net"),
        "b.pt": own("net", seed=1),
        "start.pt": own("net", seed=2),
        "wide.pt": own("net", 9, 7, seed=4),
        "shallow.pt": own("shallow", seed=5),
        "four.pt": own("four_inputs", seed=6),
    }.items():
        torch.save(net.state_dict(), file)
    save_file(own("net", seed=2).state_dict(), "own.safetensors")
    yield
    sys.modules.pop("own", None)


def printed(words: str, capsys) -> list[str]:
    code = main(words.split())
    out, err = capsys.readouterr()
    assert (code, [line for line in err.splitlines() if not line.startswith("match: ")]) == (0, [])
    return out.splitlines()


def test_what_it_finds_is_what_numpy_finds(capsys):
    record = json.loads(printed(f"{WORDS} --earlier start.pt --earlier b.pt --json", capsys)[-1])
    assert json.loads(Path("a-b-match.json").read_text()) == record
    arrays = load_file("a-b-match.safetensors")
    x, a, b = own_inputs(), own("net"), own("net", seed=1)
    for layer, depth in zip(record["layers"], (2, 4), strict=True):
        with torch.no_grad():
            ours, theirs = a[:depth](x).double().numpy(), b[:depth](x).double().numpy()
        dead = [[i for i, column in enumerate(values.T) if column.std() == 0] for values in (ours, theirs)]
        assert layer["dead"] == {"a": dead[0], "b": dead[1]}
        with np.errstate(invalid="ignore"):
            whole = np.nan_to_num(np.corrcoef(theirs, ours, rowvar=False)[: len(theirs.T), len(theirs.T) :])
        name = f"{layer['a']}={layer['b']}"
        assert np.abs(arrays[f"{name}/correlation"].numpy() - whole).max() < 1e-6
        living = np.delete(whole, dead[0], axis=1)
        assert layer["mean_best"] == pytest.approx(living.max(0).mean(), abs=1e-6)
        assert layer["earlier_mean_best"][1] == pytest.approx(layer["mean_best"])
        assert layer["earlier_mean_rank"][1] == 0
        assert arrays[f"{name}/order_b"].sort().values.tolist() == list(range(layer["units"]["b"]))
        assert arrays[f"{name}/earlier/0"].shape == whole.shape
    assert record["samples"] == 120
    assert record["data"] == "120 samples of own.py:data"


def own_inputs() -> torch.Tensor:
    space: dict = {}
    exec(OWN, space)
    return space["X"]


def test_the_table_and_the_files(capsys):
    lines = printed(f"{WORDS} --samples 50 --seed 4", capsys)
    assert lines[0] == "A: a.pt; B: b.pt; on 50 of the 120 samples of own.py:data, drawn at random with seed 4"
    assert lines[1].split()[:4] == ["A", "B", "UNITS", "MEAN"]
    assert [line.split()[:5] for line in lines[2:4]] == [["0", "0", "6", "/", "6"], ["2", "2", "5", "/", "5"]]
    assert lines[-2] == "wrote a-b-match.safetensors and a-b-match.json"
    page = Path("a-b-match.html").read_text()
    assert "Units of a.pt met in b.pt" in page
    assert "Did the winners lead?" not in page
    assert sorted(p.name for p in Path.cwd().glob("*match*")) == [
        f"a-b-match.{e}" for e in ("html", "json", "safetensors")
    ]


def test_a_wider_network_by_its_arguments(capsys):
    words = "match a.pt wide.pt --model own.py:net --arg-b hidden=9 --arg-b other=7 --data own.py:data --json"
    record = json.loads(printed(words, capsys)[-1])
    assert [layer["units"] for layer in record["layers"]] == [{"a": 6, "b": 9}, {"a": 5, "b": 7}]


def test_another_network_and_layers(capsys):
    Path("here").mkdir()
    words = "match a.pt shallow.pt --model own.py:net --model-b own.py:shallow --data own.py:data --out here"
    lines = printed(words, capsys)
    assert "mean best correlation of every layer of A with every layer of B:" in lines
    assert Path("here/a-shallow-match.html").is_file()
    record = json.loads(printed(f"{words} --layers 2=0 --force --json", capsys)[-1])
    assert [(layer["a"], layer["b"]) for layer in record["layers"]] == [("2", "0")]
    assert record["table"] == []


def test_names_of_files_are_escaped_on_the_page(capsys):
    Path("a.pt").rename("a<b>.pt")
    printed("match a<b>.pt b.pt --model own.py:net --data own.py:data --report page.html --out o.safetensors", capsys)
    page = Path("page.html").read_text()
    assert "a&lt;b&gt;.pt" in page
    assert "a<b>.pt" not in page


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("match no.pt b.pt --model own.py:net --data own.py:data", "no.pt"),
        ("match a.pt b.pt --model own.py:net --data own.py:bad", "NaN or infinity"),
        ("match a.pt wide.pt --model own.py:net --data own.py:data", "wide.pt"),
        ("match a.pt b.pt --model own.py:net --data own.py:four", "a.pt"),
        ("match a.pt four.pt --model own.py:net --model-b own.py:four_inputs --data own.py:data", "four.pt"),
        (f"{WORDS} --earlier no.pt", "no.pt"),
        (f"{WORDS} --layers 0", "Name both groups"),
        (f"{WORDS} --layers 0=7", "'7'"),
        (f"{WORDS} --out b.pt", "Rename"),
        (f"{WORDS} --out new.safetensors --report b.pt", ".html"),
        (f"{WORDS} --earlier own.safetensors --out own.safetensors --force", "differ"),
        (f"{WORDS} --samples 500", "at most 120"),
        (f"{WORDS} --model-b own.py:net --net-b MLP", "Got both"),
        ("match a.pt b.pt --data own.py:data", "Got neither"),
    ],
)
def test_what_is_refused(words, named, capsys):
    before = sorted(Path.cwd().iterdir())
    code = main(words.split())
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if not line.startswith("match: ")]
    assert (code, out, len(errors)) == (2, "", 1)
    assert errors[0].startswith("error: Expected ")
    assert named in errors[0]
    assert sorted(Path.cwd().iterdir()) == before


def test_nothing_is_overwritten(capsys):
    for ending in ("safetensors", "json", "html"):
        Path(f"a-b-match.{ending}").write_text("mine")
        assert "--force" in refused(WORDS, capsys)
        if ending != "html":
            Path(f"a-b-match.{ending}").unlink()
    printed(f"{WORDS} --force", capsys)
    assert Path("a-b-match.html").read_text() != "mine"


@pytest.mark.parametrize("text", ["", "0", "0=", "=1", "a=b=c", "0=1,0=1"])
def test_layers_that_cannot_be_read(text):
    with pytest.raises(ConfigError):
        layers_of(text)
