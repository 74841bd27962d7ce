"""Theorem 3: gradients orthogonal to weights under BatchNorm, and norms that drift with the step only."""

import pytest
import torch
from torch import nn

from thalweg.errors import ConfigError, NumericalError, ShapeError, StructureError
from thalweg.nets import relu_cnn, relu_mlp, teacher_init_
from thalweg.teacher_student import norm_drift, radial_gradients, without_biases_

PLACES = ("after_relu", "before_relu")


def network(kind: str, place: str, eps: float = 1e-30) -> tuple[nn.Sequential, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if kind == "fc":
        net = relu_mlp((12, 9), num_inputs=6, num_outputs=4, norm=place, eps=eps, affine=True)
        x = torch.randn(64, 6, generator=generator, dtype=torch.float64)
    else:
        net = relu_cnn((5, 4), image_size=8, num_outputs=4, norm=place, eps=eps)
        x = torch.randn(16, 1, 8, 8, generator=generator, dtype=torch.float64)
    return teacher_init_(net, generator).double(), x


def loss(outputs: torch.Tensor) -> torch.Tensor:
    return (outputs - 1).square().sum(1).mean()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["fc", "conv"])
@pytest.mark.parametrize("biases", [True, False])
def test_gradients_are_orthogonal_to_what_batchnorm_conserves(kind, place, biases):
    net, x = network(kind, place)
    if not biases:
        without_biases_(net)
    for layer in radial_gradients(net, loss, x):
        assert layer.conserved.max() <= 1e-10
        assert layer.num_dead < len(layer.weights)
        assert layer.is_biased is biases
        if not biases or place == "before_relu":  # the paper's statement: weights alone
            assert layer.weights.max() <= 1e-10


def test_behind_a_relu_a_bias_is_part_of_what_is_conserved():
    net, x = network("fc", "after_relu")
    assert radial_gradients(net, loss, x)[0].weights.max() > 1e-3


def test_the_shares_are_those_of_plain_backpropagation():
    net, x = network("fc", "after_relu", eps=0.1)  # so large that the gradient is not orthogonal
    found = radial_gradients(net, loss, x)[0]
    loss(net.train()(x)).backward()
    w, g = net.linear1.weight.detach(), net.linear1.weight.grad
    for j in range(len(w)):
        share = float((w[j] @ g[j]).abs() / (w[j].norm() * g[j].norm()))
        assert float(found.weights[j]) == pytest.approx(share, rel=1e-9)


def test_what_is_left_is_of_the_size_of_epsilon_and_of_single_precision():
    wide, x = network("fc", "before_relu", eps=1e-5)
    shares = [float(layer.conserved.max()) for layer in radial_gradients(wide, loss, x)]
    assert 1e-8 < max(shares) < 1e-3
    exact, _ = network("fc", "before_relu")
    single = radial_gradients(exact.float(), loss, x.float())
    assert 1e-9 < max(float(layer.conserved.max()) for layer in single) < 1e-4


def test_dead_nodes_are_counted_and_no_nan():
    net, x = network("fc", "after_relu")
    net.linear1.bias.data[:2] = -100
    first = radial_gradients(net, loss, x)[0]
    assert first.num_dead == 2
    assert (first.weights[:2] == 0).all()
    assert first.with_bias.isfinite().all()


def test_neither_the_network_nor_its_flags_change():
    net, x = network("fc", "after_relu")
    without_biases_(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    radial_gradients(net, loss, x)
    norm_drift(net, loss, x, step_sizes=(0.1, 0.05), time=0.1)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not net.linear1.bias.requires_grad
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("biases", [True, False])
def test_norms_drift_in_proportion_to_the_step(place, biases):
    net, x = network("fc", place)
    if not biases:
        without_biases_(net)
    drift = norm_drift(net, loss, x, step_sizes=(0.04, 0.02, 0.01), time=0.4)
    assert abs(drift.exponent - 1) <= 0.15
    assert drift.drifts[0] > drift.drifts[1] > drift.drifts[2]


def test_without_batchnorm_the_drift_does_not_fall_with_the_step():
    net, x = network("fc", "none")
    drift = norm_drift(net, loss, x, step_sizes=(0.02, 0.01, 0.005), time=0.2)
    assert abs(drift.exponent) < 0.2
    assert min(drift.drifts) > 1e-3


def test_norms_without_running_statistics_and_in_single_precision():
    net, x = network("fc", "before_relu")
    for norm in (net.norm1, net.norm2):
        norm.track_running_stats, norm.momentum, norm.running_mean, norm.running_var = False, None, None, None
    assert max(float(layer.conserved.max()) for layer in radial_gradients(net, loss, x)) <= 1e-10
    drift = norm_drift(net.float(), loss, x.float(), step_sizes=(0.04, 0.02, 0.01), time=0.4)
    assert abs(drift.exponent - 1) <= 0.15


def test_refusals():
    net, x = network("fc", "none")
    normed, _ = network("fc", "after_relu")
    with pytest.raises(ShapeError, match="a variance"):
        radial_gradients(normed, loss, x[:1])
    with pytest.raises(ShapeError, match="a variance"):
        norm_drift(normed, loss, x[:1], step_sizes=(0.1, 0.05), time=0.1)
    with pytest.raises(StructureError, match="frozen ones alone"):
        norm_drift(normed.requires_grad_(False), loss, x, step_sizes=(0.1, 0.05), time=0.1)
    with pytest.raises(ConfigError, match="divide the time inf"):
        norm_drift(net, loss, x, step_sizes=(0.1, 0.05), time=float("inf"))
    with pytest.raises(StructureError, match="with BatchNorm"):
        radial_gradients(net, loss, x)
    for steps in ((0.1,), (0.1, -0.1), (0.1, 0.3)):
        with pytest.raises(ConfigError, match="divide the time"):
            norm_drift(net, loss, x, step_sizes=steps, time=1.0)
    with pytest.raises(NumericalError, match="norms that move"):
        norm_drift(net, lambda y: 0 * y.sum(), x, step_sizes=(0.1, 0.05), time=0.1)
