"""Descent without a gradient: the same step as with one, and never a whole gradient at a time."""

import copy
from itertools import islice
from pathlib import Path as File
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thalweg.checkpoint import save_state
from thalweg.data import iris
from thalweg.errors import CheckpointError, StructureError
from thalweg.objective import Objective
from thalweg.paths.descent import Descent, endless_batches
from thalweg.paths.streamed import StateFile, Streamed, hollow


def landscape(build: Any) -> Objective:
    data = iris()
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        module = build().double()
    return Objective(module, nn.CrossEntropyLoss(), (data.inputs, data.targets), batch_size=60)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        once = torch.tanh(self.inner(x))
        result: Tensor = self.head(torch.tanh(self.outer(once)) + once @ self.inner.weight)
        return result


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.cell, self.head = nn.LSTM(2, 5, 2, batch_first=True), nn.GRUCell(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        sequence = self.lstm(x.reshape(-1, 2, 2))[0]
        state = self.cell(sequence[:, 0])
        result: Tensor = self.head(self.cell(sequence[:, 1], state))
        return result


class Detached(nn.Module):
    """An early use of the last weight that its gradient does not know of, but whose backward pass reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.first(x) @ self.last.weight.detach()))
        return result


class Doubling(torch.autograd.Function):
    """Reads, going back, a weight that it keeps on its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight.detach()
        result: Tensor = x @ ctx.weight
        return result

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        slope: Tensor = slopes[0] @ ctx.weight.T
        return slope, None


class OwnRules(Detached):
    def forward(self, x: Tensor) -> Tensor:
        once: Tensor = Doubling.apply(self.first(x), self.last.weight.detach())  # type: ignore[no-untyped-call]
        result: Tensor = self.last(torch.tanh(once))
        return result


class Recomputed(Detached):
    def forward(self, x: Tensor) -> Tensor:
        once = checkpoint(self.last, self.first(x), use_reentrant=False)
        result: Tensor = checkpoint(self.last, torch.tanh(once), use_reentrant=False)
        return result


class Nested(Detached):
    """A gradient within the network, by torch.func."""

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.func.vmap(torch.func.grad(lambda row: self.first(row).square().sum()))(x)
        result: Tensor = self.last(inner[:, :3])
        return result


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.LayerNorm(3))


NETS = {
    "tied": Tied,
    "recurrent": Recurrent,
    "normed": normed,
    "detached": Detached,
    "own rules": OwnRules,
    "recomputed": Recomputed,
    "nested": Nested,
}


@pytest.mark.parametrize("name", NETS)
def test_a_step_is_that_of_the_whole_gradient(name: str) -> None:
    objective = landscape(NETS[name])
    streamed, twin = Streamed(objective), copy.deepcopy(objective.module).train()
    image = {key: value.clone() for key, value in objective.space.parameters(objective.theta()).items()}
    generator = torch.Generator().manual_seed(0)
    for batch in islice(endless_batches(objective, 20, generator), 3):
        loss = nn.functional.cross_entropy(twin(batch[0]), batch[1])
        parameters = dict(twin.named_parameters())
        slopes = torch.autograd.grad(loss, list(parameters.values()))
        for parameter, slope in zip(parameters.values(), slopes, strict=True):
            parameter.data.sub_(slope, alpha=0.3)
        assert streamed.descend(image, batch, 0.3) == pytest.approx(loss.item(), rel=1e-12)
        for key, parameter in parameters.items():
            torch.testing.assert_close(image[key], parameter.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["tied", "normed"])
def test_the_loss_is_measured_as_by_a_descent_with_a_vector(name: str) -> None:
    objective = landscape(NETS[name])
    found = Streamed(objective).measured(objective.space.parameters(objective.theta()))
    assert found == pytest.approx(Descent(objective).measured(objective.weighted_batches()), rel=1e-12)


def test_the_network_keeps_nothing_and_the_objective_stays() -> None:
    objective = landscape(Tied)
    before = objective.theta()
    streamed = Streamed(objective)
    image = {key: value.clone() for key, value in objective.space.parameters(before).items()}
    streamed.descend(image, next(objective.batches()), 0.1)
    assert all(p.grad is None and p.untyped_storage().nbytes() == 8 for p in streamed._module.parameters())
    assert torch.equal(objective.theta(), before)
    assert not torch.equal(objective.space.theta(image), before)


def test_nothing_moves_where_the_loss_is_not_finite() -> None:
    objective = landscape(Tied)
    image = {key: value.clone() for key, value in objective.space.parameters(objective.theta()).items()}
    inputs, targets = next(objective.batches())
    assert not Streamed(objective).descend(image, (inputs * float("inf"), targets), 0.1) < float("inf")
    assert torch.equal(objective.space.theta(image), objective.theta())


class Watched(nn.Sequential):
    """Tells, when the backward pass comes to the first layer, whether the last one has moved."""

    def forward(self, x: Tensor) -> Tensor:
        once, place = self[0](x), self.get_parameter("1.weight").detach()
        before = place.clone()
        if once.requires_grad:
            once.register_hook(lambda _: WATCHED.append(not torch.equal(before, place)))
        result: Tensor = self[1](once)
        return result


WATCHED: list[bool] = []


def test_a_layer_moves_before_the_layers_below_it_have_a_slope() -> None:
    objective = landscape(lambda: Watched(nn.Linear(4, 6), nn.Linear(6, 3)))
    image = {key: value.clone() for key, value in objective.space.parameters(objective.theta()).items()}
    WATCHED.clear()
    Streamed(objective).descend(image, next(objective.batches()), 0.1)
    assert WATCHED == [True]


def test_a_file_that_is_no_state_is_refused(tmp_path: File) -> None:
    (tmp_path / "x.safetensors").write_text("nothing")
    for name in ("x.safetensors", "missing"):
        with pytest.raises(CheckpointError, match="Expected a whole safetensors file"):
            StateFile(tmp_path / name)
    save_state(tmp_path / "net.safetensors", {"w": torch.ones(2)})
    assert "v" not in StateFile(tmp_path / "net.safetensors")
    assert len(StateFile(tmp_path / "net.safetensors")) == 1


def test_hollow_keeps_ties_buffers_and_frozen_parameters() -> None:
    tied = hollow(Tied())
    assert tied.inner.weight is tied.outer.weight
    assert hollow(copy.deepcopy(tied)).inner.weight.untyped_storage().nbytes() == 4
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.get_parameter("0.weight").requires_grad_(False)
    twin = hollow(net)
    assert torch.equal(twin.get_parameter("0.weight"), net.get_parameter("0.weight"))
    assert torch.equal(twin.get_buffer("1.running_var"), net.get_buffer("1.running_var"))
    assert not bool(twin.get_parameter("1.weight").any())
    with pytest.raises(StructureError, match="meta device"), torch.device("meta"):
        hollow(nn.BatchNorm1d(2))
