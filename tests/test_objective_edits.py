"""Modules that write to their own weights and attributes are functions of theta all the same."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.testing import assert_close

from thalweg.objective import Objective

SAMPLES = 7
exact = functools.partial(assert_close, rtol=1e-12, atol=1e-12)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels() -> Tensor:
    return torch.randint(0, 3, (SAMPLES,), generator=torch.Generator().manual_seed(5))


class Clamped(nn.Module):
    """Edits its weight on every run, behind autograd's back."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.line.weight.data.clamp_(min=0.0)
        return self.line(x)


EDITORS: dict[str, tuple[nn.Module, Tensor]] = {
    "max_norm": (
        nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3)).double(),
        torch.randint(0, 5, (SAMPLES, 2), generator=torch.Generator().manual_seed(6)),
    ),
    "clamp": (Clamped().double(), randn(SAMPLES, 2)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # max_norm under vmap
@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("call", ["value", "gradient", "per_sample", "outputs", "hvp", "values"])
def test_theta_stays_whatever_the_module_does_to_its_weights(name: str, call: str) -> None:
    net, inputs = EDITORS[name]
    objective = Objective(net, nn.MSELoss(), (inputs, randn(SAMPLES, 3, seed=2)), batch_size=3)
    theta = 3 * 0.5 * randn(objective.num_params, seed=1)
    thetas = torch.stack([theta, -theta])
    before, all_before = theta.clone(), thetas.clone()
    if call == "values":
        exact(objective.value(thetas), torch.stack([objective.value(t) for t in thetas]))
    elif call == "hvp":
        objective.hvp(theta, torch.ones_like(theta))
    else:
        getattr(objective, call)(theta)
    assert_close(theta, before, rtol=0, atol=0)
    assert_close(thetas, all_before, rtol=0, atol=0)


class Remembering(nn.Module):
    """Keeps its last output and counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 3)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.last = self.line(x)
        return self.last * self.runs


def test_a_module_that_remembers_its_runs_is_the_same_function_every_time() -> None:
    objective = Objective(Remembering().double(), nn.CrossEntropyLoss(), (randn(SAMPLES, 2), labels()))
    theta = 0.5 * randn(objective.num_params, seed=1)
    first = objective.value(theta)
    objective.gradient(torch.stack([theta, theta]))
    exact(objective.value_and_gradient(theta)[0], first)
    copy.deepcopy(objective.module)
    exact(objective.in_dtype(torch.float64).value(theta), first)


def test_a_pruned_module_is_a_landscape() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    prune.random_unstructured(net[0], "weight", amount=0.5)
    inputs = randn(SAMPLES, 2)
    objective = Objective(net, nn.CrossEntropyLoss(), (inputs, labels()))
    value = objective.value(objective.theta())
    exact(value, functional.cross_entropy(net(inputs), labels()).detach())
    exact(objective.in_dtype(torch.float64).value(objective.theta()), value)
    copy.deepcopy(objective.module)
