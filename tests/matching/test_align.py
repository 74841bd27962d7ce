"""A network against a permuted copy of itself is recovered exactly; descent never moves two networks apart."""

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.random_nets import random_net
from tests.zoo import CASES, randomize_
from torch import Tensor, nn

from thalweg.errors import ConfigError, NumericalError, ShapeError, StructureError
from thalweg.matching import align
from thalweg.matching.comparing import comparable_rows, squared_distance
from thalweg.nets import MLP, VGG, BlockWidths, EncoderClassifier, ResNet
from thalweg.structure import View, permute, random_permutations, trace

State = dict[str, Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=seeded())


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: MLP([8, 30, 20, 4]), lambda: torch.randn(20, 8, generator=seeded())),
    "vgg": (lambda: VGG(((6, 7), (9,)), (12,), image_size=8), images),
    "vgg with BatchNorm": (lambda: VGG(((6, 7), (9,)), (12,), image_size=8, norm="batch"), images),
    "resnet": (lambda: ResNet(stem=6, channels=(6, 8), hidden=((5, 7), (9, 10))), images),
    "transformer": (
        lambda: EncoderClassifier(
            num_features=5, num_tokens=6, dim=12, blocks=[BlockWidths(3, 4, 5, 14)] * 2, num_classes=3
        ),
        lambda: torch.randn(12, 6, 5, generator=seeded()),
    ),
}
names = pytest.mark.parametrize("name", NETS)


def state_of(module: nn.Module) -> State:
    return {n: t.detach() for n, t in [*module.named_parameters(), *module.named_buffers()]}


@functools.cache
def traced(name: str) -> tuple[nn.Module, Tensor, View, State]:
    build, inputs = NETS[name]
    module, x = randomize_(build()).eval(), inputs()
    return module, x, trace(module, x[:3]), state_of(module)


def noisy(state: Mapping[str, Tensor], level: float) -> State:
    generator = seeded(7)
    return {
        n: t + level * t.std(correction=0) * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for n, t in state.items()
    }


def undone(planted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> bool:
    return all(np.array_equal(order[found[n]], np.arange(len(order))) for n, order in planted.items())


@names
@pytest.mark.parametrize("by", ["weights", "incoming", "activations"])
def test_a_permuted_copy_is_recovered_bit_for_bit(name: str, by: Any) -> None:
    module, x, view, a = traced(name)
    planted = random_permutations(view, seeded())
    b = permute(view, a, planted)
    found = align(view, a, b, by=by, module=module, inputs=x)
    back = permute(view, b, found.permutations)
    assert all(torch.equal(back[n], a[n]) for n in a)
    assert found.cost == 0
    assert found.converged


@names
@pytest.mark.parametrize("by", ["weights", "activations"])
def test_it_is_recovered_under_noise_of_one_per_cent(name: str, by: Any) -> None:
    module, x, view, a = traced(name)
    planted = random_permutations(view, seeded(1))
    b = noisy(permute(view, a, planted), 0.01)
    assert undone(planted, align(view, a, b, by=by, module=module, inputs=x).permutations)


@pytest.mark.parametrize("name", ["shared_layer", "tied_autoencoder", "lstm", "gpt", "densenet", "stock_encoder"])
def test_tied_recurrent_and_concatenated_units_are_recovered(name: str) -> None:
    case = CASES[name]
    module = case.build()
    view, a = trace(module, case.example()), state_of(module)
    b = permute(view, a, random_permutations(view, seeded()))
    for by in ("weights", "activations"):
        found = align(view, a, b, by=by, module=module, inputs=case.example())
        back = permute(view, b, found.permutations)
        assert all(torch.equal(back[n], a[n]) for n in a)


def test_no_permutation_of_a_two_layer_net_is_closer() -> None:
    nets = [randomize_(MLP([3, 5, 2]), seed) for seed in (0, 1)]
    view, (a, b) = trace(nets[0], torch.randn(4, 3, generator=seeded())), map(state_of, nets)
    (group,) = view.groups
    orders = (np.array(order) for order in itertools.permutations(range(5)))
    best = min(squared_distance(a, permute(view, b, {group.name: order})) for order in orders)
    assert align(view, a, b).cost == pytest.approx(best, rel=1e-12)


@settings(max_examples=6)
@given(seed=st.integers(0, 10_000))
def test_descent_never_moves_two_networks_apart(seed: int) -> None:
    module, inputs = random_net(seed)
    view = trace(module, inputs)
    a, b = ({n: t.clone() for n, t in state_of(randomize_(module, seed + i)).items()} for i in (0, 1))
    start = random_permutations(view, seeded(seed))
    before = squared_distance(a, permute(view, b, start))
    found = align(view, a, b, start=start, generator=seeded(seed))
    assert found.cost <= before
    assert found.cost == squared_distance(a, permute(view, b, found.permutations))
    again = align(view, a, b, start=found.permutations)
    assert again.cost == found.cost
    assert again.sweeps == 1
    assert align(view, a, b).cost <= squared_distance(a, b)


def test_restarts_keep_the_closest() -> None:
    nets = [randomize_(MLP([4, 9, 9, 9, 3]), seed) for seed in (10, 11)]
    view, (a, b) = trace(nets[0], torch.randn(4, 4, generator=seeded())), map(state_of, nets)
    costs = [align(view, a, b, restarts=n, generator=seeded()).cost for n in (0, 1, 2)]
    assert costs[2] <= costs[1] <= costs[0]
    assert costs[2] < costs[0]


def test_rows_do_not_depend_on_the_order_of_groups_that_are_not_settled() -> None:
    _, _, view, a = traced("transformer")
    orders = random_permutations(view, seeded())
    for group in view.groups:
        others = {n: order for n, order in orders.items() if n != group.name}
        rows = [comparable_rows(view, group, s, "butterfly", ()) for s in (a, permute(view, a, others))]
        assert torch.equal(*rows)


def test_dead_and_duplicated_units_have_partners_and_no_nan() -> None:
    _, x, view, state = traced("mlp")
    net = MLP([8, 30, 20, 4], "relu").eval()
    a = {n: t.clone() for n, t in state.items()}
    first = "layers.0"
    a[f"{first}.bias"][:5] = -100  # never act
    for suffix in ("weight", "bias"):
        a[f"{first}.{suffix}"][7] = a[f"{first}.{suffix}"][8]
    a["layers.1.weight"][:, 7] = a["layers.1.weight"][:, 8]
    planted = random_permutations(view, seeded())
    b = permute(view, a, planted)
    for by in ("weights", "activations"):
        back = permute(view, b, align(view, a, b, by=by, module=net, inputs=x).permutations)
        assert all(torch.equal(back[n], a[n]) for n in a)


def test_a_network_is_aligned_to_itself_as_it_stands() -> None:
    module, x, view, a = traced("resnet")
    for by in ("weights", "incoming", "activations"):
        found = align(view, a, a, by=by, module=module, inputs=x)
        assert undone({g.name: np.arange(g.size) for g in view.groups}, found.permutations)


def test_only_the_groups_asked_for_move() -> None:
    _, _, view, a = traced("mlp")
    one, two = (g.name for g in view.groups)
    planted = random_permutations(view, seeded())
    found = align(view, a, permute(view, a, {one: planted[one]}), groups=[one])
    assert undone({one: planted[one]}, found.permutations)
    assert np.array_equal(found.permutations[two], np.arange(20))


def test_activations_leave_the_module_alone() -> None:
    module, x, view, a = traced("vgg with BatchNorm")
    module.train()
    before = {n: t.clone() for n, t in state_of(module).items()}
    align(view, a, a, by="activations", module=module, inputs=x)
    assert module.training
    assert all(torch.equal(t, before[n]) for n, t in state_of(module).items())
    module.eval()


def test_what_cannot_be_aligned_is_refused() -> None:
    _, _, view, a = traced("mlp")
    with pytest.raises(ConfigError, match="Expected module and inputs to match by activations"):
        align(view, a, a, by="activations")
    with pytest.raises(ConfigError, match="Expected a generator for 2 restarts"):
        align(view, a, a, restarts=2)
    with pytest.raises(StructureError, match="Expected one of the groups"):
        align(view, a, a, groups=["nothing"])
    with pytest.raises(ShapeError, match=re.escape("Expected two states of one network. Got 'layers.0.bias'")):
        align(view, a, {**a, "layers.0.bias": torch.zeros(3)})
    with pytest.raises(NumericalError, match=re.escape("Got NaN or infinity in 'layers.0.bias' of b")):
        align(view, a, {**a, "layers.0.bias": torch.full((30,), torch.nan)})
    with pytest.raises(ShapeError, match="Expected a permutation of 30 units"):
        align(view, a, a, start={view.groups[0].name: np.zeros(30, dtype=np.int64)})
