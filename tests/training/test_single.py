import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from thalweg.errors import ConfigError, ShapeError
from thalweg.objective import Objective
from thalweg.training import recording_steps, train


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny(**options: Any) -> Objective:
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1, bias=False)).double()
    options.setdefault("loss", nn.MSELoss())
    loss = options.pop("loss")
    return Objective(net, loss, (randn(11, 2), randn(11, 1, seed=2)), **options)


def start(objective: Objective) -> Tensor:
    return 0.5 * randn(objective.num_params, seed=1)


def naive(objective: Objective, theta: Tensor, optimizer: Any, steps: int) -> Tensor:
    """torch's own optimizer on the objective's own gradient."""
    parameter = nn.Parameter(theta.clone())
    stepper = optimizer([parameter])
    for _ in range(steps):
        parameter.grad = objective.gradient(parameter.detach())
        stepper.step()
    return parameter.detach()


def test_adam_is_torchs_adam_bit_for_bit() -> None:
    objective = tiny()
    found = train(objective, start(objective), learning_rate=0.02, steps=200).theta
    expected = naive(objective, start(objective), lambda p: torch.optim.Adam(p, lr=0.02, foreach=False), steps=200)
    assert_close(found, expected, rtol=0, atol=0)


def test_gradient_descent_is_its_formula() -> None:
    objective = tiny()
    theta = start(objective)
    for _ in range(50):
        theta = theta - 0.1 * objective.gradient(theta)
    found = train(objective, start(objective), learning_rate=0.1, steps=50, optimizer="gd")
    assert_close(found.theta, theta, rtol=1e-12, atol=1e-14)


def test_any_torch_optimizer_can_be_passed() -> None:
    objective = tiny()
    found = train(objective, start(objective), learning_rate=0.01, steps=20, optimizer=torch.optim.RMSprop)
    expected = naive(objective, start(objective), lambda p: torch.optim.RMSprop(p, lr=0.01), steps=20)
    assert_close(found.theta, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@settings(max_examples=5, deadline=None)
@given(batch_size=st.integers(1, 11))
def test_no_batch_size_changes_the_way(reduction: str, batch_size: int) -> None:
    loss = nn.MSELoss(reduction=reduction)
    whole, cut = tiny(loss=loss), tiny(loss=loss, batch_size=batch_size)
    ways = [train(o, start(o), learning_rate=1e-3, steps=20, optimizer="gd") for o in (whole, cut)]
    assert_close(ways[0].thetas, ways[1].thetas, rtol=1e-12, atol=1e-13)
    assert_close(ways[0].losses, ways[1].losses, rtol=1e-12, atol=1e-13)


def test_what_is_recorded_is_the_landscape() -> None:
    objective = tiny()
    run = train(objective, start(objective), learning_rate=0.01, steps=100, record=7)
    assert run.steps.tolist() == [*range(0, 100, 7), 100]
    assert_close(run.losses, objective.value(run.thetas))
    assert_close(run.gradient_l1, objective.gradient(run.thetas).abs().sum(1))
    assert_close(run.theta, run.thetas[-1], rtol=0, atol=0)
    assert run.theta_steps.tolist() == run.steps.tolist()
    assert (run.status, run.last_step) == ("finished", 100)


def test_a_loader_and_frozen_tied_and_dict_inputs_train_too() -> None:
    class Paired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.second.weight = self.first.weight
            self.second.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    inputs, targets = randn(10, 2), randn(10, 2, seed=2)
    net = Paired().double()
    data: list[Any] = [
        (inputs, targets),
        DataLoader(TensorDataset(inputs, targets), batch_size=4),
        [({"x": inputs[:3]}, targets[:3]), ((inputs[3:],), targets[3:])],
    ]
    objectives = [Objective(net, nn.MSELoss(), d) for d in data]
    theta = start(objectives[0])
    ends = [train(o, theta, learning_rate=0.1, steps=10, optimizer="gd").theta for o in objectives]
    for end in ends[1:]:
        assert_close(end, ends[0], rtol=1e-12, atol=1e-13)
    assert len(theta) == 6


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_buffers_stay_as_they_were(mode: Any) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1)).double()
    objective = Objective(net, nn.MSELoss(), (randn(11, 2), randn(11, 1, seed=2)), mode=mode)
    before = {name: buffer.clone() for name, buffer in objective.module.named_buffers()}
    run = train(objective, start(objective), learning_rate=0.1, steps=10, optimizer="gd")
    assert_close(run.losses, objective.value(run.thetas))
    for name, buffer in objective.module.named_buffers():
        assert_close(buffer, before[name], rtol=0, atol=0)


def test_training_leaves_the_start_and_the_objective_alone() -> None:
    objective = tiny()
    theta, module = start(objective), objective.theta()
    train(objective, theta, learning_rate=0.1, steps=5)
    assert_close(theta, start(objective), rtol=0, atol=0)
    assert_close(objective.theta(), module, rtol=0, atol=0)


def test_a_run_stops_at_the_gradient_asked_for() -> None:
    objective = tiny()
    run = train(objective, start(objective), learning_rate=0.2, steps=5000, optimizer="gd", stop_gradient_l1=0.05)
    assert run.status == "stopped"
    assert run.last_step < 5000
    assert float(run.gradient_l1[-1]) <= 0.05
    assert int(run.steps[-1]) == run.last_step


def test_divergence_is_a_status_with_a_finite_point() -> None:
    objective = Objective(nn.Linear(1, 1).double(), nn.MSELoss(), (randn(5, 1), randn(5, 1, seed=2)))
    run = train(objective, start(objective), learning_rate=100.0, steps=1000, optimizer="gd")
    assert run.status == "diverged"
    assert bool(torch.isfinite(run.theta).all())
    assert bool(torch.isfinite(run.losses).all())
    assert math.isfinite(float(objective.value(run.theta)))


def test_a_start_that_is_not_finite_diverges_at_once() -> None:
    objective = tiny()
    run = train(objective, torch.full((objective.num_params,), torch.nan).double(), learning_rate=1.0, steps=3)
    assert (run.status, len(run.steps), run.last_step) == ("diverged", 0, 0)


def test_memory_is_bounded_and_the_smallest_gradients_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thalweg.training.single._THETA_BYTES", 1)
    objective = tiny()
    run = train(objective, start(objective), learning_rate=0.01, steps=300, record=1)
    assert len(run.steps) == 301
    assert len(run.thetas) <= 16
    assert_close(
        objective.gradient(run.thetas).abs().sum(1), run.gradient_l1[torch.searchsorted(run.steps, run.theta_steps)]
    )
    assert int(run.gradient_l1.argmin()) in run.theta_steps.tolist()


def test_progress_is_told_at_every_record() -> None:
    objective = tiny()
    told: list[tuple[int, float]] = []
    run = train(
        objective,
        start(objective),
        learning_rate=0.01,
        steps=10,
        record=[3, 5],
        progress=lambda step, loss: told.append((step, loss)),
    )
    assert [step for step, _ in told] == [0, 3, 5, 10]
    assert [loss for _, loss in told] == run.losses.tolist()


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 10**6))
def test_a_logarithmic_record_is_dense_in_every_decade(steps: int) -> None:
    recorded = sorted(recording_steps(steps, "log"))
    assert recorded[0] == 0
    assert recorded[-1] == steps
    assert len(recorded) <= 52 + 50 * math.log10(steps)
    for a, b in itertools.pairwise(recorded[1:]):
        assert b <= max(a + 1, 1.1 * a)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Expected optimizer 'adam', 'gd' or a class.*Got 'sgd'"):
        train(tiny(), start(tiny()), learning_rate=0.1, steps=1, optimizer="sgd")


def test_a_learning_rate_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Expected a positive learning rate\. Got 0\.0"):
        train(tiny(), start(tiny()), learning_rate=0.0, steps=1)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Expected at least one step\. Got 0"):
        train(tiny(), start(tiny()), learning_rate=0.1, steps=0)


@pytest.mark.parametrize(
    ("record", "match"),
    [
        (0, r"Expected to record every n-th step, n ≥ 1\. Got 0"),
        ([3, 12], r"Expected steps to record between 0 and 10\. Got 3 … 12"),
        ("linear", r"Expected record='log', an interval or steps\. Got 'linear'"),
    ],
)
def test_a_record_outside_the_run_is_refused(record: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        recording_steps(10, record)


def test_a_theta_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="Expected theta with 16 parameters"):
        train(tiny(), torch.zeros(3), learning_rate=0.1, steps=1)
