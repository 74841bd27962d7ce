"""Figure 6: biases are counted as a plain loop counts them; of a file, its content decides, and faults are told."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from thalweg.cli.app import main
from thalweg.errors import CheckpointError, ConfigError, DataError
from thalweg.lab.claims import judge
from thalweg.lab.figures import histograms
from thalweg.lab.recipe import Context
from thalweg.lab.runs.identity import run_id
from thalweg.recipes.luck_matters import bias_counts, figure_6
from thalweg.recipes.luck_matters.bias_counts import Biases
from thalweg.recipes.luck_matters.figure_6 import BiasPreset

TINY = BiasPreset(
    data="digits",
    num_train=60,
    num_test=20,
    stages=((2, 2), (3,)),
    num_seeds=2,
    epochs=2,
    batch_size=30,
    augment=False,
)
COMMAND = ["run", "luck_matters/figure_6", "quick"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("THALWEG_RUNS", raising=False)
    return tmp_path


def network(*biases: tuple[float, ...]) -> nn.Sequential:
    """Convolutions with BatchNorm, laid out and named as torchvision's VGG."""
    layers: list[nn.Module] = []
    for values in biases:
        norm = nn.BatchNorm2d(len(values))
        norm.bias.data = torch.tensor(values)
        layers += [nn.Conv2d(1, len(values), 3), norm, nn.ReLU()]
    return nn.Sequential(*layers)


def saved(name: str, *biases: tuple[float, ...]) -> str:
    torch.save(network(*biases).state_dict(), name)
    return name


def verdicts(measured: dict[str, object]) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in judge(figure_6.RECIPE.claims, measured)}


def test_networks_are_trained_and_all_their_biases_counted() -> None:
    outcome = figure_6.run(TINY, Context())
    assert outcome.measured == {}  # digits are no test
    for row in outcome.tables["layers"]:
        values = outcome.arrays[f"{row['network']}/{row['place']}/{row['layer']}"]
        assert row["negative"] == sum(v < 0 for v in values.tolist()) / len(values)
    assert sum(row["count"] for row in outcome.tables["histograms"]) == 2 * 7
    start = [row for row in outcome.tables["trained"] if row["epoch"] == 0]
    assert [(row["negative"], row["train_accuracy"]) for row in start] == [(0.0, None)] * 2
    assert len(figure_6.figures(outcome.tables)) == 3
    assert "not the paper's weights" in figure_6.figures(outcome.tables)[0].title


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    def stop(fraction: float, _: str) -> None:
        if fraction > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        figure_6.run(TINY, Context(folder=tmp_path, progress=stop))
    assert (tmp_path / "part-0.json").is_file()
    again, whole = figure_6.run(TINY, Context(folder=tmp_path)), figure_6.run(TINY, Context())
    assert again.tables["layers"] == whole.tables["layers"]


@pytest.mark.parametrize(
    ("biases", "majority", "top", "fails"),
    [
        (((-1.0, 1.0), (-1.0, -2.0), (-3.0, -1.0)), 5 / 6, {"lower": 0.5, "upper": 1.0}, set()),
        (((-1.0, 1.0), (-1.0, 0.0)), 0.5, {"lower": 0.5, "upper": 0.5}, {"majority"}),
        (((-1.0, -1.0, -1.0), (2.0, -2.0)), 0.8, {"lower": 1.0, "upper": 0.5}, {"top"}),
        (((-1.0, 1.0),), 0.5, None, {"majority"}),
    ],
)
def test_claims_are_those_of_the_file_and_can_fail(biases, majority, top, fails) -> None:
    outcome = figure_6.run(BiasPreset(checkpoint=saved("net.pt", *biases)), Context())
    assert outcome.measured["majority"] == pytest.approx(majority)
    assert outcome.measured["top"] == top
    assert {c for c, v in verdicts(dict(outcome.measured)).items() if v == "fails"} == fails
    assert len(figure_6.figures(outcome.tables)) == 2


def test_bins_split_at_zero_and_exact_zeros_stand_apart() -> None:
    rows = bias_counts.histogram_rows({"a": (Biases("n", (-2.0, -1e-9, 0.0, 1e-9, 1.0)),)})
    assert sum(row["count"] for row in rows if row["low"] < row["high"] <= 0) == 2
    assert sum(row["count"] for row in rows if row["high"] > row["low"] >= 0) == 2
    assert [row["count"] for row in rows if row["low"] == row["high"]] == [1]
    none = bias_counts.histogram_rows({"a": (Biases("n", (0.0, 0.0)),)})
    assert sum(row["count"] for row in none) == 2


def test_a_bin_around_zero_has_no_sign() -> None:
    with pytest.raises(ConfigError, match="Make 0 an edge"):
        histograms([{"panel": "a", "low": -1.0, "high": 1.0, "count": 2}], id="h", title="t", caption="c")


def test_the_content_of_the_file_names_the_run() -> None:
    def name(file: str) -> str:
        return run_id("r", 1, BiasPreset(checkpoint=file).parameters())

    first = name(saved("net.pt", (-1.0, 2.0)))
    assert name("net.pt") == first
    assert name(saved("net.pt", (-1.0, -2.0, 1.0))) != first
    preset = BiasPreset(checkpoint="net.pt")
    assert BiasPreset.model_validate(json.loads(json.dumps(preset.parameters()))) == preset
    shutil.copy("net.pt", "copy.pt")
    assert BiasPreset(checkpoint="copy.pt").checkpoint_sha256 == preset.checkpoint_sha256


def test_the_command_counts_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    file = saved("a: mÿ # net \U0001f600.pt", (-1.0, 1.0), (-1.0, -2.0))
    assert main([*COMMAND, "--checkpoint", file, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert [claim["verdict"] for claim in first["claims"]] == ["holds", "holds"]
    assert main([*COMMAND, f'checkpoint="{file}"', "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == first["run"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--checkpoint", "gone.pt"],
            "checkpoint: Expected a checkpoint file. Got gone.pt: No such file or directory.",
        ),
        (["--checkpoint", "code.pt"], "checkpoint: Expected a checkpoint of tensors only. Got code.pt, a pickle"),
        (["--checkpoint", "plain.pt"], "checkpoint: Expected a BatchNorm with biases"),
        (
            ["--checkpoint", "net.pt", "checkpoint_sha256=abc"],
            "checkpoint: Expected a file with the sha256 abc, not ",
        ),
    ],
)
def test_a_file_that_cannot_be_counted_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved("net.pt", (1.0, -1.0))
    torch.save(network((1.0, 2.0)), "code.pt")
    torch.save(nn.Linear(1, 1).state_dict(), "plain.pt")
    assert main([*COMMAND, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert "trust" not in line


def test_faults_of_a_file_keep_their_kind() -> None:
    torch.save(nn.Linear(1, 1).state_dict(), "plain.pt")
    with pytest.raises(DataError, match="Expected a BatchNorm"):
        bias_counts.of_file("plain.pt")
    with pytest.raises(CheckpointError, match="No such file"):
        bias_counts.of_file("gone.pt")


def test_a_recipe_without_a_checkpoint_refuses_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "embedding_principle/figure_1", "quick", "--checkpoint", "net.pt"]) == 2
    assert "Expected a recipe that takes a checkpoint" in capsys.readouterr().err


def test_the_presets_have_the_layouts_of_the_paper() -> None:
    assert [sum(map(len, p.stages)) for p in (figure_6.PAPER, figure_6.PAPER_VGG11)] == [13, 8]
    assert figure_6.CPU.num_seeds >= 3
