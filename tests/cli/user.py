"""A user at the command line: a folder with nets of their own, checkpoints as they write them, commands."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli import mynets
from torch import Tensor, nn

from thalweg.cli.app import main

MODULE = Path(mynets.__file__)


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """Work where `mynets.py` lies, and forget it after the test."""
    shutil.copy(MODULE, tmp_path / "mynets.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("mynets", None)


def shaken(net: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Draw weights and running statistics, the same in every run."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.1)
    return net.to(dtype).eval()


def saved(name: str, file: str = "net.pt", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Write a checkpoint as its user would."""
    net = shaken(getattr(mynets, name)(), dtype)
    if file.endswith(".pt"):
        torch.save(net.state_dict(), file)
    else:
        save_file(net.state_dict(), file)
    return net


def loaded(file: str) -> dict[str, Tensor]:
    """Read a checkpoint with plain PyTorch."""
    if file.endswith(".safetensors"):
        return load_file(file)
    return torch.load(file, weights_only=True)


def run(words: str, capsys) -> list[str]:
    code = main(words.split())
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out.splitlines()


def refused(words: str | list[str], capsys) -> str:
    """Run a command that must end with one line and leave the folder as it is."""
    before = sorted(Path.cwd().iterdir())
    code = main(words.split() if isinstance(words, str) else words)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: Expected ")
    assert ". Got " in err
    assert len(err.splitlines()) == 1
    assert sorted(Path.cwd().iterdir()) == before
    return err
