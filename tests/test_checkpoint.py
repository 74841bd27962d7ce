"""Checkpoints are read safely, written whole, and every failure says what to do."""

import errno
import logging
import os
import pickle
import resource
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from tests.zoo import CASES
from thalweg.checkpoint import load_into, load_metadata, load_state, save_state
from thalweg.errors import CheckpointError

suffixes = pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_state(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What comes back


@suffixes
@pytest.mark.parametrize("name", ["mlp", "resnet", "gpt", "lstm", "tied_autoencoder", "frozen_parameters"])
def test_every_module_comes_back_to_the_bit(tmp_path: Path, name: str, suffix: str) -> None:
    module = CASES[name].build()
    save_state(tmp_path / f"net{suffix}", module.state_dict())
    twin = CASES[name].build()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(twin.parameters()) * 0 + 1, twin.parameters())
    load_into(twin, load_state(tmp_path / f"net{suffix}"))
    assert_close(twin.state_dict(), module.state_dict(), rtol=0, atol=0)


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    names=st.lists(st.from_regex(r"[a-z_.0-9]{1,12}", fullmatch=True), min_size=1, max_size=4, unique=True),
    shape=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]),
    suffix=st.sampled_from([".safetensors", ".pt"]),
    seed=st.integers(0, 1000),
)
def test_any_state_round_trips(
    tmp_path: Path, names: list[str], shape: list[int], dtype: torch.dtype, suffix: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = {n: (3 * torch.randn(shape, generator=generator)).abs().to(dtype) for n in names}
    save_state(tmp_path / f"any{suffix}", state)
    found = load_state(tmp_path / f"any{suffix}")
    assert_close(found, state, rtol=0, atol=0)


@suffixes
def test_what_is_written_loads_in_plain_pytorch(tmp_path: Path, suffix: str) -> None:
    module, path = CASES["gpt"].build(), tmp_path / f"net{suffix}"
    save_state(path, module.state_dict())
    plain = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    CASES["gpt"].build().load_state_dict(plain, strict=True)


def test_a_pickled_checkpoint_keeps_tied_tensors_tied(tmp_path: Path) -> None:
    save_state(tmp_path / "net.pt", CASES["gpt"].build().state_dict())
    plain = torch.load(tmp_path / "net.pt", weights_only=True)
    assert plain["head.weight"].data_ptr() == plain["tokens.weight"].data_ptr()


@suffixes
def test_a_small_view_of_a_large_tensor_is_stored_small(tmp_path: Path, suffix: str) -> None:
    large = torch.arange(100_000.0)
    save_state(tmp_path / f"net{suffix}", {"a": large[:3], "b": large[1:4], "c": large[:6].view(2, 3).T})
    assert (tmp_path / f"net{suffix}").stat().st_size < 10_000
    assert load_state(tmp_path / f"net{suffix}")["c"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


@suffixes
def test_metadata_come_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    save_state(path, {"weight": torch.ones(2)}, {"net": "MLP", "widths": "[1, 2]"})
    assert load_metadata(path) == {"net": "MLP", "widths": "[1, 2]"}
    assert_close(load_state(path), {"weight": torch.ones(2)})
    save_state(path, {"weight": torch.ones(2)})
    assert load_metadata(path) == {}


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_a_wrapped_state_dict_is_found(tmp_path: Path, wrapper: str) -> None:
    torch.save({"epoch": 3, wrapper: net().state_dict(), "optimizer": {"lr": 0.1}}, tmp_path / "net.pt")
    assert list(load_state(tmp_path / "net.pt")) == list(net().state_dict())


@pytest.mark.parametrize(("prefix", "origin"), [("module.", "DataParallel"), ("_orig_mod.", "torch.compile")])
def test_the_prefix_of_a_wrapped_module_is_taken_off_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str, origin: str
) -> None:
    torch.save({prefix + k: v for k, v in net().state_dict().items()}, tmp_path / "net.pt")
    with caplog.at_level(logging.INFO, logger="thalweg.checkpoint"):
        assert list(load_state(tmp_path / "net.pt")) == list(net().state_dict())
    assert origin in caplog.text


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path) -> None:
    save_state(tmp_path / "net.pt", {"module.weight": torch.ones(1), "head": torch.ones(1)})
    assert list(load_state(tmp_path / "net.pt")) == ["module.weight", "head"]


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "b.safetensors")
    torch.save({"weight": torch.ones(2)}, tmp_path / "c.bin", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "b.safetensors", "c.bin"):
        assert_close(load_state(tmp_path / name), {"weight": torch.ones(2)})


# What is refused when reading


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    torch.save({"weight": torch.ones(1), "x": Touch(tmp_path / "owned")}, tmp_path / "bad.pt",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    message = refused(tmp_path / "bad.pt")
    assert "a pickle that runs code when it is read (posix.mkdir)" in message
    assert message.endswith("if you trust whoever made it, add --trust-pickle.")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_bare_pickle_that_runs_code_does_not_run(tmp_path: Path, protocol: int) -> None:
    with (tmp_path / "bad.pt").open("wb") as stream:
        pickle.dump({"weight": Touch(tmp_path / "owned")}, stream, protocol=protocol)
    refused(tmp_path / "bad.pt")
    with pytest.raises(CheckpointError):
        load_metadata(tmp_path / "bad.pt")
    assert not (tmp_path / "owned").exists()


def test_a_trusted_pickle_may_hold_a_whole_module(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "module.pt")
    assert "--trust-pickle" in refused(tmp_path / "module.pt")
    assert list(load_state(tmp_path / "module.pt", trust_pickle=True)) == list(net().state_dict())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path / "no.pt")
    assert (
        message == f"Expected a checkpoint file. Got {tmp_path / 'no.pt'}: No such file or directory. Check the path."
    )


def test_a_folder_names_the_checkpoints_in_it(tmp_path: Path) -> None:
    assert refused(tmp_path).endswith("Name a file.")
    save_state(tmp_path / "net.pt", net().state_dict())
    assert refused(tmp_path).endswith("Name a file in it: net.pt.")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.pt").touch()
    assert "which is empty. Copy or download it again." in refused(tmp_path / "net.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.03, 0.5, 0.98])
def test_a_torch_file_cut_short_is_damaged(tmp_path: Path, zipped: bool, share: float) -> None:
    path = tmp_path / "net.pt"
    torch.save(net().state_dict(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "which is damaged or cut short" in refused(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.98])
def test_a_safetensors_file_cut_short_is_damaged(tmp_path: Path, share: float) -> None:
    path = tmp_path / "net.safetensors"
    save_state(path, net().state_dict())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "which is damaged or cut short" in refused(path)
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_metadata(path)


@pytest.mark.parametrize(
    ("content", "guess"),
    [
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"\n <html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"hello", "bytes of another kind"),
    ],
)
def test_what_is_no_checkpoint_is_told_apart(tmp_path: Path, content: bytes, guess: str) -> None:
    (tmp_path / "net.pt").write_bytes(content)
    assert guess in refused(tmp_path / "net.pt")


def test_a_foreign_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "net.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    assert "damaged" in refused(tmp_path / "net.pt")


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({"epoch": 3, "lr": 0.1}, "a dict with epoch (int), lr (float)"),
        ({}, "an empty dict"),
        ({"state_dict": {}}, "an empty dict"),
        (torch.ones(3), "a Tensor"),
        ([torch.ones(3)], "a list"),
        ({3: torch.ones(1)}, "a dict"),
        ({"weight": torch.ones(1), "step": 4}, "a dict with step (int)"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: object, got: str) -> None:
    torch.save(content, tmp_path / "net.pt")
    assert f"which holds {got}. Save module.state_dict()" in refused(tmp_path / "net.pt")


@suffixes
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float, suffix: str) -> None:
    state = {f"w{i}": torch.tensor([1.0, value]) for i in range(7)} | {"fine": torch.ones(1)}
    save_state(tmp_path / f"net{suffix}", state)
    message = refused(tmp_path / f"net{suffix}")
    assert "with NaN or infinity in w0, w1, w2, w3, w4 and 2 more" in message


# What is refused when writing


@pytest.mark.parametrize("name", ["net", "net.onnx", "net.bin"])
def test_an_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"Expected a name ending in \.safetensors, \.pt or \.pth"):
        save_state(tmp_path / name, net().state_dict())


def test_a_state_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Got an empty one"):
        save_state(tmp_path / "net.pt", {})
    with pytest.raises(CheckpointError, match="Got step"):
        save_state(tmp_path / "net.pt", {"step": 3})


@suffixes
def test_a_file_where_a_folder_should_be_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(CheckpointError, match="Expected a place that can be written"):
        save_state(tmp_path / "taken" / f"net{suffix}", net().state_dict())
    assert (tmp_path / "taken").read_text() == "mine"


@suffixes
def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    path.mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        save_state(path, net().state_dict())
    assert list(tmp_path.iterdir()) == [path]


@suffixes
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    save_state(path, {"weight": torch.ones(2)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match=r"Expected a place that can be written\. Got .*net"):
            save_state(path, {"weight": torch.zeros(50_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [path]
    assert_close(load_state(path), {"weight": torch.ones(2)})


@suffixes
def test_a_disk_that_fails_to_flush_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("thalweg.checkpoint.os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_state(tmp_path / f"net{suffix}", net().state_dict())
    assert list(tmp_path.iterdir()) == []


def test_missing_folders_are_made(tmp_path: Path) -> None:
    save_state(tmp_path / "a" / "b" / "net.pt", net().state_dict())
    assert (tmp_path / "a" / "b" / "net.pt").is_file()


# What does not fit


def misfit(module: nn.Module, state: dict[str, Tensor]) -> str:
    before = OrderedDict((k, v.clone()) for k, v in module.state_dict().items())
    with pytest.raises(CheckpointError) as caught:
        load_into(module, state)
    assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
    return str(caught.value)


def test_names_and_shapes_that_do_not_fit_are_listed() -> None:
    state = dict(net().state_dict())
    state["0.weight"] = torch.ones(9, 3)
    state["extra"] = torch.ones(1)
    del state["2.bias"]
    message = misfit(net(), state)
    assert "Got 1 missing: 2.bias; 1 unexpected: extra; " in message
    assert "1 of another shape: 0.weight (expected (4, 3), got (9, 3))." in message


def test_long_lists_are_cut() -> None:
    assert "9 missing: 0.weight, 0.bias, 1.weight, 1.bias, 1.running_mean and 4 more" in misfit(net(), {})


def test_a_tied_parameter_may_stand_under_one_name() -> None:
    source, target = CASES["gpt"].build(), CASES["gpt"].build()
    with torch.no_grad():
        source.tokens.weight.fill_(0.5)
    for dropped in ("head.weight", "tokens.weight"):
        state = {k: v for k, v in source.state_dict().items() if k != dropped}
        load_into(target, state)
        assert_close(target.head.weight, source.head.weight, rtol=0, atol=0)


def test_two_values_for_a_tied_parameter_are_refused() -> None:
    state = dict(CASES["gpt"].build().state_dict())
    state["head.weight"] = state["head.weight"] + 1
    message = misfit(CASES["gpt"].build(), state)
    assert message.startswith("Expected one value for the tied tokens.weight and head.weight. Got two.")


def test_values_are_cast_to_the_module() -> None:
    module = nn.Linear(1, 1).double()
    load_into(module, {"weight": torch.full((1, 1), 0.5), "bias": torch.zeros(1)})
    assert module.weight.dtype == torch.float64
    assert module.weight.item() == 0.5


def test_plain_pytorch_passes_over_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    save_state(path, {"weight": torch.ones(2)}, {"net": "MLP"})
    for is_mapped in (False, True):
        assert_close(torch.load(path, weights_only=True, mmap=is_mapped), {"weight": torch.ones(2)})
