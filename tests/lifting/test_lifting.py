"""Lifting: the linear map Φ, its transpose and its projection, and what training does on both sides."""

import copy

import pytest
import torch
from tests.lifting.nets import normed, random_cnn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from thalweg.errors import ShapeError
from thalweg.lifting import Lifted, lift

FORMS = (("fc", False), ("fc", True), ("local", False))


def _slope(module: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss in train mode and its gradient, flat."""
    loss = cross_entropy(module(inputs), targets)
    slopes = torch.autograd.grad(loss, list(module.parameters()))
    return loss.detach(), torch.cat([s.reshape(-1) for s in slopes])


def _drawn(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _lifted(to: str, padded: bool) -> Lifted:
    net, inputs, _ = normed()
    return lift(net, inputs, to=to, padded=padded)


@pytest.mark.parametrize(("to", "padded"), FORMS)
def test_the_chain_rule_holds(to: str, padded: bool) -> None:
    net, inputs, targets = normed()
    lifted = lift(net, inputs, to=to, padded=padded)
    loss, slope = _slope(net, inputs, targets)
    same, wide = _slope(lifted.module, inputs, targets)
    torch.testing.assert_close(same, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(lifted.lifting.adjoint(wide), slope, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dict(lifted.module.named_buffers()), dict(net.named_buffers()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("to", "padded"), FORMS)
def test_the_adjoint_is_the_transpose(to: str, padded: bool) -> None:
    lifting = _lifted(to, padded).lifting
    x, y = _drawn(lifting.space.num_params, 0), _drawn(lifting.lifted_space.num_params, 1)
    torch.testing.assert_close(lifting.apply(x) @ y, x @ lifting.adjoint(y), rtol=1e-12, atol=1e-12)
    z = _drawn(lifting.space.num_params, 2)
    torch.testing.assert_close(lifting.apply(x + 2 * z), lifting.apply(x) + 2 * lifting.apply(z))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("to", "padded"), FORMS)
def test_projecting_a_lift_gives_the_network_back_to_the_bit(to: str, padded: bool, dtype: torch.dtype) -> None:
    lifting = _lifted(to, padded).lifting
    theta = _drawn(lifting.space.num_params, 0).to(dtype)
    assert torch.equal(lifting.project(lifting.apply(theta)), theta)


@pytest.mark.parametrize(("to", "padded"), FORMS)
def test_the_projection_is_orthogonal(to: str, padded: bool) -> None:
    lifting = _lifted(to, padded).lifting
    away = _drawn(lifting.lifted_space.num_params, 1)
    rest = away - lifting.apply(lifting.project(away))
    torch.testing.assert_close(
        lifting.adjoint(rest), torch.zeros(lifting.space.num_params, dtype=torch.float64), rtol=0, atol=1e-11
    )
    near = lifting.apply(lifting.project(away) + 1e-3 * _drawn(lifting.space.num_params, 3))
    assert float((away - near).norm()) > float(rest.norm())


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_random_network_comes_back(seed: int) -> None:
    net, inputs = random_cnn(seed)
    for to, padded in FORMS:
        lifted = lift(net, inputs, to=to, padded=padded)
        wide = lifted.lifting.lifted_space.theta(lifted.module)
        torch.testing.assert_close(wide, lifted.lifting.apply(lifted.lifting.space.theta(net)), rtol=0, atol=0)
        torch.testing.assert_close(
            lifted.lifting.nearest(lifted.module.state_dict()), net.state_dict(), rtol=0, atol=0
        )


@pytest.mark.parametrize("to", ["fc", "local"])
def test_taps_that_read_only_padding_keep_their_value(to: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 5, padding=2)).double()
    lifting = lift(net, torch.ones(1, 1, 2, 2), to=to).lifting
    theta = lifting.space.theta(net)
    assert torch.equal(lifting.project(lifting.apply(theta)), theta)
    unread = lifting.adjoint(torch.ones(lifting.lifted_space.num_params, dtype=torch.float64)) == 0
    assert int(unread.sum()) == 2 * (25 - 9)
    other = lifting.project(lifting.apply(2 * theta))
    assert torch.equal(other[unread], theta[unread])
    assert torch.equal(other[~unread], 2 * theta[~unread])


def test_padding_kept_as_a_layer_leaves_no_tap_unread() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 5, padding=2))
    assert not lift(net, torch.ones(1, 1, 2, 2), padded=True).lifting.unread


@pytest.mark.parametrize(("to", "padded"), FORMS)
def test_a_step_of_descent_projects_to_a_step_at_rates_of_their_own(to: str, padded: bool) -> None:
    """P = D⁻¹Φᵀ with D = ΦᵀΦ, the numbers of tied entries, so that P(Φθ - η·g') = θ - η·D⁻¹g by the chain rule."""
    net, inputs, targets = normed()
    lifted = lift(net, inputs, to=to, padded=padded)
    lifting, rate = lifted.lifting, 0.3
    theta, slope = lifting.space.theta(net), _slope(net, inputs, targets)[1]
    optimizer = torch.optim.SGD(lifted.module.parameters(), lr=rate)
    cross_entropy(lifted.module(inputs), targets).backward()
    optimizer.step()
    times = lifting.adjoint(lifting.apply(torch.ones_like(theta)))
    projected = lifting.project(lifting.lifted_space.theta(lifted.module))
    torch.testing.assert_close(projected, theta - rate * slope / times, rtol=1e-10, atol=1e-12)
    assert float(times.max()) == 16


def test_a_step_of_adam_stays_local_in_the_local_form_and_leaves_it_in_the_dense_one() -> None:
    from thalweg.lifting import deviation

    net, inputs, targets = normed()
    found = {}
    for to, padded in FORMS[::2]:
        lifted = lift(net, inputs, to=to, padded=padded)
        optimizer = torch.optim.Adam(lifted.module.parameters(), lr=1e-3)
        cross_entropy(lifted.module(inputs), targets).backward()
        optimizer.step()
        found[to] = deviation(lifted.lifting, lifted.module.state_dict())
    assert found["local"].lifted == 0
    assert found["local"].sharing > 0
    assert found["fc"].lifted > 0


def test_steps_under_tied_gradients_are_those_of_the_convolutional_network() -> None:
    """Descent along Φ(Φᵀg') in the relaxed net never leaves the subspace and is descent in the shared one."""
    net, inputs, targets = normed()
    lifted = lift(net, inputs)
    twin, rate = copy.deepcopy(net), 0.1
    theta, lifting = lifted.lifting.space.theta(net), lifted.lifting
    for _ in range(3):
        slope = _slope(twin, inputs, targets)[1]
        wide = _slope(lifted.module, inputs, targets)[1]
        torch.testing.assert_close(lifting.adjoint(wide), slope, rtol=1e-9, atol=1e-11)
        theta = theta - rate * slope
        lifting.space.write(theta, twin)
        lifting.lifted_space.write(lifting.apply(theta), lifted.module)


def test_the_lazy_state_makes_what_the_state_holds() -> None:
    net, inputs, _ = normed()
    lifting = lift(net, inputs).lifting
    state = dict(net.state_dict())
    lazy, made = lifting.lazily(state), lifting.state(state)
    assert len(lazy) == len(made) == len(state)
    assert set(lazy) == set(made)
    torch.testing.assert_close(dict(lazy), made, rtol=0, atol=0)
    assert made["1.running_mean"] is state["1.running_mean"]


def test_what_does_not_fit_is_refused() -> None:
    net, inputs, _ = normed()
    lifting = lift(net, inputs).lifting
    state = dict(net.state_dict())
    with pytest.raises(ShapeError, match=r"Expected '0.weight' of shape \(4, 2, 3, 3\). Got \(1,\)"):
        lifting.lazily.__wrapped__(lifting, state | {"0.weight": torch.ones(1)})["0.linear.weight"]
    with pytest.raises(ShapeError, match=r"Expected '0.bias' of shape \(4,\)"):
        lifting.lazily.__wrapped__(lifting, state | {"0.bias": torch.ones(2)})["0.linear.bias"]
    with pytest.raises(ShapeError, match=r"Expected '0.linear.weight' of shape \(64, 128\)"):
        lifting.nearest(lifting.state(state) | {"0.linear.weight": torch.ones(1)})
    for carry in (lifting.apply, lifting.adjoint, lifting.project):
        with pytest.raises(ShapeError, match="Expected theta with"):
            carry(torch.ones(3))
