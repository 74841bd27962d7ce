"""LocallyConnected: against plain loops, under every kind of differentiation, and as a module among modules."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap

from thalweg.errors import ShapeError
from thalweg.lifting import LocallyConnected

CASES = (
    (2, 3, (3, 2), (4, 5), {"stride": (2, 1), "padding": 1}),
    (4, 6, (2, 3), (5, 4), {"padding": ((1, 0), (2, 1)), "dilation": (2, 1), "groups": 2}),
    (2, 2, (3,), (6,), {"padding": 1, "bias": False}),
    (1, 2, (2, 1, 2), (2, 3, 3), {"padding": (0, 0, 1)}),
    (3, 3, (3, 3), (3, 3), {"padding": 1, "groups": 3}),
)


def _layer(case: tuple, dtype: torch.dtype = torch.float64) -> LocallyConnected:
    *sizes, options = case
    layer = LocallyConnected(*sizes, **options, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def _inputs(layer: LocallyConnected, batch: int = 2) -> Tensor:
    shape = (batch, layer.geometry.in_channels, *layer.geometry.input_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _looped(layer: LocallyConnected, inputs: Tensor) -> Tensor:
    """The docstring's formula, position by position and channel by channel, on padded inputs."""
    g = layer.geometry
    padded = nn.functional.pad(inputs, [n for pair in g.padding[::-1] for n in pair])
    out = inputs.new_zeros(len(inputs), g.out_channels, *g.output_size)
    ins, outs = g.in_channels // g.groups, g.out_channels // g.groups
    for y in torch.cartesian_prod(*map(torch.arange, g.output_size)).reshape(g.positions, -1).tolist():
        for o in range(g.out_channels):
            first = o // outs * ins
            reach = [
                slice(p * s, p * s + d * (k - 1) + 1, d)
                for p, s, d, k in zip(y, g.stride, g.dilation, g.kernel_size, strict=True)
            ]
            patch = padded[(slice(None), slice(first, first + ins), *reach)]
            kernel = layer.weight[(*y, o)].movedim(-1, 0)
            out[(slice(None), o, *y)] = (patch * kernel).flatten(1).sum(1)
    return out if layer.bias is None else out + layer.bias


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_it_is_the_formula(case: tuple, batch: int) -> None:
    layer = _layer(case)
    inputs = _inputs(layer, batch)
    torch.testing.assert_close(layer(inputs), _looped(layer, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_its_gradient_is_that_of_the_formula(case: tuple) -> None:
    layer = _layer(case)
    inputs = _inputs(layer).requires_grad_()
    wanted = (inputs, *layer.parameters())
    mine = torch.autograd.grad(layer(inputs).tanh().sum(), wanted)
    theirs = torch.autograd.grad(_looped(layer, inputs).tanh().sum(), wanted)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "case",
    [(2, 2, (2, 1), (2, 2), {"padding": (1, 0), "groups": 2}), (1, 2, (2,), (4,), {"stride": 2, "padding": 1})],
    ids=("groups", "stride"),
)
def test_it_can_be_differentiated_twice(case: tuple, batch: int) -> None:
    layer = _layer(case)
    inputs = _inputs(layer, batch).requires_grad_()

    def of(x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight}, (x,))[:, :1]

    arguments = (inputs, layer.weight.detach().requires_grad_())
    assert torch.autograd.gradcheck(of, arguments)
    assert torch.autograd.gradgradcheck(of, arguments)


def _loss(layer: LocallyConnected, state: dict, inputs: Tensor) -> Tensor:
    return functional_call(layer, state, (inputs,)).tanh().square().sum()


@pytest.mark.parametrize("case", CASES[:2], ids=("stride", "groups"))
def test_transforms_of_functions_see_the_same(case: tuple) -> None:
    layer = _layer(case)
    inputs, state = _inputs(layer, 3), dict(layer.named_parameters())
    plain = {k: v.detach() for k, v in state.items()}
    expected = torch.autograd.grad(_loss(layer, state, inputs), list(state.values()), create_graph=True)
    found = grad(lambda s: _loss(layer, s, inputs))(plain)
    torch.testing.assert_close(tuple(found.values()), expected, rtol=1e-12, atol=1e-12)
    by_sample = vmap(grad(lambda s, x: _loss(layer, s, x)), in_dims=(None, 0))(plain, inputs)
    summed = tuple(v.sum(0) for v in by_sample.values())
    torch.testing.assert_close(summed, expected, rtol=1e-12, atol=1e-12)
    many = {k: torch.stack([v, 2 * v]) for k, v in plain.items()}
    both = vmap(lambda s: functional_call(layer, s, (inputs,)))(many)
    twice = functional_call(layer, {k: 2 * v for k, v in plain.items()}, (inputs,))
    torch.testing.assert_close(both, torch.stack([layer(inputs), twice]), rtol=1e-12, atol=1e-12)


def test_products_of_the_hessian_agree_in_three_ways() -> None:
    layer = _layer(CASES[0])
    inputs, weight = _inputs(layer), layer.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (slope,) = torch.autograd.grad(_loss(layer, {"weight": weight}, inputs), weight, create_graph=True)
    (twice,) = torch.autograd.grad(slope, weight, direction, retain_graph=True)
    (functional,) = vjp(grad(lambda w: _loss(layer, {"weight": w}, inputs)), weight.detach())[1](direction)
    torch.testing.assert_close(twice, functional, rtol=1e-10, atol=1e-10)
    pair = torch.stack([direction, -direction])
    (batched,) = torch.autograd.grad(slope, weight, pair, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([twice, -twice]), rtol=1e-10, atol=1e-10)


def test_a_jacobian_by_batched_backward_passes_is_that_of_the_transform() -> None:
    layer = _layer(CASES[1])
    inputs = _inputs(layer, 1)
    mine = torch.autograd.functional.jacobian(layer, inputs, vectorize=True)
    torch.testing.assert_close(mine, jacrev(layer)(inputs), rtol=1e-12, atol=1e-12)


def test_small_pieces_of_patches_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer(CASES[1])
    inputs = _inputs(layer).requires_grad_()
    wanted = (inputs, *layer.parameters())
    expected = layer(inputs), *torch.autograd.grad(layer(inputs).tanh().sum(), wanted)
    monkeypatch.setattr("thalweg.lifting.patches._AT_ONCE", {"cpu": 700})
    found = layer(inputs), *torch.autograd.grad(layer(inputs).tanh().sum(), wanted)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_leaving_out_what_reads_padding_gives_the_same(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer(case)
    inputs = _inputs(layer, 3).requires_grad_()
    wanted = (inputs, *layer.parameters())
    expected = layer(inputs), *torch.autograd.grad(layer(inputs).tanh().sum(), wanted)
    monkeypatch.setattr("thalweg.lifting.patches._WORTH_CUTTING", 0)
    found = layer(inputs), *torch.autograd.grad(layer(inputs).tanh().sum(), wanted)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_positions_that_read_nothing_but_padding_give_their_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer((1, 2, (1,), (2,), {"stride": 2, "padding": 3}))
    for least in (2**22, 0):
        monkeypatch.setattr("thalweg.lifting.patches._WORTH_CUTTING", least)
        outputs = layer(_inputs(layer))
        torch.testing.assert_close(outputs, _looped(layer, _inputs(layer)), rtol=1e-12, atol=1e-12)
        assert torch.equal(outputs[:, :, 0], layer.bias[:, 0].expand(2, -1))


def test_weights_that_read_padding_start_at_0_and_stay_there() -> None:
    layer = LocallyConnected(2, 3, (3, 3), (4, 4), padding=1, dtype=torch.float64)
    assert not layer.weight[0, :, :, 0].any()
    assert layer.weight[1, 1].all()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        layer(_inputs(layer)).square().sum().backward()
        optimizer.step()
    assert not layer.weight[0, :, :, 0].any()
    assert not layer.weight[-1, :, :, -1].any()


def test_its_start_is_bounded_by_the_fan_in() -> None:
    layer = LocallyConnected(4, 8, (3, 3), (6, 6), groups=2)
    bound = (2 * 9) ** -0.5
    assert bound / 2 < float(layer.weight.detach().abs().max()) <= bound
    assert float(layer.bias.detach().abs().max()) <= bound


def test_one_sample_and_no_sample_are_taken() -> None:
    layer = _layer(CASES[0])
    inputs = _inputs(layer, 1)
    torch.testing.assert_close(layer(inputs[0]), layer(inputs)[0])
    empty = layer(inputs[:0])
    empty.sum().backward()
    assert empty.shape == (0, *layer(inputs).shape[1:])
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("shape", [(2, 2, 4, 6), (2, 3, 4, 5), (4, 5), (1, 1, 2, 4, 5)], ids=str)
def test_other_inputs_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"Expected inputs of shape \(batch, 2, 4, 5\)"):
        _layer(CASES[0])(torch.zeros(shape, dtype=torch.float64))


def test_a_kernel_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="a kernel that fits the input"):
        LocallyConnected(1, 1, (3, 3), (2, 2))


def test_copies_and_state_dicts_hold_all_of_it() -> None:
    layer = _layer(CASES[1])
    inputs = _inputs(layer)
    expected = layer(inputs)
    torch.testing.assert_close(copy.deepcopy(layer)(inputs), expected, rtol=0, atol=0)
    other = LocallyConnected(*CASES[1][:-1], **CASES[1][-1], dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(inputs), expected, rtol=0, atol=0)
    assert "groups=2" in repr(layer)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
def test_lower_precisions_round(dtype: torch.dtype, tolerance: float) -> None:
    layer = _layer(CASES[0])
    inputs, expected = _inputs(layer), layer(_inputs(layer)).detach()
    found = layer.to(dtype)(inputs.to(dtype)).detach()
    assert found.dtype == dtype
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < tolerance


def test_autocast_lowers_it_as_it_lowers_a_convolution() -> None:
    layer = _layer(CASES[0], torch.float32)
    inputs = _inputs(layer).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(inputs)
        assert found.dtype == nn.Conv2d(2, 3, 3)(inputs).dtype == torch.bfloat16
        found.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_two_threads_give_the_same() -> None:
    layer = _layer(CASES[0])
    inputs = _inputs(layer, 5)
    expected, threads = layer(inputs), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-13, atol=1e-13)
    finally:
        torch.set_num_threads(threads)
