"""Merging: a permuted copy comes back, REPAIR against a plain one, statistics of the data, plain checkpoints."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from thalweg.ensembles import merge
from thalweg.errors import ConfigError, StructureError
from thalweg.nets import MLP, VGG
from thalweg.objective import Objective
from thalweg.paths.pair import Pair
from thalweg.structure import permute

GENERATOR = torch.Generator().manual_seed(4)
X = torch.randn(80, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(3, (80,), generator=GENERATOR)


def drawn(build, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    net = build().double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net


def mlp() -> nn.Module:
    return MLP([5, 8, 7, 3], "relu")


def pair_of(build=mlp, x: Tensor = X) -> Pair:
    nets = [drawn(build, seed) for seed in (1, 2)]
    return Pair.of(Objective(nets[0], nn.CrossEntropyLoss(), (x, Y)), *nets)


@pytest.mark.parametrize("match", ["weights", "activations", "straight through"])
@pytest.mark.parametrize("method", ["midpoint", "joint"])
def test_a_network_merged_with_a_permuted_copy_is_the_network(match, method):
    pair = pair_of()
    generator = np.random.default_rng(0)
    orders = {group.name: generator.permutation(group.size) for group in pair.view.groups}
    twin = Pair.of(pair.objective, pair.a, permute(pair.view, pair.a, orders), view=pair.view)
    found = merge(twin, match=match, method=method, at=0.3, rebasin_steps=2)
    for name, tensor in pair.a.items():
        torch.testing.assert_close(found.state[name], tensor, rtol=0, atol=1e-9)
    scores = found.scores(pair.objective)
    assert list(scores.values())[-1].loss == pytest.approx(scores["A"].loss, abs=1e-9)
    assert scores["plain"].loss != pytest.approx(scores["A"].loss, abs=1e-3)


def moments(net: nn.Module, state: dict[str, Tensor], layers: int) -> tuple[Tensor, Tensor]:
    """Give mean and deviation of the pre-activations of a layer, as plain code."""
    h = X
    for k in range(layers + 1):
        z = h @ state[f"layers.{k}.weight"].T + state[f"layers.{k}.bias"]
        h = torch.relu(z)
    return z.mean(0), z.std(0, correction=0)


def test_repaired_channels_have_the_mean_and_deviation_between_those_of_the_ends():
    pair = pair_of()
    found = merge(pair, at=0.25)
    aligned = permute(pair.view, pair.b, found.permutations)
    for layer in (0, 1):
        parts = [moments(pair.objective.module, dict(state), layer) for state in (pair.a, aligned, found.state)]
        for one, two, got in zip(*parts, strict=True):
            torch.testing.assert_close(got, 0.75 * one + 0.25 * two, rtol=0, atol=1e-10)
    for name in ("layers.2.weight", "layers.2.bias"):
        torch.testing.assert_close(found.state[name], torch.lerp(pair.a[name], aligned[name], 0.25))
    assert found.notes == ("channels of 2 linear maps rescaled and shifted",)
    mlp().double().load_state_dict(dict(found.state), strict=True)


def test_layers_without_a_bias_are_rescaled_only_and_told():
    pair = pair_of(lambda: MLP([5, 8, 3], "relu", bias=False, output_bias=False))
    found = merge(pair)
    aligned = permute(pair.view, pair.b, found.permutations)
    z = [(X @ state["layers.0.weight"].T).std(0) for state in (pair.a, aligned, found.state)]
    torch.testing.assert_close(z[2], (z[0] + z[1]) / 2, rtol=0, atol=1e-10)
    assert found.notes[1] == "without a bias, rescaled only: layers.0.weight"


def test_a_dead_channel_keeps_its_scale():
    pair = pair_of(lambda: MLP([5, 8, 3], "relu", bias=False))
    dead = {n: t.clone() for n, t in pair.a.items()}
    dead["layers.0.weight"][2] = 0.0
    found = merge(Pair.of(pair.objective, dead, dead, view=pair.view))
    assert float(found.state["layers.0.weight"][2].abs().max()) == 0.0


def test_normalisation_layers_take_their_statistics_from_the_data():
    x = torch.randn(80, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pair = pair_of(lambda: VGG(((4,), (5,)), (6,), in_channels=2, image_size=4, num_classes=3, norm="batch"), x)
    found = merge(pair)
    net = VGG(((4,), (5,)), (6,), in_channels=2, image_size=4, num_classes=3, norm="batch").double().eval()
    net.load_state_dict(dict(found.state), strict=True)
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    torch.testing.assert_close(norm.running_mean, first(x).mean((0, 2, 3)), rtol=0, atol=1e-10)
    assert found.notes == ("statistics of 2 normalisation layers re-estimated on 80 samples",)
    assert "repaired" not in merge(pair, repair=False).states


def test_the_joint_fit_comes_closer_to_the_pre_activations_between_those_of_both():
    pair = pair_of()
    found = merge(pair, method="joint")
    assert list(found.states) == ["A", "B", "plain", "aligned"]
    assert "nothing repaired" in found.notes[-1]
    aligned = permute(pair.view, pair.b, found.permutations)
    weights = merge(pair, repair=False).state
    one, two, fitted, averaged = (outputs(state) for state in (pair.a, aligned, found.state, weights))
    assert float((fitted - (one + two) / 2).norm()) < 0.7 * float((averaged - (one + two) / 2).norm())


def outputs(state) -> Tensor:
    h = X
    for k in range(3):
        z = h @ state[f"layers.{k}.weight"].T + state[f"layers.{k}.bias"]
        h = torch.relu(z)
    return z


def test_a_point_outside_is_refused():
    with pytest.raises(ConfigError, match=r"Expected a point between 0 and 1\. Got 0\.0"):
        merge(pair_of(), at=0.0)


def test_without_interchangeable_units_only_no_matching_works():
    pair = pair_of(lambda: nn.Sequential(nn.Linear(5, 3)))
    with pytest.raises(StructureError, match="Merge without matching"):
        merge(pair)
    assert list(merge(pair, match="none", repair=False).states) == ["A", "B", "plain"]
