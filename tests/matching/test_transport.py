"""Assignments against enumeration and against POT; plans of unequally many rows against their marginals."""

import itertools
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from thalweg.errors import ConfigError, NumericalError, ShapeError
from thalweg.matching import assign, transport
from thalweg.matching.transport import correlations, squared_distances


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_enumeration(ours: Tensor, theirs: Tensor, metric: str) -> float:
    def cost(a: Tensor, b: Tensor) -> float:
        if metric == "distance":
            return float(sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)))
        return 1 - float(np.corrcoef(a.numpy(), b.numpy())[0, 1])

    costs = [[cost(a, b) for b in theirs] for a in ours]
    return min(sum(costs[i][j] for i, j in enumerate(order)) for order in itertools.permutations(range(len(ours))))


@pytest.mark.parametrize("metric", ["distance", "correlation"])
@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_no_assignment_is_cheaper(size: int, metric: str) -> None:
    for seed in range(3):
        ours, theirs = normal(size, 4, seed=seed), normal(size, 4, seed=seed + 100)
        found = assign(ours, theirs, metric)
        assert sorted(found.order) == list(range(size))
        assert found.cost == pytest.approx(by_enumeration(ours, theirs, metric), abs=1e-12)


@pytest.mark.parametrize("metric", ["distance", "correlation"])
def test_a_permutation_is_recovered_in_single_precision(metric: str) -> None:
    rows = normal(200, 30).float()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    found = assign(rows, rows[order], metric)
    assert torch.equal(order[torch.from_numpy(found.order)], torch.arange(200))
    assert found.cost == pytest.approx(0, abs=1e-10)


def test_rows_without_variance_correlate_with_none() -> None:
    rows = torch.cat([torch.full((2, 50), 0.1, dtype=torch.float64), normal(3, 50)])
    found = correlations(rows, rows)
    assert_close(found[:2], torch.zeros(2, 5, dtype=torch.float64), rtol=0, atol=0)
    assert_close(found[2:, 2:].diagonal(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert set(assign(rows, rows[[2, 0, 3, 1, 4]], "correlation").order[2:]) == {0, 2, 4}


def test_one_product_gives_the_distances_of_all_pairs() -> None:
    ours, theirs = normal(5, 7), normal(3, 7, seed=1)
    naive = torch.stack([torch.stack([(a - b).square().sum() for b in theirs]) for a in ours])
    assert_close(squared_distances(ours, theirs), naive, rtol=1e-12, atol=1e-12)


def test_equal_masses_are_an_assignment_and_cost_what_pot_finds() -> None:
    ot = pytest.importorskip("ot")
    ours, theirs = normal(40, 6), normal(40, 6, seed=1)
    plan, cost = transport(ours, theirs), squared_distances(ours, theirs)
    best = ot.emd(np.full(40, 1 / 40), np.full(40, 1 / 40), cost.numpy())
    assert float((plan * cost).sum()) == pytest.approx(float((best * cost.numpy()).sum()), rel=1e-12)
    assert float((plan * cost).sum()) * 40 == pytest.approx(assign(ours, theirs).cost, rel=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), [(3, 5), (7, 4), (1, 6)])
def test_plans_have_the_marginals_asked_for(ours: int, theirs: int) -> None:
    pytest.importorskip("ot")
    a, b = normal(ours, 4), 1e6 * normal(theirs, 4, seed=1)
    masses = normal(ours).abs(), normal(theirs, seed=1).abs()
    for weights in (None, masses):
        plan = transport(a, b, weights)
        rows, columns = (normal(ours) * 0 + 1, normal(theirs) * 0 + 1) if weights is None else weights
        assert (plan >= 0).all()
        assert_close(plan.sum(1), rows / rows.sum(), rtol=0, atol=1e-12)
        assert_close(plan.sum(0), columns / columns.sum(), rtol=0, atol=1e-12)
    assert int((transport(a, b) > 0).sum()) <= ours + theirs - 1  # a vertex of the polytope


def test_duplicated_rows_share_their_mass() -> None:
    pytest.importorskip("ot")
    rows = normal(4, 3)
    plan = transport(rows, rows.repeat(2, 1))
    expected = torch.eye(4, dtype=torch.float64) / 4
    assert_close(plan[:, :4] + plan[:, 4:], expected, rtol=0, atol=1e-12)


def test_without_pot_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ConfigError, match=r"pip install 'thalweg\[transport\]'"):
        transport(normal(2, 3), normal(3, 3))
    assert transport(normal(2, 3), normal(2, 3)).shape == (2, 2)


class Stopped:
    """A solver that ends before the optimum, as POT does: with a warning in its log."""

    @staticmethod
    def emd(a: np.ndarray, b: np.ndarray, cost: np.ndarray, **_: object) -> tuple[np.ndarray, dict[str, object]]:
        return np.zeros_like(cost), {"warning": "numItermax reached before optimality."}


def test_a_plan_that_is_not_optimal_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", Stopped)
    with pytest.raises(NumericalError, match="numItermax reached before optimality"):
        transport(normal(2, 3), normal(3, 3))


def test_pot_says_in_its_log_that_it_stopped_early(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ot")
    monkeypatch.setattr(sys.modules["thalweg.matching.transport"], "_PIVOTS", 3)
    with pytest.raises(NumericalError, match="Expected an optimal transport plan"):
        transport(normal(30, 3), normal(31, 3))


def test_rows_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ShapeError, match="Use transport for unequal numbers of units"):
        assign(normal(2, 3), normal(3, 3))
    with pytest.raises(ShapeError, match="Compare the same part of both"):
        transport(normal(2, 3), normal(2, 4))
    with pytest.raises(ShapeError, match="at most 46340 rows"):
        assign(torch.zeros(46_341, 1), torch.zeros(46_341, 1))
    with pytest.raises(NumericalError, match="Expected finite rows"):
        assign(normal(2, 3), torch.full((2, 3), torch.nan))
    with pytest.raises(ShapeError, match="Expected 2 masses"):
        transport(normal(2, 3), normal(3, 3), (torch.ones(3), torch.ones(3)))
    with pytest.raises(NumericalError, match="Expected masses that are finite"):
        transport(normal(2, 3), normal(3, 3), (torch.zeros(2), torch.ones(3)))
