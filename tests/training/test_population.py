"""Both engines against each other, against one training at a time, and what an interruption leaves."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from thalweg.errors import CheckpointError, ConfigError, ShapeError
from thalweg.objective import Objective
from thalweg.training import PopulationRun, population, stagnation, train, train_population
from thalweg.training.engines import batch_orders

ACTIVATIONS = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "relu": nn.ReLU, "gelu": nn.GELU}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs.softmax(1) - nn.functional.one_hot(targets, outputs.shape[1])) ** 2).mean()


def problem(activation: str, loss: str, *, biases: tuple[bool, bool] = (True, True), width: int = 3) -> Objective:
    inputs = randn(23, 2, seed=1)
    net = nn.Sequential(
        nn.Linear(2, width, bias=biases[0]), ACTIVATIONS[activation](), nn.Linear(width, 3, bias=biases[1])
    ).double()
    losses: dict[str, tuple[Any, Tensor]] = {
        "mse": (nn.MSELoss(), randn(23, 3, seed=2)),
        "softmax_mse": (softmax_mse, torch.arange(23) % 3),
        "cross_entropy": (nn.CrossEntropyLoss(), torch.arange(23) % 3),
    }
    return Objective(net, losses[loss][0], (inputs, losses[loss][1]))


def starts(objective: Objective, count: int = 3) -> Tensor:
    return 0.6 * randn(count, objective.num_params, seed=7)


def same(one: PopulationRun, two: PopulationRun, *, atol: float = 1e-12) -> None:
    for name in ("thetas", "losses", "gradient_l1", "least_thetas", "least_losses", "least_l1"):
        assert_close(getattr(one, name), getattr(two, name), rtol=0, atol=atol, equal_nan=True, msg=name)
    assert torch.equal(one.least_steps, two.least_steps)
    assert torch.equal(one.last_steps, two.last_steps)
    assert one.statuses == two.statuses


@pytest.mark.parametrize(
    ("activation", "loss", "optimizer", "biases"),
    [
        ("tanh", "mse", "gd", (True, False)),
        ("sigmoid", "softmax_mse", "adam", (True, True)),
        ("relu", "cross_entropy", "gd", (False, True)),
        ("gelu", "cross_entropy", "adam", (False, False)),
    ],
)
def test_both_engines_give_the_same_thousand_steps(activation, loss, optimizer, biases):
    pytest.importorskip("numba")
    objective = problem(activation, loss, biases=biases)
    # A rate at which the way is not chaotic: where it is (Adam at 0.02 here), any two roundings part after 500 steps.
    options: Any = {"learning_rate": 0.002, "steps": 1000, "optimizer": optimizer, "record": 250}
    one = train_population(objective, starts(objective), engine="compiled", **options)
    two = train_population(objective, starts(objective), engine="func", **options)
    assert (one.engine, two.engine) == ("compiled", "func")
    same(one, two)


@pytest.mark.parametrize("case", list(itertools.product(ACTIVATIONS, ("mse", "softmax_mse", "cross_entropy"))))
def test_the_compiled_loop_is_one_training_at_a_time(case):
    pytest.importorskip("numba")
    objective = problem(*case)
    thetas = starts(objective, 2)
    for optimizer in ("gd", "adam"):
        run = train_population(
            objective, thetas, learning_rate=0.01, steps=200, optimizer=optimizer, engine="compiled", record=100
        )
        for index, theta in enumerate(thetas):
            alone = train(objective, theta, learning_rate=0.01, steps=200, optimizer=optimizer, record=100)
            assert_close(run.thetas[index], alone.theta, rtol=0, atol=1e-12)
            assert_close(run.losses[index], alone.losses, rtol=0, atol=1e-12)
            assert_close(run.gradient_l1[index], alone.gradient_l1, rtol=0, atol=1e-12)


def test_one_output_and_many_trials_take_the_fast_way_and_agree():
    pytest.importorskip("numba")
    x = torch.linspace(-3, 3, 17, dtype=torch.float64).unsqueeze(1)
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    objective = Objective(net, lambda o, t: ((o - t) ** 2).sum() / 2, (x, x.sin()), reduction="sum")
    thetas = starts(objective, 37)
    options: Any = {"learning_rate": 0.002, "steps": 60, "record": 20}
    same(
        train_population(objective, thetas, engine="compiled", workers=1, **options),
        train_population(objective, thetas, engine="func", **options),
    )
    one = train_population(objective, thetas, engine="compiled", workers=1, **options)
    two = train_population(objective, thetas, engine="compiled", workers=3, **options)
    same(one, two, atol=0.0)


def test_any_module_runs_by_func_and_is_one_training_at_a_time():
    images, classes = randn(9, 1, 6, 6), torch.arange(9) % 3
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.Flatten(), nn.Linear(32, 3)).double()
    objective = Objective(net, nn.CrossEntropyLoss(), (images, classes), batch_size=4)
    thetas = 0.3 * randn(2, objective.num_params)
    run = train_population(objective, thetas, learning_rate=0.01, steps=30, optimizer="adam")
    assert run.engine == "func"
    for index, theta in enumerate(thetas):
        alone = train(objective, theta, learning_rate=0.01, steps=30, optimizer="adam")
        assert_close(run.thetas[index], alone.theta, rtol=0, atol=1e-12)


def test_a_module_that_vmap_cannot_run_is_looped_over():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight if float(self.weight.detach()) > 0 else -x * self.weight

    objective = Objective(Branching(), nn.MSELoss(), (torch.ones(3, 1), 2 * torch.ones(3, 1)))
    run = train_population(objective, torch.tensor([[0.5], [-0.5]]).double(), learning_rate=0.1, steps=60)
    assert_close(run.thetas.abs(), torch.tensor([[2.0], [2.0]]).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ["compiled", "func"])
def test_the_least_gradient_is_looked_for_at_every_step(engine):
    objective = problem("tanh", "mse")
    thetas = starts(objective)
    options: Any = {"learning_rate": 0.4, "steps": 90, "optimizer": "adam", "engine": engine}
    coarse = train_population(objective, thetas, record=30, **options)
    fine = train_population(objective, thetas, record=1, **options)
    for trial in range(3):
        for stretch in range(3):
            norms = fine.gradient_l1[trial, 30 * stretch : 30 * stretch + 30]
            assert int(coarse.least_steps[trial, stretch]) == 30 * stretch + int(norms.argmin())
            assert float(coarse.least_l1[trial, stretch]) == float(norms.min())
            there = objective.gradient(coarse.least_thetas[trial, stretch]).abs().sum()
            assert_close(there, norms.min(), rtol=1e-9, atol=0)
    run = coarse.trial(1)
    assert run.steps.tolist() == sorted(set(run.steps.tolist()))
    assert {0, 30, 60, 90} <= set(run.steps.tolist())
    assert stagnation(run, max_slope=10.0)[0].gradient_l1 == float(coarse.least_l1[1].min())


def test_short_memory_joins_neighbouring_stretches(monkeypatch):
    objective = problem("tanh", "mse")
    options: Any = {"learning_rate": 0.1, "steps": 40, "record": 2}
    whole = train_population(objective, starts(objective), **options)
    monkeypatch.setattr("thalweg.training.kept._THETA_BYTES", 1)
    joined = train_population(objective, starts(objective), **options)
    assert joined.least_steps.shape[1] <= 5 < whole.least_steps.shape[1]
    assert_close(joined.least_l1.min(1).values, whole.least_l1.min(1).values, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["compiled", "func"])
def test_a_trial_that_diverges_ends_alone(engine):
    objective = problem("relu", "mse")
    thetas = starts(objective)
    thetas[1] *= 1e80
    run = train_population(objective, thetas, learning_rate=0.01, steps=40, record=10, engine=engine)
    assert run.statuses == ("finished", "diverged", "finished")
    assert bool(torch.isfinite(run.thetas).all())
    assert bool(torch.isnan(run.losses[1, -1]))
    assert bool(torch.isfinite(run.losses[[0, 2]]).all())
    assert run.trial(1).status == "diverged"
    calm = train_population(objective, thetas[[0, 2]], learning_rate=0.01, steps=40, record=10, engine=engine)
    assert_close(run.thetas[[0, 2]], calm.thetas, rtol=0, atol=1e-13)


@pytest.mark.parametrize("engine", ["compiled", "func"])
def test_a_trial_stops_at_the_bound_asked_for(engine):
    objective = problem("tanh", "mse", width=1)
    run = train_population(
        objective, starts(objective), learning_rate=0.5, steps=400, engine=engine, stop_gradient_l1=3e-2, record=100
    )
    assert "stopped" in run.statuses
    for index, status in enumerate(run.statuses):
        norm = float(objective.gradient(run.thetas[index]).abs().sum())
        assert (norm <= 3e-2 * (1 + 1e-9)) == (status == "stopped")
        if status == "stopped":
            before = train(
                objective, starts(objective)[index], learning_rate=0.5, steps=int(run.last_steps[index]),
                optimizer="gd", record=1,
            )  # fmt: skip
            assert bool((before.gradient_l1[:-1] > 3e-2).all())


def test_mini_batches_are_the_same_for_both_engines_and_cover_an_epoch():
    pytest.importorskip("numba")
    for loss, options in (("cross_entropy", {"optimizer": "sgd"}), ("mse", {"optimizer": "adam"})):
        objective = problem("tanh", loss)
        both = [
            train_population(
                objective, starts(objective), learning_rate=0.02, steps=300, batch_size=5, seed=3, record=100,
                engine=engine, **options,
            )
            for engine in ("compiled", "func")
        ]  # fmt: skip
        same(*both)
    order = batch_orders(23, 5, seed=3)
    epochs = order(0, 8)
    assert all(len(set(epochs[4 * e : 4 * e + 4].flatten().tolist())) == 20 for e in (0, 1))
    assert torch.equal(order(3, 7), epochs[3:7])


@pytest.mark.parametrize(("engine", "batch_size"), [("compiled", None), ("func", None), ("compiled", 5)])
def test_an_interrupted_training_goes_on_and_ends_the_same(engine, batch_size, tmp_path, monkeypatch):
    monkeypatch.setattr(population, "_TELL_SECONDS", 0.0)
    monkeypatch.setattr(population, "_CALL_SECONDS", 0.0)
    objective = problem("tanh", "mse")
    options: Any = {"learning_rate": 0.05, "steps": 60, "optimizer": "adam", "record": 20, "engine": engine}
    options |= {"batch_size": batch_size}
    whole = train_population(objective, starts(objective), **options)

    def stop_late(step: int, rate: float) -> None:
        if step >= 31:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_population(objective, starts(objective), keep=tmp_path, progress=stop_late, **options)
    met: list[int] = []
    rest = train_population(
        objective, starts(objective), keep=tmp_path, progress=lambda step, rate: met.append(step), **options
    )
    assert min(met) > 31
    same(rest, whole, atol=0.0)
    again = train_population(objective, starts(objective), keep=tmp_path, progress=stop_late, **options)
    same(again, whole, atol=0.0)
    assert len(list(tmp_path.iterdir())) == 1


def test_other_settings_or_data_are_never_taken_for_the_same(tmp_path):
    objective = problem("tanh", "mse")
    options: Any = {"learning_rate": 0.05, "steps": 20, "keep": tmp_path}
    one = train_population(objective, starts(objective), **options)
    two = train_population(objective, starts(objective), **options | {"learning_rate": 0.06})
    assert not torch.equal(one.thetas, two.thetas)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_file_is_passed_over(tmp_path):
    objective = problem("tanh", "mse")
    options: Any = {"learning_rate": 0.05, "steps": 20, "keep": tmp_path}
    one = train_population(objective, starts(objective), **options)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-50])
    same(train_population(objective, starts(objective), **options), one, atol=0.0)


def test_what_is_wrong_is_said():
    objective = problem("tanh", "mse")
    thetas = starts(objective)
    good: Any = {"learning_rate": 0.1, "steps": 5}
    for changes in (
        {"optimizer": "lion"},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"steps": 0},
        {"record": 0},
        {"optimizer": "sgd"},
        {"batch_size": 4},
        {"optimizer": "sgd", "batch_size": 24},
        {"engine": "fast"},
        {"workers": 0},
    ):
        with pytest.raises(ConfigError, match="Expected"):
            train_population.__wrapped__(objective, thetas, **(good | changes))
    for wrong in (thetas[0], thetas[:, :-1], thetas[:0]):
        with pytest.raises(ShapeError, match="Expected starts"):
            train_population.__wrapped__(objective, wrong, **good)
    with pytest.raises(ConfigError, match="finite"):
        train_population(objective, torch.full_like(thetas, torch.nan), **good)
    with pytest.raises(ConfigError, match="trial from 0"):
        train_population(objective, thetas, **good).trial(3)
    deep = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    other = Objective(deep, nn.MSELoss(), (randn(5, 2), randn(5, 3)))
    with pytest.raises(ConfigError, match="two-layer"):
        train_population(other, other.theta().unsqueeze(0), engine="compiled", **good)
    loader = Objective(deep, nn.MSELoss(), [(randn(5, 2), randn(5, 3))] * 2)
    with pytest.raises(ConfigError, match="mini-batches"):
        train_population(loader, other.theta().unsqueeze(0), optimizer="sgd", batch_size=2, **good)


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    objective = problem("tanh", "mse")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Expected a place"):
        train_population(objective, starts(objective), learning_rate=0.1, steps=5, keep=tmp_path / "file" / "folder")
