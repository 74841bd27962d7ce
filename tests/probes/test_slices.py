"""slices: the loss along lines and over planes is that of the landscape at exactly the stored points."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import zoo
from tests.probes.slice_nets import IMAGE, NETS, Cnn, mlp, squares
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from thalweg.objective import Objective
from thalweg.probes import grid_losses, shortcuts
from thalweg.probes.directions import random_direction
from thalweg.probes.slices import Slice, line, plane

exact = functools.partial(assert_close, rtol=1e-12, atol=1e-14)
A, B = torch.linspace(-1, 0.5, 5).double(), torch.linspace(-0.25, 1, 4).double()  # not symmetric, not square


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(count: int, number: int = 3) -> Tensor:
    return torch.randint(0, number, (count,), generator=torch.Generator().manual_seed(5))


def directions_of(objective: Objective) -> Tensor:
    generator, theta = torch.Generator().manual_seed(1), objective.theta()
    draw = functools.partial(random_direction, objective, theta, generator=generator, vectors="keep")
    return torch.stack([draw(), draw()])


@pytest.fixture
def _cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take nothing for tiny, and a batch of 11 for large: every shortcut is tried."""
    monkeypatch.setattr(grid_losses, "_TINY", 0)
    monkeypatch.setattr(shortcuts, "_PIECE_BYTES", 1)
    monkeypatch.setattr(shortcuts, "_SMALLEST_PIECE", 4)


def landscape(name: str, count: int = 11, **options: Any) -> Objective:
    build, shape = NETS[name]
    net = zoo.randomize_(build()).double()
    outputs = net.eval()(randn(2, *shape))
    return Objective(net, nn.CrossEntropyLoss(), (randn(count, *shape), classes(count, outputs.shape[1])), **options)


def assert_is_the_landscape(found: Slice, objective: Objective) -> None:
    """Compare every entry with R at theta + a·d (+ b·e), computed from the stored coordinates in a plain loop."""
    for entry, place in zip(found.loss.reshape(-1), indices(found), strict=True):
        theta = found.origin
        for axis, direction, i in zip(found.axes, found.directions, place, strict=True):
            theta = theta + axis[i] * direction
        exact(entry, objective.value(theta))


def indices(found: Slice) -> Iterator[list[int]]:
    yield from torch.cartesian_prod(*(torch.arange(len(c)) for c in found.axes)).view(-1, len(found.axes)).tolist()


@pytest.mark.parametrize("name", NETS)
def test_a_plane_is_the_landscape_at_its_points(name: str) -> None:
    objective = landscape(name)
    found = plane(objective, objective.theta(), directions_of(objective), coordinates=(A, B))
    assert found.loss.shape == (5, 4)
    assert_is_the_landscape(found, objective)


@pytest.mark.usefixtures("_cut_small")
@pytest.mark.parametrize("name", NETS)
def test_shortcuts_change_nothing(name: str) -> None:
    objective = landscape(name)
    found = plane(objective, objective.theta(), directions_of(objective), coordinates=(A, B))
    assert_is_the_landscape(found, objective)


@pytest.mark.usefixtures("_cut_small")
@pytest.mark.parametrize("name", NETS)
def test_a_line_is_the_landscape_at_its_points(name: str) -> None:
    objective = landscape(name)
    found = line(objective, objective.theta(), directions_of(objective)[0], coordinates=randn(17))
    assert_is_the_landscape(found, objective)


@pytest.mark.parametrize("tiny", [0, 10**9], ids=["one by one", "many at once"])
@pytest.mark.parametrize("name", zoo.CASES)
def test_the_zoo(name: str, tiny: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_losses, "_TINY", tiny)
    case = zoo.CASES[name]
    net, inputs = case.build().double(), tuple(x.double() if x.is_floating_point() else x for x in case.example())
    objective = Objective(net, squares, [(inputs, torch.zeros(1))])
    found = plane(objective, objective.theta(), 0.3 * directions_of(objective), coordinates=(A, B))
    assert_is_the_landscape(found, objective)


def test_a_linear_net_has_the_quadratic_that_theory_gives() -> None:
    x, y = randn(40, 6), randn(40, 1, seed=2)
    objective = Objective(nn.Linear(6, 1, bias=False).double(), nn.MSELoss(), (x, y))
    theta, (one, two) = randn(6, seed=3), randn(2, 6, seed=4)
    found = plane(objective, theta, torch.stack([one, two]), coordinates=(A, B))
    start, along, across = x @ theta - y[:, 0], x @ one, x @ two
    a, b = A.unsqueeze(1), B.unsqueeze(0)
    expected = (
        start @ start + 2 * a * (start @ along) + 2 * b * (start @ across)
        + a**2 * (along @ along) + 2 * a * b * (along @ across) + b**2 * (across @ across)
    ) / 40  # fmt: skip
    exact(found.loss, expected)


@settings(max_examples=20)
@given(
    count=st.integers(1, 30), rows=st.integers(1, 6), columns=st.integers(1, 6), batch=st.integers(1, 30),
    seed=st.integers(0, 99), is_sum=st.booleans(),
)  # fmt: skip
def test_any_batching_and_grid_gives_the_quadratic(
    count: int, rows: int, columns: int, batch: int, seed: int, is_sum: bool
) -> None:
    x, y = randn(count, 3, seed=seed), randn(count, 1, seed=seed + 1)
    loss = nn.MSELoss(reduction="sum" if is_sum else "mean")
    objective = Objective(nn.Linear(3, 1, bias=False).double(), loss, (x, y), batch_size=batch)
    theta, moves = randn(3, seed=seed + 2), randn(2, 3, seed=seed + 3)
    a, b = randn(rows, seed=seed + 4), randn(columns, seed=seed + 5)
    found = plane(objective, theta, moves, coordinates=(a, b))
    points = theta + a[:, None, None] * moves[0] + b[None, :, None] * moves[1]
    errors = (points @ x.T - y[:, 0]).square()
    exact(found.loss, errors.sum(-1) if is_sum else errors.mean(-1))


def test_rows_do_not_zigzag() -> None:
    """A walk that turns at the end of each row and is off by one there shifts every other row by a step."""
    objective = landscape("mlp")
    moves = directions_of(objective)
    moves[0] = 0
    found = plane(objective, objective.theta(), moves, coordinates=(A, B))
    assert torch.equal(found.loss, found.loss[:1].expand_as(found.loss))


@pytest.mark.parametrize("steps", [4, 5])
def test_the_coordinates_are_the_steps_taken(steps: int) -> None:
    """Not a `linspace` beside steps counted from steps // 2: with an even number the two differ."""
    objective = Objective(nn.Linear(1, 1, bias=False).double(), nn.L1Loss(), (randn(1, 1) * 0 + 1, randn(1, 1) * 0))
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    found = line(objective, zero, one, coordinates=torch.linspace(-1, 1, steps))
    assert torch.equal(found.loss, found.axes[0].abs())


def test_the_default_is_51_points_from_minus_one_to_one_with_the_centre_among_them() -> None:
    objective = landscape("mlp")
    found = line(objective, objective.theta(), directions_of(objective)[0])
    (a,) = found.axes
    assert (len(a), float(a[0]), float(a[25]), float(a[-1])) == (51, -1.0, 0.0, 1.0)
    assert torch.equal(found.theta(25), objective.theta())
    exact(found.loss[25], objective.value(objective.theta()))


def test_calls_repeat() -> None:
    """No noise is added to anything."""
    objective = landscape("cnn with batch norm")
    run = lambda: plane(objective, objective.theta(), directions_of(objective), coordinates=(A, B)).loss
    assert torch.equal(run(), run())


def test_values_that_are_not_finite_stay() -> None:
    objective = landscape("mlp")
    far = torch.tensor([-1e200, 0.0, 1.0, 1e100], dtype=torch.float64)
    moves = directions_of(objective)
    moves[1] *= 1e200
    found = plane(objective, objective.theta(), moves, coordinates=(A, far))
    expected = torch.stack([torch.stack([objective.value(found.theta(i, j)) for j in range(4)]) for i in range(5)])
    assert not bool(torch.isfinite(expected).all())
    assert torch.equal(torch.isfinite(found.loss), torch.isfinite(expected))
    exact(found.loss, expected, equal_nan=True)
    assert found.num_not_finite == int((~torch.isfinite(expected)).sum())


@pytest.mark.usefixtures("_cut_small")
def test_a_ragged_last_batch_has_its_weight() -> None:
    whole, ragged = (landscape("cnn with batch norm", **options) for options in ({}, {"batch_size": 5}))
    moves = directions_of(whole)
    one, two = (plane(o, whole.theta(), moves, coordinates=(A, B)) for o in (whole, ragged))
    exact(one.loss, two.loss)
    assert one.accuracy is not None
    assert torch.equal(one.accuracy, two.accuracy)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_cut_small")
def test_class_weights_and_ignored_targets_weigh_the_pieces() -> None:
    targets = classes(11)
    targets[::3] = 7
    loss = nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 3.0]).double(), ignore_index=7)
    objective = Objective(mlp().double(), loss, (randn(11, 4), targets))
    found = plane(objective, objective.theta(), directions_of(objective), coordinates=(A, B))
    assert "cut" in found.method
    assert_is_the_landscape(found, objective)
    predicted = objective.outputs(found.theta(1, 2)).argmax(1)
    assert found.accuracy is not None
    assert float(found.accuracy[1, 2]) == float((predicted == targets)[targets != 7].double().mean())


@pytest.mark.usefixtures("_cut_small")
def test_a_loss_that_couples_samples_is_not_cut() -> None:
    loss = lambda outputs, targets: (outputs - outputs.mean(0)).square().sum() / len(targets)
    objective = Objective(mlp().double(), loss, (randn(11, 4), classes(11)))
    found = plane(objective, objective.theta(), directions_of(objective), coordinates=(A, B))
    assert "cut" not in found.method
    assert_is_the_landscape(found, objective)


@pytest.mark.usefixtures("_cut_small")
@pytest.mark.parametrize(
    ("name", "used", "unused"),
    [
        ("mlp", ["1 layer on the data", "cut"], []),
        ("cnn with batch norm", ["1 layer on the data", "cut", "channels last"], []),
        ("view of an image", ["1 layer on the data", "cut"], ["channels last"]),
        ("output changed in place", ["1 layer on the data", "cut"], []),
        ("tied", ["1 layer on the data"], []),
        ("first bias frozen", ["1 layer on the data"], []),
        ("layer used twice", ["cut"], ["layer on the data"]),
        ("weights clamped", [], ["layer on the data"]),
        ("weight norm", ["cut"], ["layer on the data"]),
        ("samples coupled", ["1 layer on the data"], ["cut"]),
        ("branch on a value", ["1 layer on the data"], ["cut"]),
        ("gradient inside", [], ["layer on the data", "cut"]),
    ],
)
def test_the_shortcuts_that_hold_are_taken(name: str, used: list[str], unused: list[str]) -> None:
    objective = landscape(name)
    found = plane(objective, objective.theta(), directions_of(objective), coordinates=(A, B))
    assert [word for word in used if word not in found.method] == []
    assert [word for word in unused if word in found.method] == []


@pytest.mark.parametrize(("channels", "words"), [(4, ""), (64, "pieces of at most 64 samples")])
def test_pieces_are_as_large_as_fits_the_cache(channels: int, words: str) -> None:
    """16 × 16 numbers of 8 bytes in each channel: 8 MiB are 1,024 samples, or 64."""
    net = nn.Sequential(nn.Conv2d(1, channels, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    objective = Objective(net, nn.CrossEntropyLoss(), (randn(600, 1, 16, 16), classes(600)))
    found = line(objective, objective.theta(), directions_of(objective)[0], coordinates=torch.zeros(16))
    assert words in found.method
    assert ("cut" in found.method) == bool(words)


def test_a_tiny_net_is_evaluated_at_many_points_at_once() -> None:
    objective = landscape("mlp")
    assert "64 points at a time" in line(objective, objective.theta(), directions_of(objective)[0]).method


@pytest.mark.usefixtures("_cut_small")
def test_float32_is_kept() -> None:
    net = zoo.randomize_(Cnn())
    objective = Objective(net, nn.CrossEntropyLoss(), (randn(11, *IMAGE).float(), classes(11)))
    precise = objective.in_dtype(torch.float64)
    moves = directions_of(objective)
    found, reference = (plane(o, objective.theta(), moves, coordinates=(A, B)) for o in (objective, precise))
    assert (found.loss.dtype, found.axes[0].dtype, found.directions.dtype) == (torch.float32,) * 3
    assert_close(found.loss.double(), reference.loss, rtol=1e-5, atol=1e-6)


def test_a_loader_is_read_batch_by_batch() -> None:
    data = TensorDataset(randn(11, *IMAGE), classes(11))
    net = zoo.randomize_(Cnn()).double()
    streamed = Objective(net, nn.CrossEntropyLoss(), DataLoader(data, batch_size=4))
    whole = Objective(net, nn.CrossEntropyLoss(), data.tensors)
    moves = directions_of(whole)
    one, two = (plane(o, whole.theta(), moves, coordinates=(A, B)).loss for o in (streamed, whole))
    exact(one, two)


def test_batchnorm_keeps_the_running_statistics_of_the_module() -> None:
    """They are no coordinates: a random direction does not move running_var, which may become negative then."""
    net = zoo.randomize_(Cnn()).double().train()
    before = copy.deepcopy(net.state_dict())
    objective = Objective(net, nn.CrossEntropyLoss(), (randn(11, *IMAGE), classes(11)))
    moves = directions_of(objective)
    found = plane(objective, objective.theta(), moves, coordinates=(A, B))
    twin = copy.deepcopy(net).eval()
    objective.space.write(found.theta(0, 1), twin)
    exact(found.loss[0, 1], functional.cross_entropy(twin(randn(11, *IMAGE)), classes(11)).detach())
    assert found.batchnorm.startswith("BatchNorm uses the running statistics of the module")
    assert net.training
    assert objective.mode == "eval"
    assert all(torch.equal(before[n], value) for n, value in net.state_dict().items())
    assert all(torch.equal(before[n], value) for n, value in objective.module.state_dict().items())


@pytest.mark.usefixtures("_cut_small")
def test_in_train_mode_batchnorm_uses_each_batch_whole() -> None:
    net = zoo.randomize_(Cnn()).double()
    objective = Objective(net, nn.CrossEntropyLoss(), (randn(11, *IMAGE), classes(11)), batch_size=6, mode="train")
    before = copy.deepcopy(objective.module.state_dict())
    found = plane(objective, objective.theta(), directions_of(objective), coordinates=(A, B))
    assert_is_the_landscape(found, objective)
    assert "statistics of each batch" in found.batchnorm
    assert "cut" not in found.method
    assert all(torch.equal(before[n], value) for n, value in objective.module.state_dict().items())


def test_a_net_without_batchnorm_says_so() -> None:
    objective = landscape("mlp")
    assert "no BatchNorm" in line(objective, objective.theta(), directions_of(objective)[0]).batchnorm


def test_neither_theta_nor_directions_nor_data_are_changed() -> None:
    data = randn(11, *IMAGE), classes(11)
    objective = Objective(zoo.randomize_(Cnn()).double(), nn.CrossEntropyLoss(), data)
    theta, moves = objective.theta(), directions_of(objective)
    kept = [t.clone() for t in (*data, theta, moves)]
    plane(objective, theta, moves, coordinates=(A, B))
    assert all(torch.equal(a, b) for a, b in zip((*data, theta, moves), kept, strict=True))
