"""Theorem 2: K added units, K dimensions of points with the same outputs, critical if the origin is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.embeddings.nets import data, deep_net, landscape, view_of, worst
from tests.zoo import CASES

from thalweg.embeddings import Embedding, critical_subspace, split_plan
from thalweg.errors import PlanError
from thalweg.objective import Objective
from thalweg.space import Space
from thalweg.structure import trace


@given(st.integers(0, 1000), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_the_dimension_is_the_number_of_added_units(seed: int, hidden: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = deep_net([2, *hidden, 2], "tanh", generator)
    view = view_of(net, data(net, generator))
    widths = {g.name: g.size + 1 + k for k, g in enumerate(view.groups)}
    embedding = Embedding(view, Space.of(net), split_plan(view, widths, shares="random", generator=generator))
    subspace = critical_subspace(embedding, Space.of(net).theta(net))
    assert subspace.dimension == embedding.plan.num_added == len(subspace.labels)


def test_outputs_stay_and_gradients_follow_the_shares_all_over_the_subspace() -> None:
    generator = torch.Generator().manual_seed(2)
    net = deep_net([2, 3, 4, 2], "gelu", generator)
    pairs = data(net, generator)
    view = view_of(net, pairs)
    embedding = Embedding(view, Space.of(net), split_plan(view, {"0": 5, "2": 7}))
    narrow, wide = landscape(net, pairs), landscape(embedding.wide(net), pairs)
    subspace = critical_subspace(embedding, narrow.theta())
    for point in subspace.sample(20, generator):
        assert worst(wide.outputs(point), narrow.outputs(narrow.theta())) <= 1e-12
        # The parts of the gradient add up to the narrow one's: nothing is lost over the copies.
        total = wide.space.parameters(wide.gradient(point))["0.bias"]
        parents = torch.from_numpy(embedding.plan.splits["0"].parents)
        summed = torch.zeros(3, dtype=torch.float64).index_add_(0, parents, total)
        torch.testing.assert_close(summed, narrow.space.parameters(narrow.gradient(narrow.theta()))["0.bias"])


def test_points_of_the_subspace_are_the_embeddings_with_other_shares() -> None:
    generator = torch.Generator().manual_seed(3)
    net = deep_net([2, 2, 2, 1], "tanh", generator)
    view, space = view_of(net, data(net, generator)), Space.of(net)
    equal = Embedding(view, space, split_plan(view, {"0": 4, "2": 3}))
    other = Embedding(view, space, split_plan(view, {"0": 4, "2": 3}, shares="random", generator=generator))
    subspace = critical_subspace(equal, space.theta(net))
    shift = torch.tensor(
        [other.plan.splits[g].shares[j] - equal.plan.splits[g].shares[j] for g, j in subspace.labels],
        dtype=torch.float64,
    )
    torch.testing.assert_close(subspace.point(shift), other.apply(space.theta(net)), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ["vgg", "resnet", "densenet", "outer_product"])
def test_convolutional_nets_have_the_subspace_too(name: str) -> None:
    module = CASES[name].build().double()
    inputs = tuple(x.double() for x in CASES[name].example())
    view = trace(module, inputs)
    widths = {g.name: g.size + 2 for g in view.groups[:1]}
    embedding = Embedding(view, Space.of(module), split_plan(view, widths))
    subspace = critical_subspace(embedding, Space.of(module).theta(module))
    assert subspace.dimension == 2
    wide = Objective(embedding.wide(module), lambda o, t: (o**2).mean(), [(inputs, torch.zeros(1))])
    reference = wide.outputs(wide.theta())
    for point in subspace.sample(5, torch.Generator().manual_seed(0)):
        assert worst(wide.outputs(point), reference) <= 1e-12


def test_a_unit_without_outgoing_weights_adds_no_dimension() -> None:
    generator = torch.Generator().manual_seed(4)
    net = deep_net([2, 2, 1], "tanh", generator)
    with torch.no_grad():
        net[2].weight[:, 0] = 0
    view = view_of(net, data(net, generator))
    embedding = Embedding(view, Space.of(net), split_plan(view, {"0": 4}))
    assert critical_subspace(embedding, Space.of(net).theta(net)).dimension == 1


def test_two_split_groups_along_one_axis_are_refused() -> None:
    case = CASES["encoder"]
    view = trace(case.build(), case.example())
    names = ["blocks.0.attention.q/0", "blocks.0.attention.v"]
    plan = split_plan(view, {n: view.group(n).size + 1 for n in names})
    with pytest.raises(PlanError, match="not affine in both shares"):
        critical_subspace(Embedding(view, Space.of(case.build()), plan), Space.of(case.build()).theta(case.build()))
