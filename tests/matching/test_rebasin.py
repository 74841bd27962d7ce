"""Straight-through refinement: lower half-way than the start, never above it, and nothing but a permutation of B."""

import functools
import math

import numpy as np
import pytest
import torch
from tests.zoo import randomize_
from torch import Tensor, nn
from torch.func import functional_call

from thalweg.data import digits
from thalweg.errors import ConfigError
from thalweg.matching import Alignment, Rebasin, align, straight_through
from thalweg.nets import MLP, VGG
from thalweg.objective import Objective
from thalweg.structure import View, permute, random_permutations, trace

State = dict[str, Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def data() -> tuple[Tensor, Tensor]:
    found = digits(dtype=torch.float32)
    return found.inputs[:1000].flatten(1), found.targets[:1000]


def state_of(module: nn.Module) -> State:
    return {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}


@functools.cache
def trained(seed: int) -> State:
    net, generator = randomize_(MLP([64, 32, 24, 10], "relu"), seed), seeded(seed)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x, y = data()
    for _ in range(12):
        for rows in torch.randperm(len(x), generator=generator).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return state_of(net)


def landscape() -> tuple[Objective, View]:
    net = MLP([64, 32, 24, 10], "relu")
    return Objective(net, nn.CrossEntropyLoss(), data()), trace(net, data()[0][:3])


def as_it_stands(view: View) -> Alignment:
    return Alignment({g.name: np.arange(g.size) for g in view.groups}, 1, math.nan, converged=False)


def refined(objective: Objective, view: View, a: State, b: State, start: Alignment, **options: object) -> Rebasin:
    known = {"steps": 20, "learning_rate": 3e-2, "batch_size": 100, "generator": seeded()}
    return straight_through(objective, view, a, b, start=start, **{**known, **options})


def half_way(objective: Objective, view: View, a: State, b: State, found: Alignment) -> float:
    moved = permute(view, b, found.permutations)
    middle = {n: (a[n] + moved[n]) / 2 for n in a}
    return float(objective.value(torch.cat([middle[n].reshape(-1) for n in objective.space.names])))


def test_the_loss_half_way_falls_far_below_that_of_matched_weights() -> None:
    objective, view = landscape()
    a, b = trained(0), trained(1)
    start = align(view, a, b)
    found = refined(objective, view, a, b, start)
    assert found.start_loss == pytest.approx(half_way(objective, view, a, b, start), rel=1e-5)
    assert found.loss == pytest.approx(half_way(objective, view, a, b, found.alignment), rel=1e-5)
    assert found.loss < 0.9 * found.start_loss
    assert found.best_step > 0
    assert len(found.losses) == 20
    assert all(sorted(order) == list(range(len(order))) for order in found.alignment.permutations.values())


def test_a_permuted_copy_is_found_from_no_alignment_at_all() -> None:
    objective, view = landscape()
    a = trained(0)
    planted = random_permutations(view, seeded())
    found = refined(objective, view, a, permute(view, a, planted), as_it_stands(view), steps=2, learning_rate=1e-4)
    assert all(
        np.array_equal(planted[n][order], np.arange(len(order))) for n, order in found.alignment.permutations.items()
    )
    assert found.alignment.cost == 0
    assert found.loss < found.start_loss


def test_it_never_returns_worse_than_the_start() -> None:
    objective, view = landscape()
    a, b = trained(0), trained(1)
    start = align(view, a, b)
    wild = refined(objective, view, a, b, start, learning_rate=100.0, steps=5)
    assert wild.loss <= wild.start_loss
    if wild.best_step == 0:
        assert wild.alignment.permutations is start.permutations


def test_it_stops_where_the_loss_is_not_finite() -> None:
    objective, view = landscape()
    a, b = trained(0), trained(1)
    huge = {n: 1e30 * t for n, t in a.items()}
    found = refined(objective, view, huge, b, as_it_stands(view))
    assert found.has_diverged
    assert len(found.losses) == 1


def test_batch_norm_takes_the_statistics_of_the_batch_and_nothing_is_written() -> None:
    def build(seed: int) -> nn.Module:
        return randomize_(VGG(((4, 5),), (6,), in_channels=1, image_size=8, norm="batch"), seed).eval()

    nets = [build(0), build(1)]
    x, y = data()[0][:200].reshape(-1, 1, 8, 8), data()[1][:200]
    objective, view = Objective(nets[0], nn.CrossEntropyLoss(), (x, y)), trace(nets[0], x[:3])
    a, b = map(state_of, nets)
    start = align(view, a, b)
    kept = {n: t.clone() for n, t in a.items()}
    told: list[tuple[float, str]] = []
    found = refined(objective, view, a, b, start, steps=3, batch_size=64, progress=lambda *step: told.append(step))
    module, moved = build(0).train(), permute(view, b, start.permutations)
    middle = {n: (a[n] + moved[n]) / 2 if a[n].is_floating_point() else a[n].clone() for n in a}
    expected = nn.functional.cross_entropy(functional_call(module, middle, (x,)), y)
    assert found.start_loss == pytest.approx(float(expected), rel=1e-4)
    assert all(torch.equal(a[n], kept[n]) for n in a)
    assert not objective.module.training
    assert [share for share, _ in told] == [1 / 3, 2 / 3, 1.0]


def test_the_same_generator_gives_the_same_refinement() -> None:
    objective, view = landscape()
    a, b = trained(0), trained(1)
    one, two = (refined(objective, view, a, b, align(view, a, b), steps=3) for _ in range(2))
    assert one.losses == two.losses


def test_no_step_and_no_sample_are_refused() -> None:
    objective, view = landscape()
    a = trained(0)
    for options in ({"steps": 0}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match="Expected at least one step and one sample"):
            refined(objective, view, a, a, as_it_stands(view), **options)
