"""The string method: its highest point is the saddle, and on a network it goes below the straight line."""

import math

import pytest
import torch
from torch import Tensor, nn

from thalweg.data import iris
from thalweg.errors import ConfigError
from thalweg.objective import Objective
from thalweg.paths.string import string

BEND = 0.4


class Plane(nn.Module):
    """A point of the plane as a network; the landscape is in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.point + 0 * x


def valley(outputs: Tensor, targets: Tensor) -> Tensor:
    """(x² - 1)² + 0.3x along the parabola y = c(1 - x²), and steep across it: minima near ±1, one saddle."""
    x, y = outputs[..., 0], outputs[..., 1]
    return ((x**2 - 1) ** 2 + 0.3 * x + 4 * (y - BEND * (1 - x**2)) ** 2 + 0 * targets).mean()


def root(low: float, high: float) -> tuple[float, float]:
    """A critical point of the valley: 4x(x² - 1) + 0.3 = 0 on the parabola."""

    def slope(x: float) -> float:
        return 4 * x * (x * x - 1) + 0.3

    rising = slope(low) < 0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (slope(middle) < 0) == rising else (low, middle)
    return low, BEND * (1 - low * low)


def landscape() -> tuple[Objective, Tensor, Tensor, Tensor]:
    data = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    objective = Objective(Plane(), valley, data)
    points = [torch.tensor(root(*ends), dtype=torch.float64) for ends in ((-1.2, -0.8), (0.8, 1.0), (-0.3, 0.3))]
    return objective, points[0], points[1], points[2]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_highest_point_of_the_string_is_the_saddle() -> None:
    objective, a, b, saddle = landscape()
    run = string(objective, a, b, images=9, cycles=2, steps=70, learning_rate=0.02, generator=generator())
    points = run.path(torch.linspace(0, 1, 401))
    losses = objective.value(points)
    assert float((points[losses.argmax()] - saddle).norm()) < 1e-2
    assert float(losses.max() - objective.value(saddle)) == pytest.approx(0, abs=1e-2)
    assert float(objective.value(saddle)) < run.losses[0] - 0.3
    assert run.status == "finished"


def test_images_are_inserted_where_the_loss_exceeds_the_chord() -> None:
    objective, a, b, _ = landscape()
    options = {"images": 1, "steps": 20, "learning_rate": 0.02}
    run = string(objective, a, b, cycles=3, generator=generator(), **options)
    assert run.inserted[0] > 0
    assert run.inserted[-1] == 0
    assert len(run.images) == 3 + sum(run.inserted)
    assert len(run.path.legs) == len(run.images) - 1
    plain = string(objective, a, b, cycles=3, insert=False, generator=generator(), **options)
    assert plain.inserted == (0, 0, 0)
    bounded = string(objective, a, b, cycles=3, most_images=2, generator=generator(), **options)
    assert len(bounded.images) <= 4


def test_images_stand_at_their_shares_of_the_length_and_the_ends_are_exact() -> None:
    objective, a, b, _ = landscape()
    run = string(objective, a, b, images=4, cycles=1, steps=60, learning_rate=0.02, generator=generator())
    lengths = (run.images[1:] - run.images[:-1]).norm(dim=1)
    spans = torch.tensor(run.positions, dtype=torch.float64).diff()
    torch.testing.assert_close(lengths / lengths.sum(), spans, rtol=0, atol=2e-2)
    assert torch.equal(run.path.at(0.0), a)
    assert torch.equal(run.path.at(1.0), b)
    for position, image in zip(run.positions, run.images, strict=True):
        torch.testing.assert_close(run.path.at(min(position, 1.0)), image, rtol=1e-9, atol=1e-9)


def trained_net(seed: int, x: Tensor, y: Tensor) -> nn.Module:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def test_a_string_between_two_networks_goes_below_the_line() -> None:
    data = iris()
    nets = [trained_net(seed, data.inputs, data.targets) for seed in (0, 1)]
    objective = Objective(nets[0], nn.CrossEntropyLoss(), (data.inputs, data.targets))
    a, b = (objective.theta(net) for net in nets)
    settings = {"images": 3, "cycles": 2, "steps": 40, "batch_size": 50, "learning_rate": 0.05}
    run = string(objective, a, b, generator=generator(), **settings)
    worst = float(objective.value(run.path(torch.linspace(0, 1, 41))).max())
    ends = float(max(objective.value(a), objective.value(b)))
    assert worst - ends < 0.3 * (run.losses[0] - ends)
    assert run.losses[-1] <= worst + 1e-9
    again = string(objective, a, b, generator=generator(), **settings)
    assert torch.equal(run.images, again.images)


def test_equal_ends_stay_where_they_are_put() -> None:
    objective, a, _, _ = landscape()
    run = string(objective, a, a, cycles=1, steps=5, generator=generator())
    assert bool(torch.isfinite(run.images).all())


def test_a_diverging_string_says_so_and_gives_finite_images() -> None:
    objective, a, b, _ = landscape()
    run = string(objective, a, b, cycles=2, steps=20, learning_rate=1e3, generator=generator())
    assert run.status == "diverged"
    assert math.isnan(run.losses[-1])
    assert bool(torch.isfinite(run.images).all())


@pytest.mark.parametrize(
    "settings", [{"images": 0}, {"images": 30}, {"steps": 0}, {"learning_rate": -1.0}, {"momentum": 1.0}]
)
def test_wrong_settings_are_refused(settings: dict[str, float]) -> None:
    objective, a, b, _ = landscape()
    with pytest.raises(ConfigError, match="Expected positive counts"):
        string(objective, a, b, generator=generator(), **settings)
