"""Replay: the same losses as evaluating every point alone, for networks of every kind, or in full with the reason."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.zoo import CASES, Case
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from thalweg.objective import Objective
from thalweg.paths.leg import Blend, BlendLeg, blend_leg
from thalweg.paths.path import Path
from thalweg.paths.profile import Profile, profile


def mean_square(outputs: Any, targets: Tensor) -> Tensor:
    """Take any structure of outputs."""
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return torch.stack([leaf.square().mean() for leaf in leaves]).sum() + 0 * targets.sum()


def both_ways(path: Path, objective: Objective, **options: Any) -> tuple[Profile, Profile]:
    """Profile a path with and without reuse, and compare."""
    options = {"refine": False, **options}
    replayed = profile(path, objective, **options)
    plain = profile(path, objective, reuse=False, **options)
    torch.testing.assert_close(replayed.train_loss, plain.train_loss, rtol=1e-12, atol=1e-14)
    assert torch.equal(replayed.train_loss[[0, -1]], plain.train_loss[[0, -1]])
    return replayed, plain


def staged(objective: Objective) -> Path:
    """Move early parameters on an arc, then late ones on a line, then all of them."""
    names, theta = objective.space.names, objective.theta()
    generator = torch.Generator().manual_seed(1)
    points = [
        objective.space.parameters(theta + 0.3 * torch.randn(len(theta), generator=generator, dtype=theta.dtype))
        for _ in range(3)
    ]
    early = set(names[: max(1, len(names) // 2)])
    middle = {name: points[1 if name in early else 0][name] for name in names}
    centres = {name: points[2][name] for name in early}
    legs = (
        blend_leg("early", points[0], middle, centres=centres),
        blend_leg("late", middle, points[1]),
        blend_leg("all", points[1], points[2]),
    )
    return Path(objective.space, tuple(leg for leg in legs if leg.blends))


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: str(case.name))
def test_replay_is_the_plain_evaluation_on_every_network(case: Case) -> None:
    inputs = tuple(x.double() if x.is_floating_point() else x for x in case.example())
    data = [(inputs, torch.zeros(len(inputs[0]), dtype=torch.float64))]
    objective = Objective(case.build(), mean_square, data, dtype=torch.float64)
    replayed, _ = both_ways(staged(objective), objective, points=10)
    if case.name == "data_dependent":
        assert "the operations depend on values that move" in replayed.reuse
    else:
        legs = 3 if len(objective.space.names) > 1 else 2
        assert replayed.reuse.startswith(f"what rests was computed once on {legs} of {legs} legs")


def net(*extra: nn.Module) -> nn.Sequential:
    """Make a net of three layers from a seed."""
    layers = nn.Sequential(nn.Linear(4, 12), *extra, nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layers.parameters():
            p.normal_(generator=generator)
    return layers


def objective_of(module: nn.Module) -> Objective:
    """Give a landscape on random classes in three batches."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    return Objective(module, nn.CrossEntropyLoss(), (x, torch.arange(50) % 3), batch_size=20)


def test_only_the_rows_that_differ_are_computed_along_a_chain_of_swaps() -> None:
    objective = objective_of(net(nn.ReLU()))
    points = [objective.space.parameters(objective.theta())]
    for k in range(6):
        order = torch.arange(12)
        order[k], order[k + 1] = k + 1, k
        last = points[-1]
        points.append(
            {
                **last,
                "0.weight": last["0.weight"][order],
                "0.bias": last["0.bias"][order],
                "2.weight": last["2.weight"][:, order],
            }
        )
    legs = tuple(blend_leg("swap", a, b) for a, b in pairwise(points))
    replayed, _ = both_ways(Path(objective.space, legs), objective, points=13)
    assert "of terms only the rows that differ" in replayed.reuse
    at_joints = replayed.train_loss[::2]
    torch.testing.assert_close(at_joints, at_joints[:1].expand(7), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bias", ["rests", "alike", "otherwise", "alone"])
def test_a_bias_may_move_in_its_own_way(bias: str) -> None:
    objective = objective_of(net(nn.Tanh()))
    a, b = (objective.space.parameters(objective.theta() + shift) for shift in (0.0, 0.5))
    blends = {"0.weight": Blend("linear", (a["0.weight"], b["0.weight"]))}
    if bias == "alike":
        blends["0.bias"] = Blend("linear", (a["0.bias"], b["0.bias"]))
    if bias in ("otherwise", "alone"):
        blends["0.bias"] = Blend("arc", (a["0.bias"], b["0.bias"], 3 * a["0.bias"]))
    if bias == "alone":
        del blends["0.weight"]
    fixed = {name: value for name, value in a.items() if name not in blends}
    both_ways(Path(objective.space, (BlendLeg("x", fixed, blends),)), objective, points=7)


class Writing(nn.Module):
    """Writes what moves into what rests."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Add in place."""
        total = self.first(x)
        total += self.second(x)
        return total


class Late(nn.Module):
    """Writes into what was read before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Use h, then change it."""
        h = self.first(x)
        out = self.second(h.tanh()) + self.second(h)
        return out + h.mul_(2).sum(1, keepdim=True)


class Clamped(nn.Module):
    """Writes into its weights, behind the back of autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Clamp them."""
        self.second.weight.data.clamp_(-0.1, 0.1)
        out: Tensor = self.second(self.first(x))
        return out


@pytest.mark.parametrize(
    ("module", "reason"),
    [(Writing, "written into what rests"), (Late, "written into after"), (Clamped, "writes into its weights")],
)
def test_writing_in_place_is_noticed(module: type[nn.Module], reason: str) -> None:
    objective = objective_of(module().double())
    theta = objective.theta()
    a, b = objective.space.parameters(theta), objective.space.parameters(theta + 0.4)
    end = {name: b[name] if name.startswith("second") else a[name] for name in a}
    path = Path(objective.space, (blend_leg("late", a, end),))
    before = path(torch.tensor([0.0, 0.5, 1.0]))
    replayed, _ = both_ways(path, objective, points=5)
    assert reason in replayed.reuse
    torch.testing.assert_close(
        replayed.train_loss,
        torch.stack([objective.value(path.at(float(t))) for t in replayed.times]),
        rtol=1e-12,
        atol=0,
    )
    assert torch.equal(path(torch.tensor([0.0, 0.5, 1.0])), before)


def test_in_place_activations_are_replayed() -> None:
    objective = objective_of(net(nn.ReLU(inplace=True)))
    replayed, _ = both_ways(staged(objective), objective, points=13)
    assert "3 of 3 legs" in replayed.reuse
