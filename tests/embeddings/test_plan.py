"""Plans: laws, constructions, and every way to break them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.zoo import CASES
from torch import nn

from thalweg.embeddings import Plan, Split, one_step, split_plan
from thalweg.errors import PlanError
from thalweg.structure import trace


def view(activation: type[nn.Module] = nn.Tanh):
    return trace(nn.Sequential(nn.Linear(2, 3), activation(), nn.Linear(3, 1)), torch.randn(4, 2))


def split(parents: list[int], shares: list[float], narrow: int = 2) -> Split:
    return Split(narrow, np.array(parents), np.array(shares))


def test_shares_that_do_not_sum_to_one_are_refused() -> None:
    with pytest.raises(PlanError, match=r"shares of unit 0 to sum to 1\. Got \[0\.5, 0\.6\], sum 1\.1"):
        split([0, 0, 1], [0.5, 0.6, 1.0])


@pytest.mark.parametrize(
    ("parents", "shares", "message"),
    [
        ([0, 1], [1.0], "one share for each of the 2 wide units"),
        ([0, 2], [1.0, 1.0], "parents from 0 to 1"),
        ([0, -2], [1.0, 1.0], "parents from 0 to 1"),
        ([0, 0], [0.5, 0.5], "at least one copy of every unit. Got none of unit 1"),
        ([0, 1, -1], [1.0, 1.0, 0.5], "share 0 for null units"),
        ([0, 1], [1.0, float("nan")], "finite shares"),
    ],
)
def test_a_broken_split_is_refused(parents: list[int], shares: list[float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        split(parents, shares)


def test_a_narrower_width_is_refused() -> None:
    with pytest.raises(PlanError, match=r"at least 3 for '0'. Got 2. An embedding only widens"):
        split_plan(view(), {"0": 2})


def test_given_shares_are_checked() -> None:
    with pytest.raises(PlanError, match="sum to 1"):
        split_plan(view(), {"0": 4}, shares={"0": [0.5, 1, 1, 0.6]})
    plan = split_plan(view(), {"0": 4}, shares={"0": [3.0, 1, 1, -2.0]})
    assert plan.splits["0"].shares.tolist() == [3.0, 1, 1, -2.0]


def test_random_shares_need_a_generator() -> None:
    with pytest.raises(PlanError, match="a generator for random shares"):
        split_plan(view(), {"0": 4}, shares="random")


def test_too_few_parents_are_refused() -> None:
    with pytest.raises(PlanError, match=r"Expected 5 parents for '0'. Got 4"):
        split_plan(view(), {"0": 5}, parents={"0": [0, 1, 2, 2]})


def test_null_units_are_refused_where_zero_is_not_kept() -> None:
    assert split_plan(view(nn.Tanh), {}, parents={"0": [0, 1, 2, -1]}).num_added == 1
    with pytest.raises(PlanError, match="whose activation is not zero at zero"):
        split_plan(view(nn.Sigmoid), {}, parents={"0": [0, 1, 2, -1]})


def test_units_under_an_average_split_evenly_or_not_at_all() -> None:
    case = CASES["group_norm"]
    found = trace(case.build(), case.example())
    inner = next(g for g in found.groups if g.coupling == "average")
    assert split_plan(found, {inner.name: 3 * inner.size}).widths == {inner.name: 3 * inner.size}
    with pytest.raises(PlanError, match="equally often, with equal shares"):
        split_plan(found, {inner.name: inner.size + 1})
    with pytest.raises(PlanError, match="equally often, with equal shares"):
        split_plan(found, {inner.name: 2 * inner.size}, shares="random", generator=torch.Generator())
    with pytest.raises(PlanError, match="whose units share an average"):
        one_step(found, inner.name, 0, 0.5)


@pytest.mark.parametrize(
    ("case", "why"), [("encoder", "query and key"), ("gpt", "tied weight"), ("softmax_units", "softmax")]
)
def test_units_that_cannot_be_split_say_why(case: str, why: str) -> None:
    found = trace(CASES[case].build(), CASES[case].example())
    group = next(g for g in found.groups if not g.is_duplicable)
    with pytest.raises(PlanError, match=why):
        one_step(found, group.name, 0, 0.5)


def test_a_unit_out_of_range_is_refused() -> None:
    with pytest.raises(PlanError, match=r"a unit from 0 to 2 of '0'. Got 3"):
        one_step(view(), "0", 3, 0.5)


def test_the_same_width_is_no_split() -> None:
    assert split_plan(view(), {"0": 3}).splits == {}


def test_composition_needs_matching_widths() -> None:
    with pytest.raises(PlanError, match=r"a split of 3 units. Got one of 2"):
        split([0, 1, 1], [1.0, 0.5, 0.5]).then(split([0, 1], [1.0, 1.0]))


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.integers(0, 5))
def test_composed_shares_sum_to_one(alphas: list[float], first: int) -> None:
    total = Plan({"g": Split(2, np.arange(2), np.ones(2))})
    for alpha in alphas:
        width = total.splits["g"].wide
        unit = first % width
        shares = np.append(np.ones(width), alpha)
        shares[unit] = 1 - alpha
        total = total.then(Plan({"g": Split(width, np.append(np.arange(width), unit), shares)}))
    assert total.num_added == len(alphas)


@given(st.integers(3, 20), st.integers(0, 100))
def test_random_shares_sum_to_one_and_leave_the_unit_interval(width: int, seed: int) -> None:
    plan = split_plan(view(), {"0": width}, shares="random", generator=torch.Generator().manual_seed(seed))
    if width >= 12:
        shares = plan.splits["0"].shares
        assert shares.min() < 0 or shares.max() > 1
