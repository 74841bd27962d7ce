"""`thalweg train`: what it writes is what plain PyTorch reads, and what is done once is not done again."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tests.cli.user import loaded, refused, user_folder
from torch import nn

from thalweg.cli import train_page
from thalweg.cli.app import main
from thalweg.training import minibatch

__all__ = ["user_folder"]
pytestmark = pytest.mark.usefixtures("user_folder")

OWN = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
_g = torch.Generator().manual_seed(3)
X = torch.randn(120, 3, generator=_g)
Y = X.argmax(1)
both = {"train": (X, Y), "test": (X[:50] + 0.1, Y[:50])}
pair = (X, Y)
numbers = (X, X @ torch.ones(3, 2))
bad_labels = {"train": (torch.cat([X] * 5), torch.cat([Y] * 4 + [Y + 5]))}
loader = DataLoader(TensorDataset(X, Y), batch_size=50)

class Fallible(nn.Module):
    def forward(self, x):
        if self.training:
            raise RuntimeError("not in train mode")
        return x

class Noted(nn.Linear):
    def get_extra_state(self):
        return "a note"

def net(hidden=8, p=0.2):
    return nn.Sequential(
        nn.Linear(3, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(p), nn.Linear(hidden, 3)
    )

def regression():
    return nn.Linear(3, 2)

def fails():
    return nn.Sequential(nn.Linear(3, 3), Fallible())

def noted():
    return nn.Sequential(Noted(3, 3))

calls = [0, 10**9]

def shift(inputs, generator):
    calls[0] += 1
    if calls[0] == calls[1]:
        raise KeyboardInterrupt
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)

def raises(inputs, generator):
    raise ValueError("no images")
"""
NET = "--model own.py:net --data own.py:both --epochs 4 --batch-size 16 --schedule constant"


@pytest.fixture
def page():
    """Ask for the report, which takes longer to write than these trainings; the other tests go without."""


@pytest.fixture(autouse=True)
def own_files(user_folder, monkeypatch, request):
    if "page" not in request.fixturenames:
        monkeypatch.setattr(train_page, "write_page", lambda path, record: None)
    Path("own.py").write_text(OWN)
    Path("made.py").write_text("from torch import nn\nnet = nn.Linear(3, 3)\n")
    yield
    for name in ("own", "made"):
        sys.modules.pop(name, None)


def own(name: str):
    space: dict = {}
    exec(OWN, space)
    return space[name]


def trained(words: str, capsys) -> list[str]:
    code = main(["train", *words.split()])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out.splitlines()


def test_plain_torch_finds_what_is_printed_in_the_files(page, capsys):
    lines = trained(f"{NET} --seeds 2 --out ends", capsys)
    assert (
        lines[0] == "own.py:net on 120 samples of own.py:both, train; loss: cross_entropy (default for class labels)"
    )
    assert lines[1].split() == "SEED TRAIN LOSS TRAIN ACCURACY TEST LOSS TEST ACCURACY SECONDS".split()
    rows = json.loads(Path("ends/train.json").read_text())["seeds"]
    for seed, row in enumerate(rows):
        module = own("net")()
        module.load_state_dict(loaded(f"ends/seed-{seed}.safetensors"), strict=True)
        module.eval()
        for split in ("train", "test"):
            inputs, labels = own("both")[split]
            with torch.no_grad():
                outputs = module(inputs)
            assert row[split]["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, labels)), rel=1e-5)
            assert row[split]["accuracy"] == pytest.approx(float((outputs.argmax(1) == labels).double().mean()))
        assert int(module[1].num_batches_tracked) == 4 * 8
        assert row["losses"][-1] < row["losses"][0]
        assert lines[2 + seed].split()[:2] == [str(seed), f"{row['train']['loss']:.6g}"]
    assert not torch.equal(*(loaded(f"ends/seed-{seed}.safetensors")["0.weight"] for seed in (0, 1)))
    assert train_page.is_page(Path("ends/report.html"))
    page = Path("ends/report.html").read_text()
    assert all(words in page for words in ("Loss over the epochs", "Accuracy over the epochs", "own.py:net: 2 seeds"))
    assert sorted(p.name for p in Path("ends").iterdir()) == [
        *("report.html", "seed-0.safetensors", "seed-1.safetensors", "train.json")
    ]


def test_a_seed_starts_where_torch_does_after_that_seed(capsys):
    world = torch.get_rng_state()
    options = "--epochs 1 --learning-rate 1e-30 --weight-decay 0 --seeds 1 --seed 7 --out ends"
    trained(f"--model own.py:net --data own.py:pair {options}", capsys)
    torch.testing.assert_close(torch.get_rng_state(), world, rtol=0, atol=0)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(7)
        start = own("net")()
    found = loaded("ends/seed-7.safetensors")
    for name, parameter in start.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=1e-20)


def test_what_is_there_is_not_trained_again(capsys, monkeypatch):
    first = json.loads(trained(f"{NET} --seeds 1 --out ends --json", capsys)[-1])
    before = Path("ends/seed-0.safetensors").stat().st_mtime_ns
    lines = trained(f"{NET} --seeds 2 --out ends", capsys)
    assert "not trained again: seed 0" in lines
    assert Path("ends/seed-0.safetensors").stat().st_mtime_ns == before
    monkeypatch.setattr(minibatch._Run, "complete", lambda *_: pytest.fail("trains again"))
    second = json.loads(trained(f"{NET} --seeds 2 --out ends --force --json", capsys)[-1])
    assert second["seeds"][0] == first["seeds"][0]


def test_another_training_is_overwritten_only_by_force(capsys):
    trained(f"{NET} --seeds 1 --out ends", capsys)
    for change in (
        "--epochs 3",
        "--augment own.py:shift",
        "--data own.py:pair --samples 50",
        "--arg hidden=9",
        "--arg p=0.0",
    ):
        code = main(["train", *f"{NET} --seeds 1 --out ends {change}".split()])
        assert (code, "Expected no file of another training in ends" in capsys.readouterr().err) == (2, True)
    trained(f"{NET} --seeds 1 --out ends --force --arg hidden=9", capsys)
    assert loaded("ends/seed-0.safetensors")["0.weight"].shape == (9, 3)
    Path("ends/seed-0.safetensors").write_text("mine")
    assert main(["train", *f"{NET} --seeds 1 --out ends".split()]) == 2
    assert Path("ends/seed-0.safetensors").read_text() == "mine"


def test_every_seed_of_the_training_in_the_folder_is_in_table_and_report(capsys):
    words = NET.replace("both", "pair")
    trained(f"{words} --seeds 1 --seed 1 --out ends", capsys)
    lines = trained(f"{NET} --seeds 2 --seed 7 --out ends", capsys)  # with test data, which decide nothing
    assert [line.split()[0] for line in lines[2:5]] == ["1", "7", "8"]
    assert lines[2].split()[3:5] == ["–", "–"]
    assert "of earlier commands: seed 1" in lines
    assert "wrote ends/seed-7.safetensors, ends/seed-8.safetensors" in lines
    assert [row["seed"] for row in json.loads(Path("ends/train.json").read_text())["seeds"]] == [1, 7, 8]


def test_reports_of_others_are_overwritten_only_by_force(capsys):
    words = f"{NET} --epochs 1 --seeds 1 --out ends"
    Path("ends").mkdir()
    page = train_page._CAPTION
    for record, report, whose in ((None, "mine", "command"), (None, page, "command"), ("{}", None, "training")):
        for name, text in (("train.json", record), ("report.html", report)):
            Path("ends", name).unlink(missing_ok=True)
            if text is not None:
                Path("ends", name).write_text(text)
        assert f" of another {whose} in ends" in refused(f"train {words}", capsys)
    trained(f"{words} --force", capsys)
    assert "Got ends/train.json" in refused(f"train {words} --seed 5 --arg hidden=9", capsys)
    Path("ends/report.html").write_text("of connect")
    assert "Got ends/report.html" in refused(f"train {words} --seed 5", capsys)
    Path("ends/report.html").write_text(page)
    trained(f"{words} --seed 5", capsys)
    trained(f"{words} --seed 6 --arg hidden=9 --force", capsys)
    assert [row["seed"] for row in json.loads(Path("ends/train.json").read_text())["seeds"]] == [6]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("+ 0.1 * torch.randn", "+ 0.2 * torch.randn"),
        ("nn.BatchNorm1d(hidden)", "nn.BatchNorm1d(hidden, momentum=0.2)"),
    ],
)
def test_a_changed_function_is_another_training_and_a_comment_is_not(before, after, capsys):
    words = f"{NET} --epochs 1 --augment own.py:shift --seeds 1 --out ends"
    trained(words, capsys)
    Path("own.py").write_text(
        OWN.replace("def shift", "# a comment\ndef shift").replace("return inputs", "return  inputs")
    )
    assert "not trained again: seed 0" in trained(words, capsys)
    Path("own.py").write_text(OWN.replace(before, after))
    code = main(["train", *words.split()])
    assert (code, "Expected no file of another training" in capsys.readouterr().err) == (2, True)


def test_an_interrupted_training_goes_on_and_writes_the_same(capsys, monkeypatch):
    monkeypatch.setattr(minibatch, "_KEPT_EVERY", 0.0)
    words = f"{NET} --augment own.py:shift --out"
    trained(f"{words} whole", capsys)
    source = Path("own.py").read_text()
    # 8 mini-batches an epoch; one more call looks whether the augmentation runs
    Path("own.py").write_text(source.replace("calls = [0, 10**9]", f"calls = [0, {1 + 32 + 20}]"))
    assert main(["train", *f"{words} torn".split()]) == 130
    assert capsys.readouterr().err.endswith("interrupted: state kept; run the same command again to resume\n")
    assert sorted(p.name for p in Path("torn").iterdir()) == ["parts", "seed-0.safetensors"]
    # of the second seed two epochs are kept
    Path("own.py").write_text(source.replace("calls = [0, 10**9]", f"calls = [0, {1 + 16 + 1}]"))
    assert "not trained again: seed 0" in trained(f"{words} torn", capsys)
    for seed in (0, 1):
        one, two = (loaded(f"{folder}/seed-{seed}.safetensors") for folder in ("whole", "torn"))
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert not Path("torn/parts").exists()


def test_a_command_that_keeps_nothing_does_not_say_so(capsys, monkeypatch):
    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("thalweg.cli.runs.store_at", interrupt)
    assert main(["runs", "--out", "train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_net_of_ours_is_built_from_words(capsys):
    arguments = "--net MLP --arg widths=[4,5,3] --arg activation=relu --arg output_bias=false"
    trained(f"{arguments} --data iris --epochs 1 --optimizer adam --seeds 1 --out ends", capsys)
    shapes = [tuple(t.shape) for t in loaded("ends/seed-0.safetensors").values()]
    assert shapes == [(5,), (5, 4), (3, 5)]
    record = json.loads(Path("ends/train.json").read_text())
    assert (record["learning_rate"], record["test_data"]) == (0.001, None)


def test_numbers_batches_of_a_loader_and_the_same_start_are_taken(capsys):
    lines = trained("--model own.py:regression --data own.py:numbers --epochs 2 --out a", capsys)
    assert lines[1].split() == "SEED TRAIN LOSS SECONDS".split()
    lines = trained("--model made:net --data own.py:loader --epochs 2 --out b", capsys)
    assert "every seed starts from the same weights: they differ in order, augmentation and dropout alone" in lines
    assert not torch.equal(*(loaded(f"b/seed-{seed}.safetensors")["weight"] for seed in (0, 1)))


def test_a_divergence_is_told_and_writes_no_checkpoint(capsys):
    assert main(["train", *f"{NET} --learning-rate 1e30 --out ends".split()]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: Expected a training that stays finite. Got NaN or infinity in epoch ")
    assert not list(Path("ends").glob("**/*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model own.py:net --data own.py:both --optimizer lion", "Expected --optimizer sgd, adam. Got 'lion'"),
        ("--model own.py:net --data own.py:both --schedule step", "Expected --schedule paper, constant, cosine"),
        ("--model own.py:net --data own.py:both --learning-rate 0", "Expected a positive --learning-rate. Got 0.0"),
        ("--model own.py:net --data own.py:both --momentum -1", "Expected --momentum that is not negative"),
        ("--model own.py:net --data own.py:both --weight-decay nan", "Expected --weight-decay that is not negative"),
        ("--model own.py:net --data own.py:both --augment flip", "Expected --augment crop_and_flip, crop or module:"),
        ("--model own.py:net --data own.py:both --augment own.py:X", "to take (inputs, generator). Got a Tensor"),
        ("--model own.py:net --data own.py:both --out own.py", "Expected a folder for --out. Got the file own.py"),
        ("--data own.py:both", "Expected one of --model PKG.MOD:FACTORY and --net NAME. Got neither"),
        ("--net conv2fc1 --data own.py:both", "Expected"),
        ("--model own.py:noted --data own.py:both", "Expected a state dict of tensors. Got '0._extra_state'"),
        ("--model own.py:net --data own.py:numbers --loss cross_entropy", "Expected"),
    ],
)
def test_bad_input_is_one_line_before_any_work(words, message, capsys):
    assert message in refused(f"train {words}", capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model own.py:net --data own.py:bad_labels", "Expected class labels from 0 to 2"),
        ("--model own.py:net --data own.py:both --augment own.py:raises", "Got ValueError: no images"),
        ("--model own.py:net --data own.py:both --augment crop", "Expected images of shape"),
        ("--model own.py:fails --data own.py:both", "Expected a network that trains in train mode. Got RuntimeError"),
    ],
)
def test_what_shows_only_later_is_one_line_too(words, message, capsys):
    assert main(["train", *words.split()]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path().glob("thalweg-train/*.safetensors"))
