"""lift on a user's own nets: what it prints, what it writes, how that is loaded, and what it refuses."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli import mynets
from tests.cli.user import refused, run, saved, shaken, user_folder
from torch import nn

from thalweg.checkpoint import load_metadata, save_state
from thalweg.cli.app import main
from thalweg.cli.lift_options import kinds_of, size_of
from thalweg.errors import ConfigError
from thalweg.lifting.memory import worded_bytes

__all__ = ["user_folder"]

pytestmark = pytest.mark.usefixtures("user_folder")
RESNET = "--model mynets:OddResNet --input 3x8x8"
NETS = """
from torch import nn
from torch.nn import functional

class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(nn.Conv2d(1, 2, 3).weight.detach())

    def forward(self, x):
        return functional.conv2d(x, self.weight).mean((2, 3))

class Peeks(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) * self.conv.weight.norm()

class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.all = [self.conv]

    def forward(self, x):
        return self.all[0](x).mean((2, 3))

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.one = nn.Conv2d(2, 2, 3, padding=1)
        self.again, self.norm = self.one, nn.BatchNorm2d(2)

    def forward(self, x):
        return self.norm(self.again(self.one(self.stem(x)).relu())).mean((2, 3))

def partly_frozen():
    net = Twice()
    net.stem.requires_grad_(False)
    net.one.bias.requires_grad_(False)
    return net

def frozen():
    return Twice().requires_grad_(False)

def digits(width=3):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16 * width, 10),
    )
"""


def own(name: str, file: str) -> nn.Module:
    """Write lift_nets.py, and a checkpoint of one of its nets."""
    Path("lift_nets.py").write_text(NETS, encoding="utf-8")
    names: dict[str, object] = {"__name__": "lift_nets"}
    exec(NETS, names)
    factory = names[name]
    assert callable(factory)
    net = shaken(factory())
    for parameter in net.parameters():  # another net for each length of the name
        parameter.data.copy_(parameter.data.roll(len(file), 0))
    torch.save(net.state_dict(), file)
    return net


def snippet(lines: list[str]) -> str:
    start = lines.index("to load it in plain PyTorch:")
    return "\n".join(line.removeprefix("    ") for line in lines[start + 1 :])


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ("", "net-lifted.safetensors"),
        ("--padded --out net-fc.pt", "net-fc.pt"),
        ("--to local --out net-local.pt", "net-local.pt"),
        ("--to stem=fc,blocks.*=local", "net-lifted.safetensors"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_printed_loads_the_file_in_plain_pytorch(options, file, dtype, capsys):
    net = saved("OddResNet", dtype=dtype)
    lines = run(f"lift net.pt {RESNET} {options}", capsys)
    code = snippet(lines)
    assert [word for word in code.split() if "thalweg" in word] == ["thalweg.lifting"] * ("local" in options)
    assert sum("LocallyConnected(" in line or "nn.Sequential(" in line for line in code.splitlines()) == 6
    names: dict[str, nn.Module] = {}
    exec(code, names)
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    with torch.no_grad():
        change = (names["net"](images) - net(images)).abs().max() / net(images).abs().max()
    assert float(change) < (1e-5 if dtype == torch.float32 else 1e-12)
    assert f"wrote {file}: {Path(file).stat().st_size:,} bytes" in "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "options"),
    [("partly_frozen", ""), ("partly_frozen", "--to one=local,stem=fc"), ("frozen", "--padded")],
)
def test_what_is_frozen_is_frozen_in_what_is_printed(name, options, capsys):
    net = own(name, "own.pt")
    code = snippet(run(f"lift own.pt --model lift_nets.py:{name} --input 1x5x5 {options}", capsys))
    names: dict[str, nn.Module] = {}
    exec(code, names)
    loaded = names["net"]
    before = {n: p.requires_grad for n, p in net.named_parameters()}
    after = {n.replace("linear.", ""): p.requires_grad for n, p in loaded.named_parameters()}
    assert after == before
    assert loaded.get_submodule("one") is loaded.get_submodule("again")
    images = torch.randn(3, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded(images), net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_disk_that_does_not_hold_every_name_of_a_tensor_is_refused(suffix, capsys, monkeypatch):
    own("Twice", "own.pt")
    out = f"own-lifted{suffix}"
    line = f"lift own.pt --model lift_nets.py:Twice --input 1x5x5 --out {out}"
    one = 4 * (50 * 50 + 50)
    size = 4 * (50 * 25 + 50) + one * (2 if suffix == ".safetensors" else 1) + 4 * 4 * 2 + 8  # BatchNorm, its counter
    usage = type(shutil.disk_usage("."))
    monkeypatch.setattr("thalweg.cli.lift.shutil.disk_usage", lambda _: usage(10**9, 0, size - 1))
    assert f"Expected {size:,} bytes" in refused(line, capsys)
    monkeypatch.setattr("thalweg.cli.lift.shutil.disk_usage", lambda _: usage(10**9, 0, size))
    assert f", the file {worded_bytes(size)}" in "\n".join(run(line, capsys))
    assert Path(out).stat().st_size > size  # and its header


def test_the_table_stands_before_what_was_done(capsys):
    saved("OddCNN")
    lines = run("lift net.pt --model mynets:OddCNN --input 2x9x15 --to one=fc", capsys)
    assert lines[0].split()[:4] == ["LAYER", "TO", "PARAMETERS", "LIFTED"]
    before, after = 2 * 4 * 15 + 4, 4 * 135 * (2 * 135 + 1)
    assert lines[1].split()[:4] == ["one", "fc", str(before), f"{after:,}"]
    total = sum(p.numel() for p in mynets.OddCNN().parameters())
    assert lines[2].startswith(f"parameters: {total:,} -> {total + after - before:,}; lifted weights take 585.4 kB")
    assert lines[3].startswith("outputs change by ")


def test_json_and_the_report_say_the_same(capsys):
    saved("OddResNet")
    lines = run(f"lift net.pt {RESNET} --to local --report page.html --json", capsys)
    record = json.loads(lines[-1])
    assert len(lines) == 1
    assert record["output_change"] < 1e-5
    assert record["bytes"] == Path("net-lifted.safetensors").stat().st_size
    assert {layer["kind"] for layer in record["layers"]} == {"local"}
    state = load_file("net-lifted.safetensors")
    first = record["layers"][0]
    assert first["parameters"]["after"] == state["stem.weight"].numel() + state["stem.bias"].numel()
    assert first["local"] == pytest.approx(float((state["stem.weight"] != 0).double().mean()))
    page = Path("page.html").read_text(encoding="utf-8")
    assert f"{record['parameters']['after']:,}" in page
    code = re.search(r'<pre class="listing"[^>]*><code>([^<]*)</code></pre>', page)
    assert code is not None
    assert html.unescape(code[1]).splitlines() == record["load"]


def test_what_cannot_be_lifted_is_named_with_the_reason(capsys, user_folder):
    (user_folder / "other.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(1, 2, 3, 2), nn.ConvTranspose2d(2, 1, 3), nn.Flatten())\n"
    )
    run("lift net.pt --model other.py:build --input 1x7x7".replace("net.pt", _written("other.py")), capsys)
    lines = run("lift other.pt --model other.py:build --input 1x7x7 --force", capsys)
    assert "1: kept as it is, ConvTranspose2d is no nn.Conv1d, nn.Conv2d or nn.Conv3d" in lines


def _written(source: str) -> str:
    names: dict[str, object] = {}
    exec(Path(source).read_text(encoding="utf-8"), names)
    build = names["build"]
    assert callable(build)
    file = Path(source).with_suffix(".pt")
    torch.save(build().state_dict(), file)
    return str(file)


@pytest.mark.parametrize("to", ["fc", "local"])
def test_lifted_checkpoints_are_connected_merged_and_probed(to, capsys):
    for file in ("a.pt", "second.pt"):
        own("digits", file)
        run(f"lift {file} --model lift_nets.py:digits --input 1x8x8 --to {to}", capsys)
    data = "--model lift_nets.py:digits --data digits --samples 60"
    pair = "a-lifted.safetensors second-lifted.safetensors"
    words = f"connect {pair} {data} --methods linear --points 3 --out paths --json"
    assert main(words.split()) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["status"] for row in rows] == ["measured"], rows
    match = "weights" if to == "fc" else "none"  # the view sees no channels in a locally-connected layer
    assert main(f"merge {pair} {data} --match {match} --out middle.pt".split()) == 0
    assert load_metadata("middle.pt")["thalweg.lifted"] == load_metadata("a-lifted.safetensors")["thalweg.lifted"]
    assert main(f"probe middle.pt {data} --out probed".split()) == 0


def test_a_checkpoint_that_was_widened_and_then_lifted_fits_its_factory(capsys):
    net = own("digits", "a.pt")
    run("embed a.pt --model lift_nets.py:digits --input 1x8x8 --widths x2", capsys)
    code = snippet(run("lift a-wide.safetensors --model lift_nets.py:digits --input 1x8x8", capsys))
    words = "has other widths: build your module with these first (0=6), in place of the dots; then:\nnet = ...\n"
    assert f"# digits() {words}" in code
    names: dict[str, nn.Module] = {}
    exec(code.replace("net = ...", "net = digits(width=6)"), names)
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(names["net"](images), net(images), rtol=1e-4, atol=1e-4)
    known = "lift a-wide.safetensors --model lift_nets.py:digits --arg width=6 --input 1x8x8 --out known.pt"
    exec(snippet(run(known, capsys)), names)  # the factory makes the widths: no dots
    torch.testing.assert_close(names["net"](images), net(images), rtol=1e-4, atol=1e-4)
    run("lift a-wide-lifted.safetensors --model lift_nets.py:digits --back", capsys)
    back, wide = load_file("a-wide-lifted-back.safetensors"), load_file("a-wide.safetensors")
    assert all(torch.equal(back[name], wide[name]) for name in wide)
    assert load_metadata("a-wide-lifted-back.safetensors")["thalweg.widths"] == '{"0": 6}'


@pytest.mark.parametrize("options", ["", "--to local", "--padded"])
def test_back_restores_what_was_lifted(options, capsys):
    net = saved("OddResNet")
    run(f"lift net.pt {RESNET} {options}", capsys)
    lines = run("lift --back net-lifted.safetensors --model mynets:OddResNet", capsys)
    assert "distance to the nearest convolutional network: 0 of the norm" in lines
    back = load_file("net-lifted-back.safetensors")
    torch.testing.assert_close(back, dict(net.state_dict()), rtol=0, atol=0)


def test_back_says_how_far_a_relaxed_network_is(capsys):
    saved("OddResNet")
    run(f"lift net.pt {RESNET}", capsys)
    state = load_file("net-lifted.safetensors")
    generator = torch.Generator().manual_seed(3)
    weight = state["stem.linear.weight"]
    is_local = weight != 0
    weight += 0.01 * torch.randn(weight.shape, generator=generator)
    off = float(weight[~is_local].double().norm() / (weight.double().square().sum()
                + state["stem.linear.bias"].double().square().sum()).sqrt())  # fmt: skip
    save_state("relaxed.safetensors", state, load_metadata("net-lifted.safetensors"))
    record = json.loads(run("lift relaxed.safetensors --model mynets:OddResNet --back --json", capsys)[-1])
    assert record["off_local"]["by_layer"]["stem"] == pytest.approx(off, rel=1e-6)
    assert record["sharing"]["by_layer"]["stem"] > 0
    assert record["sharing"]["by_layer"]["blocks.0.one"] == 0
    assert record["output_change"] > 1e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"lift nothing.pt {RESNET}", "Expected a checkpoint file"),
        (f"lift nan.pt {RESNET}", "Expected finite weights"),
        ("lift net.pt --model mynets:OddCNN --input 2x9x15", "of OddCNN. Got"),
        (f"lift net.pt {RESNET} --to dense", "Expected --to fc, local or shared"),
        (f"lift net.pt {RESNET} --to stem=fc,stem=local", "'stem' twice"),
        (f"lift net.pt {RESNET} --to nowhere=fc", "'nowhere'. There are: stem, "),
        ("lift linear.pt --model mynets:two_layers --arg width=4", "Expected a convolution that can be lifted"),
        (f"lift net.pt {RESNET} --max-memory much", "Expected --max-memory such as 4GB"),
        (f"lift net.pt {RESNET} --max-memory 1kB", "Expected at most 1,000 bytes"),
        (
            "lift net.pt --model mynets:OddResNet --input 3x400x400 --max-memory 4GB",
            "'stem', 307,200,640,000 parameters",
        ),
        (f"lift net.pt {RESNET} --out net.pt", "Expected --out to differ"),
        (f"lift net.pt {RESNET} --out nan.pt", "Use --force"),
        (f"lift net.pt {RESNET} --out no/where.pt", "Expected a folder no"),
        (f"lift net.pt {RESNET} --report page.txt", "Expected --report ending in .html"),
        (f"lift net.pt {RESNET} --back", "Leave out --back"),
        (f"lift net.pt {RESNET} --back --to fc", "Expected --back without --to"),
        ("lift net.pt --model mynets:OddResNet --input 2x8x8", "Expected a module that runs on the example"),
    ],
)
def test_wrong_input_is_refused_in_one_line_and_nothing_is_written(words, message, capsys):
    net = saved("OddResNet")
    torch.save(shaken(mynets.two_layers(4)).state_dict(), "linear.pt")
    torch.save({name: t / 0 if t.is_floating_point() else t for name, t in net.state_dict().items()}, "nan.pt")
    error = refused(words, capsys)
    assert message in error


def test_an_empty_kind_is_refused(capsys):
    saved("OddResNet")
    assert "Expected --to fc, local or shared" in refused(["lift", "net.pt", *RESNET.split(), "--to", ""], capsys)


def test_a_place_that_cannot_be_written_is_one_line(capsys, monkeypatch):
    saved("OddResNet")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("thalweg.checkpoint.save_file", full)
    assert main(f"lift net.pt {RESNET}".split()) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not Path("net-lifted.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("Functional", "called as a function"), ("Peeks", "its weight is also used"), ("Listed", "Expected")],
)
def test_a_net_that_uses_weights_beside_its_layers_is_refused(name, message, capsys):
    own(name, "own.pt")
    assert main(f"lift own.pt --model lift_nets.py:{name} --input 1x5x5".split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Expected ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not Path("own-lifted.safetensors").exists()


def test_a_lifted_checkpoint_is_not_lifted_again_and_not_run_on_other_images(capsys):
    saved("OddResNet")
    run(f"lift net.pt {RESNET}", capsys)
    assert "is lifted already" in refused(f"lift net-lifted.safetensors {RESNET} --out x.pt", capsys)
    words = "view net-lifted.safetensors --model mynets:OddResNet --input"
    assert "of spatial size 8×8 at 'stem'" in refused(f"{words} 3x9x8", capsys)
    assert "give what builds the convolutional module" in refused(
        "view net-lifted.safetensors --model mynets:OddCNN --input 2x9x15", capsys
    )


@pytest.mark.parametrize("text", ["{", "{}", '{"layers": {"stem": {"kind": "fc"}}, "padded": false, "input": null}'])
def test_metadata_that_say_nothing_are_refused(text, capsys):
    saved("OddResNet", "net.safetensors")
    save_file(load_file("net.safetensors"), "odd.safetensors", metadata={"thalweg.lifted": text})
    assert "Lift the convolutional checkpoint again" in refused(f"view odd.safetensors {RESNET}", capsys)


def test_weights_of_another_width_than_stated_are_refused_before_anything_is_made(capsys):
    own("digits", "a.pt")
    run("lift a.pt --model lift_nets.py:digits --input 1x8x8", capsys)
    error = refused("view a-lifted.safetensors --model lift_nets.py:digits --arg width=5", capsys)
    assert "Expected '0.linear.weight' of shape (320, 64). Got (192, 64)" in error


@pytest.mark.parametrize("text", ["", ",", "fc,local", "one=", "=", "fc=fc=dense"])
def test_words_that_name_no_kind_are_refused(text):
    with pytest.raises(ConfigError, match="Expected --to fc, local or shared"):
        kinds_of(text)


def test_sizes_are_read_in_decimal_and_binary_units():
    assert [size_of(t) for t in ("0", "500MB", "1.5GiB", "2 kb", "3t")] == [0, 5 * 10**8, 3 * 2**29, 2000, 3 * 10**12]
    assert size_of(None) is None
    for wrong in ("GB", "-1", "1iB", "4XB", "1e9"):
        with pytest.raises(ConfigError, match="Expected --max-memory"):
            size_of(wrong)
