"""Irreversibility (zhang2022hierarchical): no eigenvalue count falls under a critical embedding. An exact oracle."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from thalweg.data import three_tanh
from thalweg.embeddings import Embedding, Plan, Split
from thalweg.nets import two_layer
from thalweg.objective import Objective
from thalweg.probes import inertia, spectrum
from thalweg.structure import View
from thalweg.training import polish

THRESHOLD = 1e-11
# (w; b; a) of critical points of the paper's 1-D data, polished below.
POINTS = {
    1: [0.0895366, 0.0, 3.746951],
    2: [1.302005, 0.154989, -9.335645, 0.417625, 0.788588, 2.341854],
}


def landscape(width: int) -> Objective:
    data = three_tanh()
    return Objective(two_layer(width).double(), lambda o, t: ((o - t) ** 2).mean(), (data.inputs, data.targets))


def critical(width: int) -> torch.Tensor:
    point = polish(landscape(width), torch.tensor(POINTS[width], dtype=torch.float64))
    assert point.gradient_l1 <= 1e-12
    return point.theta


def embedded(narrow: int, parents: list[int], shares: np.ndarray, theta: torch.Tensor) -> torch.Tensor:
    objective = landscape(narrow)
    members = [("layers.0.weight", 0), ("layers.0.bias", 0), ("layers.1.weight", 1)]
    view = View.of_spec(objective.module, {"hidden": members})
    plan = Plan({"hidden": Split(narrow, np.array(parents), shares)})
    return Embedding(view, objective.space, plan).apply(theta)


def counts(width: int, theta: torch.Tensor) -> tuple[int, int, int]:
    found = inertia(spectrum(landscape(width), theta), THRESHOLD)
    return found.negative, found.zero, found.positive


@settings(max_examples=40)
@given(st.integers(1, 2), st.lists(st.integers(0, 1), min_size=1, max_size=3), st.integers(0, 1000))
def test_counts_never_fall_for_any_shares(narrow: int, copies: list[int], seed: int) -> None:
    theta = critical(narrow)
    parents = [*range(narrow), *[c % narrow for c in copies]]
    generator = np.random.default_rng(seed)
    drawn = generator.normal(size=len(parents))
    sizes = np.bincount(parents)
    shares = drawn + ((1 - np.bincount(parents, weights=drawn)) / sizes)[parents]
    # A share near zero makes eigenvalues near zero that are not: the threshold could not tell them.
    assume(np.abs(shares).min() > 0.1)
    wide = embedded(narrow, parents, shares, theta)
    assert float(landscape(len(parents)).gradient(wide).abs().sum()) <= 1e-11
    before, after = counts(narrow, theta), counts(len(parents), wide)
    assert all(b >= a for a, b in zip(before, after, strict=True)), (before, after)
    assert after[1] >= before[1] + len(copies)


@pytest.mark.parametrize("width", [2, 3, 10, 50])
def test_the_width_one_point_has_one_negative_and_one_zero_for_each_added_neuron(width: int) -> None:
    theta = embedded(1, [0] * width, np.full(width, 1 / width), critical(1))
    assert counts(width, theta) == (width - 1, width - 1, width + 2)
