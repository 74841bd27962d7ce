"""`thalweg probe` as a user meets it: one point, several, a training; interrupted, misused."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.cli.user import refused, saved, user_folder
from torch import nn

from thalweg.cli import measurement, probe_page
from thalweg.cli.app import main
from thalweg.objective import Objective
from thalweg.probes import (
    HessianOperator,
    eigenpairs,
    gradient_norm,
    hessian_trace,
    inertia,
    spectral_density,
    spectrum,
)
from thalweg.space import Space

__all__ = ["user_folder"]
pytestmark = pytest.mark.usefixtures("user_folder")

DATA = """
import torch
from torch import nn
_g = torch.Generator().manual_seed(3)
X = torch.randn(24, 3, generator=_g)
Y = torch.randint(0, 2, (24,), generator=_g)
both = {"train": (X, Y), "test": (X + 0.1, Y)}
pair = (X, Y)
bad_labels = (X, Y + 5)
nan = (torch.where(X > 2, torch.nan, X), Y)
none = (X[:0], Y[:0])
images = (torch.randn(6, 3, 8, 8, generator=_g), torch.randint(0, 4, (6,), generator=_g))

def net(hidden=4):
    return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 2))

def vector_loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, reduction="none")
"""


@pytest.fixture(autouse=True)
def own_files(user_folder):
    """Data, a net and three checkpoints of it, as if from a training."""
    Path("own.py").write_text(DATA)
    generator = torch.Generator().manual_seed(1)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for step in (1, 2, 10):
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(0.7 * torch.randn(p.shape, generator=generator))
        torch.save(module.state_dict(), f"net-{step}.pt")
    yield
    sys.modules.pop("own", None)


def landscape(step: int = 1) -> Objective:
    namespace: dict = {}
    exec(DATA, namespace)
    module = namespace["net"]()
    module.load_state_dict(torch.load(f"net-{step}.pt", weights_only=True))
    return Objective(module, nn.CrossEntropyLoss(), namespace["pair"])


def probed(words: str, capsys) -> tuple[list[str], str]:
    code = main(f"probe {words}".split())
    out, err = capsys.readouterr()
    assert code == 0, err
    return out.splitlines(), err


def as_json(words: str, capsys) -> dict:
    return json.loads(probed(f"{words} --json", capsys)[0][-1])


ONE = "net-1.pt --model own:net --data own:both"


def test_the_numbers_are_those_of_the_library(capsys):
    found = as_json(f"{ONE} --eigen 2 --negative 1 --density --trace --degeneracy --layers --probes 3", capsys)
    point, objective = found["checkpoints"][0], landscape()
    theta = objective.theta()
    assert point["loss"] == pytest.approx(float(objective.value(theta)), rel=1e-6)
    assert point["gradient"]["l1"] == pytest.approx(gradient_norm(objective, theta).l1, rel=1e-5)
    largest = eigenpairs(objective, theta, 2)
    assert point["largest"]["values"] == pytest.approx(largest.values.tolist(), rel=1e-5)
    assert point["largest"]["converged"] == [True, True]
    assert point["smallest"]["values"][0] == pytest.approx(float(spectrum(objective, theta).eigenvalues[0]), rel=1e-3)
    density = spectral_density(HessianOperator(objective, theta), num_probes=3)
    assert point["density"]["trace"]["value"] == pytest.approx(density.trace.value, rel=1e-4)
    assert point["trace"]["value"] == pytest.approx(
        hessian_trace(HessianOperator(objective, theta)).value, rel=1e-3, abs=1e-3
    )
    exact = inertia(spectrum(objective.in_dtype(torch.float64), theta.double()))
    assert [point["degeneracy"][k] for k in ("negative", "zero", "positive")] == [
        exact.negative,
        exact.zero,
        exact.positive,
    ]
    assert [row["layer"] for row in point["layers"]["layers"]] == ["0", "2"]
    assert found["loss"].startswith("cross_entropy")
    assert {"thalweg", "torch", "python"} <= set(found["environment"]["versions"])
    assert found["seed"] == 0


def test_the_table_says_how_sure_an_eigenvalue_is(capsys):
    out, _ = probed(f"{ONE} --eigen 2", capsys)
    assert any(re.match(r"λ1 +\S+ ± \S+ \(estimated error \S+\)$", line) for line in out)
    assert out[-1].startswith("report: /")
    assert Path(out[-1].removeprefix("report: ")).is_file()
    assert json.loads(Path("thalweg-probe/probe.json").read_bytes())["checkpoints"][0]["name"] == "net-1"


def test_a_search_that_does_not_end_is_shown_as_such():
    rows = dict(probe_page.summary([{"name": "n", **point_like(converged=False)}])[1])
    assert "NOT CONVERGED" in rows["λ1"]


def point_like(converged: bool) -> dict:
    search = {"values": [1.0], "residuals": [0.5], "errors": [0.5], "converged": [converged]}
    norms = {"l1": 1.0, "l2": 1.0, "max": 1.0, "value": 1.0}
    return {"parameters": 3, "loss": 1.0, "accuracy": None, "gradient": norms, "largest": search, "step": None}


def test_progress_and_the_cost_are_told_on_stderr(capsys):
    _, err = probed(f"{ONE} --density --probes 2 --lanczos-steps 5", capsys)
    assert re.search(r"one gradient takes .*in all about", err.splitlines()[0])
    assert "100% done" in err.splitlines()[-1]


@pytest.mark.parametrize(("axes", "points"), [("1d", 7), ("2d", 49)])
@pytest.mark.parametrize("directions", ["random", "eigen"])
def test_a_slice_goes_through_its_point_on_train_and_test_data(axes, points, directions, capsys):
    found = as_json(f"{ONE} --slice {axes} --points 7 --directions {directions}", capsys)
    point = found["checkpoints"][0]
    rows = point["slice"]["rows"]
    assert len(rows) == points
    centre = next(row for row in rows if row["a"] == 0 and row.get("b", 0) == 0)
    assert centre["loss"] == pytest.approx(point["loss"], rel=1e-5)
    assert centre["accuracy"] == pytest.approx(point["accuracy"])
    assert {"test_loss", "test_accuracy"} <= set(centre)
    assert "BatchNorm" in point["slice"]["batchnorm"]


def test_two_checkpoints_stand_side_by_side(capsys):
    out, _ = probed("net-1.pt net-10.pt --model own:net --data own:both --density --probes 2", capsys)
    assert out[1].split() == ["QUANTITY", "NET-1", "NET-10"]


def test_a_folder_of_checkpoints_is_a_training_in_the_order_of_its_numbers(capsys):
    found = as_json(". --model own:net --data own:both --slice 2d --points 5 --directions pca", capsys)
    assert [point["step"] for point in found["checkpoints"]] == [1, 2, 10]
    assert [m["name"] for m in found["shared_slice"]["markers"]] == ["net-1", "net-2", "net-10"]
    assert "explain" in found["shared_slice"]["directions"]
    assert "over-training" in Path("thalweg-probe/report.html").read_text()


def test_snapshots_of_a_training_in_one_file_are_points(capsys):
    module = landscape().module
    thetas = torch.stack([Space.of(module).theta(landscape(step).module) for step in (1, 2, 10)])
    save_file({"thetas": thetas, "steps": torch.tensor([0, 50, 100])}, "run.safetensors")
    found = as_json("run.safetensors --model own:net --data own:both", capsys)["checkpoints"]
    assert [(p["name"], p["step"]) for p in found] == [("step 0", 0), ("step 50", 50), ("step 100", 100)]
    assert found[2]["loss"] == pytest.approx(float(landscape(10).value(thetas[2])), rel=1e-6)


def test_a_line_and_a_plane_go_through_the_checkpoints(capsys):
    words = "--model own:net --data own:both --eigen 0 --points 9 --directions through --slice"
    straight = as_json(f"net-1.pt net-2.pt {words} 1d", capsys)["shared_slice"]
    assert [marker["a"] for marker in straight["markers"]] == [0.0, 1.0]
    flat = as_json(f"net-1.pt net-2.pt net-10.pt {words} 2d", capsys)["shared_slice"]
    assert len(flat["rows"]) == 81
    distance = float((landscape(1).theta() - landscape(2).theta()).norm())
    assert flat["markers"][1]["a"] == pytest.approx(distance, rel=1e-5)


def test_a_users_odd_cnn_with_batchnorm_is_probed_in_float64(capsys):
    saved("OddResNet")
    words = "net.pt --model mynets:OddResNet --data own:images --dtype float64 --layers"
    found = as_json(words, capsys)
    assert found["dtype"] == "float64"
    assert len(found["checkpoints"][0]["layers"]["layers"]) > 5


def test_what_is_interrupted_keeps_its_parts_and_goes_on_from_there(capsys, monkeypatch):
    words = f"{ONE} --eigen 2 --trace --density --probes 2"
    real = measurement._trace

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measurement, "_trace", stop)
    assert main(f"probe {words}".split()) == 130
    assert "state kept" in capsys.readouterr().err
    left = {p.name: p.stat().st_mtime_ns for p in Path("thalweg-probe").rglob("*") if p.is_file()}
    assert len(left) == 2
    assert all(re.fullmatch(r"[0-9a-f]{32}\.json", name) for name in left)
    monkeypatch.setattr(measurement, "_trace", real)
    monkeypatch.setattr(measurement, "_density", stop)  # it is not computed again
    as_json(words, capsys)
    now = {p.name: p.stat().st_mtime_ns for p in Path("thalweg-probe/parts").iterdir()}
    assert left.items() <= now.items()


def test_a_damaged_part_is_computed_again(capsys):
    first = as_json(ONE, capsys)["checkpoints"]
    part = next(Path("thalweg-probe/parts").iterdir())
    part.write_text("{")
    again = as_json(ONE, capsys)["checkpoints"]
    assert again[0]["largest"]["values"] == first[0]["largest"]["values"]


def test_other_data_are_another_landscape(capsys):
    words = "net-1.pt --model own:net --data own:both"
    one, other = (as_json(f"{words}{more}", capsys)["checkpoints"][0] for more in ("", " --samples 12"))
    assert one["largest"]["values"] != other["largest"]["values"]
    assert other["samples"] == 12


def test_other_test_data_give_another_slice(capsys):
    words = "net-1.pt --model own:net --data own:both --slice 1d --points 5"
    first = as_json(words, capsys)["checkpoints"][0]["slice"]["rows"]
    Path("own.py").write_text(DATA.replace("X + 0.1", "X + 0.9"))
    sys.modules.pop("own", None)
    again = as_json(words, capsys)["checkpoints"][0]["slice"]["rows"]
    assert [row["loss"] for row in again] == [row["loss"] for row in first]
    assert [row["test_loss"] for row in again] != [row["test_loss"] for row in first]


def test_another_loss_of_the_same_value_is_another_landscape(capsys):
    extra = """
def zeros():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    return net
fit = (torch.ones(4, 1), torch.zeros(4, 1))
"""
    Path("own.py").write_text(DATA + extra)
    torch.save({"weight": torch.zeros(1, 1)}, "zero.pt")
    words = "zero.pt --model own:zeros --data own:fit --loss"
    values = [as_json(f"{words} {loss}", capsys)["checkpoints"][0]["largest"]["values"] for loss in ("mse", "huber")]
    assert values == [[pytest.approx(2.0)], [pytest.approx(1.0)]]


def test_a_renamed_checkpoint_has_its_own_name_in_the_slice(capsys):
    as_json(f"{ONE} --slice 1d --points 3", capsys)
    Path("net-1.pt").rename("other-1.pt")
    found = as_json(f"other-1.pt {ONE[9:]} --slice 1d --points 3", capsys)["checkpoints"][0]
    assert found["slice"]["markers"][0]["name"] == "other-1"


def test_one_probe_has_no_error_and_still_a_report(capsys):
    out, _ = probed(f"{ONE} --density --probes 1 --lanczos-steps 5 --layers --slice 2d --points 3", capsys)
    assert any("± inf" in line for line in out)
    assert Path("thalweg-probe/report.html").is_file()


def test_thetas_in_float64_stay_so(capsys):
    thetas = landscape().theta().double()[None] + torch.tensor([1e-12], dtype=torch.float64)
    save_file({"thetas": thetas}, "run.safetensors")
    assert as_json("run.safetensors --model own:net --data own:both", capsys)["dtype"] == "float64"


def test_thetas_of_a_network_with_buffers_are_refused(capsys):
    save_file({"thetas": torch.zeros(2, 7)}, "run.safetensors")
    words = "probe run.safetensors --model mynets:OddResNet --data own:images"
    assert "buffers or frozen parameters" in refused(words, capsys)


def test_half_precision_is_probed_in_float32(capsys):
    state = {n: t.bfloat16() for n, t in torch.load("net-1.pt", weights_only=True).items()}
    torch.save(state, "half.pt")
    assert as_json("half.pt --model own:net --data own:pair", capsys)["dtype"] == "float32"


def test_checkpoints_of_two_sizes_have_no_line_between_them(capsys):
    code = main("embed net-1.pt --model own:net --widths x2 --out wide-9.safetensors".split())
    assert code == 0
    words = "net-1.pt wide-9.safetensors --model own:net --data own:pair --eigen 0 --slice 1d --directions through"
    code = main(f"probe {words}".split())
    assert code == 2
    assert "of one network" in capsys.readouterr().err


def test_ctrl_c_while_writing_leaves_no_half_file(tmp_path, monkeypatch):
    from thalweg.lab import files

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "x" / "part.json", b"{}")
    assert list((tmp_path / "x").iterdir()) == []


def test_names_that_are_markup_are_escaped(capsys):
    Path("<b>1.pt").write_bytes(Path("net-1.pt").read_bytes())
    assert main(["probe", "<b>1.pt", *"--model own:net --data own:both".split()]) == 0
    assert "<b>1" not in Path("thalweg-probe/report.html").read_text().replace("\\u003c", "")
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("net-1.pt --model own:net --data own:bad_labels", "label"),
        ("net-1.pt --model own:net --data own:pair --loss own:vector_loss", "scalar"),
        ("net-1.pt --model own:net --data own:nan", "NaN"),
        ("net-1.pt --model own:net --data own:none", "at least one sample"),
        ("net-1.pt --model own:net --data nowhere", "nowhere"),
        ("net-1.pt --model own:net --arg hidden=7 --data own:pair", "hidden|--arg|shape"),
        ("net-1.pt --model own:net --data own:images", "shape|size|matri|run"),
        ("gone.pt --model own:net --data own:pair", "gone.pt"),
        ("net-1.pt --model own:net --data own:pair --slice 3d", "1d, 2d"),
        ("net-1.pt --model own:net --data own:pair --tolerance 2", "--tolerance"),
        ("net-1.pt --model own:net --data own:pair --span=-1", "--span"),
        ("net-1.pt --model own:net --data own:pair --dtype float16", "float32"),
        ("net-1.pt --model own:net --data own:pair --directions eigen", "--slice"),
        ("net-1.pt --model own:net --data own:pair --slice 1d --directions pca", "2d"),
        ("net-1.pt --model own:net --data own:pair --device cuda:77", "device"),
        ("empty --model own:net --data own:pair", "checkpoints"),
        ("net-1.pt --data own:pair", "--model"),
    ],
)
def test_wrong_input_is_one_clear_line_and_leaves_nothing(words, expected, capsys):
    Path("empty").mkdir()
    assert re.search(expected, refused(f"probe {words}", capsys))


def test_thetas_of_another_length_are_refused(capsys):
    save_file({"thetas": torch.zeros(2, 7)}, "run.safetensors")
    assert "thetas of 26 parameters" in refused("probe run.safetensors --model own:net --data own:pair", capsys)
    save_file({"thetas": torch.zeros(2, 26), "steps": torch.zeros(3)}, "run.safetensors")
    assert "a step for each" in refused("probe run.safetensors --model own:net --data own:pair", capsys)


def test_a_place_that_cannot_be_written_is_told_before_the_work(capsys):
    Path("file").write_text("")
    assert "folder that can be written" in refused(f"probe {ONE} --out file/x", capsys)


def test_too_few_checkpoints_for_a_plane_are_told_before_the_work(capsys):
    words = f"probe net-1.pt net-2.pt {ONE[9:]} --eigen 0 --slice 2d --directions through"
    assert "Expected 3 checkpoints" in refused(words, capsys)
