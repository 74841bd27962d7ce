"""`thalweg connect`: the panel it prints, the files it writes, and how it goes on after an interruption."""

import csv
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.cli.user import user_folder
from torch import nn

from thalweg.cli import connect_page, connect_rows
from thalweg.cli.app import main
from thalweg.objective import Objective
from thalweg.paths.pair import Pair
from thalweg.paths.panel import PanelRow, panel

__all__ = ["user_folder"]
pytestmark = pytest.mark.usefixtures("user_folder")

OWN = """
import torch
from torch import nn
_g = torch.Generator().manual_seed(3)
X = torch.randn(120, 3, generator=_g)
Y = (X.abs().sum(1) > 2).long() + (X[:, 0] > 0.5).long()
both = {"train": (X, Y), "test": (X + 0.1, Y)}
pair = (X, Y)
numbers = (X, X.abs()[:, :2])
bad_labels = (X, Y + 5)
nan = (torch.where(X > 2, torch.nan, X), Y)
none = (X[:0], Y[:0])

def net(hidden=8, outputs=3):
    return nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

def normed():
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

def flat():
    return nn.Linear(3, 3)

def other():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
"""
RUN = "connect a.pt b.pt --model own.py:net --data own.py:both --points 7"
COLUMNS = ["method", "t", "leg", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]


def own(name: str):
    namespace: dict = {}
    exec(OWN, namespace)
    return namespace[name]


@functools.cache
def states() -> dict[str, dict[str, torch.Tensor]]:
    """Train each net from two starts."""
    found, generator = {}, torch.Generator().manual_seed(1)
    nets = {"": own("net"), "numbers-": lambda: own("net")(outputs=2), "normed-": own("normed"), "flat-": own("flat")}
    for kind, build in nets.items():
        for letter in "ab":
            net = build()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
            x, y = own("numbers" if kind == "numbers-" else "pair")
            loss = nn.MSELoss() if kind == "numbers-" else nn.CrossEntropyLoss()
            for _ in range(80):
                slopes = torch.autograd.grad(loss(net(x), y), tuple(net.parameters()))
                with torch.no_grad():
                    for parameter, slope in zip(net.parameters(), slopes, strict=True):
                        parameter.sub_(0.3 * slope)
            found[f"{kind}{letter}"] = net.state_dict()
    return found


@pytest.fixture(autouse=True)
def own_files(user_folder):
    Path("own.py").write_text(OWN)
    for name, state in states().items():
        torch.save(state, f"{name}.pt")
    yield
    sys.modules.pop("own", None)


@pytest.fixture
def plain_page(monkeypatch):
    """Spare the page, of which packing Plotly's code takes most of the time."""
    monkeypatch.setattr(connect_page, "write_page", lambda path, record: path.write_text("a page"))


def connected(words: str, capsys) -> list[str]:
    code = main(words.split())
    out, err = capsys.readouterr()
    assert code == 0, err
    return out.splitlines()


def as_json(words: str, capsys) -> dict:
    return json.loads(connected(f"{words} --json", capsys)[-1])


def measured(name: str, build: str, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Compute loss and accuracy of a checkpoint with plain PyTorch."""
    net = own(build)()
    net.load_state_dict(states()[name])
    net.eval()
    with torch.no_grad():
        outputs = net(x)
    return float(nn.functional.cross_entropy(outputs, y)), float((outputs.argmax(1) == y).double().mean())


def test_table_files_and_page_tell_the_same(capsys):
    lines = connected(f"{RUN} --methods linear+wa,linear,arc", capsys)
    record = json.loads(Path("a-to-b-connection/panel.json").read_text())
    assert [row["method"] for row in record["rows"]] == ["linear", "arc", "linear+wa"]
    assert lines[0].startswith("A a.pt: train loss ")
    assert lines[1].startswith("B b.pt: train loss ")
    assert lines[2].split()[:7] == ["METHOD", "TRAIN", "TO", "F(B)", "TRAIN", "TO", "B"]
    assert [line.split()[0] for line in lines[3:6]] == ["linear", "arc", "linear+wa"]
    marked = [line.split()[0] for line in lines[3:6] if line.endswith("best")]
    assert marked == [record["best"]]
    folder = Path("a-to-b-connection")
    assert f"path of {record['best']}: {folder / 'path-'}{record['best']}.safetensors" in lines
    names = {p.name for p in folder.iterdir()}
    assert names == {"parts", "panel.json", "profiles.csv", "report.html", f"path-{record['best']}.safetensors"}
    page = (folder / "report.html").read_text()
    for title in ("The two ends", "The panel", "Worst accuracy along the path of each method", "Train loss along"):
        assert title in page


@pytest.mark.usefixtures("plain_page")
def test_the_ends_are_what_plain_torch_finds_in_the_checkpoints(capsys):
    record = as_json(f"{RUN} --methods linear,linear+wa", capsys)
    for name in "ab":
        for split in ("train", "test"):
            loss, accuracy = measured(name, "net", *own("both")[split])
            assert record[name][f"{split}_loss"] == pytest.approx(loss, rel=1e-5)
            assert record[name][f"{split}_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    with Path(record["files"]["profiles"]).open() as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == COLUMNS
    for method in ("linear", "linear+wa"):
        own_rows = [row for row in rows if row["method"] == method]
        for row, end in ((own_rows[0], "a"), (own_rows[-1], "b")):
            for column in COLUMNS[3:]:
                assert float(row[column]) == pytest.approx(record[end][column], rel=1e-12)


@pytest.mark.usefixtures("plain_page")
def test_the_numbers_are_those_of_the_library(capsys):
    record = as_json(f"{RUN} --methods linear,arc,linear+wa --fit-samples 50 --seed 2", capsys)
    modules = [own("net")() for _ in "ab"]
    for module, name in zip(modules, "ab", strict=True):
        module.load_state_dict(states()[name])
    on = lambda split: Objective(modules[0], nn.CrossEntropyLoss(), own("both")[split])
    pair = Pair.of(on("train"), *modules, fit_samples=50, seed=2)
    expected = panel(pair, ("linear", "arc", "linear+wa"), test=on("test"), points=7)
    for row, found in zip(expected, record["rows"], strict=True):
        values = row.values()
        for key in ("worst_train_loss", "worst_test_accuracy", "barrier", "length", "met_train_accuracy"):
            assert found[key] == pytest.approx(values[key], rel=1e-5), key
    best = max(record["rows"], key=lambda row: (row["worst_train_accuracy"], -row["worst_train_loss"]))
    assert record["best"] == best["method"]


@pytest.mark.usefixtures("plain_page")
def test_an_interrupted_command_goes_on_where_it_stopped(monkeypatch, capsys):
    measure, asked = connect_rows._panel_row, []

    def stopped(couple, wishes, name, tell):
        asked.append(name)
        if name == "arc":
            raise KeyboardInterrupt
        return measure(couple, wishes, name, tell)

    words = f"{RUN} --methods linear,arc,polygon-3 --curve-epochs 2".split()
    monkeypatch.setattr(connect_rows, "_panel_row", stopped)
    assert main(words) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert {p.name for p in Path("a-to-b-connection").iterdir()} == {"parts"}
    monkeypatch.setattr(connect_rows, "_panel_row", lambda *given: asked.append(given[2]) or measure(*given))
    assert main(words) == 0
    assert asked == ["linear", "arc", "arc", "polygon-3"]
    assert main([*words, "--force"]) == 0
    assert main([*words, "--force", "--curve-epochs", "3"]) == 0
    assert asked[4:] == ["polygon-3"]


@pytest.mark.usefixtures("plain_page")
def test_a_failed_method_does_not_stop_the_others_and_is_tried_again(monkeypatch, capsys):
    failed = PanelRow("arc", "an arc", "a", "failed", "NumericalError: no luck")
    measure = connect_rows._panel_row
    monkeypatch.setattr(connect_rows, "_panel_row", lambda *g: failed if g[2] == "arc" else measure(*g))
    lines = connected(f"{RUN} --methods linear,arc", capsys)
    assert "arc: failed: NumericalError: no luck" in lines
    monkeypatch.setattr(connect_rows, "_panel_row", measure)
    assert [row["status"] for row in as_json(f"{RUN} --methods linear,arc --force", capsys)["rows"]] == [
        "measured"
    ] * 2


@pytest.mark.usefixtures("plain_page")
def test_what_does_not_apply_says_why(capsys):
    words = "connect flat-a.pt flat-b.pt --model own.py:flat --data own.py:pair --points 7 --methods linear,linear+wa"
    lines = connected(words, capsys)
    reason = next(line for line in lines if line.startswith("linear+wa: does not apply: "))
    assert "no interchangeable units" in reason
    assert "TEST" not in lines[2]
    record = json.loads(Path("flat-a-to-flat-b-connection/panel.json").read_text())
    assert (record["best"], record["test_data"]) == ("linear", None)


@pytest.mark.usefixtures("plain_page")
def test_paths_are_written_as_asked_and_those_of_other_runs_go(capsys):
    from thalweg.paths.saved import load_path

    words = f"{RUN} --methods linear,bezier --curve-epochs 1 --out here"
    record = as_json(f"{words} --save all", capsys)
    assert list(record["files"]["paths"]) == ["linear", "bezier"]
    theta = {name: torch.cat([t.reshape(-1) for t in states()[name].values()]) for name in "ab"}
    for file in record["files"]["paths"].values():
        path = load_path(file)
        for t, name in ((0.0, "a"), (1.0, "b")):
            torch.testing.assert_close(path.at(t), theta[name], rtol=0, atol=0)
    connected(f"{words} --save linear --force", capsys)
    assert [p.name for p in Path("here").glob("path-*")] == ["path-linear.safetensors"]
    connected(f"{words} --save none --force", capsys)
    assert not list(Path("here").glob("path-*"))


@pytest.mark.usefixtures("plain_page")
def test_files_of_the_users_stay_whatever_their_names_are(capsys):
    Path("here").mkdir()
    for name in "ab":
        save_file(states()[name], f"here/path-{name}.safetensors")
    save_file(states()["a"], "here/path-mine.safetensors")
    words = "connect here/path-a.safetensors here/path-b.safetensors --model own.py:net --data own.py:pair"
    words = f"{words} --points 5 --methods linear,arc --out here"
    connected(f"{words} --save arc", capsys)
    connected(f"{words} --save linear --force", capsys)
    found = {p.name for p in Path("here").glob("path-*.safetensors")}
    assert found == {f"path-{name}.safetensors" for name in ("a", "b", "mine", "linear")}
    save_file(states()["a"], "here/path-arc.safetensors")
    for change in ("--save arc --force", "--save all --force"):  # no path over one of the checkpoints
        line = f"{words} {change}".replace("here/path-a.", "here/path-arc.").split()
        assert (main(line), "Expected results apart from A and B" in capsys.readouterr().err) == (2, True)
    for left in ("panel.json", "profiles.csv", "report.html"):
        Path("here", left).unlink()
    assert main(f"{words} --save arc".split()) == 2
    assert "Got here/path-arc.safetensors. Use --force" in capsys.readouterr().err


@pytest.mark.usefixtures("plain_page")
def test_a_checkpoint_is_connected_with_itself(capsys):
    record = as_json(f"{RUN.replace('b.pt', 'a.pt')} --methods linear,arc,linear+wa", capsys)
    linear, _, adjusted = record["rows"]
    assert (linear["length"], linear["barrier"]) == (0.0, 0.0)
    assert linear["worst_train_loss"] == record["a"]["train_loss"]
    assert adjusted["status"] == "measured"


@pytest.mark.usefixtures("plain_page")
def test_numbers_are_compared_by_their_loss(capsys):
    words = "connect numbers-a.pt numbers-b.pt --model own.py:net --arg outputs=2 --data own.py:numbers --points 7"
    lines = connected(f"{words} --methods linear,linear+wa", capsys)
    assert "accuracy" not in lines[0]
    assert any(line.startswith("best: ") and "(the lowest worst train loss" in line for line in lines)
    record = json.loads(Path("numbers-a-to-numbers-b-connection/panel.json").read_text())
    least = min(record["rows"], key=lambda row: row["values"]["worst_train_loss"])
    assert record["best"] == least["method"]


@pytest.mark.usefixtures("plain_page")
def test_running_statistics_are_the_networks_own_at_the_ends(capsys):
    words = "connect normed-a.pt normed-b.pt --model own.py:normed --data own.py:both --points 7 --methods linear"
    lines = connected(words, capsys)
    assert lines[2].startswith("BatchNorm statistics: at t = 0 and 1 the networks' own; re-estimated")
    for line, name in zip(lines, ("normed-a", "normed-b"), strict=False):
        loss, accuracy = measured(name, "normed", *own("pair"))
        assert f"train loss {loss:.5g}"[:-1] in line
        assert f"accuracy {accuracy:.4f}" in line


@pytest.mark.usefixtures("plain_page")
def test_a_map_of_units_is_one_more_row(capsys):
    from thalweg.matching.units import unit_rows
    from thalweg.paths.flow_model import identity_map
    from thalweg.structure import trace

    view = trace(own("net")(), own("X")[:4])
    rows = torch.cat([unit_rows(view, view.groups[0], states()[name], "butterfly") for name in "ab"])
    unit_map = identity_map(view.groups[0].name, rows, generator=torch.Generator().manual_seed(0))
    unit_map.save("map.safetensors")
    lines = connected(f"{RUN} --methods arc --flow map.safetensors --save all", capsys)
    assert [line.split()[0] for line in lines[3:5]] == ["arc", "flow-map"]
    arc, flow = json.loads(Path("a-to-b-connection/panel.json").read_text())["rows"]
    assert flow["words"] == "units of 0 through a map (realnvp) fitted on other nets"
    assert flow["values"]["worst_t"] == pytest.approx(arc["values"]["worst_t"], abs=0.05)
    assert [p.name for p in Path("a-to-b-connection").glob("path-*")] == ["path-arc.safetensors"]


@pytest.mark.usefixtures("plain_page")
def test_half_precision_and_another_type_meet_in_the_wider_one(capsys):
    torch.save({n: t.half() for n, t in states()["a"].items()}, "half.pt")
    torch.save({n: t.double() for n, t in states()["b"].items()}, "double.pt")
    record = as_json(
        "connect half.pt double.pt --model own.py:net --data own.py:pair --points 5 --methods linear", capsys
    )
    loss, _ = measured("b", "net", *own("pair"))
    assert record["b"]["train_loss"] == pytest.approx(loss, rel=1e-6)
