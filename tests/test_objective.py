import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from thalweg.errors import DataError, ShapeError
from thalweg.objective import Objective

SAMPLES = 7
exact = functools.partial(assert_close, rtol=1e-12, atol=1e-12)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def point(objective: Objective, seed: int = 1) -> Tensor:
    return 0.5 * randn(objective.num_params, seed=seed)


def labels(classes: int = 3, count: int = SAMPLES) -> Tensor:
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(5))


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.read = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.lstm(x)[0][:, -1])


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.read = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.mix(x, x, x, need_weights=False)[0].mean(1))


class Pairwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 1), nn.Linear(3, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.tanh(self.left(left)) * self.right(right)


class Branching(nn.Module):
    """Control flow that depends on the data: vmap cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.line(x)
        return torch.tanh(y) if float(y.detach().sum()) > 0 else y * y


CASES: dict[str, tuple[nn.Module, Any, Tensor, Tensor]] = {
    "mlp, mse": (tiny(), nn.MSELoss(), randn(SAMPLES, 2), randn(SAMPLES, 3, seed=2)),
    "mlp, cross-entropy": (tiny(), nn.CrossEntropyLoss(), randn(SAMPLES, 2), labels()),
    "lstm": (Recurrent(), nn.MSELoss(), randn(SAMPLES, 4, 2), randn(SAMPLES, 1, seed=2)),
    "attention": (Attentive(), nn.MSELoss(), randn(SAMPLES, 3, 4), randn(SAMPLES, 1, seed=2)),
    "convolution": (
        nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)),
        nn.CrossEntropyLoss(),
        randn(SAMPLES, 1, 5),
        labels(),
    ),
    "branching": (Branching(), nn.MSELoss(), randn(SAMPLES, 2), randn(SAMPLES, 1, seed=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_value_gradient_and_products_are_those_of_the_loss_written_out(name: str) -> None:
    module, loss, inputs, targets = CASES[name]
    objective = Objective(module, loss, (inputs, targets), dtype=torch.float64)
    theta, vector = point(objective), randn(objective.num_params, seed=3)

    net = copy.deepcopy(module).double().eval()
    objective.space.write(theta, net)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        risk = loss(net(inputs), targets)
        slopes = torch.autograd.grad(risk, list(net.parameters()), create_graph=True)
        slope = torch.cat([s.reshape(-1) for s in slopes])
        products = torch.autograd.grad(slope @ vector, list(net.parameters()), materialize_grads=True)
    exact(objective.value(theta), risk.detach())
    exact(objective.gradient(theta), slope.detach())
    exact(objective.hvp(theta, vector), torch.cat([p.reshape(-1) for p in products]))


@pytest.mark.parametrize("name", CASES)
def test_the_hessian_vector_product_is_the_slope_of_the_gradient(name: str) -> None:
    module, loss, inputs, targets = CASES[name]
    objective = Objective(module, loss, (inputs, targets), dtype=torch.float64)
    theta, vector = point(objective), randn(objective.num_params, seed=3)
    h = 1e-5
    slope = (objective.gradient(theta + h * vector) - objective.gradient(theta - h * vector)) / (2 * h)
    assert_close(objective.hvp(theta, vector), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_block_of_products_is_the_products_one_by_one(name: str) -> None:
    module, loss, inputs, targets = CASES[name]
    objective = Objective(module, loss, (inputs, targets), dtype=torch.float64, batch_size=3)
    theta, vectors = point(objective), randn(3, objective.num_params, seed=3)
    exact(objective.hvp_block(theta, vectors), torch.stack([objective.hvp(theta, v) for v in vectors]))


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_points_is_the_points_one_by_one(name: str) -> None:
    module, loss, inputs, targets = CASES[name]
    objective = Objective(module, loss, (inputs, targets), dtype=torch.float64, batch_size=3)
    thetas = torch.stack([point(objective, seed) for seed in range(3)])
    exact(objective.value(thetas), torch.stack([objective.value(t) for t in thetas]))
    exact(objective.gradient(thetas), torch.stack([objective.gradient(t) for t in thetas]))


LOSSES: dict[str, tuple[Any, Tensor]] = {
    "mse mean": (nn.MSELoss(), randn(SAMPLES, 3, seed=2)),
    "mse sum": (nn.MSELoss(reduction="sum"), randn(SAMPLES, 3, seed=2)),
    "mse none": (nn.MSELoss(reduction="none"), randn(SAMPLES, 3, seed=2)),
    "a function": (lambda o, t: ((o - t) ** 4).mean(), randn(SAMPLES, 3, seed=2)),
    "cross-entropy": (nn.CrossEntropyLoss(), labels()),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), labels()),
    "probabilities": (nn.CrossEntropyLoss(), randn(SAMPLES, 3, seed=2).softmax(1)),
    "class weights": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2])), labels()),
    "ignored class": (nn.CrossEntropyLoss(ignore_index=1), labels()),
    "weights, ignored": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]), ignore_index=0), labels()),
    "weights, sum": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]), reduction="sum"), labels()),
    "weights, none": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]), reduction="none"), labels()),
    "the function": (functional.cross_entropy, labels().where(labels() > 0, -100)),
    "a partial": (functools.partial(functional.cross_entropy, ignore_index=2), labels()),
    "a partial sum": (functools.partial(functional.cross_entropy, reduction="sum"), labels()),
}


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=8, deadline=None)
@given(batch_size=st.integers(1, SAMPLES))
def test_no_batch_size_changes_anything(name: str, batch_size: int) -> None:
    loss, targets = LOSSES[name]
    data = (randn(SAMPLES, 2), targets)
    whole, cut = (Objective(tiny(), loss, data, batch_size=size) for size in (None, batch_size))
    theta, vector = point(whole), randn(whole.num_params, seed=3)
    exact(cut.value(theta), whole.value(theta))
    exact(cut.gradient(theta), whole.gradient(theta))
    exact(cut.hvp(theta, vector), whole.hvp(theta, vector))


@pytest.mark.parametrize("name", LOSSES)
def test_the_value_is_the_loss_of_all_data_at_once(name: str) -> None:
    loss, targets = LOSSES[name]
    inputs = randn(SAMPLES, 2)
    objective = Objective(tiny(), loss, (inputs, targets), batch_size=3)
    theta = point(objective)
    net = tiny()
    objective.space.write(theta, net)
    placed = copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss
    exact(objective.value(theta), placed(net(inputs), targets).mean().detach())


def test_a_loader_is_the_tensors_it_loads() -> None:
    inputs, targets = randn(SAMPLES, 2), labels()
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=3, shuffle=True)
    streamed = Objective(tiny(), nn.CrossEntropyLoss(), loader)
    whole = Objective(tiny(), nn.CrossEntropyLoss(), (inputs, targets))
    theta = point(whole)
    exact(streamed.value(theta), whole.value(theta))
    exact(streamed.gradient(theta), whole.gradient(theta))
    assert not streamed.in_memory
    assert whole.in_memory


@pytest.mark.parametrize("batch_size", [None, 3])
def test_inputs_may_be_a_tuple_or_a_dict(batch_size: int | None) -> None:
    left, right, targets = randn(SAMPLES, 2), randn(SAMPLES, 3, seed=2), randn(SAMPLES, 1, seed=3)
    net = Pairwise().double()
    objectives = [
        Objective(net, nn.MSELoss(), ((left, right), targets), batch_size=batch_size),
        Objective(net, nn.MSELoss(), ({"right": right, "left": left}, targets), batch_size=batch_size),
        Objective(net, nn.MSELoss(), [({"right": right, "left": left}, targets)]),
    ]
    theta = point(objectives[0])
    for objective in objectives:
        exact(objective.value(theta), ((net_at(objective, theta)(left, right) - targets) ** 2).mean())


def net_at(objective: Objective, theta: Tensor) -> nn.Module:
    net = copy.deepcopy(objective.module)
    objective.space.write(theta, net)
    return net.requires_grad_(False)


def test_per_sample_losses_average_to_the_value() -> None:
    objective = Objective(tiny(), nn.CrossEntropyLoss(), (randn(SAMPLES, 2), labels()), batch_size=3)
    theta = point(objective)
    exact(objective.per_sample(theta).mean(), objective.value(theta))


def test_outputs_are_those_of_the_module() -> None:
    inputs = randn(SAMPLES, 2)
    objective = Objective(tiny(), nn.CrossEntropyLoss(), (inputs, labels()), batch_size=3)
    theta = point(objective)
    exact(objective.outputs(theta), net_at(objective, theta)(inputs))


def test_frozen_parameters_stay_and_tied_ones_move_together() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    net[2].weight = net[0].weight
    net[2].bias.requires_grad_(False)
    inputs, targets = randn(SAMPLES, 2), randn(SAMPLES, 2, seed=2)
    objective = Objective(net, nn.MSELoss(), (inputs, targets))
    assert objective.space.names == ("0.weight", "0.bias")
    theta = point(objective)
    w, b = theta[:4].view(2, 2), theta[4:]
    outputs = torch.tanh(inputs @ w.T + b) @ w.T + net[2].bias.detach()
    exact(objective.value(theta), ((outputs - targets) ** 2).mean())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_neither_the_users_module_nor_any_buffer_is_touched(mode: Any) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3)).double()
    net.train()
    before = copy.deepcopy(net.state_dict())
    objective = Objective(net, nn.CrossEntropyLoss(), (randn(SAMPLES, 2), labels()), mode=mode)
    theta = point(objective)
    buffers = copy.deepcopy(dict(objective.module.named_buffers()))
    first = objective.value(theta)
    objective.gradient(theta)
    objective.hvp(theta, theta)
    exact(objective.value(theta), first)
    assert net.training
    for name, value in net.state_dict().items():
        assert_close(value, before[name], rtol=0, atol=0)
    for name, value in objective.module.named_buffers():
        assert_close(value, buffers[name], rtol=0, atol=0)


def test_train_mode_uses_the_statistics_of_the_batch() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3)).double()
    inputs = 4 + 3 * randn(SAMPLES, 2)
    objective = Objective(net, nn.CrossEntropyLoss(), (inputs, labels()), mode="train")
    theta = point(objective)
    gain, shift, w, b = theta[:2], theta[2:4], theta[4:10].view(3, 2), theta[10:]
    normed = (inputs - inputs.mean(0)) / (inputs.var(0, unbiased=False) + 1e-5).sqrt() * gain + shift
    exact(objective.value(theta), functional.cross_entropy(normed @ w.T + b, labels()))


def test_another_dtype_computes_from_the_data_as_they_were_passed() -> None:
    inputs, targets = randn(SAMPLES, 2), randn(SAMPLES, 3, seed=2)
    single = Objective(tiny(), nn.MSELoss(), (inputs, targets), dtype=torch.float32, batch_size=3)
    double = Objective(tiny(), nn.MSELoss(), (inputs, targets))
    theta = point(double)
    assert single.value(theta).dtype == torch.float32
    exact(single.in_dtype(torch.float64).value(theta), double.value(theta))


def test_a_loss_affine_in_theta_has_no_curvature() -> None:
    objective = Objective(nn.Linear(2, 1).double(), lambda o, t: (o * t).mean(), (randn(5, 2), randn(5, 1)))
    vectors = randn(2, 3, seed=4)
    exact(objective.hvp_block(point(objective), vectors), torch.zeros_like(vectors))


def test_a_loss_that_ignores_theta_is_flat() -> None:
    objective = Objective(nn.Linear(2, 1).double(), lambda o, t: t.mean(), (randn(5, 2), randn(5, 1)))
    theta = point(objective)
    exact(objective.gradient(theta), torch.zeros_like(theta))
    exact(objective.hvp(theta, theta), torch.zeros_like(theta))


def refusal(match: str, data: Any, error: type[Exception] = DataError, **options: Any) -> None:
    with pytest.raises(error, match=match):
        Objective(tiny(), options.pop("loss", nn.CrossEntropyLoss()), data, **options)


def test_a_one_shot_iterator_is_refused() -> None:
    refusal("Expected data that can be read more than once. Got a one-shot iterator", iter([(1, 2)]))


def test_unequal_counts_are_refused() -> None:
    refusal(r"Expected as many inputs as targets, at least one. Got \[6, 7\]", (randn(6, 2), labels()))


def test_empty_tensors_are_refused() -> None:
    refusal(r"at least one. Got \[0\]", (randn(0, 2), labels(count=0)))


def test_an_empty_loader_is_refused() -> None:
    refusal("Expected at least one batch. Got empty data", [])


def test_batches_that_are_no_pairs_are_refused() -> None:
    refusal(r"Expected batches \(inputs, targets\). Got a Tensor", [randn(3, 2)])


def test_data_that_are_no_data_are_refused() -> None:
    refusal(r"Expected \(inputs, targets\) or batches of them. Got a int", 3)


def test_a_batch_size_for_batches_is_refused() -> None:
    data = [(randn(SAMPLES, 2), labels())]
    refusal("Expected batch_size only with a pair of tensors", data, batch_size=2)


def test_no_counting_target_is_refused_on_use() -> None:
    data = (randn(SAMPLES, 2), torch.full((SAMPLES,), -100))
    objective = Objective(tiny(), nn.CrossEntropyLoss(), data)
    with pytest.raises(DataError, match="Expected at least one target that counts in the loss"):
        objective.value(point(objective))


def test_a_loss_per_element_without_a_reduction_is_refused_on_use() -> None:
    data = (randn(SAMPLES, 2), randn(SAMPLES, 3))
    objective = Objective(tiny(), lambda o, t: (o - t) ** 2, data)
    with pytest.raises(ShapeError, match=r"Expected a scalar loss. Got shape \(7, 3\) under 'mean'"):
        objective.value(point(objective))


def test_a_theta_that_does_not_fit_is_refused() -> None:
    objective = Objective(tiny(), nn.CrossEntropyLoss(), (randn(SAMPLES, 2), labels()))
    with pytest.raises(ShapeError, match=r"Expected theta of shape \(27,\) or \(points, 27\). Got \(3,\)"):
        objective.value(torch.zeros(3))
