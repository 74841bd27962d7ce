"""The elastic string: it comes to rest where loss and springs balance, at every stiffness, and copies nothing."""

import math
from collections.abc import Iterator, Mapping
from itertools import islice, pairwise
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from thalweg.checkpoint import save_state
from thalweg.data import iris
from thalweg.errors import CheckpointError, ConfigError, DataError, ShapeError
from thalweg.objective import Objective
from thalweg.paths.descent import endless_batches
from thalweg.paths.elastic import elastic_string, spring_weights
from thalweg.paths.saved import load_path, save_path
from thalweg.paths.streamed import StateFile, hollow

HESSIAN = torch.tensor([[1.5, 0.4], [0.4, 0.6]], dtype=torch.float64)
CENTRE = torch.tensor([0.3, 2.0], dtype=torch.float64)
ENDS = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)


class Plane(nn.Module):
    """A point of the plane as a network; the landscape is in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.point + 0 * x


def bowl(outputs: Tensor, targets: Tensor) -> Tensor:
    away = outputs - CENTRE
    return (0.5 * (away @ HESSIAN * away).sum(-1) + 0 * targets).mean()


def ridge(outputs: Tensor, targets: Tensor) -> Tensor:
    """A narrow barrier at x = -0.6, and a valley along y = 0."""
    x, y = outputs[..., 0], outputs[..., 1]
    return (torch.exp(-(((x + 0.6) / 0.1) ** 2)) + 0.5 * y**2 + 0 * targets).mean()


def plane(loss: Any = bowl) -> Objective:
    return Objective(Plane(), loss, (torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stacked(points: tuple[Mapping[str, Tensor], ...]) -> Tensor:
    return torch.stack([torch.cat([value.reshape(-1) for value in point.values()]) for point in points])


def line(positions: tuple[float, ...]) -> Tensor:
    return torch.stack([torch.lerp(ENDS[0], ENDS[1], position) for position in positions])


def seeded(build: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        module: nn.Module = build().double()
    return module


def second_differences(positions: tuple[float, ...]) -> np.ndarray:
    """T, and the weights with which the two ends pull: one spring of stiffness h/gap for each segment."""
    springs = [1 / ((len(positions) - 1) * (q - p)) for p, q in pairwise(positions)]
    full = np.zeros((len(positions), len(positions)))
    for k, spring in enumerate(springs):
        full[k : k + 2, k : k + 2] += spring * np.array([[1, -1], [-1, 1]])
    return full


# the naive string


def naive(
    objective: Objective, a: Tensor, b: Tensor, count: int, stiffness: float, rate: float, steps: int
) -> Tensor:
    """Stacked vectors, `autograd.grad`, and a linear system solved at every step."""
    points = torch.stack([a + (b - a) * k / (count + 1) for k in range(count + 2)])
    full = second_differences(tuple(k / (count + 1) for k in range(count + 2)))
    system = np.eye(count) + rate * stiffness * full[1:-1, 1:-1]
    for inputs, targets in islice(endless_batches(objective, 50, generator()), steps):
        fallen = points[1:-1].clone()
        for k in range(count):
            theta = points[k + 1].clone().requires_grad_()
            (slope,) = torch.autograd.grad(objective.batch_loss(theta, inputs, targets), theta)
            fallen[k] -= rate * slope
        right = fallen.numpy().copy()
        right -= rate * stiffness * (full[1:-1, [0, -1]] @ points[[0, -1]].numpy())
        points[1:-1] = torch.from_numpy(np.linalg.solve(system, right))
    return points


@pytest.mark.parametrize("stiffness", [0.0, 0.7, 10.0, 1e4])
def test_the_string_is_the_naive_one(stiffness: float) -> None:
    data = iris()
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    objective = Objective(net, nn.CrossEntropyLoss(), (data.inputs, data.targets))
    a = objective.theta()
    b = a + torch.randn(len(a), generator=generator(1), dtype=torch.float64)
    run = elastic_string(
        objective, a, b, stiffness=stiffness, cycles=2, steps=4, insert=False, between=1, generator=generator()
    )
    expected = naive(objective, a, b, 3, stiffness, 0.1, 8)
    torch.testing.assert_close(stacked(run.images), expected, rtol=1e-12, atol=1e-12)
    middles = (expected[1:] + expected[:-1]) / 2
    highest = max(float(objective.value(theta)) for theta in (*expected, *middles))
    assert run.losses[-1] == pytest.approx(highest, abs=1e-12)


def test_a_pass_over_the_data_is_the_default_cycle() -> None:
    data = iris()
    objective = Objective(seeded(lambda: nn.Linear(4, 3)), nn.CrossEntropyLoss(), (data.inputs, data.targets))
    a, b = objective.theta(), -objective.theta()
    runs = [
        elastic_string(objective, a, b, cycles=2, insert=False, steps=s, generator=generator()) for s in (None, 3)
    ]
    assert torch.equal(*(stacked(run.images) for run in runs))


# where it comes to rest


def test_on_a_bowl_it_comes_to_rest_where_loss_and_springs_balance() -> None:
    stiffness, count = 4.0, 5
    run = elastic_string(
        *(plane(), *ENDS),
        images=count,
        stiffness=stiffness,
        learning_rate=0.8,
        cycles=1,
        steps=100,
        between=0,
        insert=False,
        generator=generator(),
    )
    full = stiffness * second_differences(run.positions)
    system = np.kron(full[1:-1, 1:-1], np.eye(2)) + np.kron(np.eye(count), HESSIAN.numpy())
    right = np.kron(np.ones(count), (HESSIAN @ CENTRE).numpy()) - (full[1:-1, [0, -1]] @ ENDS.numpy()).reshape(-1)
    expected = torch.from_numpy(np.linalg.solve(system, right).reshape(count, 2))
    torch.testing.assert_close(stacked(run.images)[1:-1], expected, rtol=1e-12, atol=1e-12)


def test_stiff_springs_hold_the_straight_line() -> None:
    run = elastic_string(plane(), *ENDS, stiffness=1e6, cycles=1, steps=50, generator=generator())
    torch.testing.assert_close(stacked(run.images), line(run.positions), rtol=0, atol=1e-5)
    assert run.status == "finished"


def test_without_springs_images_fall_to_the_minimum() -> None:
    run = elastic_string(
        *(plane(), *ENDS),
        stiffness=0.0,
        learning_rate=1.0,
        cycles=1,
        steps=60,
        insert=False,
        between=0,
        generator=generator(),
    )
    torch.testing.assert_close(stacked(run.images)[1:-1], CENTRE.expand(3, 2), rtol=1e-9, atol=1e-9)


def explicit(stiffness: float, steps: int) -> Tensor:
    """The scheme of the paper's code: the elastic force unscaled, image after image."""
    points = line((0.0, 0.25, 0.5, 0.75, 1.0))
    for _ in range(steps):
        for k in (1, 2, 3):
            points[k] -= 0.1 * (HESSIAN @ (points[k] - CENTRE))
            points[k] += stiffness * (points[k - 1] + points[k + 1] - 2 * points[k])
    return points


def test_springs_that_make_the_explicit_scheme_diverge_are_stable() -> None:
    assert float(explicit(0.4, 100).abs().max()) < 10
    assert float(explicit(1.5, 100).abs().max()) > 1e6
    run = elastic_string(plane(), *ENDS, stiffness=1.5 / 0.1, cycles=2, steps=50, generator=generator())
    assert run.status == "finished"
    assert float(stacked(run.images).abs().max()) < 3


@pytest.mark.parametrize("positions", [(0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.1, 0.15, 0.6, 1.0)])
def test_a_step_of_the_springs_solves_its_linear_system(positions: tuple[float, ...]) -> None:
    pull = 0.37 * (len(positions) - 1)
    full = pull * second_differences(positions)
    points = torch.randn(5, 7, generator=generator(), dtype=torch.float64)
    right = points[1:-1].numpy() - full[1:-1, [0, -1]] @ points[[0, -1]].numpy()
    expected = np.linalg.solve(np.eye(3) + full[1:-1, 1:-1], right)
    mean, shares = spring_weights(positions, pull / (len(positions) - 1))
    moved = mean @ points[1:-1]
    for end, share in zip(points[[0, -1]], shares, strict=True):
        moved = torch.lerp(moved, end.expand(3, -1), torch.tensor(share, dtype=torch.float64).unsqueeze(1))
    torch.testing.assert_close(moved, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    factors = np.linalg.eigvalsh(np.linalg.inv(np.eye(3) + full[1:-1, 1:-1]))
    assert 0 < factors.min()
    assert factors.max() < 1


# images where the barrier is


def test_images_are_inserted_where_the_barrier_is_and_the_springs_stay_at_rest() -> None:
    run = elastic_string(plane(ridge), *ENDS, images=1, cycles=2, steps=5, stiffness=1e7, generator=generator())
    assert run.inserted == (1, 0)
    assert run.positions[1] == pytest.approx(0.2)  # x = -0.6, which no other measured point is as near to
    torch.testing.assert_close(stacked(run.images), line(run.positions), rtol=0, atol=1e-6)
    bounded = elastic_string(plane(ridge), *ENDS, images=1, cycles=3, steps=5, most_images=2, generator=generator())
    assert len(bounded.images) == 4
    plain = elastic_string(plane(ridge), *ENDS, images=1, cycles=3, steps=5, insert=False, generator=generator())
    assert plain.inserted == (0, 0, 0)


# the ends


class Made(Mapping[str, Tensor]):
    """A point whose tensors are made when they are asked for."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values_made = values

    def __getitem__(self, name: str) -> Tensor:
        return self.values_made[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_made)

    def __len__(self) -> int:
        return len(self.values_made)


def test_ends_are_read_from_anywhere_and_stay_to_the_bit(tmp_path: File) -> None:
    data = iris()
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).float()
    objective = Objective(net, nn.CrossEntropyLoss(), (data.inputs.float(), data.targets))
    a = objective.theta()
    b = a + torch.randn(len(a), generator=generator(1))
    kept = a.clone(), b.clone()
    save_state(tmp_path / "b.safetensors", {**objective.space.parameters(b), "more": torch.zeros(1)})
    settings: dict[str, Any] = {"cycles": 2, "steps": 3}
    run = elastic_string(objective, a, b, generator=generator(), **settings)
    lazy = elastic_string(
        *(Objective(hollow(net), objective.loss, (data.inputs.float(), data.targets)),),
        *(Made(objective.space.parameters(a)), StateFile(tmp_path / "b.safetensors")),
        generator=generator(),
        **settings,
    )
    assert run.losses == lazy.losses
    assert torch.equal(stacked(run.images), stacked(lazy.images))
    for path in (run.path, lazy.path):
        assert torch.equal(path.at(0.0), a)
        assert torch.equal(path.at(1.0), b)
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])
    for position, image in zip(run.positions, stacked(run.images), strict=True):
        torch.testing.assert_close(run.path.at(position), image, rtol=1e-5, atol=1e-5)
    save_path(lazy.path, tmp_path / "path.safetensors")
    assert torch.equal(load_path(tmp_path / "path.safetensors").at(0.3), run.path.at(0.3))


def test_equal_coordinates_of_both_ends_without_a_slope_stay_as_they_are() -> None:
    ends = ENDS.float().clone()
    ends[:, 1] = 0.1
    net = Plane().float()
    objective = Objective(net, lambda o, t: (o[..., 0] ** 2 + 0 * t).mean(), (torch.zeros(1, 2), torch.zeros(1)))
    run = elastic_string(objective, *ends, cycles=1, steps=50, generator=generator())
    assert set(stacked(run.images)[:, 1].tolist()) == {ends[0, 1].item()}


# what goes wrong


class Breaking(Plane):
    """Gives infinities in training after so many calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(x) * (math.inf if self.calls > 15 else 1.0)


@pytest.mark.parametrize("in_files", [False, True])
def test_a_diverging_string_keeps_the_images_of_the_best_cycle(in_files: bool, tmp_path: File) -> None:
    data = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    told: list[tuple[int, float]] = []
    settings: dict[str, Any] = {"stiffness": 1.0, "insert": False, "generator": generator()}
    run = elastic_string(
        *(Objective(Breaking(), bowl, data), *ENDS),
        cycles=4,
        steps=5,
        kept_in=tmp_path if in_files else None,
        progress=lambda cycle, loss: told.append((cycle, loss)),
        **settings,
    )
    good = elastic_string(plane(), *ENDS, cycles=1, steps=5, **settings)
    assert run.status == "diverged"
    assert math.isnan(run.losses[-1])
    assert run.losses[:2] == good.losses
    assert [cycle for cycle, _ in told] == [1, 2]
    assert torch.equal(stacked(run.images), stacked(good.images))
    assert bool(list(tmp_path.iterdir())) == in_files


def test_a_string_that_diverges_at_once_is_the_straight_line() -> None:
    run = elastic_string(plane(), *ENDS, learning_rate=1e3, stiffness=0.0, cycles=2, steps=200, generator=generator())
    assert run.status == "diverged"
    assert torch.equal(stacked(run.images), line(run.positions))


@pytest.mark.parametrize(
    "settings",
    [{"images": 0}, {"images": 30}, {"steps": -1}, {"learning_rate": 0.0}, {"stiffness": -1.0}, {"cycles": 0}],
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Expected positive counts"):
        elastic_string(plane(), *ENDS, generator=generator(), **settings)


def test_insertion_needs_points_between() -> None:
    with pytest.raises(ConfigError, match="Expected between >= 1"):
        elastic_string(plane(), *ENDS, between=0, generator=generator())


def test_ends_of_another_network_are_refused() -> None:
    with pytest.raises(ShapeError, match="Expected theta with 2"):
        elastic_string(plane(), ENDS[0, :1], ENDS[1, :1], generator=generator())
    with pytest.raises(ShapeError, match="without 'point'"):
        elastic_string(plane(), ENDS[0], {"other": ENDS[1]}, generator=generator())
    with pytest.raises(ShapeError, match="'point' of shape"):
        elastic_string(plane(), ENDS[0], {"point": ENDS}, generator=generator())


def test_data_that_cannot_be_cut_are_refused() -> None:
    whole = [(torch.zeros(1, 2, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))]
    with pytest.raises(DataError):
        elastic_string(Objective(Plane(), bowl, whole), *ENDS, cycles=1, generator=generator())


def test_a_place_that_cannot_be_written_is_named(tmp_path: File) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="taken"):
        elastic_string(plane(), *ENDS, cycles=2, steps=1, kept_in=tmp_path / "taken", generator=generator())
