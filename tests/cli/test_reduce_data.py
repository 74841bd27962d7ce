"""`thalweg reduce --data`: the curve it prints, the width it chooses, and what it writes."""

import functools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from tests.cli.user import loaded, refused, user_folder
from torch import nn

from thalweg.cli import reduce_on_data
from thalweg.cli.app import main
from thalweg.cli.reduce_page import curve_rows, distinct_points
from thalweg.embeddings import embed

__all__ = ["user_folder"]
pytestmark = pytest.mark.usefixtures("user_folder")

OWN = """
import torch
from torch import nn
_g = torch.Generator().manual_seed(3)
X = torch.randn(200, 3, generator=_g)
Y = torch.randint(0, 3, (200,), generator=_g)
both = {"train": (X, Y), "test": (X + 0.1, Y)}
pair = (X, Y)
numbers = (X, X[:, :2] @ torch.ones(2, 3))
bad_labels = (X, Y + 5)
nan = (torch.where(X > 2, torch.nan, X), Y)
none = (X[:0], Y[:0])
wide = (torch.randn(9, 4, generator=_g), Y[:9])
images = {"train": (torch.randn(40, 1, 8, 8, generator=_g), torch.randint(0, 3, (40,), generator=_g))}

def net(hidden=16):
    return nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 3))

def cnn(channels=8, hidden=10):
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.Flatten(),
        nn.Linear(36 * channels, hidden), nn.Tanh(), nn.Linear(hidden, 3),
    )
"""


@functools.cache
def checkpoints() -> dict[str, dict[str, torch.Tensor]]:
    """Give states of two nets of which some units nearly agree."""
    generator, found = torch.Generator().manual_seed(1), {}
    for name, narrow, inputs, widths in (
        ("net", own("net")(5), own("X")[:4], {"0": 16}),
        ("cnn", own("cnn")(4, 5), own("images")["train"][0][:4], {"0": 8, "4": 10}),
    ):
        with torch.no_grad():
            for p in narrow.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        found[name] = embed(narrow.eval(), inputs, widths).module.state_dict()
        for tensor in found[name].values():
            if tensor.is_floating_point():
                tensor.mul_(1 + 1e-4 * torch.rand(tensor.shape, generator=generator))
    return found


@pytest.fixture(autouse=True)
def own_files(user_folder):
    Path("own.py").write_text(OWN)
    for name, state in checkpoints().items():
        torch.save(state, f"{name}.pt")
    yield
    sys.modules.pop("own", None)


@functools.cache
def _space() -> dict:
    space: dict = {}
    exec(OWN, space)
    return space


def own(name: str):
    return _space()[name]


def reduced(words: str, capsys) -> list[str]:
    code = main(f"reduce {words}".split())
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "100%" in err
    return out.splitlines()


def built(name: str, file: str, **sizes: int) -> nn.Module:
    """Build a net and load a checkpoint, as its user would without thalweg."""
    module = own(name)(**sizes)
    module.load_state_dict(loaded(file), strict=True)
    return module.eval()


MLP = "net.pt --model own.py:net --data own.py:pair"


def test_the_curve_is_printed_and_the_chosen_width_written(capsys):
    lines = reduced(MLP, capsys)
    assert lines[0] == "200 samples of own.py:pair; loss: cross_entropy (default for class labels)"
    heads = ["SIMILARITY", "AMPLITUDE", "UNITS", "0", "PARAMETERS", "LOSS", "ACCURACY", "AGREEMENT"]
    assert lines[1].split()[:8] == heads
    end = lines.index("chosen: fewest units that agree by at least 0.99")
    table = [line.split() for line in lines[2:end] if "outdone" not in line]
    assert lines[2].split()[:5] == ["as", "it", "is", "0", "16"]
    assert sum(row[-1] == "chosen" for row in table) == 1
    units = [int(row[2]) for row in table[1:]]
    agreements = [float(row[7]) for row in table[1:]]
    assert units == sorted(set(units), reverse=True)
    assert agreements == sorted(agreements, reverse=True)
    assert "parameters: 115 -> 38" in lines
    built("net", "net-narrow.safetensors", hidden=5)
    page = Path("net-narrow.html").read_text()
    for title in ("Width against agreement", "Measured again from the written file", "Similarity of the units of 0"):
        assert title in page


@pytest.mark.parametrize(
    ("name", "file", "data", "sizes"),
    [("net", "net.pt", "pair", {"hidden": 5}), ("cnn", "cnn.pt", "images", {"channels": 4, "hidden": 5})],
)
@pytest.mark.parametrize("out", ["small.pt", "small.safetensors"])
def test_what_is_printed_is_what_plain_torch_finds_in_the_files(name, file, data, sizes, out, capsys):
    record = json.loads(reduced(f"{file} --model own.py:{name} --data own.py:{data} --out {out} --json", capsys)[-1])
    before, after = built(name, file), built(name, out, **sizes)
    assert {n: w["after"] for n, w in record["widths"].items()} == dict(
        zip(record["widths"], sizes.values(), strict=True)
    )
    pair = own(data)["train"] if name == "cnn" else own(data)
    with torch.no_grad():
        one, two = before(pair[0]), after(pair[0])
    found = record["measured"]["data"]["after"]
    assert found["agreement"] == pytest.approx(float((one.argmax(1) == two.argmax(1)).double().mean()), abs=1e-9)
    assert found["accuracy"] == pytest.approx(float((two.argmax(1) == pair[1]).double().mean()), abs=1e-9)
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(two, pair[1])), rel=1e-5)
    assert found["agreement"] >= 0.99
    for key in ("loss", "accuracy", "agreement"):
        assert found[key] == pytest.approx(record["chosen"][key], rel=1e-6)
    assert record["parameters"]["after"] == sum(p.numel() for p in after.parameters())
    assert Path(record["report"]).is_file()


def test_the_test_split_is_measured_too_where_there_is_one(capsys):
    words = "net.pt --model own.py:net --data own.py:both --json"
    record = json.loads(reduced(words, capsys)[-1])
    x, _ = own("both")["test"]
    with torch.no_grad():
        one, two = built("net", "net.pt")(x), built("net", "net-narrow.safetensors", hidden=5)(x)
    expected = float((one.argmax(1) == two.argmax(1)).double().mean())
    assert record["measured"]["test"]["after"]["agreement"] == pytest.approx(expected, abs=1e-9)
    assert record["test_data"].endswith("test")
    assert record["measured"]["test"]["before"]["agreement"] == 1.0


def test_a_similarity_is_taken_as_asked_and_drops_nothing_else(capsys):
    lines = reduced(f"{MLP} --similarity 0.97 --out a.pt", capsys)
    assert "chosen: similarity 0.97, as asked for" in lines
    assert loaded("a.pt")["0.weight"].shape == (5, 3)
    main("reduce net.pt --model own.py:net --similarity 0.97 --out b.pt".split())
    for key, tensor in loaded("b.pt").items():
        torch.testing.assert_close(tensor, loaded("a.pt")[key], rtol=0, atol=0)


def test_a_tolerance_of_nothing_keeps_all_predictions_and_one_of_all_gives_the_narrowest(capsys):
    exact = json.loads(reduced(f"{MLP} --tolerance 0 --json", capsys)[-1])
    assert exact["chosen"]["agreement"] == 1.0
    narrowest = json.loads(reduced(f"{MLP} --tolerance 1 --json --force --amplitude 0.5", capsys)[-1])
    assert narrowest["chosen"]["units"] == min(p["units"] for p in narrowest["points"])
    assert {p["amplitude"] for p in narrowest["points"]} == {0.0, 0.5}
    assert narrowest["chosen"]["units"] < exact["chosen"]["units"]


def test_a_tolerance_that_rounding_would_miss_is_met(capsys):
    """Of 100 samples, 82 agree with the one unit that is left; 1 - 0.18 is more than 0.82."""
    module = torch.nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        module[2].weight.copy_(torch.tensor([[1.0, 0.005], [0.0, 0.0]]))
        module[2].bias.copy_(torch.tensor([0.0, 0.001]))
    torch.save(module.state_dict(), "two.pt")
    Path("two.py").write_text(
        "import torch\nfrom torch import nn\n"
        "net = lambda hidden=2: nn.Sequential(nn.Linear(1, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, 2))\n"
        "pair = (torch.cat([torch.ones(82, 1), -torch.ones(18, 1)]), torch.zeros(100, dtype=torch.long))\n"
    )
    words = "two.pt --model two.py:net --data two.py:pair --amplitude 0.01 --json --force"
    for tolerance, units in (("0.18", 1), ("0.17", 2)):
        record = json.loads(reduced(f"{words} --tolerance {tolerance}", capsys)[-1])
        assert record["chosen"]["units"] == units
    assert record["points"][-1]["agreement"] == 0.82
    sys.modules.pop("two", None)


def test_numbers_agree_by_the_variance_that_is_explained(capsys):
    lines = reduced("net.pt --model own.py:net --data own.py:numbers", capsys)
    assert "ACCURACY" not in lines[1]
    assert lines[0].endswith("loss: mse (default for floating targets)")
    assert "share of the variance of the outputs" in Path("net-narrow.html").read_text()


def test_an_example_of_the_users_own_is_traced_in_place_of_the_data(capsys):
    record = json.loads(reduced(f"{MLP} --input 3 --json", capsys)[-1])
    assert record["widths"] == {"0": {"before": 16, "after": 5}}


def test_half_precision_is_measured_in_single_and_written_as_it_was(capsys):
    torch.save({n: t.half() for n, t in loaded("net.pt").items()}, "half.pt")
    record = json.loads(reduced("half.pt --model own.py:net --data own.py:pair --out h.pt --json", capsys)[-1])
    assert loaded("h.pt")["0.weight"].dtype == torch.float16
    assert record["measured"]["data"]["after"]["agreement"] >= 0.98


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data own.py:bad_labels", "Expected class labels from 0 to 2"),
        ("--data own.py:nan", "Expected finite inputs. Got NaN or infinity"),
        ("--data own.py:none", "Expected at least one sample"),
        ("--data own.py:wide", "Its first linear layer takes 3 features"),
        ("--data own.py:pair --loss mse", "Expected targets of the shape of the outputs"),
        ("--data own.py:missing", "Expected 'missing' in 'own.py'"),
        ("--data own.py:pair --tolerance 1.5", "--tolerance in [0, 1]"),
        ("--data own.py:pair --similarity 2", "--similarity in (0, 1]"),
        ("--data own.py:pair --amplitude 1", "--amplitude in [0, 1)"),
        ("--data own.py:pair --similarity 0.9 --tolerance 0.1", "--similarity or --tolerance"),
        ("--data own.py:pair --groups 7", "Expected one of the groups 0"),
        ("--data own.py:pair --report page.txt", "--report ending in .html"),
        ("--data own.py:pair --report no/page.html", "Expected a folder no"),
        ("--data own.py:pair --report own.html", "Use --force"),
        ("--data own.py:pair --report pages.html", "Got the folder pages.html"),
        ("--tolerance 0.1", "Expected --data with --tolerance"),
        ("--split test", "Expected --data with --split"),
        ("--report a.html", "Expected --data with --report"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(words, message, capsys):
    Path("own.html").write_text("mine")
    Path("pages.html").mkdir()
    assert message in refused(f"reduce net.pt --model own.py:net {words}", capsys)


@pytest.mark.parametrize("place", ["curve", "file", "page"])
def test_an_interruption_leaves_no_half_file(place, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    if place == "curve":
        monkeypatch.setattr(reduce_on_data, "_curve", interrupt)
    else:
        replace, wanted = os.replace, {"file": ".safetensors", "page": ".html"}[place]
        stop = lambda old, new: interrupt() if str(new).endswith(wanted) else replace(old, new)
        monkeypatch.setattr(os, "replace", stop)
    before = {p.name for p in Path.cwd().iterdir()}
    assert main(f"reduce {MLP}".split()) == 130
    written = {"net-narrow.safetensors"} if place == "page" else set()
    assert {p.name for p in Path.cwd().iterdir()} - before - {"__pycache__"} == written


def test_of_many_groups_only_the_sum_has_a_column_and_equal_points_one_row():
    point = {"similarity": None, "amplitude": 0.0, "units": 15, "widths": {n: 3 for n in "abcde"}, "parameters": 9}
    point |= {"is_dominated": False, "loss": 1.0, "accuracy": 0.5, "agreement": 1.0, "max_change": 0.0}
    narrow = point | {"similarity": 0.9, "units": 14, "widths": point["widths"] | {"a": 2}, "agreement": 0.9}
    record = {"points": [point, point | {"similarity": 0.99}, narrow], "widths": point["widths"], "chosen": narrow}
    assert len(distinct_points(record)) == 2
    heads, rows = curve_rows(record, is_whole=True)
    assert heads[:4] == ["similarity", "amplitude", "units", "parameters"]
    assert [row[0] for row in rows] == ["as it is", "0.9"]
    assert rows[1][-1] == "chosen"
    record["points"].append(point | {"units": 13, "agreement": 0.8, "is_dominated": True, "similarity": 0.5})
    assert [row[0] for row in curve_rows(record, is_whole=True)[1]] == ["as it is", "0.9", "0.5"]
    assert [row[0] for row in curve_rows(record, is_whole=False)[1]] == ["as it is", "0.9"]
