"""What a checkpoint leaves out, and batches of keyword arguments: embed and reduce on files of a user's own."""

from pathlib import Path

import pytest
import torch
from tests.cli.user import loaded, refused, run, shaken, user_folder
from torch import Tensor, nn

__all__ = ["user_folder"]

pytestmark = pytest.mark.usefixtures("user_folder")

NETS = '''
import torch
from torch import nn

class Scaled(nn.Module):
    """A scale for each hidden unit that no checkpoint holds."""

    def __init__(self, scale):
        super().__init__()
        self.one, self.two = nn.Linear(3, len(scale)), nn.Linear(len(scale), 2)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)) * self.scale)

def narrow():
    return Scaled([1.0, 2.0, 3.0])

def repeated():
    return Scaled([1.0, 2.0, 3.0, 1.0, 2.0, 3.0])

def other():
    return Scaled([1.0, 1.4, 1.8, 2.2, 2.6, 3.0])

class Free(nn.Module):
    """Normalised by a layer without a tensor."""

    def __init__(self, width=4):
        super().__init__()
        self.one, self.norm, self.out = (
            nn.Linear(3, width), nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 2)
        )

    def forward(self, x):
        return self.out(self.norm(self.one(x)).tanh())

class Named(nn.Module):
    """Takes its inputs by name."""

    def __init__(self, width=4):
        super().__init__()
        self.one, self.out = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, *, left, right):
        return self.out(torch.tanh(self.one(left)) * 2) + right

def batch():
    return {"left": torch.randn(5, 3), "right": torch.randn(5, 2)}

def no_batch():
    return {}
'''


@pytest.fixture(autouse=True)
def nets(user_folder):
    (user_folder / "nets.py").write_text(NETS)


def built(name: str, **keywords: object) -> nn.Module:
    scope: dict[str, object] = {}
    exec(NETS, scope)  # the file above, as its user would import it
    return scope[name](**keywords).eval()


def saved_net(name: str) -> nn.Module:
    net = built(name)
    state = shaken(built(name)).state_dict()
    net.load_state_dict(state)
    torch.save(state, "net.pt")
    return net


def change(wide: nn.Module, narrow: nn.Module, **inputs: Tensor) -> float:
    with torch.no_grad():
        theirs = narrow(**inputs)
        return float((wide(**inputs) - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(
    ("words", "got"),
    [
        ("", "no module of these widths to tell"),
        ("--wide nets.py:other", "another one in your own module"),
    ],
)
def test_a_buffer_that_is_in_no_checkpoint_and_not_what_the_factory_makes_is_refused(words, got, capsys):
    saved_net("narrow")
    told = refused(f"embed net.pt --model nets.py:narrow --widths one=6 --out wide.pt {words}", capsys)
    assert "'scale'" in told
    assert got in told
    assert "persistent=True" in told


def test_a_buffer_that_the_factory_makes_as_embedding_does_is_accepted(capsys):
    narrow = saved_net("narrow")
    run("embed net.pt --model nets.py:narrow --widths one=6 --out wide.pt --wide nets.py:repeated", capsys)
    wide = built("repeated")
    wide.load_state_dict(loaded("wide.pt"), strict=True)
    assert change(wide, narrow, x=torch.randn(5, 3)) <= 1e-6


def test_reduce_compares_such_a_buffer_with_the_factory_too(capsys):
    narrow = saved_net("narrow")
    run("embed net.pt --model nets.py:narrow --widths one=6 --out wide.pt --wide nets.py:repeated", capsys)
    run("reduce wide.pt --model nets.py:narrow --out back.pt", capsys)
    back = built("narrow")
    back.load_state_dict(loaded("back.pt"), strict=True)
    assert change(back, narrow, x=torch.randn(5, 3)) <= 1e-6
    Path("back.pt").unlink()
    assert "'scale'" in refused("reduce wide.pt --model nets.py:repeated --out back.pt", capsys)


def test_a_checkpoint_widened_through_a_norm_without_weights_is_read_with_the_narrow_factory(capsys):
    narrow = saved_net("Free")
    run("embed net.pt --model nets.py:Free --widths x2 --out wide.pt", capsys)
    wide = built("Free", width=8)
    wide.load_state_dict(loaded("wide.pt"), strict=True)
    assert change(wide, narrow, x=torch.randn(5, 3)) <= 1e-4
    run("reduce wide.pt --model nets.py:Free --out back.pt", capsys)
    for key, tensor in loaded("back.pt").items():
        torch.testing.assert_close(tensor, narrow.state_dict()[key], rtol=1e-6, atol=1e-7)


def test_an_example_of_keyword_arguments_is_passed_by_name(capsys):
    narrow = saved_net("Named")
    words = "--model nets.py:Named --example nets.py:batch"
    assert run(f"view net.pt {words}", capsys)[2].split()[:2] == ["one", "4"]
    run(f"embed net.pt {words} --widths one=7 --out wide.pt", capsys)
    wide = built("Named", width=7)
    wide.load_state_dict(loaded("wide.pt"), strict=True)
    assert change(wide, narrow, left=torch.randn(5, 3), right=torch.randn(5, 2)) <= 1e-6
    run(f"reduce wide.pt {words} --out back.pt", capsys)
    assert loaded("back.pt")["one.weight"].shape == (4, 3)


def test_an_example_without_a_tensor_is_refused(capsys):
    told = refused("view --model nets.py:Named --example nets.py:no_batch", capsys)
    assert "a dict of keyword arguments. Got one of type dict" in told
