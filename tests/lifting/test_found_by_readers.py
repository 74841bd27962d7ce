"""What strangers ran into: convolutions reached by other ways, threads, tracers, frozen layers, hooks."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from thalweg.errors import ConfigError, ShapeError, StructureError
from thalweg.lifting import LocallyConnected, deviation, lift, lift_plan
from thalweg.lifting.local import _geometry


class FromAList(nn.Module):
    """Runs its convolutions from a plain list, which no replacement by name reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)
        self.stages = [self.one, self.two]

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))


def test_a_convolution_that_runs_from_a_list_is_found_out() -> None:
    with pytest.raises(StructureError, match=r"reached by another way than its name"):
        lift(FromAList(), torch.randn(2, 1, 8, 8))


def test_threads_that_meet_in_the_first_pass_get_the_same() -> None:
    x = torch.randn(128, 32, 16, 16)
    layer = LocallyConnected(32, 64, 5, (16, 16), padding=2)
    with torch.no_grad():
        expected = LocallyConnected(32, 64, 5, (16, 16), padding=2)
        expected.load_state_dict(layer.state_dict())
        wanted = expected(x)
    barrier, found = threading.Barrier(3), []

    def work() -> None:
        barrier.wait()
        with torch.no_grad():
            found.append(layer(x))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for outputs in found:
        assert_close(outputs, wanted, rtol=1e-5, atol=1e-5)


def test_a_pass_with_fake_tensors_leaves_nothing_behind() -> None:
    layer, x = LocallyConnected(2, 3, 3, (5, 5), padding=1), torch.randn(2, 2, 5, 5)
    wanted = LocallyConnected(2, 3, 3, (5, 5), padding=1)
    wanted.load_state_dict(layer.state_dict())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (2, 3, 5, 5)
    assert_close(layer(x), wanted(x))


def test_the_layer_is_exported_and_runs_without_values() -> None:
    layer, x = LocallyConnected(2, 3, 3, (5, 5), padding=1), torch.randn(2, 2, 5, 5)
    exported = torch.export.export(layer, (x,), strict=False).module()
    assert_close(exported(x), layer(x))
    assert layer.to("meta")(x.to("meta")).shape == (2, 3, 5, 5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, on first use
def test_forward_derivatives_are_those_of_the_convolution() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)).double()
    x, v = torch.randn(2, 2, 5, 5).double(), torch.randn(2, 2, 5, 5).double()
    lifted = lift(net, x, to="local").module
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        own = torch.autograd.forward_ad.unpack_dual(net(dual)).tangent
        theirs = torch.autograd.forward_ad.unpack_dual(lifted(dual)).tangent
    assert own is not None
    assert theirs is not None
    assert_close(theirs, own)


def test_a_backward_pass_within_autocast_works() -> None:
    layer, x = LocallyConnected(2, 3, 3, (5, 5)), torch.randn(2, 2, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    wanted, x.grad = x.grad, None
    outputs = layer(x).sum()
    with torch.autocast("cpu", torch.bfloat16):
        outputs.backward()
    assert_close(x.grad, wanted)


def test_frozen_layers_count_in_the_deviation_of_their_layer() -> None:
    net = small()
    net[0].requires_grad_(False)
    lifted = lift(net, torch.randn(2, 1, 4, 4))
    state = lifted.module.state_dict()
    state["0.linear.weight"] = torch.randn_like(state["0.linear.weight"])
    found = deviation(lifted.lifting, state)
    assert found.by_layer["0"] > 0.1
    assert found.distance > 0.1


def test_a_network_that_is_all_frozen_is_lifted() -> None:
    net = small().requires_grad_(False)
    lifted = lift(net, torch.randn(2, 1, 4, 4))
    assert lifted.error < 1e-5
    assert not any(p.requires_grad for p in lifted.module.parameters())


@pytest.mark.parametrize("kind", ["module", "backward", "weight"])
def test_hooks_that_would_be_lost_keep_a_layer(kind: str) -> None:
    net = small()
    if kind == "module":
        net[0].register_forward_hook(lambda *_: None)
    elif kind == "backward":
        net[0].register_full_backward_hook(lambda *_: None)
    else:
        net[0].weight.register_hook(lambda slope: slope * 0)
    with pytest.raises(StructureError, match=r"0: it has hooks, which would be lost"):
        lift(net, torch.randn(2, 1, 4, 4))


class ByCode(nn.Module):
    """Uses the weight of a convolution without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.d(nn.functional.conv2d(x, self.c.weight, self.c.bias))
        return out


def test_a_weight_that_code_uses_is_told_from_one_that_nothing_reaches() -> None:
    plan = lift_plan(ByCode(), torch.randn(1, 1, 8, 8))
    assert plan.kept == {"c": "its weight is used by code, not by calling the layer"}


def test_patterns_that_come_too_late_are_told() -> None:
    with pytest.raises(StructureError, match=r"Expected '0' before the patterns that take the same layers"):
        lift_plan(small(), torch.randn(1, 1, 4, 4), to={"*": "local", "0": "shared"})
    with pytest.raises(ConfigError, match=r"Got none. Name a layer"):
        lift_plan(small(), torch.randn(1, 1, 4, 4), to={})
    with pytest.raises(StructureError, match=r"Got ReLU without parameters"):
        lift(nn.ReLU(), torch.randn(1, 1))


@pytest.mark.parametrize(("input_size", "padding"), [(5, 0), ((5, 5), "same")])
def test_sizes_that_are_no_numbers_are_refused(input_size: object, padding: object) -> None:
    with pytest.raises(ShapeError, match=r"Expected input_size as one number for each spatial dim"):
        _geometry(
            (2, 3, 1), 3, input_size, 1, padding, 1
        )  # what the layer calls: types are checked in tests before it


def test_inputs_of_another_type_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"Expected inputs of type torch.float32, that of the weights"):
        LocallyConnected(1, 1, 3, (5, 5))(torch.zeros(1, 1, 5, 5).double())


def test_carrying_a_point_takes_no_more_than_the_point(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small()
    lifted = lift(net, torch.randn(2, 1, 4, 4))
    monkeypatch.setattr(torch, "cat", lambda *_, **__: pytest.fail("a copy of all pieces"))
    theta = lifted.lifting.apply(torch.arange(float(lifted.lifting.space.num_params)))
    monkeypatch.undo()
    state = lifted.lifting.lifted_space.parameters(theta)
    assert_close(lifted.lifting.project(theta), torch.arange(float(lifted.lifting.space.num_params)))
    assert state["0.linear.weight"].shape == (48, 16)
