"""The zoo is what it says: it runs, it is reproducible, its widths are in its parameters."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from tests.zoo import CASES, Case

cases = pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)


@cases
def test_every_case_runs_twice_alike_in_both_precisions(case: Case) -> None:
    with torch.no_grad():
        first = tree_leaves(case.build()(*case.example()))
        second = tree_leaves(case.build()(*case.example()))
        wide = case.build().double()(*(x.double() if x.is_floating_point() else x for x in case.example()))
    assert_close(first, second, rtol=0, atol=0)
    assert all(torch.isfinite(x).all() for x in first)
    assert_close(tree_leaves(wide), [x.double() for x in first], rtol=1e-3, atol=1e-4)


@cases
def test_no_parameter_is_zero_but_where_the_case_says_so(case: Case) -> None:
    zero = [name for name, p in case.build().named_parameters() if not p.any()]
    assert zero == (["head.weight"] if case.name == "zero_head" else [])


@cases
def test_groups_are_listed_in_order_and_none_is_trivial(case: Case) -> None:
    assert list(case.expected_groups) == sorted(case.expected_groups)
    assert min(case.expected_groups + case.optional_groups) > 1
