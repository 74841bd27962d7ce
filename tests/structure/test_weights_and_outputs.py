"""Functions of weights before they meet data, and outputs in odd containers: where a view was once wrong."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thalweg.embeddings import embed
from thalweg.errors import StructureError
from thalweg.objective import Objective
from thalweg.structure import View, trace, verified


class Outgoing(nn.Module):
    """A hidden layer whose outgoing weights are a function of parameters and a mask."""

    def __init__(self, function: Callable[["Outgoing"], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Linear(3, 6).double()
        self.w = nn.Parameter(torch.randn(2, 6, generator=generator, dtype=torch.float64))
        self.s = nn.Parameter(torch.rand(6, generator=generator, dtype=torch.float64) + 0.5)
        self.register_buffer("m", (torch.rand(2, 6, generator=generator) > 0.3).double())
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.a(x)), self.function(self))


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


LINEAR = {
    "a mask": lambda n: n.w * n.m,
    "a mask first": lambda n: n.m * n.w,
    "a scale": lambda n: n.w * n.s,
    "a quotient": lambda n: n.w / n.s,
    "noise": lambda n: n.w + n.m * n.s,
    "a number": lambda n: 3 * n.w - n.m,
}
NONLINEAR = {
    "softplus": lambda n: F.softplus(n.w),
    "sign": lambda n: n.w.sign(),
    "a shift": lambda n: n.w + 1,
    "a square": lambda n: n.w * n.w,
    "row sums": lambda n: n.w / n.w.abs().sum(1, keepdim=True),
    "row means": lambda n: n.w / n.w.abs().mean(1, keepdim=True),
    "a quotient below": lambda n: 1 / (n.w + 3),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_function_of_outgoing_weights_takes_the_share_once(name: str) -> None:
    net, x = Outgoing(LINEAR[name]), inputs(5, 3)
    made = embed(net, x, {"a": 9}, shares="random", generator=torch.Generator().manual_seed(2))
    assert made.error <= 1e-12
    narrow, wide = (Objective(m, lambda o, _: (o**3).mean(), (x, x)) for m in (net, made.module))
    expected = made.embedding.gradient(narrow.gradient(narrow.theta()))
    assert float((wide.gradient(wide.theta()) - expected).abs().max()) <= 1e-10 * float(expected.abs().max())


@pytest.mark.parametrize("name", NONLINEAR)
def test_a_nonlinear_function_of_outgoing_weights_forbids_splitting(name: str) -> None:
    view = trace(Outgoing(NONLINEAR[name]), inputs(5, 3))
    assert view.error <= 1e-9
    assert all(not group.is_duplicable for group in view.groups)


class Joined(nn.Module):
    """Two hidden layers, or one and the input, under one LayerNorm."""

    def __init__(self, *, with_input: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 3 if with_input else 5)
        self.with_input = with_input
        self.norm = nn.LayerNorm(7 if with_input else 9)
        self.out = nn.Linear(7 if with_input else 9, 2)

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.with_input else self.b(x)
        return self.out(self.norm(torch.cat([torch.tanh(self.a(x)), other], dim=1)))


@pytest.mark.parametrize("with_input", [True, False])
def test_one_average_over_two_groups_forbids_growing_one(with_input: bool) -> None:
    view = trace(Joined(with_input=with_input), inputs(5, 3).float())
    assert view.groups
    assert all(not group.is_duplicable for group in view.groups)


def test_a_single_unit_that_is_broadcast_is_no_group() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g, self.b, self.c = nn.Linear(3, 1), nn.Linear(1, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            gate = torch.tanh(self.g(x))
            return self.b(gate) + self.c(x) * gate

    assert trace(Gated(), inputs(5, 3).float()).groups == ()


@dataclasses.dataclass
class Held:
    hidden: Tensor


@dataclasses.dataclass(slots=True)
class Slotted:
    hidden: Tensor


class Told(nn.Module):
    """Gives its hidden layer away, wrapped: nothing of it may be permuted."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.wrap = wrap

    def forward(self, x: Tensor) -> object:
        hidden = torch.tanh(self.a(x))
        return self.wrap(self.b(hidden), hidden)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda o, h: {"logits": o, "more": Held(h)},
        lambda o, h: (o, [Slotted(h)]),
        lambda o, h: Held({"deep": (o, Held(h))}),  # type: ignore[arg-type]
    ],
)
def test_outputs_are_found_in_any_container(wrap: Callable[[Tensor, Tensor], object]) -> None:
    net, x = Told(wrap), inputs(5, 3).float()
    assert trace(net, x).groups == ()
    wrong = View.of_spec(net, {"hidden": [("a.weight", 0), ("a.bias", 0), ("b.weight", 1)]})
    assert verified(wrong, net, x).rejected == ("hidden",)


def wrong_spec(net: nn.Module) -> View:
    return View.of_spec(net, {"hidden": [("a.weight", 0), ("b.weight", 1)]})


def test_a_wrong_spec_is_caught_behind_complex_outputs_and_behind_large_ones() -> None:
    x = inputs(5, 3).float()
    for wrap in (
        lambda o, _: torch.complex(torch.ones_like(o), o),
        lambda o, _: torch.cat([1e8 * torch.ones_like(o), o], dim=1),
    ):
        net = Told(wrap)
        assert verified(wrong_spec(net), net, x).rejected == ("hidden",)


def test_a_module_that_returns_only_class_numbers_is_refused() -> None:
    net = Told(lambda o, _: o.argmax(dim=1))
    with pytest.raises(StructureError, match="Expected real-valued outputs, such as logits"):
        trace(net, inputs(5, 3).float())
