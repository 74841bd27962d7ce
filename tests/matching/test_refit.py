"""Refitting a layer: the least squares that torch would solve, from sampled patches and streamed sums."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from thalweg.errors import ShapeError
from thalweg.matching.gram import Gram
from thalweg.matching.refit import refit, sampled_positions
from thalweg.structure.sites import Site, captured, execution

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
GENERATOR = torch.Generator().manual_seed(0)


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def _site(layer: nn.Module, inputs: Tensor) -> Site:
    return execution(layer, inputs).sites[0]


CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (40, 3, 9)),
    "2d": (nn.Conv2d(3, 4, 3, padding=1), (20, 3, 6, 5)),
    "strided, dilated, unlike sides": (
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1)),
        (30, 2, 9, 6),
    ),
    "same": (nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (20, 2, 6, 7)),
    "valid": (nn.Conv2d(2, 3, 2, padding="valid", bias=False), (20, 2, 4, 4)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (20, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), (30, 4, 5, 5)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (20, 2, 5, 5)),
    "3d": (nn.Conv3d(2, 3, 2, padding=(1, 0, 1)), (20, 2, 3, 4, 3)),
}


def _naive(layer: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Minimise over every weight at once: the convolution as one dense matrix, a column for each weight."""
    theta = torch.cat([p.detach().reshape(-1) for p in layer.parameters()])

    def outputs(flat: Tensor) -> Tensor:
        sizes = [p.numel() for p in layer.parameters()]
        named = {n: v.reshape(p.shape) for (n, p), v in zip(layer.named_parameters(), flat.split(sizes), strict=True)}
        return torch.func.functional_call(layer, named, (inputs,)).reshape(-1)

    matrix = torch.stack([outputs(unit).detach() for unit in torch.eye(len(theta), dtype=theta.dtype)], dim=1)
    return torch.linalg.lstsq(matrix, targets.reshape(-1)).solution


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_is_the_least_squares_of_its_weights(kind: str) -> None:
    layer, shape = CONVOLUTIONS[kind]
    layer = layer.double()
    inputs = _drawn(*shape)
    taken, results = captured(layer, {}, inputs, reads=["weight"], makes=["weight"])
    targets = results["weight"] + _drawn(*results["weight"].shape)
    fit = refit(
        _site(layer, inputs),
        taken["weight"],
        targets,
        weight=layer.weight,
        bias=layer.bias,
        samples_per_feature=10**6,
    )
    flat = torch.cat([fit.weight.reshape(-1), *([] if fit.bias is None else [fit.bias])])
    assert_close(flat, _naive(layer, inputs, targets), rtol=0, atol=1e-11)
    assert fit.samples == targets.numel() // targets.shape[1]
    assert (fit.bias is None) == (layer.bias is None)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_sampled_patches_recover_the_weights_that_made_the_targets(kind: str) -> None:
    layer, shape = CONVOLUTIONS[kind]
    layer = layer.double()
    taken, results = captured(layer, {}, inputs := _drawn(*shape), reads=["weight"], makes=["weight"])
    fit = refit(
        _site(layer, inputs),
        taken["weight"],
        results["weight"],
        weight=torch.zeros_like(layer.weight),
        bias=None if layer.bias is None else torch.zeros_like(layer.bias),
        samples_per_feature=3,
    )
    assert fit.samples == 3 * fit.features < results["weight"].numel() // results["weight"].shape[1]
    assert fit.residual < 1e-11
    assert_close(fit.weight, layer.weight.detach(), rtol=0, atol=1e-11)


def test_a_linear_layer_takes_every_axis_but_the_last_as_samples() -> None:
    inputs, targets = _drawn(7, 5, 6), _drawn(7, 5, 3)
    fit = refit(Site("w", "b", 0), inputs, targets, weight=torch.zeros(3, 6), bias=torch.zeros(3))
    augmented = torch.cat([inputs.reshape(35, 6), torch.ones(35, 1, dtype=torch.float64)], dim=1)
    wanted = torch.linalg.lstsq(augmented, targets.reshape(35, 3)).solution.T
    assert_close(torch.cat([fit.weight, fit.bias[:, None]], dim=1), wanted.float(), rtol=0, atol=1e-6)
    assert (fit.weight.dtype, fit.samples, fit.features) == (torch.float32, 35, 7)


def test_a_single_image_needs_no_batch_axis() -> None:
    layer = nn.Conv2d(1, 2, 2).double()
    inputs = _drawn(1, 9, 9)
    fit = refit(_site(layer, inputs), inputs, layer(inputs).detach(), weight=layer.weight, bias=layer.bias)
    assert_close(fit.weight, layer.weight.detach(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("precision", ["double", "single"])
def test_targets_of_the_prior_have_the_prior_as_solution(precision: str) -> None:
    layer = nn.Linear(300, 4).double()
    inputs = _drawn(100, 300).relu()
    targets = layer(inputs).detach()
    fit = refit(
        Site("w", "b", 0), inputs, targets, weight=layer.weight, bias=layer.bias, ridge=1e-4, prior=True,
        precision=precision,
    )  # fmt: skip
    tolerance = 1e-13 if precision == "double" else 1e-5
    assert_close(fit.weight, layer.weight.detach(), rtol=0, atol=tolerance)
    assert_close(fit.bias, layer.bias.detach(), rtol=0, atol=tolerance)


def test_few_samples_give_the_nearest_weights_and_say_so() -> None:
    inputs, targets = _drawn(10, 30), _drawn(10, 2)
    fit = refit(Site("w", None, 0), inputs, targets, weight=torch.zeros(2, 30, dtype=torch.float64))
    assert_close(fit.weight.T, torch.linalg.pinv(inputs) @ targets, rtol=0, atol=1e-11)
    assert (fit.status, fit.rank, fit.is_scarce, fit.bias) == ("minimum norm", 10, True, None)
    assert "10 samples for 30 features" in str(fit.warning)
    assert refit(Site("w", None, 0), _drawn(60, 3), _drawn(60, 2), weight=torch.zeros(2, 3)).warning is None


def test_the_draw_is_the_same_for_equal_shapes_and_covers_the_borders() -> None:
    first, again = sampled_positions(10**6, 500, 3), sampled_positions(10**6, 500, 3)
    assert_close(first, again, rtol=0, atol=0)
    assert len(first.unique()) == 500
    assert not torch.equal(first, sampled_positions(10**6, 500, 4))
    whole = torch.cat([sampled_positions(100, 20, seed) for seed in range(60)])
    assert len(whole.unique()) == 100
    assert sampled_positions(100, 80, 0).unique().numel() == 80


def test_zero_targets_have_no_residual() -> None:
    fit = refit(Site("w", None, 0), _drawn(20, 3), torch.zeros(20, 2), weight=torch.zeros(2, 3))
    assert (fit.residual, float(fit.weight.abs().max())) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("site", "inputs", "targets", "weight"),
    [
        (Site("w", None, 0), (5, 3), (5, 2), (2, 4)),
        (Site("w", None, 0), (5, 3), (4, 2), (2, 3)),
        (Site("w", None, 2), (5, 3, 4, 4), (5, 2, 4, 4), (2, 3, 3, 3)),
        (Site("w", None, 2), (5, 4, 4, 4), (5, 2, 2, 2), (2, 3, 3, 3)),
    ],
)
def test_layers_that_do_not_fit_are_refused(
    site: Site, inputs: tuple[int, ...], targets: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeError, match="Take both at this layer"):
        refit(site, torch.zeros(inputs), torch.zeros(targets), weight=torch.zeros(weight))


def test_the_prior_is_the_one_of_the_normal_equations_and_the_residual_that_of_the_targets() -> None:
    inputs, targets, weight, bias = _drawn(50, 8), _drawn(50, 3), _drawn(3, 8), _drawn(3)
    fit = refit(Site("w", "b", 0), inputs, targets, weight=weight, bias=bias, ridge=1e-2, prior=True)
    gram = Gram(8, 3, bias=True)
    gram.add(inputs, targets)
    wanted = gram.solve(1e-2, (weight, bias))
    assert_close(fit.weight, wanted.weight, rtol=0, atol=1e-12)
    assert_close(fit.bias, wanted.bias, rtol=0, atol=1e-12)
    error = (inputs @ fit.weight.T + fit.bias - targets).norm() / targets.norm()
    assert abs(fit.residual - float(error)) < 1e-12
    assert abs(wanted.residual - float(error)) < 1e-12
