"""Mini-batch training against the loop that a plain PyTorch script has, and what an interruption leaves."""

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from thalweg.errors import CheckpointError, ConfigError, DataError, ShapeError
from thalweg.objective import Objective
from thalweg.training import Fit, fit, learning_rate_factors, minibatch
from thalweg.training.naming import named
from thalweg.training.resumption import landscape_name


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


INPUTS = torch.randn(22, 3, generator=seeded(5), dtype=torch.float64)
LABELS = torch.randint(0, 4, (22,), generator=seeded(6))


def mixed_net() -> nn.Module:
    """Statistics, dropout, and a parameter that is not trained."""
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 4)).double()
    with torch.no_grad():
        for place, parameter in enumerate(net.parameters()):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=seeded(place), dtype=torch.float64))
    net[1].bias.requires_grad_(False)
    return net


def landscape(net: nn.Module | None = None, **options: Any) -> Objective:
    return Objective(net or mixed_net(), nn.CrossEntropyLoss(), (INPUTS, LABELS), **options)


def state(result: Fit) -> dict[str, Tensor]:
    return {"theta": result.theta, "losses": result.losses, **result.buffers}


def scripted(net: nn.Module, epochs: int, batch_size: int, seed: int) -> tuple[nn.Module, list[float]]:
    """Train as the paper's code does, step by step, with the update of SGD written out."""
    net, generator = copy.deepcopy(net).train(), seeded(seed)
    parameters = [p for p in net.parameters() if p.requires_grad]
    velocities = [torch.zeros_like(p) for p in parameters]
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        for epoch in range(epochs):
            alpha = epoch / epochs
            factor = 1.0 if alpha <= 0.5 else 1.0 - (alpha - 0.5) / 0.4 * 0.99 if alpha <= 0.9 else 0.01
            order, total = torch.randperm(len(LABELS), generator=generator), 0.0
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                loss = functional.cross_entropy(net(INPUTS[rows]), LABELS[rows])
                gradients = torch.autograd.grad(loss, parameters)
                total += float(loss.detach()) * len(rows)
                with torch.no_grad():
                    for p, v, g in zip(parameters, velocities, gradients, strict=True):
                        v.mul_(0.9).add_(g + 1e-4 * p)
                        p.sub_(0.01 * factor * v)
            losses.append(total / len(order))
    return net, losses


def test_it_is_the_loop_of_the_papers_code() -> None:
    objective = landscape()
    found = fit(objective, objective.theta(), epochs=10, batch_size=4, generator=seeded(7))
    net, losses = scripted(mixed_net(), 10, 4, 7)
    assert_close(found.theta, objective.theta(net), rtol=1e-12, atol=1e-12)
    assert_close(found.buffers, dict(net.named_buffers()), rtol=1e-12, atol=1e-12)
    assert_close(found.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert (found.status, found.epochs, found.buffers["1.num_batches_tracked"]) == ("finished", 10, 60)


def by_torch(name: str) -> Callable[..., torch.optim.Optimizer]:
    options: dict[str, Any] = {"weight_decay": 1e-4} if name == "Adam" else {}
    return lambda parameters, rate: getattr(torch.optim, name)(parameters, lr=rate, **options)


@pytest.mark.parametrize(("name", "optimizer", "rate"), [("Adam", "adam", 1e-3), ("RMSprop", None, 0.02)])
def test_other_optimizers_are_those_of_torch(name: str, optimizer: str | None, rate: float) -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    objective = landscape(net)
    given_rate = {} if optimizer else {"learning_rate": rate}
    chosen = optimizer or getattr(torch.optim, name)
    found = fit(
        objective,
        objective.theta(),
        epochs=3,
        generator=seeded(),
        optimizer=chosen,
        schedule="constant",
        **given_rate,
    )
    stepper = by_torch(name)(net.parameters(), rate)
    generator = seeded()
    torch.randint(2**62, (1,), generator=generator)
    for _ in range(3):
        order = torch.randperm(len(LABELS), generator=generator)
        stepper.zero_grad()
        functional.cross_entropy(net(INPUTS[order]), LABELS[order]).backward()
        stepper.step()
    assert_close(found.theta, objective.theta(net), rtol=1e-12, atol=1e-12)


@settings(max_examples=15)
@given(batch_size=st.integers(1, 30), reduction=st.sampled_from(["mean", "sum"]))
def test_what_it_reports_is_the_landscape_if_nothing_moves(batch_size: int, reduction: str) -> None:
    net = nn.Linear(3, 4).double()
    objective = Objective(net, nn.CrossEntropyLoss(reduction=reduction), (INPUTS, LABELS))
    found = fit(
        objective, objective.theta(), epochs=1, batch_size=batch_size, generator=seeded(), learning_rate=1e-300
    )
    assert_close(found.losses[0], objective.value(objective.theta()), rtol=1e-12, atol=0.0)
    right = (objective.outputs(objective.theta()).argmax(1) == LABELS).double().mean()
    assert found.accuracies is not None
    assert_close(found.accuracies[0], right, rtol=1e-12, atol=0.0)


def test_nothing_of_the_users_is_touched_and_the_generator_decides_all() -> None:
    net = mixed_net()
    objective, before = landscape(net), copy.deepcopy(net.state_dict())
    inner, theta = copy.deepcopy(objective.module.state_dict()), objective.theta()
    start, world = theta.clone(), torch.get_rng_state()
    one, two, other = (fit(objective, theta, epochs=2, batch_size=8, generator=seeded(s)) for s in (1, 1, 2))
    assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert_close(objective.module.state_dict(), inner, rtol=0, atol=0)
    assert_close(theta, start, rtol=0, atol=0)
    assert_close(torch.get_rng_state(), world, rtol=0, atol=0)
    assert_close(state(one), state(two), rtol=0, atol=0)
    assert not torch.equal(one.theta, other.theta)
    assert all(p.grad is None for p in net.parameters())


class Breaks:
    """Augments by noise, and is interrupted at one of its calls."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.calls = at, 0

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return inputs + 0.1 * torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", torch.optim.RMSprop])
@pytest.mark.parametrize("every", [0.0, 1.0])
def test_an_interrupted_training_goes_on_and_ends_the_same_to_the_bit(
    optimizer: Any, every: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minibatch, "_KEPT_EVERY", every)
    objective = landscape()
    options: dict[str, Any] = {"epochs": 6, "batch_size": 8, "optimizer": optimizer, "learning_rate": 0.02}

    def run(augment: Breaks, keep: Path | None) -> tuple[Fit, Tensor]:
        generator = seeded(3)
        result = fit(objective, objective.theta(), generator=generator, augment=augment, keep=keep, **options)
        return result, generator.get_state()

    undisturbed, ending = run(Breaks(), None)
    world = torch.get_rng_state()
    for moment in (8, 7):  # in the middle of the third epoch, then of a later one
        with pytest.raises(KeyboardInterrupt):
            run(Breaks(moment), tmp_path)
    assert_close(torch.get_rng_state(), world, rtol=0, atol=0)
    last = Breaks()
    resumed, resumed_ending = run(last, tmp_path)
    assert last.calls == (6 if every == 0.0 else 12)  # of 18; each beginning keeps its first epoch at least
    assert_close(state(resumed), state(undisturbed), rtol=0, atol=0)
    assert_close(resumed.accuracies, undisturbed.accuracies, rtol=0, atol=0)
    assert_close(resumed_ending, ending, rtol=0, atol=0)
    again, ending_again = run(Breaks(1), tmp_path)  # finished: no step is taken
    assert_close(state(again), state(undisturbed), rtol=0, atol=0)
    assert_close(ending_again, ending, rtol=0, atol=0)


def test_what_is_kept_belongs_to_its_training_alone(tmp_path: Path) -> None:
    objective = landscape()
    theta = objective.theta()
    fit(objective, theta, epochs=2, generator=seeded(), keep=tmp_path)
    for change in (
        {"epochs": 3},
        {"momentum": 0.5},
        {"weight_decay": 0.0},
        {"schedule": "cosine"},
        {"batch_size": 5},
    ):
        options: dict[str, Any] = {"epochs": 2, **change}
        kept = fit(objective, theta, generator=seeded(), keep=tmp_path, **options)
        assert_close(state(kept), state(fit(objective, theta, generator=seeded(), **options)), rtol=0, atol=0)
    fit(objective, theta, epochs=2, generator=seeded(1), keep=tmp_path)
    other = Objective(mixed_net(), nn.CrossEntropyLoss(), (INPUTS + 1, LABELS))
    fit(other, theta, epochs=2, generator=seeded(), keep=tmp_path)
    assert len(list(tmp_path.iterdir())) == 8


def test_what_shows_in_train_mode_alone_and_the_body_of_a_function_tell_trainings_apart() -> None:
    def name(net: nn.Module) -> str:
        objective = landscape(net)
        return landscape_name(objective, objective.theta(), ())

    assert name(mixed_net()) == name(mixed_net())
    changed = [mixed_net() for _ in range(3)]
    for part in changed[0].modules():
        part.__dict__.update({"p": 0.5} if isinstance(part, nn.Dropout) else {})
    for part in changed[1].modules():
        part.__dict__.update({"momentum": 0.5} if isinstance(part, nn.BatchNorm1d) else {})
    changed[2].noise = 0.5  # type: ignore[assignment]  # a number that a module of the user's may use
    assert len({name(net) for net in [mixed_net(), *changed]}) == 4


BODIES = ("return inputs + SCALE", "return inputs - SCALE", "return helper(inputs)")


def test_functions_count_with_their_bodies_and_what_they_use_of_their_file() -> None:
    def made(body: str, scale: float = 0.1, helper: str = "x", name: str = "change") -> str:
        space: dict[str, Any] = {"SCALE": scale, "__name__": "users"}
        exec(f"def helper(x):\n    return {helper}\ndef {name}(inputs):\n    {body}", space)
        return named(space[name])

    found = [made(body) for body in BODIES] + [made(BODIES[0], 0.2), made(BODIES[2], helper="2 * x")]
    assert len(set(found)) == 5
    assert found[0] == made(BODIES[0], helper="2 * x")
    assert made("return {'a', 'b'} and [x for x in inputs]") == made("return {'a', 'b'} and [x for x in inputs]")
    assert named(functools.partial(Breaks, at=1)) != named(functools.partial(Breaks, at=2))
    assert named(Breaks()) == named(Breaks(3)) != named(Breaks.__call__)
    assert named(torch.optim.SGD) == "torch.optim.sgd.SGD"
    times = lambda y: lambda x: y * x
    assert len(set(map(named, (lambda x: x, lambda x: 2 * x, times(3), times(4))))) == 4


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_file_is_passed_over(content: bytes | None, tmp_path: Path) -> None:
    objective = landscape()
    expected = fit(objective, objective.theta(), epochs=2, generator=seeded(), keep=tmp_path)
    (file,) = tmp_path.iterdir()
    if content is None:
        torch.save({"tensors": {}, "losses": [1.0]}, file)
    else:
        file.write_bytes(content)
    found = fit(objective, objective.theta(), epochs=2, generator=seeded(), keep=tmp_path)
    assert_close(state(found), state(expected), rtol=0, atol=0)


def test_a_divergence_leaves_the_last_finite_state(tmp_path: Path) -> None:
    objective = landscape()
    theta = objective.theta()
    options: dict[str, Any] = {"epochs": 4, "generator": seeded(), "batch_size": 8, "keep": tmp_path}
    wild = lambda share: 1.0 if share < 0.5 else 1e200
    found = fit(objective, theta, schedule=wild, **options)
    calm = fit(objective, theta, schedule="constant", epochs=4, generator=seeded(), batch_size=8)
    assert (found.status, found.epochs) == ("diverged", 2)
    assert_close(found.losses, calm.losses[:2], rtol=0, atol=0)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state(found).values())
    assert not torch.equal(found.theta, theta)
    again = fit(objective, theta, schedule=wild, **options | {"generator": seeded()})
    assert again.status == "diverged"
    assert_close(state(again), state(found), rtol=0, atol=0)
    at_once = fit(objective, theta, learning_rate=1e300, **options)
    assert (at_once.status, at_once.epochs, at_once.accuracies) == ("diverged", 0, None)
    assert_close(at_once.theta, theta, rtol=0, atol=0)
    assert_close(at_once.buffers, dict(objective.module.named_buffers()), rtol=0, atol=0)


def test_a_sample_that_is_left_over_alone_does_not_stop_a_batch_norm() -> None:
    objective = landscape()
    found = fit(objective, objective.theta(), epochs=1, batch_size=7, generator=seeded())
    assert int(found.buffers["1.num_batches_tracked"]) == 3  # 22 = 3·7 + 1
    plain = landscape(nn.Linear(3, 4).double())
    assert fit(plain, plain.theta(), epochs=1, batch_size=7, generator=seeded()).status == "finished"


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_batches_of_a_loader_named_inputs_and_numbers_are_taken() -> None:
    net = Named().double()
    targets = INPUTS.sum(1, keepdim=True)
    for data in (
        ({"x": INPUTS}, targets),
        ((INPUTS,), targets),
        DataLoader(TensorDataset(INPUTS, targets), batch_size=9),
    ):
        objective = Objective(net, nn.MSELoss(), data)
        found = fit(objective, objective.theta(), epochs=20, batch_size=4, learning_rate=0.05, generator=seeded())
        assert found.accuracies is None
        assert found.losses[-1] < 0.01 < found.losses[0]


def test_targets_that_do_not_count_are_left_out() -> None:
    net = nn.Linear(3, 4).double()
    labels = torch.where(torch.arange(22) < 20, -100, LABELS)
    objective = Objective(net, nn.CrossEntropyLoss(), (INPUTS, labels))
    found = fit(objective, objective.theta(), epochs=2, batch_size=1, generator=seeded())
    assert bool(torch.isfinite(found.losses).all())
    none = Objective(net, nn.CrossEntropyLoss(), (INPUTS, torch.full_like(labels, -100)))
    with pytest.raises(DataError, match="Expected at least one mini-batch with a target that counts"):
        fit(none, none.theta(), epochs=1, generator=seeded())


def test_progress_is_told_at_the_end_of_every_epoch() -> None:
    objective, told = landscape(), []
    fit(objective, objective.theta(), epochs=4, generator=seeded(), progress=lambda *words: told.append(words))
    assert [share for share, _ in told] == [0.25, 0.5, 0.75, 1.0]
    assert told[1][1].startswith("epoch 2 of 4, loss ")


def test_the_result_is_written_into_a_module_that_plain_torch_saves() -> None:
    objective = landscape()
    found = fit(objective, objective.theta(), epochs=2, generator=seeded())
    fresh = mixed_net().float()
    found.write(fresh)
    other = mixed_net()
    other.load_state_dict(fresh.state_dict(), strict=True)
    assert_close(objective.theta(other), found.theta, rtol=1e-6, atol=1e-6)
    assert_close(other[1].running_var, found.buffers["1.running_var"], rtol=1e-6, atol=1e-6)
    with pytest.raises(ShapeError, match=r"Expected a module with a buffer '1\.running_mean'"):
        found.write(nn.Linear(3, 4))


def test_schedules() -> None:
    paper = learning_rate_factors("paper", 20)
    assert_close(paper[:11], (1.0,) * 11)
    assert paper[14] == pytest.approx(1 - 0.5 * 0.99)
    assert paper[18:] == pytest.approx((0.01, 0.01))
    assert learning_rate_factors("constant", 2) == (1.0, 1.0)
    assert learning_rate_factors("cosine", 2) == pytest.approx((1.0, 0.5))
    assert learning_rate_factors(lambda share: 2 * share, 2) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "Expected at least one epoch. Got 0"),
        ({"batch_size": 0}, "Expected a batch size of at least 1. Got 0"),
        ({"optimizer": "lion"}, "Expected optimizer 'sgd', 'adam' or a class"),
        ({"optimizer": torch.optim.RMSprop}, "Expected a positive learning rate. Got None"),
        ({"learning_rate": math.nan}, "Expected a positive learning rate. Got nan"),
        ({"momentum": -0.1}, "Expected a momentum that is not negative"),
        ({"weight_decay": math.inf}, "Expected a weight decay that is not negative"),
        ({"schedule": "step"}, "Expected a schedule out of paper, constant, cosine"),
        ({"schedule": lambda share: -1.0}, "Expected a schedule of factors that are finite"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], message: str) -> None:
    objective = landscape()
    with pytest.raises(ConfigError, match=message):
        fit(objective, objective.theta(), **{"epochs": 1, "generator": seeded(), **options})


def test_wrong_points_and_places_are_refused(tmp_path: Path) -> None:
    objective = landscape()
    with pytest.raises(ShapeError, match=r"Expected theta of shape \(\d+,\)"):
        fit(objective, torch.zeros(3, dtype=torch.float64), epochs=1, generator=seeded())
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Expected a place that can be written"):
        fit(objective, objective.theta(), epochs=1, generator=seeded(), keep=tmp_path / "file")
