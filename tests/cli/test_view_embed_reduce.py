"""view, embed and reduce on a user's own nets: what they print, and what they write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.cli import mynets
from tests.cli.user import loaded, refused, run, saved, shaken, user_folder
from torch import nn

from thalweg.structure import View

__all__ = ["user_folder"]

pytestmark = pytest.mark.usefixtures("user_folder")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
IMAGES = {"OddCNN": (3, 2, 9, 15), "OddResNet": (3, 3, 8, 8)}
WIDE = {"OddCNN": {"first": 8, "second": 10, "hidden": 12}, "OddResNet": {"stem": 8, "inner": 6, "last": 12}}


def difference(one: nn.Module, two: nn.Module, shape: tuple[int, ...]) -> float:
    dtype = next(two.parameters()).dtype
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    with torch.no_grad():
        theirs = two(x)
        return float((one(x) - theirs).abs().max() / theirs.abs().max())


def test_view_prints_groups_with_flags_and_what_makes_and_reads_them(capsys):
    saved("OddCNN")
    lines = run("view net.pt --model mynets:OddCNN --input 2x9x15", capsys)
    assert lines[0] == "OddCNN, example batch: drawn at random, 2x9x15"
    assert lines[1].split() == ["GROUP", "UNITS", "FLAGS", "MADE", "BY", "READ", "BY"]
    assert lines[2].split()[:5] == ["one", "4", "duplicable,", "homogeneous", "one.weight[0]"]
    assert [line.split()[:3] for line in lines[3:5]] == [["two", "5", "duplicable"], ["hidden", "6", "duplicable"]]
    assert lines[5].startswith("verified: outputs change by ")


def test_view_works_without_a_checkpoint_and_from_a_file_path(capsys):
    lines = run("view --model mynets.py:OddCNN --arg first=7 --example mynets:images", capsys)
    assert lines[0] == "OddCNN, example batch: mynets:images"
    assert lines[2].split()[:2] == ["one", "7"]


def test_view_names_the_operation_that_froze_an_axis(capsys):
    lines = run("view --model mynets:Unruly", capsys)
    assert [line.split()[0] for line in lines[2:4]] == ["one", "three"]
    assert "frozen by an operation without a rule: cumsum (1x)" in lines


def test_view_guesses_words_for_a_language_model_and_says_what_is_tied(capsys):
    lines = run("view --model mynets:TinyGPT", capsys)
    assert lines[0] == "TinyGPT, example batch: guessed, 8"
    assert lines[2].split()[:4] == ["tokens", "8", "coupled,", "tied"]
    assert "tokens: not duplicable, a tied weight both makes and reads its units" in lines
    assert run("view --model mynets:TinyGPT --input 5", capsys)[0].endswith("drawn at random, 5")


def test_view_as_json_is_one_line_that_reads_back_as_a_view(capsys):
    lines = run("view --net MLP --arg widths=[2,5,1] --json", capsys)
    view = View.from_json(lines[-1])
    assert len(lines) == 1
    assert [g.size for g in view.groups] == [5]
    assert view.error < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("source", "out"), [("net.pt", "wide.safetensors"), ("net.safetensors", "wide.pt")])
@pytest.mark.parametrize("name", ["OddCNN", "OddResNet"])
def test_plain_torch_loads_the_wide_checkpoint_into_the_wide_module(name, source, out, dtype, capsys):
    narrow = saved(name, source, dtype)
    run(f"embed {source} --model mynets:{name} --widths x2 --shares random --out {out}", capsys)
    wide = getattr(mynets, name)(**WIDE[name]).to(dtype).eval()
    state = loaded(out)
    wide.load_state_dict(state, strict=True)
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {dtype}
    assert difference(wide, narrow, IMAGES[name]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("out", ["back.safetensors", "back.pt"])
@pytest.mark.parametrize("name", ["OddCNN", "OddResNet"])
@pytest.mark.parametrize("through", ["metadata", "arguments"])
def test_reduce_gives_the_narrow_weights_back_in_their_order(name, out, through, capsys):
    narrow = saved(name)
    run(f"embed net.pt --model mynets:{name} --widths x2 --out wide.safetensors", capsys)
    words = "" if through == "metadata" else " ".join(f"--arg {k}={v}" for k, v in WIDE[name].items())
    run(f"reduce wide.safetensors --model mynets:{name} {words} --out {out}", capsys)
    expected = narrow.state_dict()
    found = loaded(out)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-7)


def test_random_shares_are_undone_and_drawn_from_the_seed(capsys):
    narrow = saved("OddCNN", dtype=torch.float64)
    words = "embed net.pt --model mynets:OddCNN --widths one=9,two=x3,hidden=7 --shares random --force"
    for seed, out in ((3, "a.pt"), (3, "b.pt"), (4, "c.pt")):
        run(f"{words} --seed {seed} --out {out}", capsys)
    one, again, other = (loaded(f"{n}.pt")["two.weight"] for n in "abc")
    assert one.shape == (15, 9, 1, 3)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    run("reduce a.pt --model mynets:OddCNN --out back.pt", capsys)
    back = mynets.OddCNN().double().eval()
    back.load_state_dict(loaded("back.pt"), strict=True)
    assert difference(back, narrow, IMAGES["OddCNN"]) <= 1e-12


@pytest.mark.parametrize("width", [40, 80, 97])
@pytest.mark.parametrize("shares", ["equal", "random"])
def test_wide_layers_are_copied_unit_by_unit_as_narrow_ones_are(width, shares, capsys):
    narrow = shaken(nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2)), torch.float64)
    torch.save(narrow.state_dict(), "net.pt")
    build = "--model mynets:two_layers --arg width=40"
    run(f"embed net.pt {build} --widths 0={width} --shares {shares} --out wide.pt", capsys)
    state = loaded("wide.pt")
    for unit in range(width):
        assert torch.equal(state["0.weight"][unit], narrow[0].weight[unit % 40])
    for unit in range(40):
        total = state["2.weight"][:, unit::40].sum(1)
        torch.testing.assert_close(total, narrow[2].weight[:, unit].detach(), rtol=1e-12, atol=1e-13)


def test_groups_that_are_not_named_stay_as_they_are(capsys):
    narrow = saved("OddCNN")
    lines = run("embed net.pt --model mynets:OddCNN --widths hidden=10", capsys)
    assert [line.split() for line in lines[:2]] == [["GROUP", "BEFORE", "AFTER"], ["hidden", "6", "10"]]
    assert lines[-1].startswith("wrote net-wide.safetensors")
    assert torch.equal(loaded("net-wide.safetensors")["one.weight"], narrow.one.weight)


@pytest.mark.parametrize(
    "words",
    [
        "--wide mynets:wide_cnn",
        "--wide mynets.py:OddCNN --wide-arg first=8 --wide-arg second=10 --wide-arg hidden=12",
        "--wide-arg first=8 --wide-arg second=10 --wide-arg hidden=12",
    ],
)
def test_a_wide_module_of_the_users_own_is_filled(words, capsys):
    narrow = saved("OddCNN")
    run(f"embed net.pt --model mynets:OddCNN --widths x2 --out wide.pt {words}", capsys)
    wide = mynets.wide_cnn().eval()
    wide.load_state_dict(loaded("wide.pt"), strict=True)
    assert difference(wide, narrow, IMAGES["OddCNN"]) <= 1e-6


def test_what_was_widened_twice_still_fits_the_narrow_factory(capsys):
    narrow = saved("OddCNN")
    run("embed net.pt --model mynets:OddCNN --widths one=8,two=10 --out a.pt", capsys)
    run("embed a.pt --model mynets:OddCNN --arg first=8 --arg second=10 --widths hidden=9 --out b.pt", capsys)
    run("reduce b.pt --model mynets:OddCNN --out c.pt", capsys)
    for key, tensor in loaded("c.pt").items():
        torch.testing.assert_close(tensor, narrow.state_dict()[key], rtol=1e-6, atol=1e-7)


def test_what_was_reduced_below_the_factory_is_read_with_the_same_factory(capsys):
    saved("OddCNN")
    run("embed net.pt --model mynets:OddCNN --widths x2 --out wide.pt", capsys)
    torch.save(loaded("wide.pt"), "plain.pt")
    run("reduce plain.pt --model mynets:wide_cnn --out narrow.pt", capsys)
    lines = run("view narrow.pt --model mynets:wide_cnn", capsys)
    assert [line.split()[1] for line in lines[2:5]] == ["4", "5", "6"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_checkpoint_is_kept(dtype, capsys):
    saved("OddCNN", dtype=dtype)
    run("embed net.pt --model mynets:OddCNN --widths x2 --out wide.pt", capsys)
    run("reduce wide.pt --model mynets:OddCNN --out back.pt", capsys)
    for file in ("wide.pt", "back.pt"):
        state = loaded(file)
        assert {t.dtype for t in state.values() if t.is_floating_point()} == {dtype}
        assert state["norm_one.num_batches_tracked"].dtype == torch.int64


def test_a_checkpoint_with_a_tied_weight_is_widened_elsewhere(capsys):
    saved("TinyGPT", "net.pt")
    run("embed net.pt --model mynets:TinyGPT --widths up=x2 --out wide.safetensors", capsys)
    mynets.TinyGPT(hidden=12).load_state_dict(load_file("wide.safetensors"), strict=True)


def test_one_factor_for_all_leaves_out_what_the_code_fixes_and_says_why(capsys):
    saved("FixedSize")
    lines = run("embed net.pt --model mynets:FixedSize --widths x2", capsys)
    assert lines[1].split() == ["two", "4", "8"]
    assert lines[2].startswith("one: kept at its width. Expected the resized module to run. Got RuntimeError")


def test_units_under_an_average_are_split_evenly(capsys):
    saved("Normed")
    assert "duplicable evenly, coupled" in run("view net.pt --model mynets:Normed", capsys)[2]
    run("embed net.pt --model mynets:Normed --widths x3 --out wide.pt", capsys)
    mynets.Normed(12).load_state_dict(loaded("wide.pt"), strict=True)


def test_lazy_layers_learn_their_sizes_from_the_example_batch(capsys):
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    torch.save(shaken(net).state_dict(), "net.pt")
    run("embed net.pt --model mynets:lazy --input 3 --widths x2 --out wide.pt", capsys)
    assert loaded("wide.pt")["2.weight"].shape == (2, 10)


def test_the_last_line_of_json_says_what_was_written(capsys):
    saved("OddCNN")
    made = json.loads(run("embed net.pt --model mynets:OddCNN --widths x2 --json", capsys)[-1])
    assert made["widths"]["two"] == {"narrow": 5, "wide": 10}
    assert made["kept"] == {}
    assert made["output_change"] <= 1e-6
    back = json.loads(run("reduce net-wide.safetensors --model mynets:OddCNN --json", capsys)[-1])
    assert back["widths"]["two"] == {"before": 10, "after": 5}
    assert back["parameters"] == {"before": made["parameters"]["after"], "after": made["parameters"]["before"]}
    assert Path(back["file"]).is_file()


def test_a_trusted_pickle_is_read_where_asked(capsys):
    torch.save(shaken(nn.Linear(2, 2)), "whole.pt")
    words = "view whole.pt --model torch.nn:Linear --arg in_features=2 --arg out_features=2"
    assert "--trust-pickle" in refused(words, capsys)
    assert run(f"{words} --trust-pickle", capsys)[1] == "no groups: nothing may be permuted"


def test_an_existing_file_is_overwritten_with_force_only(capsys):
    saved("OddCNN")
    Path("out.pt").write_text("old")
    words = "embed net.pt --model mynets:OddCNN --widths x2 --out out.pt"
    assert "--force" in refused(words, capsys)
    assert Path("out.pt").read_text() == "old"
    run(f"{words} --force", capsys)
    assert "one.weight" in loaded("out.pt")


def test_from_the_shell_nothing_but_the_message_is_written():
    saved("OddCNN")
    program = [sys.executable, "-c", "import sys; from thalweg.cli.app import main; sys.exit(main())"]
    words = "embed net.pt --model mynets:OddCNN --widths x2 --json".split()
    done = subprocess.run([*program, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout.splitlines()[-1])["file"] == "net-wide.safetensors"
    done = subprocess.run([*program, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: Expected a new file.")
    assert len(done.stderr.splitlines()) == 1


HELP = """
import sys
from thalweg.cli.app import main
code = main([sys.argv[1], "--help"])
print(code, "torch" in sys.modules)
"""
SHARED = ["--model", "--net", "--arg", "--input", "--example", "--trust-pickle", "--json"]
OPTIONS = {
    "view": SHARED,
    "embed": [*SHARED, "--widths", "--shares", "--seed", "--wide", "--wide-arg", "--out", "--force"],
    "reduce": [*SHARED, "--similarity", "--amplitude", "--groups", "--out", "--force"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option_without_loading_torch(command):
    done = subprocess.run([sys.executable, "-c", HELP, command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
    assert [option for option in OPTIONS[command] if option not in done.stdout] == []
