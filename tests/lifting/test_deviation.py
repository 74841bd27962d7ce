"""The distance from the convolutional networks, against dense masks; masked states and images of filters."""

import math

import pytest
import torch
from tests.lifting.nets import normed, random_cnn
from torch import Tensor, nn

from thalweg.errors import ConfigError, ShapeError
from thalweg.lifting import Lifting, deviation, filter_image, lift, masked
from thalweg.nets import vanilla_cnn

FORMS = (("fc", False), ("fc", True), ("local", False))


def _moved(lifting: Lifting, state: dict[str, Tensor], size: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    drawn = {}
    for name, tensor in state.items():
        is_moved = name in lifting.lifted_space.names
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor) if is_moved else 0
        drawn[name] = tensor + size * noise
    return drawn


def _owners(lifting: Lifting, net: nn.Module) -> dict[str, Tensor]:
    """Which kernel entry each lifted weight is a copy of, plus 1; 0 where it is none's: by lifting the numbers."""
    numbers = {
        name: torch.arange(1.0, 1 + tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
        for name, tensor in net.state_dict().items()
        if tensor.is_floating_point()
    }
    return lifting.state(numbers)


def _naive(lifting: Lifting, net: nn.Module, state: dict[str, Tensor]) -> tuple[float, float, float, float]:
    """δ of the lifted layers, δ of all, sharing and distance, by masks as large as the weights."""
    owners = _owners(lifting, net)
    off = lifted = whole = tied = spread = away = 0.0
    for name in lifting.lifted_space.names:
        value, owner = state[name].double(), owners[name]
        square = float(value.square().sum())
        whole += square
        own = name in lifting.lifted_space.names and owner.shape != net.state_dict().get(name, value[:0]).shape
        lifted += square * own
        if not own:
            continue
        outside = float(value[owner == 0].square().sum()) if value.ndim > 1 else 0.0
        ids = owner.reshape(-1).long()
        count = torch.bincount(ids).clamp_min(1)
        mean = torch.bincount(ids, value.reshape(-1)) / count
        about = (value.reshape(-1) - mean[ids]).square()[ids > 0].sum()
        away += outside + float(about)
        if name.endswith("weight"):
            tied += float(value[owner > 0].square().sum())
            spread += float(about)
            off += outside
    return math.sqrt(off / lifted), math.sqrt(off / whole), spread / tied, math.sqrt(away / whole)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("seed", [1, 2, 3, 6])
@pytest.mark.parametrize(("to", "padded"), FORMS[:2])
def test_the_measures_are_those_of_dense_masks(to: str, padded: bool, seed: int) -> None:
    net, inputs = random_cnn(seed)
    lifted = lift(net, inputs, to=to, padded=padded)
    state = _moved(lifted.lifting, dict(lifted.module.state_dict()), 0.1)
    found = deviation(lifted.lifting, state)
    expected = _naive(lifted.lifting, net, state)
    assert (found.lifted, found.total, found.sharing, found.distance) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("to", "padded"), FORMS)
def test_the_distance_is_that_to_the_projection(to: str, padded: bool) -> None:
    net, inputs, _ = normed()
    lifted = lift(net, inputs, to=to, padded=padded)
    state = _moved(lifted.lifting, dict(lifted.module.state_dict()), 0.1)
    if to == "local":
        state = _moved(lifted.lifting, dict(lifted.module.state_dict()), 0.0)
        state["0.weight"] = state["0.weight"] * torch.linspace(1, 2, 4, dtype=torch.float64).reshape(4, 1, 1, 1, 1, 1)
    theta = lifted.lifting.lifted_space.theta(state)
    near = lifted.lifting.apply(lifted.lifting.project(theta))
    expected = float((theta - near).norm() / theta.norm())
    assert deviation(lifted.lifting, state).distance == pytest.approx(expected, rel=1e-12)
    assert expected > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("to", "padded"), FORMS)
def test_a_lift_deviates_by_exactly_nothing(to: str, padded: bool, dtype: torch.dtype) -> None:
    net, inputs, _ = normed()
    lifted = lift(net.to(dtype), inputs.to(dtype), to=to, padded=padded)
    found = deviation(lifted.lifting, lifted.module.state_dict())
    assert (found.lifted, found.total, found.sharing, found.distance) == (0, 0, 0, 0)
    assert set(found.by_layer.values()) == set(found.sharing_by_layer.values()) == {0}


def test_small_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    net, inputs = random_cnn(2)
    lifted = lift(net, inputs)
    state = _moved(lifted.lifting, dict(lifted.module.state_dict()), 0.1)
    expected = deviation(lifted.lifting, state)
    monkeypatch.setattr(sys.modules["thalweg.lifting.deviation"], "_AT_ONCE", 100)
    found = deviation(lifted.lifting, state)
    assert found.total == pytest.approx(expected.total, rel=1e-12)
    assert found.by_layer == pytest.approx(expected.by_layer, rel=1e-12)


def test_a_network_at_its_default_start_is_nearly_all_off_local() -> None:
    """The paper's 97 % at its own size (0.9746, 442 MB) is this measure; here at 16×16 with 8 channels."""
    net = vanilla_cnn(8, image_size=16)
    lifted = lift(net, torch.ones(1, 3, 16, 16), padded=True)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        for layer in lifted.module.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    state = dict(lifted.module.state_dict())
    found = deviation(lifted.lifting, state)
    expected = _naive(lifted.lifting, net, state)
    assert (found.lifted, found.total) == pytest.approx(expected[:2], rel=1e-6)
    assert 0.9 < found.total < found.lifted < 1


@pytest.mark.parametrize(("to", "padded"), FORMS)
def test_masked_parts_add_up_and_are_what_they_say(to: str, padded: bool) -> None:
    net, inputs, _ = normed()
    lifting = lift(net, inputs, to=to, padded=padded).lifting
    state = _moved(lifting, lifting.state(net.state_dict()), 0.1)
    local, rest = masked(lifting, state, keep="local"), masked(lifting, state, keep="off-local")
    owners = _owners(lifting, net)
    name = "0.weight" if to == "local" else "0.linear.weight"
    torch.testing.assert_close(local[name], state[name] * (owners[name] > 0), rtol=0, atol=0)
    torch.testing.assert_close(local[name] + rest[name], state[name], rtol=0, atol=0)
    assert local["6.weight"] is rest["6.weight"] is state["6.weight"]
    assert deviation(lifting, local).total == 0
    with pytest.raises(ConfigError, match=r"Expected to keep 'local' or 'off-local'. Got 'all'"):
        masked.__wrapped__(lifting, state, keep="all")  # type: ignore[attr-defined]


def test_an_image_of_a_filter_is_its_row() -> None:
    net, inputs = random_cnn(6)
    dense, local = (lift(net, inputs, to=to) for to in ("fc", "local"))
    geometry = dense.plan.layers[0].geometry
    rows = dense.module.state_dict()["0.linear.weight"].reshape(
        geometry.out_channels, *geometry.output_size, geometry.in_channels, *geometry.input_size
    )
    for channel in range(geometry.out_channels):
        for position in torch.cartesian_prod(*map(torch.arange, geometry.output_size)).tolist():
            place = tuple(position)
            for lifted in (dense, local):
                image = filter_image(lifted.lifting, lifted.module.state_dict(), "0", channel, place)
                torch.testing.assert_close(image, rows[(channel, *place)], rtol=0, atol=0)


def test_units_and_states_that_are_not_there_are_refused() -> None:
    net, inputs, _ = normed()
    lifted = lift(net, inputs)
    state = lifted.module.state_dict()
    with pytest.raises(ShapeError, match="Expected a lifted layer of"):
        filter_image(lifted.lifting, state, "6", 0, (0, 0))
    for channel, position in ((4, (0, 0)), (-1, (0, 0)), (0, (4, 0)), (0, (0,))):
        with pytest.raises(ShapeError, match=r"Expected a channel below 4 and a position within \(4, 4\)"):
            filter_image(lifted.lifting, state, "0", channel, position)
    with pytest.raises(ShapeError, match=r"Expected a parameter '0.linear.weight'. Got 0 others"):
        deviation(lifted.lifting, {})
    with pytest.raises(ShapeError, match=r"Expected '0.linear.weight' of shape"):
        deviation(lifted.lifting, state | {"0.linear.weight": torch.ones(2, 2)})
    with pytest.raises(ShapeError, match=r"Expected '0.linear.weight' of shape"):
        masked(lifted.lifting, {"0.linear.weight": torch.ones(2, 2)}, keep="local")
    with pytest.raises(ShapeError, match=r"Expected a parameter '0.linear.weight'. Got 0 others"):
        filter_image(lifted.lifting, {}, "0", 0, (0, 0))
