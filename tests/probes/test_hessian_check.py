"""What the closed form must refuse, however small: its check against Hessian–vector products is sharp."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from thalweg.errors import StructureError
from thalweg.objective import Objective
from thalweg.probes import hessian, inertia, spectrum

SAMPLES = 64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, hidden: Callable[[Tensor], Tensor], sizes: tuple[int, int, int]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(*sizes[:2]), nn.Linear(*sizes[1:])
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.hidden(self.first(x)))


def mse(o: Tensor, t: Tensor) -> Tensor:
    return ((o - t) ** 2).mean()


def landscape(hidden: Any, loss: Any, sizes: tuple[int, int, int], dtype: torch.dtype, **options: Any) -> Objective:
    data = (randn(SAMPLES, sizes[0], seed=1), randn(SAMPLES, sizes[2], seed=2))
    return Objective(Net(hidden, sizes), loss, data, dtype=dtype, **options)


def point(objective: Objective) -> Tensor:
    return (0.4 * randn(objective.num_params, seed=3)).to(objective.dtype)


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "softmax": (lambda h: torch.softmax(h, -1), mse),
    "layer norm": (lambda h: functional.layer_norm(torch.tanh(h), h.shape[-1:]), mse),
    "layer norm, then tanh": (lambda h: torch.tanh(functional.layer_norm(h, h.shape[-1:])), mse),
    "batch statistics": (lambda h: torch.tanh(h - h.mean(0)), mse),
    "faint mixing": (lambda h: torch.tanh(h) + 1e-6 * h.mean(-1, keepdim=True), mse),
    "coupled loss": (torch.tanh, lambda o, t: mse(o, t) + (o.mean() - t.mean()) ** 2),
    "faintly coupled loss": (torch.tanh, lambda o, t: mse(o, t) + 1e-6 * o.mean() ** 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(10, 40, 1), (50, 20, 1)])
@pytest.mark.parametrize("name", WRONG)
def test_a_formula_that_does_not_apply_is_never_accepted(name: str, sizes: Any, dtype: torch.dtype) -> None:
    objective = landscape(*WRONG[name], sizes, dtype)
    theta = point(objective)
    with pytest.raises(StructureError, match="Expected an elementwise activation and a loss that is a sum"):
        hessian(objective, theta, "structured")
    assert_close(hessian(objective, theta), hessian(objective, theta, "blockwise"), rtol=0, atol=0)


def test_softmax_units_in_float32_have_the_inertia_that_they_have_in_float64() -> None:
    single = landscape(lambda h: torch.softmax(h, -1), mse, (10, 40, 1), torch.float32)
    double = single.in_dtype(torch.float64)
    theta = point(single)
    found, expected = (inertia(spectrum(o, theta.to(o.dtype))) for o in (single, double))
    assert found.negative > 0
    assert abs(found.negative - expected.negative) <= found.zero


ACTIVATIONS: dict[str, Any] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "sigmoid": torch.sigmoid,
}
KINDS = ["plain", "sum", "copied", "spread", "flat"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "kind"), list(itertools.product(ACTIVATIONS, KINDS)))
def test_a_two_layer_network_is_accepted(name: str, kind: str, dtype: torch.dtype) -> None:
    objective = landscape(
        ACTIVATIONS[name], nn.MSELoss(reduction="sum" if kind == "sum" else "mean"), (10, 40, 3), dtype
    )
    theta = point(objective)
    weights = objective.space.parameters(theta)
    if kind == "copied":  # a unit read with weight 0: its rows of H are what cancellation leaves
        weights["first.weight"][1], weights["first.bias"][1] = weights["first.weight"][0], weights["first.bias"][0]
        weights["second.weight"][:, 1] = 0
    if kind == "spread":
        weights["first.weight"] *= torch.logspace(-4, 4, 10, dtype=dtype)
    if kind == "flat":
        theta *= 1e-6
    found = hessian(objective, theta, "structured")
    assert found.dtype == dtype


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss()])
def test_the_size_of_the_benchmark_is_accepted(loss: nn.Module) -> None:
    outputs = 1 if isinstance(loss, nn.MSELoss) else 3
    targets = randn(1000, 1, seed=2) if outputs == 1 else (10 * randn(1000, seed=2)).long() % 3
    objective = Objective(Net(torch.tanh, (50, 56, outputs)).double(), loss, (randn(1000, 50, seed=1), targets))
    hessian(objective, point(objective), "structured")


def test_the_closed_form_in_float32_is_the_one_of_float64_rounded() -> None:
    single = landscape(torch.tanh, nn.MSELoss(), (10, 40, 1), torch.float32)
    double = single.in_dtype(torch.float64)
    theta = point(single)
    expected = hessian(double, theta.double(), "structured").float()
    assert_close(hessian(single, theta, "structured"), expected, rtol=0, atol=0)


def test_dropout_goes_blockwise() -> None:
    objective = landscape(lambda h: functional.dropout(h, 0.5), mse, (10, 40, 1), torch.float64)
    with pytest.raises(StructureError, match="Expected an elementwise activation"):
        hessian(objective, point(objective), "structured")


class Single(nn.Module):
    """Insists on float32."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.float())


def test_a_module_that_insists_on_float32_goes_blockwise() -> None:
    objective = Objective(Single(), nn.MSELoss(), (randn(SAMPLES, 3), randn(SAMPLES, 1)), dtype=torch.float32)
    theta = point(objective)
    with pytest.raises(StructureError, match=r"Expected a module that runs in float64. Got .* Use method"):
        hessian(objective, theta, "structured")
    assert_close(hessian(objective, theta), hessian(objective, theta, "blockwise"), rtol=0, atol=0)
