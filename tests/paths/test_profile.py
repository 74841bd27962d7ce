"""Profiles: the objective's own values, exact ends, statistics taken anew, and the worst point."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from thalweg.errors import ConfigError, ShapeError
from thalweg.objective import Objective
from thalweg.paths.evaluation import Course, Runner
from thalweg.paths.leg import blend_leg
from thalweg.paths.path import Path
from thalweg.paths.profile import profile
from thalweg.paths.reuse import Reuse
from thalweg.paths.statistics import Statistics
from thalweg.paths.straight import linear
from thalweg.space import Space


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and buffer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(generator=generator)
        for name, b in module.named_buffers():
            if b.is_floating_point():
                b.uniform_(0.5, 1.5, generator=generator) if name.endswith("var") else b.normal_(generator=generator)
    return module.double()


def data(count: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Draw inputs and classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64), torch.arange(count) % 3


def plain(seed: int = 0) -> nn.Module:
    """Make a net without statistics."""
    return seeded(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)), seed)


def normed(seed: int = 0) -> nn.Module:
    """Make a net with BatchNorm and dropout."""
    layers = (nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 7), nn.BatchNorm1d(7))
    return seeded(nn.Sequential(*layers, nn.Linear(7, 3)), seed).eval()


def between(a: nn.Module, b: nn.Module) -> Path:
    """Go straight from one module to another."""
    space = Space.of(a)
    buffers = {"start_buffers": dict(a.named_buffers()), "end_buffers": dict(b.named_buffers())}
    return linear(space, space.theta(a), space.theta(b), **buffers)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [None, 16])
def test_losses_and_accuracies_are_those_of_each_net_alone(batch_size: int | None) -> None:
    train, test = (Objective(plain(), nn.CrossEntropyLoss(), data(n, n), batch_size=batch_size) for n in (50, 41))
    path = between(plain(), plain(1))
    found = profile(path, train, test=test, points=9)
    for objective, losses, accuracies in (
        (train, found.train_loss, found.train_accuracy),
        (test, found.test_loss, found.test_accuracy),
    ):
        assert losses is not None
        assert accuracies is not None
        for t, loss, accuracy in zip(found.times, losses, accuracies, strict=True):
            torch.testing.assert_close(loss, objective.value(path.at(float(t))), rtol=1e-12, atol=0)
            inputs, targets = data(50 if objective is train else 41, 50 if objective is train else 41)
            right = objective.apply(path.at(float(t)), inputs).argmax(1) == targets
            assert float(accuracy) == pytest.approx(float(right.double().mean()), abs=1e-15)
    assert found.status == "finite"
    assert found.worst_train_accuracy is not None
    assert found.worst_train_accuracy.accuracy == float(found.train_accuracy.min())  # type: ignore[union-attr]
    assert found.statistics == "none: no layer keeps any"


def test_the_ends_are_the_checkpoints_to_the_bit() -> None:
    a, b = normed(), normed(1)
    inputs, targets = data(60)
    objective = Objective(a, nn.CrossEntropyLoss(), (inputs, targets))
    found = profile(between(a, b), objective, points=5)
    for net, end in ((a, 0), (b, -1)):
        with torch.no_grad():
            outputs = net(inputs)
        assert float(found.train_loss[end]) == float(nn.functional.cross_entropy(outputs, targets))
        assert float(found.train_accuracy[end]) == float((outputs.argmax(1) == targets).double().mean())  # type: ignore[index]


@pytest.mark.parametrize("reuse", [True, False])
def test_statistics_are_those_of_torch(reuse: bool) -> None:
    a, b = normed(), normed(1)
    batches = [(x, y) for x, y in zip(*(part.split(20) for part in data(80)), strict=True)]
    objective = Objective(a, nn.CrossEntropyLoss(), batches)
    path = between(a, b)
    found = profile(path, objective, times=[0.3, 0.6], refine=False, statistics_samples=60, reuse=reuse)
    net = normed()
    net[3] = nn.Identity()  # type: ignore[index] - torch's update_bn switches dropout on
    for t, loss in zip((0.3, 0.6), found.train_loss[1:3], strict=True):
        path.space.write(path.at(t), net)
        update_bn([x for x, _ in batches[:3]], net)
        net.eval()
        with torch.no_grad():
            naive = torch.stack([nn.functional.cross_entropy(net(x), y) for x, y in batches]).mean()
        torch.testing.assert_close(loss, naive, rtol=1e-11, atol=0)
    assert "60 training samples" in found.statistics


def test_own_statistics_go_straight() -> None:
    a, b = normed(), normed(1)
    inputs, targets = data(30)
    found = profile(
        between(a, b), Objective(a, nn.CrossEntropyLoss(), (inputs, targets)), times=[0.25], statistics="own"
    )
    net = normed()
    both = zip(a.state_dict().items(), b.state_dict().values(), strict=True)
    net.load_state_dict({n: x.lerp(y, 0.25) if x.is_floating_point() else x for (n, x), y in both})
    place = found.times.tolist().index(0.25)
    with torch.no_grad():
        torch.testing.assert_close(found.train_loss[place], nn.functional.cross_entropy(net(inputs), targets))


def test_nothing_of_the_users_changes() -> None:
    net = normed().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    objective = Objective(net, nn.CrossEntropyLoss(), data(30))
    theta = objective.theta()
    profile(linear(objective.space, theta, -theta), objective, test=objective, points=5)
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in objective.module.state_dict().items())
    assert not any(layer.training for layer in objective.module.modules())


class Height(nn.Module):
    """One parameter, whose value is read as t."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Give t for every sample."""
        return self.t.expand(len(x))


def height(function: object) -> Objective:
    """Give a landscape of one coordinate."""
    return Objective(
        Height(), lambda outputs, _: function(outputs[0]), (torch.zeros(2, 1), torch.zeros(2)), dtype=torch.float64
    )  # type: ignore[operator]


def legs_to(*values: float) -> Path:
    """Go through values of the coordinate."""
    points = [{"t": torch.tensor([value], dtype=torch.float64)} for value in values]
    return Path(
        Space(("t",), ((1,),)),
        tuple(blend_leg(f"{k}", a, b) for k, (a, b) in enumerate(pairwise(points))),
    )


@pytest.mark.parametrize("peak", [0.123456, 0.5, 0.87, 0.004])
def test_the_worst_point_is_found_between_the_points_of_the_grid(peak: float) -> None:
    found = profile(legs_to(0.0, 1.0), height(lambda t: 1 / (1 + 30 * (t - peak) ** 2)), points=11)
    assert found.worst.is_refined
    assert abs(found.worst.t - peak) <= 1e-3
    assert found.worst.within <= 1e-3
    assert found.worst.loss == float(found.train_loss.max())
    assert len(found.times) <= 11 + 40
    coarse = profile(legs_to(0.0, 1.0), height(lambda t: 1 / (1 + 30 * (t - peak) ** 2)), points=11, refine=False)
    assert not coarse.worst.is_refined
    assert bool(coarse.is_on_grid.all())
    assert found.is_on_grid.sum() == 11


def test_a_kink_at_a_joint_is_the_worst_point() -> None:
    found = profile(legs_to(0.0, 1.0, 0.3), height(lambda t: t.abs().sqrt()), points=8)
    assert found.worst.t == 0.5
    assert found.worst.loss == 1.0
    assert found.worst.leg == 0
    assert found.barrier == pytest.approx(1.0 - 0.5 * math.sqrt(0.3), abs=1e-12)


def test_a_loss_that_is_no_number_is_the_worst_and_said() -> None:
    found = profile(legs_to(-1.0, 1.0), height(lambda t: 0 * t / (t.abs() > 0.3)), points=5)
    assert found.worst.loss == math.inf
    assert found.worst.t == 0.5
    assert not found.worst.is_refined
    assert found.status == "1 losses are not finite"


def test_a_users_own_curve_is_profiled() -> None:
    objective = Objective(plain(), nn.CrossEntropyLoss(), data(20))
    theta = objective.theta()
    found = profile(lambda times: theta * (1 + times.unsqueeze(1)), objective, points=5, refine=False)
    for t, loss in zip(found.times, found.train_loss, strict=True):
        torch.testing.assert_close(loss, objective.value(theta * (1 + float(t))), rtol=1e-12, atol=0)
    rows = found.rows()
    assert [row["t"] for row in rows] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert set(rows[0]) == {"t", "leg", "train_loss", "train_accuracy", "is_on_grid"}


def test_wrong_arguments_are_refused() -> None:
    objective = Objective(plain(), nn.CrossEntropyLoss(), data(20))
    path = between(plain(), plain(1))
    with pytest.raises(ConfigError, match="at least 2 points"):
        profile(path, objective, points=1)
    runner = Runner(objective)
    with pytest.raises(ConfigError, match="'re-estimate' or 'own'"):
        Statistics(runner, Course(path, objective), objective, "new", 10, Reuse(runner))
    with pytest.raises(ShapeError, match=r"t in \[0, 1\]"):
        profile(path, objective, times=[1.5])
    with pytest.raises(ShapeError, match="network of the path"):
        profile(between(normed(), normed(1)), objective)
    with pytest.raises(ShapeError, match="a row for each t"):
        profile(lambda times: times, objective)


def test_progress_ends_at_one() -> None:
    told: list[tuple[float, str]] = []
    objective = Objective(plain(), nn.CrossEntropyLoss(), data(20), batch_size=10)
    profile(
        between(plain(), plain(1)), objective, points=5, refine=False, progress=lambda f, what: told.append((f, what))
    )
    assert told[-1] == (1.0, "along the path")
    assert [fraction for fraction, _ in told] == sorted(fraction for fraction, _ in told)
