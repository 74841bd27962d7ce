"""`thalweg ensemble`: the table, the one net that it writes, and every fault in one line."""

import json
from pathlib import Path

import pytest
import torch
from tests.cli.test_merge import built, own, own_files, printed, states
from tests.cli.user import loaded, refused, user_folder
from torch import nn

from thalweg.cli import ensemble_page

__all__ = ["own_files", "user_folder"]
pytestmark = pytest.mark.usefixtures("user_folder")

THREE = "ensemble deep-a.pt deep-b.pt deep-a.pt --model own.py:deep --data own.py:both"


def test_the_table_has_every_network_and_ensemble_with_its_cost(capsys):
    lines = printed(f"{THREE} --own-layers 1 --own-layers 2", capsys)
    table = [line.split("  ") for line in lines[1:]]
    names = [row[0] for row in table[1:9]]
    assert names == [
        *(
            "deep-a.pt",
            "deep-b.pt",
            "deep-a.pt",
            "WA(1) as one net",
            "WA(1)",
            "WA(2)",
            "independent",
            "weight average",
        )
    ]
    costs = {line.split("  ")[0]: [int(n.replace(",", "")) for n in line.split()[-2:]] for line in lines[2:10]}
    assert costs["deep-a.pt"] == costs["WA(1) as one net"] == [143, 123]
    assert costs["WA(1)"] == [116 + 3 * 27, 99 + 3 * 24]
    assert costs["WA(2)"] == [36 + 3 * 107, 27 + 3 * 96]
    assert costs["independent"] == [3 * 143, 3 * 123]
    assert any(line.startswith("WA(1): largest relative residual of a fit:") for line in lines)
    page = Path("deep-a-ensemble.html").read_text()
    for title in ("Networks and ensembles", "Test accuracy, by number of networks"):
        assert title in page


def test_the_one_net_is_what_plain_torch_finds_in_the_file(capsys):
    record = json.loads(printed(f"{THREE} --json", capsys)[-1])
    module = built("deep", record["file"])
    for split in ("train", "test"):
        x, y = own("both")[split]
        with torch.no_grad():
            outputs = module(x)
        found = record["measured"][split]
        assert found["accuracy"] == pytest.approx(float((outputs.argmax(1) == y).double().mean()), abs=1e-9)
        assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, y)), rel=1e-5)
    rows = {row["name"]: row for row in record["rows"]}
    nets = [built("deep", file) for file in record["files"]]
    with torch.no_grad():
        mean = torch.stack([net(x).softmax(1) for net in nets]).mean(0)
    assert rows["independent"]["test"]["loss"] == pytest.approx(
        float(nn.functional.nll_loss(mean.log(), y)), rel=1e-5
    )
    assert record["average"] == "probabilities"


def test_a_network_twice_is_the_network_and_a_folder_is_its_checkpoints(capsys):
    Path("folder").mkdir()
    for number in (1, 2):
        torch.save(states("cnn")[0], f"folder/{number}.pt")
    record = json.loads(printed("ensemble folder --model own.py:cnn --data own.py:images --json", capsys)[-1])
    assert record["files"] == ["folder/1.pt", "folder/2.pt"]
    for key, tensor in loaded(record["file"]).items():
        torch.testing.assert_close(tensor, states("cnn")[0][key], rtol=0, atol=0)


def test_what_is_no_single_net_is_told_and_nothing_is_written(capsys):
    Path("logs.py").write_text(
        "from torch import nn\ndef net():\n"
        "    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 3), nn.LogSoftmax(1))\n"
    )
    lines = printed("ensemble net-a.pt net-b.pt --model logs.py:net --data own.py:both --loss nll", capsys)
    assert any(line.startswith("WA(1) is not one net, and nothing was written") for line in lines)
    assert not Path("net-a-ensemble.safetensors").exists()


def test_what_cannot_be_adjusted_is_told_and_the_others_are_measured(monkeypatch, capsys):
    monkeypatch.setattr(ensemble_page, "write_page", lambda path, record: None)
    Path("odd.py").write_text(
        "from torch import nn\ndef one():\n    return nn.Linear(3, 3)\ndef tied():\n"
        "    layer = nn.Linear(3, 3)\n    return nn.Sequential(layer, nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), layer)\n"
    )
    space: dict = {}
    exec(Path("odd.py").read_text(), space)
    for name in ("one", "tied"):
        for number in (0, 1):
            torch.save(space[name]().state_dict(), f"{name}-{number}.pt")
    end = "--data own.py:both"
    lines = printed(f"ensemble one-0.pt one-1.pt --model odd.py:one {end}", capsys)
    assert any(line.startswith("WA(1): Expected from 1 to 0 own layers") for line in lines)
    assert any(line.startswith("Nothing was written: WA(1)") for line in lines)
    assert [line.split()[0] for line in lines[2:6]] == ["one-0.pt", "one-1.pt", "independent", "weight"]
    lines = printed(f"ensemble net-a.pt net-b.pt --model own.py:net {end} --own-layers 1 --own-layers 9", capsys)
    assert any(line.startswith("WA(9): Expected from 1 to 1 own layers of 2") for line in lines)
    assert any(line.startswith("wrote net-a-ensemble.safetensors") for line in lines)
    record = json.loads(printed(f"{THREE} --own-layers 2 --json", capsys)[-1])
    assert (record["file"], record["own_layers"]) == (None, [2])
    assert [row["name"] for row in record["rows"]][3:] == ["WA(2)", "independent", "weight average"]
    lines = printed(f"ensemble tied-0.pt tied-1.pt --model odd.py:tied {end} --own-layers 1", capsys)
    assert any(line.startswith("WA(1): Expected") for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("net-a.pt", "Expected two checkpoints or more. Got 1"),
        ("net-a.pt deep-b.pt", "Got in deep-b.pt: "),
        ("net-a.pt none.pt", "Got none.pt: No such file"),
        ("net-a.pt net-b.pt --own-layers 2", "Expected from 1 to 1 own layers of 2 linear maps. Got 2"),
        ("net-a.pt net-b.pt --average votes", "Expected --average probabilities, outputs"),
        ("net-a.pt net-b.pt --out net-b.pt --force", "Expected --out to differ from the checkpoint"),
        ("net-a.pt net-b.pt --data own.py:numbers --average probabilities", "Expected class targets"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(words, message, capsys):
    data = "" if "--data" in words else "--data own.py:both"
    assert message in refused(f"ensemble {words} --model own.py:net {data}", capsys)
