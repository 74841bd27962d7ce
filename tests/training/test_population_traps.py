"""What a hostile reader found: look-alikes of the compiled loop's landscapes, interruptions at any moment."""

import itertools
import time
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.test_population import problem, randn, same, starts
from torch import Tensor, nn
from torch.testing import assert_close

from thalweg.checkpoint import save_state
from thalweg.errors import CheckpointError, ConfigError
from thalweg.objective import Objective
from thalweg.training import engines, train, train_population
from thalweg.training.recognised import recognise


class Clipped(nn.Module):
    """A two-layer net whose outputs are clipped far out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).clamp(-30, 30)


def one_output(activation: nn.Module, loss: Any, targets: Tensor) -> Objective:
    net = nn.Sequential(nn.Linear(1, 4), activation, nn.Linear(4, 1)).double()
    return Objective(net, loss, (torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1), targets))


LINE = torch.linspace(0, 1, 9, dtype=torch.float64).unsqueeze(1)


@pytest.mark.parametrize(
    "objective",
    [
        one_output(nn.Tanh(), nn.BCEWithLogitsLoss(), LINE),
        one_output(nn.Tanh(), nn.L1Loss(), LINE),
        one_output(nn.Tanh(), nn.HuberLoss(), LINE),
        one_output(nn.Tanh(), lambda o, t: -((o - t) ** 2).mean(), LINE),
        one_output(nn.ReLU6(), nn.MSELoss(), LINE),
        one_output(nn.Tanh(), nn.SmoothL1Loss(beta=20.0), LINE),
        Objective(Clipped(), nn.MSELoss(), (LINE, LINE)),
    ],
    ids=["bce", "l1", "huber", "negative", "relu6", "smooth l1", "clipped"],
)
def test_look_alikes_are_not_taken_for_the_compiled_loops_landscape(objective):
    assert recognise(objective) is None
    assert train_population(objective, starts(objective), learning_rate=0.01, steps=3).engine == "func"


def test_a_landscape_that_differs_only_where_training_goes_is_run_again_by_func(monkeypatch):
    monkeypatch.setattr("thalweg.training.recognised._SCALES", (0.1, 0.1, 0.1))
    net = Clipped()
    objective = Objective(net, lambda o, t: ((o - t) ** 2).mean(), (LINE, 100 + LINE))
    options: Any = {"learning_rate": 0.02, "steps": 200}
    run = train_population(objective, starts(objective), **options)
    assert run.engine == "func"
    same(run, train_population(objective, starts(objective), engine="func", **options), atol=0.0)
    with pytest.raises(ConfigError, match="differs where the training went"):
        train_population(objective, starts(objective), engine="compiled", **options)


@pytest.mark.parametrize("kind", [engines.Compiled, engines.Func])
@pytest.mark.parametrize("call", [2, 3, 4, 5])
def test_an_interruption_in_the_middle_of_a_call_leaves_a_state_that_ends_the_same(kind, call, tmp_path, monkeypatch):
    objective = problem("tanh", "mse")
    thetas = starts(objective, 20)
    options: Any = {"learning_rate": 0.01, "steps": 60, "optimizer": "adam", "engine": kind.name, "record": 20}
    whole = train_population(objective, thetas, **options)
    real, calls = kind.advance, itertools.count()

    def torn(self, state, how, begin, end, order, *, moves):
        if next(calls) == call:
            real(self, state, how, begin, begin + max(1, (end - begin) // 2), order, moves=moves)
            raise KeyboardInterrupt
        real(self, state, how, begin, end, order, moves=moves)

    monkeypatch.setattr(kind, "advance", torn)
    with pytest.raises(KeyboardInterrupt):
        train_population(objective, thetas, keep=tmp_path, **options)
    assert len(list(tmp_path.iterdir())) == 1
    same(train_population(objective, thetas, keep=tmp_path, **options), whole, atol=0.0)


def test_other_data_are_another_training_even_where_the_first_start_does_not_see_them(tmp_path):
    x = torch.linspace(-1, 1, 7, dtype=torch.float64).unsqueeze(1)
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    thetas = torch.cat([torch.zeros(1, 10, dtype=torch.float64), randn(1, 10)])
    losses = []
    for inputs in (x, 2 * x):
        objective = Objective(net, nn.MSELoss(), (inputs, x.sin()))
        run = train_population(objective, thetas, learning_rate=0.1, steps=30, keep=tmp_path)
        alone = train_population(objective, thetas, learning_rate=0.1, steps=30)
        same(run, alone, atol=0.0)
        losses.append(float(run.losses[1, -1]))
    assert losses[0] != losses[1]


def test_a_single_trial_in_half_precision_is_kept_too(tmp_path):
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).bfloat16()
    objective = Objective(net, nn.MSELoss(), (LINE.bfloat16(), LINE.bfloat16()))
    options: Any = {"learning_rate": 0.1, "steps": 3, "keep": tmp_path}
    one = train_population(objective, objective.theta().unsqueeze(0), **options)
    same(train_population(objective, objective.theta().unsqueeze(0), **options), one, atol=0.0)


def test_a_kept_file_without_its_numbers_is_passed_over(tmp_path):
    from safetensors.torch import load_file

    objective = problem("tanh", "mse")
    options: Any = {"learning_rate": 0.05, "steps": 20, "keep": tmp_path}
    one = train_population(objective, starts(objective), **options)
    (file,) = tmp_path.iterdir()
    save_state(file, load_file(file))
    same(train_population(objective, starts(objective), **options), one, atol=0.0)


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path):
    objective = problem("tanh", "mse")
    (tmp_path / "file").write_text("")
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match="Expected a place"):
        train_population(
            objective,
            starts(objective),
            learning_rate=0.01,
            steps=10**9,
            record=10**8,
            keep=tmp_path / "file" / "folder",
        )
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("engine", ["compiled", "func"])
def test_the_last_finite_point_of_a_diverged_trial_is_that_of_its_step(engine):
    objective = problem("relu", "mse")
    thetas = starts(objective)
    run = train_population(objective, thetas, learning_rate=3.0, steps=60, record=1, engine=engine)
    assert "diverged" in run.statuses
    for index, status in enumerate(run.statuses):
        if status == "diverged":
            last = int(run.last_steps[index])
            alone = train(objective, thetas[index], learning_rate=3.0, steps=max(last, 1), optimizer="gd", record=1)
            assert_close(run.thetas[index], alone.thetas[last], rtol=1e-6, atol=0)
            assert bool(torch.isfinite(run.losses[index, last]))
            assert bool(torch.isnan(run.losses[index, last + 1]))


class Branching(nn.Module):
    """Its flow depends on its weights, which vmap cannot batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if float(self.weight.detach()) > 0 else -x * self.weight


def test_mini_batches_work_where_vmap_does_not_and_refuse_train_mode():
    x = torch.ones(6, 1, dtype=torch.float64)
    options: Any = {"learning_rate": 0.1, "steps": 60, "optimizer": "sgd", "batch_size": 2}
    thetas = torch.tensor([[0.5], [-0.5]], dtype=torch.float64)
    run = train_population(Objective(Branching(), nn.MSELoss(), (x, 2 * x)), thetas, **options)
    assert_close(run.thetas.abs(), torch.full_like(thetas, 2.0), rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="eval mode"):
        train_population(Objective(Branching(), nn.MSELoss(), (x, 2 * x), mode="train"), thetas, **options)


@pytest.mark.parametrize("bound", [float("nan"), -1.0])
def test_a_bound_to_stop_at_is_checked(bound):
    objective = problem("tanh", "mse")
    with pytest.raises(ConfigError, match="bound of at least 0"):
        train_population(objective, starts(objective), learning_rate=0.1, steps=2, stop_gradient_l1=bound)


def test_without_a_place_for_machine_code_functions_are_compiled_all_the_same(monkeypatch):
    functions = pytest.importorskip("thalweg.compiled.functions", exc_type=ImportError)
    asked: list[bool] = []
    real = functions._njit

    def placeless(**options: Any) -> Any:
        asked.append(options["cache"])
        if options["cache"]:
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(functions, "_njit", placeless)
    assert functions.compiled(_double)(np.float64(2.0)) == 4.0
    assert asked == [True, False]


def _double(x: float) -> float:
    return 2 * x
