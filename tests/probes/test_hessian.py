import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from thalweg.errors import NumericalError, ShapeError, StructureError
from thalweg.objective import Objective
from thalweg.probes import hessian, is_two_layer, two_layer_hessian

SAMPLES = 9


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(classes: int) -> Tensor:
    return torch.randint(0, classes, (SAMPLES,), generator=torch.Generator().manual_seed(5))


def naive_hessian(objective: Objective, theta: Tensor) -> Tensor:
    """One double backward per parameter, on the loss summed over batches with their weights."""
    point = theta.clone().requires_grad_()
    pieces = [(w, objective.batch_loss(point, *batch)) for w, batch in objective.weighted_batches()]
    total = sum(w * loss for w, loss in pieces)
    if objective.reduction != "sum":
        total = total / sum(w for w, _ in pieces)
    (slope,) = torch.autograd.grad(total, point, create_graph=True)
    rows = [torch.autograd.grad(s, point, retain_graph=True, materialize_grads=True)[0] for s in slope]
    return torch.stack(rows)


def agrees(objective: Objective, method: Any, seed: int = 1) -> None:
    theta = 0.7 * randn(objective.num_params, seed=seed)
    expected = naive_hessian(objective, theta)
    found = hessian(objective, theta, method)
    scale = float(expected.abs().max())
    assert_close(found, expected, rtol=0, atol=1e-12 * max(scale, 1e-3))
    assert_close(found, found.T, rtol=0, atol=0)


class Backwards(nn.Module):
    """Defines its layers in the order opposite to that in which it runs them; square, so shapes do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.Linear(3, 3, bias=False)
        self.lower = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.upper(torch.sin(self.lower(x.flatten(1)))).softmax(1)


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.read = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.lstm(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unsqueeze(2).expand(-1, -1, 2)
        return self.mix(tokens, tokens, tokens, need_weights=False)[0].mean((1, 2)).unsqueeze(1)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.line(x)
        return torch.tanh(y) if float(y.detach().sum()) > 0 else y * y * y


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 3), nn.Linear(3, 3)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


def two_layer(activation: Callable[[], nn.Module], outputs: int, biases: tuple[bool, bool]) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3, 4, bias=biases[0]), activation(), nn.Linear(4, outputs, bias=biases[1])
    )


@pytest.mark.parametrize("biases", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ReLU])
def test_the_closed_form_is_the_naive_hessian(activation: Any, outputs: int, biases: tuple[bool, bool]) -> None:
    net = two_layer(activation, outputs, biases).double()
    agrees(Objective(net, nn.MSELoss(), (randn(SAMPLES, 3), randn(SAMPLES, outputs, seed=2))), "structured")


LOSSES: dict[str, tuple[Any, Tensor]] = {
    "sum": (nn.MSELoss(reduction="sum"), randn(SAMPLES, 3, seed=2)),
    "none": (nn.MSELoss(reduction="none"), randn(SAMPLES, 3, seed=2)),
    "fourth power": (lambda o, t: ((o - t) ** 4).mean(), randn(SAMPLES, 3, seed=2)),
    "cross-entropy": (nn.CrossEntropyLoss(), labels(3)),
    "class weights": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 4.0, 0.2]), ignore_index=1),
        labels(3),
    ),
    "linear": (lambda o, t: (o * t).mean(), randn(SAMPLES, 3, seed=2)),
}


@pytest.mark.parametrize("method", ["structured", "blockwise"])
@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=4, deadline=None)
@given(batch_size=st.integers(1, SAMPLES))
def test_any_loss_and_batch_size_give_the_naive_hessian(name: str, method: Any, batch_size: int) -> None:
    loss, targets = LOSSES[name]
    net = two_layer(nn.Tanh, 3, (True, True)).double()
    agrees(Objective(net, loss, (randn(SAMPLES, 3), targets), batch_size=batch_size), method)


@pytest.mark.parametrize("net", [Backwards(), Squeezed()], ids=["backwards", "squeezed"])
def test_a_users_two_layer_module_is_recognised(net: nn.Module) -> None:
    targets = randn(SAMPLES, seed=2) if isinstance(net, Squeezed) else randn(SAMPLES, 3, seed=2)
    objective = Objective(net.double(), nn.MSELoss(), (randn(SAMPLES, 3), targets))
    assert is_two_layer(objective)
    agrees(objective, "structured")


@pytest.mark.parametrize("frozen", ["1.weight", "1.bias", "3.weight", "3.bias"])
def test_a_frozen_parameter_is_no_coordinate(frozen: str) -> None:
    net = two_layer(nn.Tanh, 2, (True, True)).double()
    net.get_parameter(frozen).requires_grad_(False)
    objective = Objective(net, nn.MSELoss(), (randn(SAMPLES, 3), randn(SAMPLES, 2, seed=2)))
    agrees(objective, "structured")
    agrees(objective, "blockwise")


OTHERS: dict[str, nn.Module] = {
    "three layers": nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)),
    "softmax units": nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 1)),
    "layer norm": nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)),
    "batch norm": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)),
    "lstm": Recurrent(),
    "attention": Attentive(),
    "branching": Branching(),
    "line": nn.Linear(3, 1),
}


@pytest.mark.parametrize("method", ["auto", "blockwise"])
@pytest.mark.parametrize("name", OTHERS)
def test_any_module_gives_the_naive_hessian(name: str, method: Any) -> None:
    data = (randn(SAMPLES, 3), randn(SAMPLES, 1, seed=2))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        agrees(Objective(OTHERS[name].double(), nn.MSELoss(), data, batch_size=4), method)


def test_batch_norm_in_train_mode_gives_the_naive_hessian() -> None:
    data = (randn(SAMPLES, 3), randn(SAMPLES, 1, seed=2))
    agrees(Objective(OTHERS["batch norm"].double(), nn.MSELoss(), data, mode="train"), "blockwise")


def test_tied_layers_go_blockwise() -> None:
    objective = Objective(Tied().double(), nn.MSELoss(), (randn(SAMPLES, 3), randn(SAMPLES, 3, seed=2)))
    assert not is_two_layer(objective)
    agrees(objective, "auto")


def test_a_loss_over_the_whole_batch_goes_blockwise() -> None:
    net = two_layer(nn.Tanh, 1, (True, True)).double()
    data = (randn(SAMPLES, 3), randn(SAMPLES, 1, seed=2))
    objective = Objective(net, lambda o, t: (o - t).mean() ** 2 + o.var(), data)
    agrees(objective, "auto")
    with pytest.raises(StructureError, match="Expected an elementwise activation and a loss that is a sum"):
        hessian(objective, randn(objective.num_params), "structured")


def test_the_closed_form_is_the_same_when_samples_are_cut_up(monkeypatch: pytest.MonkeyPatch) -> None:
    net = two_layer(nn.Tanh, 2, (True, True)).double()
    objective = Objective(net, nn.MSELoss(), (randn(SAMPLES, 3), randn(SAMPLES, 2, seed=2)))
    theta = randn(objective.num_params)
    whole = two_layer_hessian(objective, theta)
    monkeypatch.setattr("thalweg.probes.two_layer._JACOBIAN_BYTES", 1)
    assert_close(two_layer_hessian(objective, theta), whole, rtol=1e-12, atol=1e-13)


def test_the_module_is_left_without_hooks() -> None:
    net = two_layer(nn.Tanh, 1, (True, True)).double()
    objective = Objective(net, nn.MSELoss(), (randn(SAMPLES, 3), randn(SAMPLES, 1, seed=2)))
    hessian(objective, randn(objective.num_params))
    assert not any(module._forward_hooks for module in objective.module.modules())


def test_a_vector_times_the_matrix_is_the_product() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    objective = Objective(net, nn.CrossEntropyLoss(), (randn(SAMPLES, 3), labels(2)), batch_size=2)
    theta, vector = randn(objective.num_params), randn(objective.num_params, seed=3)
    assert_close(hessian(objective, theta) @ vector, objective.hvp(theta, vector), rtol=1e-11, atol=1e-13)


def test_another_structure_is_refused_by_the_closed_form() -> None:
    objective = Objective(nn.Linear(3, 1).double(), nn.MSELoss(), (randn(SAMPLES, 3), randn(SAMPLES, 1)))
    with pytest.raises(StructureError, match=r"parameters are those of two nn.Linear layers. Got Linear"):
        hessian(objective, randn(4), "structured")


def test_inputs_in_sequences_are_refused_by_the_closed_form() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    objective = Objective(net, nn.MSELoss(), (randn(SAMPLES, 2, 3), randn(SAMPLES, 2, 1, seed=2)))
    with pytest.raises(StructureError, match="Expected each linear layer to run once, on inputs"):
        hessian(objective, randn(objective.num_params), "structured")
    agrees(objective, "auto")


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    net = two_layer(nn.Tanh, 1, (True, True)).double()
    objective = Objective(net, nn.MSELoss(), (randn(SAMPLES, 3), randn(SAMPLES, 1)))
    for method in ("auto", "blockwise"):
        with pytest.raises(NumericalError, match=r"Expected a finite Hessian. Got NaN or infinity"):
            hessian(objective, torch.full((objective.num_params,), torch.nan), method)


def test_a_theta_that_does_not_fit_is_refused() -> None:
    objective = Objective(nn.Linear(3, 1), nn.MSELoss(), (randn(SAMPLES, 3), randn(SAMPLES, 1)))
    with pytest.raises(ShapeError, match="Expected theta with 4 parameters"):
        hessian(objective, torch.zeros(5))


def test_float32_is_as_exact_as_float32_is() -> None:
    net = two_layer(nn.Tanh, 3, (True, True)).double()
    double = Objective(net, nn.CrossEntropyLoss(), (randn(SAMPLES, 3), labels(3)))
    theta = randn(double.num_params)
    single = double.in_dtype(torch.float32)
    for method in ("structured", "blockwise"):
        found = hessian(single, theta.float(), method)
        assert_close(found.double(), hessian(double, theta), rtol=0, atol=1e-5)
