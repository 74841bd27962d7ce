"""The algebra of axes against plain index arithmetic."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thalweg.errors import StructureError
from thalweg.structure.axes import Leaf, concatenation, cut, freeze, leaves, product, reshape, resolve, unify
from thalweg.structure.tree import (
    Fixed,
    ProductTree,
    SumTree,
    Units,
    from_json,
    gather,
    resized,
    spread,
    to_json,
    unit_of,
    without,
)


def sizes(axis):
    axis = resolve(axis)
    return axis.size if isinstance(axis, Leaf) else [sizes(p) for p in axis.parts]


def test_a_view_refines_a_leaf_into_heads_and_units() -> None:
    leaf = Leaf(12)
    (batch, heads, inner), sources = reshape([Leaf(5), leaf], [5, 3, 4])
    assert [batch.size, heads.size, inner.size] == [5, 3, 4]
    assert sizes(leaf) == [3, 4]
    assert sources == [{0}, {1}, {1}]


def test_a_view_that_mixes_axes_is_refused() -> None:
    assert reshape([Leaf(6), Leaf(4)], [8, 3]) is None


def test_flattening_and_unflattening_gives_the_same_units() -> None:
    channels, height = Leaf(6), Leaf(4)
    (flat,), _ = reshape([channels, height], [24])
    (again, rest), _ = reshape([flat], [6, 4])
    assert resolve(again) is channels
    assert resolve(rest) is height


def test_unifying_products_with_other_factors_refines_both() -> None:
    one, two = product([Leaf(6), Leaf(4)]), product([Leaf(2), Leaf(12)])
    unify(one, two)
    assert [leaf.size for leaf in leaves(one)] == [leaf.size for leaf in leaves(two)] == [2, 3, 4]
    assert list(map(id, leaves(one))) == list(map(id, leaves(two)))


def test_unifying_sums_cuts_at_all_ends() -> None:
    one, two = concatenation([Leaf(5), Leaf(3)]), concatenation([Leaf(2), Leaf(6)])
    unify(one, two)
    assert [leaf.size for leaf in leaves(one)] == [2, 3, 3]
    assert list(map(id, leaves(one))) == list(map(id, leaves(two)))


def test_gates_of_a_recurrent_layer_are_tied() -> None:
    rows = Leaf(12)
    gates = cut(rows, [4, 4, 4])
    for gate in gates[1:]:
        unify(gates[0], gate)
    found = list(leaves(rows))
    assert [leaf.size for leaf in found] == [4, 4, 4]
    assert len({id(leaf) for leaf in found}) == 1


def test_a_product_equals_a_sum_of_its_inner_axis() -> None:
    inner = Leaf(4)
    stacked = product([Leaf(3), inner])
    unify(stacked, concatenation([Leaf(4), Leaf(4), Leaf(4)]))
    assert {leaf.size for leaf in leaves(stacked)} <= {1, 4}
    assert len({id(leaf) for leaf in leaves(stacked) if leaf.size == 4}) == 1


def test_frozen_stays_frozen_through_refinement_and_unification() -> None:
    one, two = Leaf(12), Leaf(12)
    freeze(one, "input")
    reshape([one], [3, 4])
    unify(one, two)
    assert [leaf.frozen for leaf in leaves(two)] == ["input", "input"]


def test_layouts_that_do_not_match_freeze() -> None:
    one, two = product([Leaf(3), Leaf(4)]), product([Leaf(4), Leaf(3)])
    unify(one, two)
    assert all(leaf.frozen for leaf in leaves(one))


@st.composite
def trees(draw, depth=2):
    kind = draw(st.sampled_from(["units", "fixed"] if depth == 0 else ["units", "fixed", "product", "sum"]))
    if kind == "units":
        return Units(name := draw(st.sampled_from("abc")), {"a": 2, "b": 3, "c": 4}[name])
    if kind == "fixed":
        return Fixed(draw(st.integers(1, 3)))
    parts = tuple(draw(st.lists(trees(depth - 1), min_size=2, max_size=3)))
    return ProductTree(parts) if kind == "product" else SumTree(parts)


SIZES = {"a": 2, "b": 3, "c": 4}


@given(trees(), st.data())
def test_gather_of_a_permutation_permutes_and_its_inverse_undoes_it(tree, data) -> None:
    perms = {g: np.array(data.draw(st.permutations(range(n)))) for g, n in SIZES.items()}
    index = gather(tree, perms)
    assert sorted(index.tolist()) == list(range(tree.size))
    inverse = gather(tree, {g: np.argsort(p) for g, p in perms.items()})
    np.testing.assert_array_equal(index[inverse], np.arange(tree.size))


@given(trees(), st.data())
def test_widening_has_the_size_of_the_resized_axis_and_shares_sum_to_one(tree, data) -> None:
    parents = {g: np.append(np.arange(n), data.draw(st.integers(0, n - 1))) for g, n in SIZES.items()}
    shares = {}
    for g, p in parents.items():
        alpha = data.draw(st.floats(-2, 2))
        shares[g] = np.ones(len(p))
        shares[g][p[-1]], shares[g][-1] = 1 - alpha, alpha
    index = gather(tree, parents)
    assert len(index) == resized(tree, {g: len(p) for g, p in parents.items()}).size
    sums = np.bincount(index, weights=spread(tree, shares), minlength=tree.size)
    np.testing.assert_allclose(sums, 1, atol=1e-9)


@given(trees())
def test_json_round_trip(tree) -> None:
    assert from_json(to_json(tree), SIZES) == tree


@given(trees())
def test_dropping_all_groups_leaves_a_fixed_axis(tree) -> None:
    assert without(tree, frozenset(SIZES)) == Fixed(tree.size)


def test_units_of_heads_times_inner() -> None:
    tree = ProductTree((Units("a", 2), Units("b", 3)))
    assert unit_of(tree, "a").tolist() == [0, 0, 0, 1, 1, 1]
    assert unit_of(tree, "b").tolist() == [0, 1, 2, 0, 1, 2]
    assert unit_of(tree, "c").tolist() == [-1] * math.prod((2, 3))


@pytest.mark.parametrize("value", ["z", True, -1, {"product": 3}, {"other": []}, None])
def test_an_axis_that_is_none_is_refused(value) -> None:
    with pytest.raises(StructureError, match="Expected an axis"):
        from_json(value, SIZES)
