"""Streamed least squares, held against torch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from thalweg.errors import DataError, NumericalError, ShapeError
from thalweg.matching.gram import CHUNK, Gram


def _drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_one(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], dim=1)


@given(
    seed=st.integers(0, 10**6),
    samples=st.integers(1, 40),
    features=st.integers(1, 12),
    dead=st.integers(0, 2),
    copies=st.integers(0, 3),
    bias=st.booleans(),
)
@settings(max_examples=40)
def test_it_is_the_pseudo_inverse_whatever_the_rank(
    seed: int, samples: int, features: int, dead: int, copies: int, bias: bool
) -> None:
    rows, targets = _drawn(seed, samples, features), _drawn(seed + 1, samples, 3)
    rows = torch.cat([rows, torch.zeros(samples, dead, dtype=torch.float64), rows[:, :copies]], dim=1)
    gram = Gram(rows.shape[1], 3, bias=bias)
    gram.add(rows, targets)
    fit = gram.solve()
    full = _with_one(rows) if bias else rows
    values = torch.linalg.svdvals(full)
    if float(values[values > 1e-10 * values[0]].min() / values[0]) < 1e-3:
        return  # a direction that is nearly dependent: neither method has 1e-9 there
    wanted = (torch.linalg.pinv(full) @ targets).T
    found = fit.weight if fit.bias is None else torch.cat([fit.weight, fit.bias[:, None]], dim=1)
    assert_close(found, wanted, rtol=0, atol=1e-8)
    assert fit.rank == int(torch.linalg.matrix_rank(full))
    assert (fit.status == "cholesky") == (fit.rank == full.shape[1])
    error = float((full @ wanted.T - targets).norm() / targets.norm())
    assert abs(fit.residual - error) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_chunks_do_not_matter(bias: bool) -> None:
    rows, targets = _drawn(0, CHUNK + 100, 7), _drawn(1, CHUNK + 100, 2)
    whole, parts = Gram(7, 2, bias=bias), Gram(7, 2, bias=bias)
    whole.add(rows, targets)
    for start in range(0, len(rows), 1111):
        parts.add(rows[start : start + 1111], targets[start : start + 1111])
    first, second = whole.solve(), parts.solve()
    assert_close(first.weight, second.weight, rtol=0, atol=1e-13)
    full = _with_one(rows) if bias else rows
    wanted = torch.linalg.lstsq(full, targets).solution.T
    assert_close(first.weight, wanted[:, :7], rtol=0, atol=1e-13)
    assert (whole.samples, whole.features) == (CHUNK + 100, 7 + bias)


def test_the_ridge_is_the_penalised_least_squares_about_the_prior() -> None:
    rows, targets, prior, shift = _drawn(0, 30, 50), _drawn(1, 30, 4), _drawn(2, 4, 50), _drawn(3, 4)
    gram = Gram(50, 4, bias=True)
    gram.add(rows, targets)
    fit = gram.solve(1e-2, (prior, shift))
    full = _with_one(rows)
    start = torch.cat([prior, shift[:, None]], dim=1)
    root = float((1e-2 * (full.T @ full).diagonal().mean()).sqrt())
    tall = torch.cat([full, root * torch.eye(51, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(tall, torch.cat([targets, root * start.T])).solution.T
    assert_close(fit.weight, wanted[:, :50], rtol=0, atol=1e-11)
    assert_close(fit.bias, wanted[:, 50], rtol=0, atol=1e-11)
    assert fit.status == "ridge"
    error = float((full @ wanted.T - targets).norm() / targets.norm())
    assert abs(fit.residual - error) < 1e-9


def test_the_solution_nearest_to_the_prior_without_a_ridge() -> None:
    rows, targets, prior = _drawn(0, 10, 25), _drawn(1, 10, 2), _drawn(2, 2, 25)
    gram = Gram(25, 2, bias=False)
    gram.add(rows, targets)
    wanted = prior.T + torch.linalg.pinv(rows) @ (targets - rows @ prior.T)
    assert_close(gram.solve(0.0, (prior, None)).weight, wanted.T, rtol=0, atol=1e-11)


def test_a_dead_feature_keeps_its_prior() -> None:
    rows, prior = _drawn(0, 30, 4), _drawn(2, 2, 4)
    rows[:, 1] = 0
    gram = Gram(4, 2, bias=False)
    gram.add(rows, _drawn(1, 30, 2))
    for ridge in (0.0, 1e-4):
        assert_close(gram.solve(ridge, (prior, None)).weight[:, 1], prior[:, 1], rtol=0, atol=0)


def test_single_precision_sums_in_double() -> None:
    rows, targets = _drawn(0, 3 * CHUNK, 20).relu(), _drawn(1, 3 * CHUNK, 3)
    double, single = Gram(20, 3, bias=True), Gram(20, 3, bias=True, precision="single")
    double.add(rows, targets)
    single.add(rows, targets)
    assert_close(single.solve(1e-6).weight, double.solve(1e-6).weight, rtol=0, atol=1e-5)


def test_single_precision_takes_no_ridge_that_its_rounding_swamps() -> None:
    rows, targets = _drawn(0, 40, 120), _drawn(1, 40, 2)
    single, double = Gram(120, 2, bias=True, precision="single"), Gram(120, 2, bias=True)
    for each in (single, double):
        each.add(rows, targets)
    fit = single.solve(1e-9)
    assert (fit.status, fit.rank) == ("ridge", 121)
    assert_close(fit.weight, single.solve(1e-6).weight, rtol=0, atol=0)
    assert_close(single.solve(1e-4).weight, double.solve(1e-4).weight, rtol=0, atol=1e-2)


def test_nothing_but_dead_features() -> None:
    gram = Gram(3, 2, bias=False)
    gram.add(torch.zeros(5, 3), torch.ones(5, 2))
    fit = gram.solve()
    assert (fit.rank, fit.residual, float(fit.weight.abs().max())) == (0, 1.0, 0.0)


def test_bad_input_is_refused() -> None:
    gram = Gram(3, 2, bias=True)
    with pytest.raises(DataError, match="Add some"):
        gram.solve()
    with pytest.raises(ShapeError, match="a row for each sample"):
        gram.add(torch.zeros(5, 4), torch.zeros(5, 2))
    gram.add(torch.ones(5, 3), torch.ones(5, 2))
    with pytest.raises(ShapeError, match="prior of shape"):
        gram.solve(0.0, (torch.zeros(2, 2), None))
    gram.add(torch.full((1, 3), float("nan")), torch.ones(1, 2))
    with pytest.raises(NumericalError, match="diverged"):
        gram.solve()
