"""view, embed and reduce refuse wrong input: exit code 2, one line on stderr, and nothing written."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.cli import mynets
from tests.cli.user import refused, run, saved, user_folder
from torch import nn

__all__ = ["user_folder"]

pytestmark = pytest.mark.usefixtures("user_folder")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="no /proc")


class RunsCode:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def a_file(kind: str) -> str:
    """Make a checkpoint with one fault."""
    saved("OddCNN", "whole.safetensors")
    if kind == "a folder":
        Path("folder").mkdir()
        return "folder"
    if kind == "missing":
        return "missing.pt"
    state = load_file("whole.safetensors")
    if kind == "NaN":
        state["one.bias"][1] = float("nan")
    if kind == "of another net":
        state = nn.Linear(2, 2).state_dict()
    if kind == "code":
        state["extra"] = RunsCode()
    torch.save(state, "faulty.pt")
    if kind == "cut short":
        content = Path("whole.safetensors").read_bytes()
        Path("faulty.pt").write_bytes(content[: len(content) // 2])
    return "faulty.pt"


@pytest.mark.parametrize("command", ["view", "embed --widths x2 --out out.pt", "reduce --out out.pt"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "Check the path."),
        ("a folder", "Got the folder folder."),
        ("of another net", "unexpected: weight, bias"),
        ("NaN", "NaN or infinity in one.bias"),
        ("code", "a pickle that runs code"),
        ("cut short", "damaged or cut short"),
    ],
)
def test_a_checkpoint_with_a_fault_is_refused_in_one_line(command, kind, words, capsys):
    file = a_file(kind)
    assert words in refused(f"{command} {file} --model mynets:OddCNN", capsys)
    assert not Path("ran").exists()


def test_a_wide_checkpoint_without_metadata_asks_for_the_factorys_arguments(capsys):
    torch.save(mynets.wide_cnn().state_dict(), "plain.pt")
    err = refused("reduce plain.pt --model mynets:OddCNN --out out.pt", capsys)
    assert "one.weight (expected (4, 2, 3, 5), got (8, 2, 3, 5))" in err
    assert err.endswith("Give them to the factory: --arg key=value.\n")


@pytest.mark.parametrize(
    ("widths", "words"),
    [
        ("nobody=8", "Expected one of the groups one, two, hidden. Got 'nobody'."),
        ("one=3", "Expected a width of at least 4 for 'one'. Got 3."),
        ("one=0", "Got 0."),
        ("one", "Got 'one'."),
        ("one=", "Got 'one='."),
        ("one=-8", "Got 'one=-8'."),
        ("one=x0", "Got 'one=x0'."),
        ("one=2.5", "Got 'one=2.5'."),
        ("one=²", "Got 'one=²'."),
        ("x0", "Got 'x0'."),
        (",", "Got nothing."),
        ("one=8,one=9", "Got 'one' twice."),
        ("one=x9999999", "Expected at most 1,000,000 units."),
        ("x99999999999999999999", "Expected at most 1,000,000 units."),
    ],
)
def test_widths_that_cannot_be_are_refused(widths, words, capsys):
    saved("OddCNN")
    assert words in refused(f"embed net.pt --model mynets:OddCNN --out out.pt --widths {widths}", capsys)


@pytest.mark.parametrize(
    ("group", "words"),
    [("tokens=x2", "a tied weight both makes and reads"), ("mix/1=x2", "contracted between two activations")],
)
def test_a_group_that_cannot_be_duplicated_is_refused_with_the_reason(group, words, capsys):
    saved("TinyGPT")
    assert words in refused(f"embed net.pt --model mynets:TinyGPT --out out.pt --widths {group}", capsys)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FixedSize", "Expected the resized module to run."),
        ("FixedScale", "Expected the wide module to compute the same outputs."),
        ("Wrapped", "Expected the wide module to compute the same outputs."),
    ],
)
def test_a_size_that_the_code_fixes_is_found(name, words, capsys):
    saved(name)
    assert words in refused(f"embed net.pt --model mynets:{name} --out out.pt --widths one=12", capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "Got neither."),
        ("--model mynets:OddCNN --net CNN", "Got both."),
        ("--model mynet:OddCNN", "No module named 'mynet'"),
        ("--model nowhere.py:OddCNN", "no file nowhere.py"),
        ("--model mynets:OddCNNN", "Did you mean 'OddCNN'?"),
        ("--model mynets", "Expected module:name or file.py:name. Got 'mynets'."),
        ("--model mynets:raises", "RuntimeError: no luck"),
        ("--model mynets:stops", "SystemExit: 3"),
        ("--model mynets:nothing", "to return an nn.Module. Got NoneType."),
        ("--model mynets:NUMBER", "Got one of type int."),
        ("--model mynets:needs", "Expected mynets:needs(width: int)"),
        ("--net CNNN", "Got 'CNNN'."),
        ("--model mynets:OddCNN --arg first", "Expected --arg key=value. Got 'first'."),
        ("--model mynets:OddCNN --arg first=[", "Expected a value after '='."),
        ("--model mynets:OddCNN --arg third=3", "unexpected keyword argument 'third'"),
        ("--model mynets:OddCNN --arg first=four", "Give its arguments with --arg"),
    ],
)
@pytest.mark.parametrize("command", ["view net.pt", "embed net.pt --widths x2 --out out.pt", "reduce net.pt"])
def test_a_factory_that_builds_no_module_is_refused(command, words, expected, capsys):
    saved("OddCNN")
    assert expected in refused(f"{command} {words}", capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--input 3x9x15", "(4, 3, 9, 15)"),
        ("--input 3x", "Expected --input of one sample"),
        ("--input 0x3", "Expected --input of one sample"),
        ("--input big", "Expected --input of one sample"),
        ("--input 2x9999999x9999999", "fits in memory"),
        ("--example mynets:BATCH", "(2, 3)"),
        ("--example mynets:BATCHES", "Did you mean 'BATCH'?"),
        ("--example nothing:BATCH", "No module named 'nothing'"),
        ("--example mynets:NUMBER", "Got one of type int."),
        ("--example mynets:EMPTY", "Got an empty tuple."),
        ("--example mynets:no_images", "FileNotFoundError: no images here"),
    ],
)
def test_an_example_batch_that_does_not_run_is_refused(words, expected, capsys):
    saved("OddCNN")
    assert expected in refused(f"embed net.pt --model mynets:OddCNN --widths x2 --out out.pt {words}", capsys)


def test_a_net_none_of_whose_groups_can_grow_is_refused_with_a_reason(capsys):
    saved("Normed")
    err = refused("embed net.pt --model mynets:Normed --widths x2 --shares random --out out.pt", capsys)
    assert "Got none of 1; the first, one: Expected every unit of 'one' equally often, with equal shares" in err
    torch.save(nn.Linear(2, 2).state_dict(), "flat.pt")
    words = "--model torch.nn:Linear --arg in_features=2 --arg out_features=2"
    assert "Got none among 0." in refused(f"embed flat.pt {words} --widths x2 --out out.pt", capsys)


def test_a_net_whose_inputs_nothing_tells_asks_for_them(capsys):
    assert "Give --input SHAPE" in refused("view --model mynets:Own", capsys)
    assert run("view --model mynets:Own --input 3", capsys)[2].split()[:2] == ["weight", "5"]


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("nowhere/out.pt", "Expected a folder nowhere."),
        ("net.pt/out.pt", "Expected a folder net.pt."),
        ("out.onnx", "Expected --out ending in .safetensors, .pt or .pth."),
        ("net.pt", "Expected --out to differ from the checkpoint."),
        (f"{'n' * 300}.pt", "File name too long"),
        pytest.param("/proc/out.pt", "Expected a place that can be written.", marks=LINUX),
        ("folder.pt", "Got the folder folder.pt."),
    ],
)
@pytest.mark.parametrize("command", ["embed --widths x2", "reduce"])
def test_a_place_that_cannot_be_written_is_refused(command, out, words, capsys):
    saved("OddCNN")
    Path("folder.pt").mkdir()
    assert words in refused(f"{command} net.pt --model mynets:OddCNN --force --out {out}", capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--shares half", "Expected --shares equal or random. Got 'half'."),
        ("--wide mynets:raises", "Give its arguments with --wide-arg"),
        ("--wide mynets:OddCNN --wide-arg first", "Expected --wide-arg key=value."),
        ("--wide mynets:OddCNN", "Expected the wide module to have 'one.weight' of shape (8, 2, 3, 5)."),
        ("--wide mynets:OddResNet", "Expected the wide module to have"),
        ("--wide mynets:Flat --wide-arg first=8 --wide-arg second=10 --wide-arg hidden=12", "relative change of inf"),
    ],
)
def test_shares_and_wide_modules_that_do_not_fit_are_refused(words, expected, capsys):
    saved("OddCNN")
    assert expected in refused(f"embed net.pt --model mynets:OddCNN --widths x2 --out out.pt {words}", capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--similarity 0", "Expected a similarity in (0, 1]. Got 0.0."),
        ("--similarity 1.5", "Expected a similarity in (0, 1]. Got 1.5."),
        ("--similarity nan", "Expected a similarity in (0, 1]. Got nan."),
        ("--amplitude 1", "Expected an amplitude in [0, 1). Got 1.0."),
        ("--amplitude -0.1", "Expected an amplitude in [0, 1). Got -0.1."),
        ("--groups one,nobody", "Got 'nobody'."),
        ("--groups ,", "Got ''."),
    ],
)
def test_what_reduce_cannot_do_is_refused(words, expected, capsys):
    saved("OddCNN")
    assert expected in refused(f"reduce net.pt --model mynets:OddCNN --out out.pt {words}", capsys)


def test_a_group_that_cannot_be_reduced_is_refused(capsys):
    saved("TinyGPT")
    assert "Got 'tokens': a tied" in refused("reduce net.pt --model mynets:TinyGPT --groups tokens", capsys)
