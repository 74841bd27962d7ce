"""The compiled activations against extended precision: value and slope to a few units in the last place."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

functions = pytest.importorskip("thalweg.compiled.functions", exc_type=ImportError)


def rows(kind: str, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    h, d = np.empty_like(z), np.empty_like(z)
    functions.activate(functions.ACTIVATIONS[kind], z, h, d, len(z))
    return h, d


def grid() -> np.ndarray:
    small = np.geomspace(1e-300, 1, 3000)
    return np.concatenate([np.linspace(-40, 40, 8001), small, -small, [0.0, 800.0, -800.0, 1e300, -1e300]])


def test_tanh_is_exact_to_three_units_in_the_last_place():
    z = grid()
    h, d = rows("tanh", z)
    exact = np.tanh(z.astype(np.longdouble))
    assert float((np.abs(h - exact) / np.spacing(np.abs(exact.astype(float)))).max()) <= 3
    np.testing.assert_allclose(d, (1 - exact**2).astype(float), rtol=0, atol=1e-15)
    assert np.signbit(rows("tanh", np.array([-0.0]))[0])[0]


def test_sigmoid_is_exact_down_to_its_least_values():
    z = grid()
    h, d = rows("sigmoid", z[np.abs(z) < 700])
    exact = 1 / (1 + np.exp(-z[np.abs(z) < 700].astype(np.longdouble)))
    np.testing.assert_allclose(h, exact.astype(float), rtol=2e-15, atol=0)
    np.testing.assert_allclose(d, (exact * (1 - exact)).astype(float), rtol=0, atol=1e-16)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=40))
def test_every_activation_and_its_slope_are_those_of_torch(values):
    z = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    for kind, function in (
        ("tanh", torch.tanh),
        ("sigmoid", torch.sigmoid),
        ("relu", torch.relu),
        ("gelu", torch.nn.functional.gelu),
    ):
        expected = function(z)
        (slope,) = torch.autograd.grad(expected.sum(), z)
        h, d = rows(kind, z.detach().numpy())
        np.testing.assert_allclose(h, expected.detach().numpy(), rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(d, slope.numpy(), rtol=1e-14, atol=1e-15)
