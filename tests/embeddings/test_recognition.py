"""A wide point is recognised as an embedding of a narrow one, and nothing else is."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.embeddings.nets import data, deep_net, landscape, view_of, worst
from torch import Tensor, nn

from thalweg.embeddings import Embedding, embed, match, minimal_form, recognise, split_plan
from thalweg.errors import PlanError, ShapeError
from thalweg.nets import two_layer
from thalweg.space import Space
from thalweg.structure import View, flip, permute, random_permutations, rescale, trace


def point(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in net.named_parameters()}


def scrambled(
    view: View, state: Mapping[str, Tensor], odd: tuple[str, ...], generator: torch.Generator
) -> dict[str, Tensor]:
    """Permute all units, and flip the signs of about half of those that may be flipped."""
    signs = {
        g.name: np.where(torch.rand(g.size, generator=generator).numpy() < 0.5, -1.0, 1.0)
        for g in view.groups
        if g.name in odd
    }
    moved = permute(view, state, {n: p for n, p in random_permutations(view, generator).items()})
    return flip(view, moved, signs)


SHARES = {
    "random": None,
    "zero": [0.0, 1.0, 1.0, 0.0, 0.0],
    "negative": [-0.5, 2.0, 1.5, -1.0, 0.0],
    "uneven": [1e-3, 0.4, 0.999, 0.6, 0.0],
}


def two_layer_pair(kind: str, num_outputs: int, generator: torch.Generator) -> tuple[nn.Module, nn.Module, Tensor]:
    """A random width-2 net, and its embedding into width 5 with one null unit."""
    net = two_layer(2, num_inputs=2, num_outputs=num_outputs).double()
    x = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(generator=generator)
    view = trace(net, x)
    shares = SHARES[kind]
    plan = split_plan(
        view,
        {},
        parents={"layers.0": [0, 1, 0, 1, -1]},
        shares="random" if shares is None else {"layers.0": shares},
        generator=generator,
    )
    return net, Embedding(view, Space.of(net), plan).wide(net), x


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(sorted(SHARES)), num_outputs=st.integers(1, 3))
def test_an_embedding_is_recognised_whatever_the_order_signs_and_shares(
    seed: int, kind: str, num_outputs: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    net, wide, x = two_layer_pair(kind, num_outputs, generator)
    views = [trace(m, x) for m in (wide, net)]
    moved = scrambled(views[0], point(wide), ("layers.0",), generator)
    found = recognise(views[0], moved, views[1], point(net), odd=("layers.0",))
    assert found is not None
    assert found.residual <= 1e-12
    assert np.bincount(found.parents["layers.0"] + 1, minlength=3).tolist() == [1, 2, 2]
    made = Embedding(views[1], Space.of(net), found.plan).state(point(net))
    made = flip(views[0], made, found.signs)
    for name, value in moved.items():
        torch.testing.assert_close(made[name], value, rtol=0, atol=1e-12)


@settings(max_examples=5)
@given(seed=st.integers(0, 10_000), noise=st.sampled_from([1e-9, 1e-7]))
def test_a_point_near_an_embedding_is_recognised_with_its_residual(seed: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    net, wide, x = two_layer_pair("negative", 1, generator)
    views = [trace(m, x) for m in (wide, net)]
    away = {
        n: v * (1 + noise * (2 * torch.rand(v.shape, generator=generator, dtype=torch.float64) - 1))
        for n, v in point(wide).items()
    }
    found = recognise(views[0], away, views[1], point(net), odd=("layers.0",), tolerance=100 * noise)
    assert found is not None
    assert noise / 100 <= found.residual <= 10 * noise


@settings(max_examples=5)
@given(seed=st.integers(0, 10_000))
def test_another_point_is_not_recognised(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    net, wide, x = two_layer_pair("random", 1, generator)
    views = [trace(m, x) for m in (wide, net)]
    other = {n: torch.randn(v.shape, generator=generator, dtype=torch.float64) for n, v in point(net).items()}
    assert recognise(views[0], point(wide), views[1], other, odd=("layers.0",)) is None
    random = {n: torch.randn(v.shape, generator=generator, dtype=torch.float64) for n, v in point(wide).items()}
    assert recognise(views[0], random, views[1], point(net), odd=("layers.0",)) is None


def test_a_sign_flip_is_not_recognised_where_the_group_is_not_odd() -> None:
    generator = torch.Generator().manual_seed(0)
    net, wide, x = two_layer_pair("random", 1, generator)
    views = [trace(m, x) for m in (wide, net)]
    flipped = flip(views[0], point(wide), {"layers.0": np.array([1.0, -1.0, 1.0, 1.0, 1.0])})
    assert recognise(views[0], flipped, views[1], point(net)) is None
    assert recognise(views[0], flipped, views[1], point(net), odd=("layers.0",)) is not None


def test_copies_that_are_not_read_in_proportion_are_no_embedding() -> None:
    """Two outputs, each of which reads one copy: the function of the narrow net, but not by shares."""
    net = two_layer(1, num_outputs=2).double()
    wide = two_layer(2, num_outputs=2).double()
    with torch.no_grad():
        net.layers[1].weight.fill_(1.0)
        wide.layers[0].weight.copy_(net.layers[0].weight.expand(2, 1))
        wide.layers[0].bias.copy_(net.layers[0].bias.expand(2))
        wide.layers[1].weight.copy_(torch.eye(2))
    x = torch.linspace(-1, 1, 5, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(wide(x), net(x))
    assert recognise(trace(wide, x), point(wide), trace(net, x), point(net)) is None


@settings(max_examples=4)
@given(seed=st.integers(0, 10_000), activation=st.sampled_from(["tanh", "relu", "gelu", "sigmoid"]))
def test_deep_networks_are_recognised(seed: int, activation: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = deep_net([3, 3, 4, 2], activation, generator)
    pairs = data(net, generator)
    view = view_of(net, pairs)
    wide = Embedding(
        view, Space.of(net), split_plan(view, {"0": 5, "2": 6}, shares="random", generator=generator)
    ).wide(net)
    wide_view = view_of(wide, pairs)
    odd = ("0", "2") if activation == "tanh" else ()
    moved = scrambled(wide_view, point(wide), odd, generator)
    found = recognise(wide_view, moved, view, point(net), odd=odd)
    assert found is not None
    assert found.residual <= 1e-10
    other = {n: v + 0.1 for n, v in point(net).items()}
    assert recognise(wide_view, moved, view, other, odd=odd) is None


def test_rescaled_relu_units_are_recognised() -> None:
    generator = torch.Generator().manual_seed(3)
    net = deep_net([2, 3, 1], "relu", generator)
    x, _ = data(net, generator)
    wide = embed(net, x, {"0": 5}, shares="random", generator=generator).module
    view = trace(wide, x)
    factors = np.array([0.5, 2.0, 3.0, 0.1, 1.0])
    found = recognise(view, rescale(view, point(wide), {"0": factors}), trace(net, x), point(net))
    assert found is not None
    assert found.residual <= 1e-12


@settings(max_examples=5)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(sorted(SHARES)))
def test_the_minimal_form_computes_the_same(seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    net, wide, x = two_layer_pair(kind, 2, generator)
    view = trace(wide, x)
    moved = scrambled(view, point(wide), ("layers.0",), generator)
    small = minimal_form(view, moved, odd=("layers.0",))
    assert small.widths == {"layers.0": 2}
    assert not small.is_same
    landscapes = [landscape(m, (x, torch.zeros(7, 2).double())) for m in (net, wide)]
    theta = landscapes[0].space.theta(small.state)
    wide_outputs = landscapes[1].outputs(landscapes[1].space.theta(moved))
    assert worst(landscapes[0].outputs(theta), wide_outputs) <= 1e-12
    again = minimal_form(small.view, small.state, odd=("layers.0",))
    assert again.is_same


def test_units_that_cancel_are_dropped() -> None:
    net = two_layer(3).double()
    with torch.no_grad():
        net.layers[0].weight.copy_(torch.tensor([[1.0], [1.0], [2.0]]))
        net.layers[0].bias.copy_(torch.tensor([0.5, 0.5, 1.0]))
        net.layers[1].weight.copy_(torch.tensor([[3.0, -3.0, 1.0]]))
    small = minimal_form(trace(net, torch.zeros(3, 1).double()), point(net), odd=("layers.0",))
    assert small.widths == {"layers.0": 1}
    assert small.parents["layers.0"].tolist() == [-1, -1, 0]


def test_a_shallow_unit_beside_a_steep_one_is_not_dropped() -> None:
    """‖in‖·‖out‖ is 3.7·0.09 against 0.5·1e6: the shallow unit makes most of the output all the same."""
    net = two_layer(2).double()
    with torch.no_grad():
        net.layers[0].weight.copy_(torch.tensor([[0.09], [1e6]]))
        net.layers[0].bias.copy_(torch.tensor([0.0, 1.0]))
        net.layers[1].weight.copy_(torch.tensor([[3.7, 0.5]]))
    assert minimal_form(trace(net, torch.zeros(3, 1).double()), point(net)).is_same


@settings(max_examples=6)
@given(seed=st.integers(0, 10_000), activation=st.sampled_from(["tanh", "relu"]))
def test_matching_undoes_a_random_symmetry(seed: int, activation: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = deep_net([2, 5, 4, 2], activation, generator)
    view = view_of(net, data(net, generator))
    odd = ("0", "2") if activation == "tanh" else ()
    moved = scrambled(view, point(net), odd, generator)
    found = match(view, point(net), moved, odd=odd)
    assert found.residual <= 1e-14
    back = flip(view, permute(view, moved, found.permutations), found.signs)
    for name, value in point(net).items():
        torch.testing.assert_close(back[name], value, rtol=0, atol=1e-14)


def test_a_narrow_point_with_copies_is_refused() -> None:
    _, wide, x = two_layer_pair("random", 1, torch.Generator().manual_seed(0))
    view = trace(wide, x)
    with pytest.raises(PlanError, match=r"without copies or idle units\. Got one that reduces to widths"):
        recognise(view, point(wide), view, point(wide))


def test_a_tolerance_of_one_is_refused() -> None:
    net, _, x = two_layer_pair("random", 1, torch.Generator().manual_seed(0))
    with pytest.raises(PlanError, match=r"tolerance in \[0, 1\)"):
        minimal_form(trace(net, x), point(net), tolerance=1.0)


def test_points_of_different_networks_are_not_matched() -> None:
    net, wide, x = two_layer_pair("random", 1, torch.Generator().manual_seed(0))
    with pytest.raises(ShapeError, match="two points of the same network"):
        match(trace(net, x), point(net), point(wide))
    other = two_layer(2, num_inputs=3).double()
    with pytest.raises(ShapeError, match="two points of the same network"):
        recognise(trace(wide, x), point(wide), trace(other, x.repeat(1, 2)[:, :3]), point(other))
