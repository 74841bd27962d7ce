"""The contract of every closed-form method, on every kind of network: found by walking METHODS."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.paths.pairs import NETS, built, data, pair_of
from torch import nn

from thalweg.errors import CheckpointError, ConfigError, ShapeError, StructureError
from thalweg.objective import Objective
from thalweg.paths.methods import METHODS, Method, Settings, connect, obstacle
from thalweg.paths.pair import Pair

FAST = Settings(knots=2, rebasin_steps=3)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_leads_from_a_to_b_to_the_bit_or_says_why_not(name: str, kind: str) -> None:
    pair = pair_of(kind)
    reason = obstacle(pair, METHODS[name])
    if reason is not None:
        with pytest.raises(StructureError, match="applies to"):
            connect(pair, name, FAST)
        return
    found = connect(pair, name, FAST)
    assert torch.equal(found.path.at(0.0), pair.theta_a)
    assert torch.equal(found.path.at(1.0), pair.theta_b)
    assert all(torch.equal(found.path.start_buffers[n], pair.a[n]) for n in found.path.start_buffers)
    assert all(torch.equal(found.path.end_buffers[n], pair.b[n]) for n in found.path.end_buffers)


@pytest.mark.parametrize("name", ["linear", "arc+wa", "ot+wa", "ot+ridge", "joint"])
def test_no_path_jumps(name: str) -> None:
    path = connect(pair_of("mlp"), name, FAST).path
    largest = [
        max(float((b - a).norm()) for a, b in pairwise(path(torch.linspace(0, 1, count, dtype=torch.float64))))
        for count in (101, 401)
    ]
    assert largest[1] < 0.35 * largest[0]


@pytest.mark.parametrize("name", ["ot", "ot+wa", "weights", "activations", "joint"])
def test_where_the_units_are_matched_b_computes_what_it_does(name: str) -> None:
    pair = pair_of("resnet")
    found = connect(pair, name, FAST)
    assert 0 < found.meets < 1
    met = pair.objective.apply(found.path.at(found.meets), pair.inputs)
    with torch.no_grad():
        buffers = {n: t for n, t in pair.b.items() if n not in pair.objective.space.names}
        swapped = {**buffers}
        for group, order in found.permutations.items():
            for member in pair.view.group(group).members:
                if member.tensor in swapped and swapped[member.tensor].ndim:
                    index = torch.from_numpy(order)
                    swapped[member.tensor] = swapped[member.tensor].index_select(member.dim, index)
        met = torch.func.functional_call(
            pair.objective.module, {**found.path.parameters(found.meets), **swapped}, (pair.inputs,)
        )
        own = torch.func.functional_call(pair.objective.module, dict(pair.b), (pair.inputs,))
    torch.testing.assert_close(met, own, rtol=1e-10, atol=1e-10)


def test_a_network_connects_to_itself_by_every_method() -> None:
    objective = Objective(built("mlp", 0), nn.CrossEntropyLoss(), data("mlp"))
    pair = Pair.of(objective, built("mlp", 0), built("mlp", 0))
    for method in METHODS.values():
        if obstacle(pair, method) is None:
            path = connect(pair, method, FAST).path
            assert torch.equal(path.at(1.0), pair.theta_a)
            middle = float(objective.value(path.at(0.5)))
            assert abs(middle - float(objective.value(pair.theta_a))) < 1e-6


def test_dead_and_duplicate_units_and_fewer_samples_than_units_break_nothing() -> None:
    nets = [built("two layers", seed) for seed in (0, 1)]
    with torch.no_grad():
        for net in nets:
            first = net.get_parameter("layers.0.weight")
            first[3], first[4] = 0.0, first[5]
            net.get_parameter("layers.0.bias")[3] = -1.0
            net.get_parameter("layers.0.bias")[4] = net.get_parameter("layers.0.bias")[5]
    objective = Objective(nets[0], nn.CrossEntropyLoss(), data("two layers", 8))
    pair = Pair.of(objective, *nets)
    for name in ("linear+wa", "arc+wa", "ot", "ot+wa", "ot+ridge", "joint", "activations"):
        found = connect(pair, name, FAST)
        thetas = found.path(torch.linspace(0, 1, 9, dtype=torch.float64))
        assert bool(torch.isfinite(thetas).all())
    assert "fewer than two samples" in connect(pair, "linear+wa", FAST).notes[0]


def test_wrong_pairs_are_told_in_one_line() -> None:
    objective = Objective(built("mlp", 0), nn.CrossEntropyLoss(), data("mlp"))
    with pytest.raises(ShapeError, match="one architecture"):
        Pair.of(objective, built("mlp", 0), built("two layers", 1))
    broken = built("mlp", 1)
    with torch.no_grad():
        broken.get_parameter("layers.1.bias")[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.bias.*second"):
        Pair.of(objective, built("mlp", 0), broken)
    with pytest.raises(ConfigError, match="Choose a method"):
        connect(pair_of("mlp"), "magic")


def test_parameters_that_are_not_trained_must_agree() -> None:
    one, two = built("mlp", 0), built("mlp", 1)
    for net in (one, two):
        net.get_parameter("layers.0.weight").requires_grad_(False)
    with pytest.raises(ShapeError, match="not trained"):
        Pair.of(Objective(one, nn.CrossEntropyLoss(), data("mlp")), one, two)


def test_a_method_of_ones_own_is_a_composition() -> None:
    own = Method(
        "mine", "weights, then arcs with fits", match="weights", inner="arc", schedule="adjusted", ridge=1e-3
    )
    found = connect(pair_of("mlp"), own, FAST)
    assert found.method == "mine"
    assert sorted(found.permutations) == sorted(g.name for g in pair_of("mlp").view.groups)
    assert all(np.array_equal(np.sort(p), np.arange(len(p))) for p in found.permutations.values())
