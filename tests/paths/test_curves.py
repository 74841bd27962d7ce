"""Trained curves: a step is the step of autograd through the combination, and the trained curve has a lower loss."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from thalweg.data import digits
from thalweg.errors import ConfigError, ShapeError
from thalweg.objective import Objective
from thalweg.paths.curves import hold_then_fall, train_curve
from thalweg.training import shuffled_batches


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(module: nn.Module | None = None, samples: int = 20) -> tuple[Objective, Tensor, Tensor]:
    x = torch.randn(samples, 3, generator=generator(1), dtype=torch.float64)
    y = torch.randn(samples, 2, generator=generator(2), dtype=torch.float64)
    module = module or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    objective = Objective(module.double(), nn.MSELoss(), (x, y))
    a, b = (torch.randn(objective.num_params, generator=generator(s), dtype=torch.float64) for s in (3, 4))
    return objective, a, b


def shares(kind: str, bends: int, t: float) -> list[float]:
    if kind == "bezier":
        return [(1 - t) ** 2, 2 * t * (1 - t), t**2]
    return [max(0.0, 1 - abs(t * (bends - 1) - j)) for j in range(bends)]


def naive(objective: Objective, a: Tensor, b: Tensor, kind: str, bends: int, steps: int) -> Tensor:
    """Garipov's training as written: autograd through Σ c_j θ_j, the penalty in the loss, torch's SGD."""
    inner = [nn.Parameter(a + (b - a) * (j / (bends - 1))) for j in range(1, bends - 1)]
    optimizer = torch.optim.SGD(inner, lr=0.05, momentum=0.9)
    draws, done = generator(), 0
    module = objective.module
    while done < steps:
        for x, y in shuffled_batches(objective, 8, draws):
            t = float(torch.rand((), generator=draws, dtype=torch.float64))
            points = [a, *inner, b]
            theta = sum(c * p for c, p in zip(shares(kind, bends, t), points, strict=True))
            assert isinstance(theta, Tensor)
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * hold_then_fall(done / steps)
            optimizer.zero_grad(set_to_none=False)
            loss = nn.functional.mse_loss(functional_call(module, objective.space.parameters(theta), (x,)), y)
            (loss + 0.5 * 0.01 * theta.square().sum()).backward()
            optimizer.step()
            done += 1
            if done == steps:
                break
    return torch.stack([a, *(p.detach() for p in inner), b])


@pytest.mark.parametrize(("kind", "bends"), [("polygon", 3), ("polygon", 5), ("bezier", 3)])
@pytest.mark.parametrize("steps", [1, 25])
def test_a_step_is_that_of_autograd_through_the_combination(kind: str, bends: int, steps: int) -> None:
    objective, a, b = small()
    settings = {"batch_size": 8, "learning_rate": 0.05, "weight_decay": 0.01, "generator": generator()}
    curve = train_curve(objective, a, b, kind=kind, bends=bends, steps=steps, **settings)
    expected = naive(objective, a, b, kind, bends, steps)
    torch.testing.assert_close(curve.bends, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "bends"), [("polygon", 4), ("bezier", 3)])
def test_the_path_runs_through_the_bends_with_exact_ends(kind: str, bends: int) -> None:
    objective, a, b = small()
    curve = train_curve(objective, a, b, kind=kind, bends=bends, epochs=2, generator=generator())
    assert torch.equal(curve.path.at(0.0), a)
    assert torch.equal(curve.path.at(1.0), b)
    for t in (0.1, 0.5, 0.85):
        expected = sum(c * p for c, p in zip(shares(kind, bends, t), curve.bends, strict=True))
        torch.testing.assert_close(curve.path.at(t), expected, rtol=1e-12, atol=1e-12)


def test_a_trained_curve_has_a_lower_loss_than_the_line() -> None:
    data = digits(dtype=torch.float32)
    nets = [trained_on(data.inputs, data.targets, seed) for seed in (0, 1)]
    objective = Objective(nets[0], nn.CrossEntropyLoss(), (data.inputs, data.targets))
    a, b = (objective.theta(net) for net in nets)
    settings = {"epochs": 6, "batch_size": 128, "learning_rate": 0.1, "generator": generator()}
    curve = train_curve(objective, a, b, **settings)
    times = torch.linspace(0, 1, 11)
    worst = float(objective.value(curve.path(times)).max())
    line = float(objective.value(torch.lerp(a, b, times.unsqueeze(1))).max())
    ends = float(max(objective.value(a), objective.value(b)))
    assert worst < ends + 0.3 * (line - ends)
    assert curve.status == "finished"
    assert len(curve.losses) == 6


def trained_on(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def test_batch_norm_trains_on_batch_statistics_and_leaves_the_module_alone() -> None:
    objective, a, b = small(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)))
    before = {name: value.clone() for name, value in objective.module.state_dict().items()}
    curve = train_curve(objective, a, b, epochs=1, batch_size=20, generator=generator())
    for name, value in objective.module.state_dict().items():
        assert torch.equal(value, before[name])
    assert not objective.module.training
    draws = generator()
    x, y = next(iter(shuffled_batches(objective, 20, draws)))
    t = float(torch.rand((), generator=draws, dtype=torch.float64))
    module = objective.module.train()
    with torch.no_grad():
        loss = nn.functional.mse_loss(
            functional_call(module, objective.space.parameters(torch.lerp(a, b, t)), (x,)), y
        )
    assert curve.losses[0] == pytest.approx(float(loss), rel=1e-12)


def test_it_begins_where_it_is_told_to() -> None:
    objective, a, b = small()
    middle = torch.randn(objective.num_params, generator=generator(5), dtype=torch.float64)
    curve = train_curve(objective, a, b, steps=1, learning_rate=1e-300, start=middle, generator=generator())
    assert torch.equal(curve.bends[1], middle)
    several = train_curve(
        objective, a, b, bends=4, steps=1, learning_rate=1e-300, start=(middle, 2 * middle), generator=generator()
    )
    assert torch.equal(several.bends, torch.stack([a, middle, 2 * middle, b]))


def test_the_same_generator_gives_the_same_curve_and_the_ends_are_not_written_to() -> None:
    objective, a, b = small()
    ends = a.clone(), b.clone()
    runs = [train_curve(objective, a, b, bends=5, epochs=2, generator=generator(9)) for _ in range(2)]
    assert torch.equal(runs[0].bends, runs[1].bends)
    assert torch.equal(a, ends[0])
    assert torch.equal(b, ends[1])


def test_a_diverging_training_says_so_and_gives_finite_bends() -> None:
    objective, a, b = small()
    curve = train_curve(objective, a, b, epochs=40, learning_rate=1e6, generator=generator())
    assert curve.status == "diverged"
    assert bool(torch.isfinite(curve.bends).all())
    assert not all(loss < float("inf") for loss in curve.losses) or len(curve.losses) < 40


def test_the_schedule_holds_falls_and_stays() -> None:
    factors = [hold_then_fall(epoch / 100) for epoch in range(100)]
    assert factors[:51] == [1.0] * 51
    assert all(x > y for x, y in pairwise(factors[50:91]))
    assert factors[90:] == [factors[90]] * 10
    assert factors[90] == pytest.approx(0.01)


def test_progress_is_told_of_every_epoch() -> None:
    objective, a, b = small()
    seen: list[tuple[int, float]] = []
    curve = train_curve(objective, a, b, epochs=3, generator=generator(), progress=lambda e, v: seen.append((e, v)))
    assert seen == [(1, curve.losses[0]), (2, curve.losses[1]), (3, curve.losses[2])]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bends": 2}, "Count both ends"),
        ({"kind": "bezier", "bends": 5}, "Count both ends"),
        ({"kind": "spline"}, "Got 'spline'"),
        ({"epochs": 0}, "at least one epoch"),
        ({"steps": 0}, "at least one epoch"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"momentum": 1.0}, "momentum in"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    objective, a, b = small()
    with pytest.raises(ConfigError, match=message):
        train_curve.__wrapped__(objective, a, b, generator=generator(), **settings)  # type: ignore[attr-defined]


def test_wrong_points_are_refused() -> None:
    objective, a, b = small()
    with pytest.raises(ShapeError, match="26 parameters"):
        train_curve(objective, a[:-1], b[:-1], epochs=1, generator=generator())
    with pytest.raises(ShapeError, match="Expected 3 free bends"):
        train_curve(objective, a, b, bends=5, epochs=1, start=a, generator=generator())
