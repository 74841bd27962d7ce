"""Reduction undoes embedding, merges what is alike, and says what it did."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.embeddings.nets import ACTIVATIONS, data, deep_net, landscape, view_of, worst
from torch import nn

from thalweg.embeddings import Embedding, embed, find_merges, reduce, similarity_matrix, split_plan
from thalweg.errors import PlanError
from thalweg.space import Space
from thalweg.structure import permute, random_permutations, trace


@given(st.integers(0, 10_000), st.sampled_from(sorted(ACTIVATIONS)))
def test_reduce_inverts_embed_up_to_permutation(seed: int, activation: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = deep_net([3, 3, 4, 2], activation, generator)
    pairs = data(net, generator)
    view = view_of(net, pairs)
    plan = split_plan(view, {"0": 7, "2": 6}, shares="random", generator=generator)
    wide = Embedding(view, Space.of(net), plan).wide(net)
    wide_view = trace(wide, pairs[0])
    shuffled = permute(wide_view, dict(wide.named_parameters()), random_permutations(wide_view, generator))
    Space.of(wide).write(Space.of(wide).theta(shuffled), wide)
    back = reduce(wide, pairs[0])
    assert {n: w for n, (_, w) in back.reduction.widths.items()} == {"0": 3, "2": 4}
    narrow, again = landscape(net, pairs), landscape(back.module, pairs)
    assert worst(again.outputs(again.theta()), narrow.outputs(narrow.theta())) <= 1e-12
    for ours, theirs in zip(_sorted_biases(back.module), _sorted_biases(net), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def _sorted_biases(net: nn.Sequential) -> list[torch.Tensor]:
    return [m.bias.detach().sort().values for m in net if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.7, 2.0])
def test_shares_of_zero_and_one_are_undone_too(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    net = deep_net([2, 3, 1], "tanh", generator)
    x, _ = data(net, generator)
    wide = embed(net, x, {"0": 4}, shares={"0": [1 - share, 1, 1, share]}).module
    torch.testing.assert_close(
        Space.of(net).theta(reduce(wide, x).module), Space.of(net).theta(net), rtol=1e-13, atol=0
    )


def test_parallel_relu_units_are_merged_with_their_sizes() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 6.0], [-1.0, 0.5]]))
        net[0].bias.copy_(torch.tensor([0.5, 1.5, 0.2]))
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = reduce(net, x)
    assert result.reduction.widths == {"0": (3, 2)}
    assert result.error <= 1e-12
    np.testing.assert_allclose(result.reduction.merges["0"].ratios, [1, 3, 1])


def test_opposite_relu_units_are_not_merged() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        net[0].weight[1] = -net[0].weight[0]
        net[0].bias[1] = -net[0].bias[0]
    assert reduce(net, torch.randn(5, 2, dtype=torch.float64)).reduction.merges == {}


def test_tanh_units_of_one_direction_but_other_size_are_not_merged() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        net[0].weight[1] = 1.5 * net[0].weight[0]
        net[0].bias[1] = 1.5 * net[0].bias[0]
    assert reduce(net, torch.randn(5, 2, dtype=torch.float64), similarity=0.95).reduction.merges == {}


def test_a_chain_of_similar_units_is_not_one_cluster() -> None:
    """Units at 0, 15, 30, … degrees: neighbours are alike, the ends are not; complete linkage keeps them apart."""
    net = nn.Sequential(nn.Linear(2, 7, bias=False), nn.ReLU(), nn.Linear(7, 1)).double()
    angles = torch.arange(7, dtype=torch.float64) * torch.pi / 12
    with torch.no_grad():
        net[0].weight.copy_(torch.stack([angles.cos(), angles.sin()], dim=1))
    view = trace(net, torch.randn(5, 2))
    state = dict(net.named_parameters())
    merge = find_merges(view, state, similarity=0.95).merges["0"]
    assert merge.similarity >= 0.95
    alike = similarity_matrix(view, state, "0")
    for i in range(7):
        for j in range(7):
            if merge.labels[i] == merge.labels[j]:
                assert alike[i, j] >= 0.95
    assert merge.after > 1


def test_similar_units_are_merged_and_the_error_is_told() -> None:
    generator = torch.Generator().manual_seed(0)
    net = deep_net([2, 3, 1], "tanh", generator)
    x, _ = data(net, generator)
    wide = embed(net, x, {"0": 9}).module
    with torch.no_grad():
        for p in wide.parameters():
            p.add_(1e-3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    assert reduce(wide, x).reduction.merges == {}
    result = reduce(wide, x, similarity=0.999)
    assert result.reduction.widths == {"0": (9, 3)}
    assert 0 < result.error < 0.05


def test_units_of_small_amplitude_are_dropped() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        net[2].weight[0, 1] = 1e-9
    result = reduce(net, torch.randn(5, 2, dtype=torch.float64), amplitude=1e-6)
    assert result.reduction.merges["0"].labels.tolist() == [0, -1, 1, 2]
    assert result.error < 1e-7


def test_named_groups_only() -> None:
    generator = torch.Generator().manual_seed(0)
    net = deep_net([2, 2, 2, 1], "tanh", generator)
    x, _ = data(net, generator)
    wide = embed(net, x, {"0": 4, "2": 4}).module
    assert reduce(wide, x, groups=["2"]).reduction.widths == {"0": (4, 4), "2": (4, 2)}


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5])
def test_a_similarity_out_of_range_is_refused(value: float) -> None:
    net = deep_net([2, 2, 1], "tanh", torch.Generator())
    with pytest.raises(PlanError, match=r"a similarity in \(0, 1\]"):
        reduce(net, torch.randn(3, 2), similarity=value)


@pytest.mark.parametrize("value", [1.0, -0.1])
def test_an_amplitude_out_of_range_is_refused(value: float) -> None:
    net = deep_net([2, 2, 1], "tanh", torch.Generator())
    with pytest.raises(PlanError, match=r"an amplitude in \[0, 1\)"):
        reduce(net, torch.randn(3, 2), amplitude=value)


def test_a_group_that_cannot_be_reduced_is_refused() -> None:
    from tests.zoo import CASES

    case = CASES["softmax_units"]
    with pytest.raises(PlanError, match=r"a group that can be reduced. Got 'first'"):
        reduce(case.build(), case.example(), groups=["first"])
