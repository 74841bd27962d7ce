"""Networks that are put together in unusual ways: what a connection claims still holds, or it says why not."""

from typing import Any

import pytest
import torch
from tests.paths.pairs import built, data, pair_of
from torch import Tensor, nn

from thalweg.errors import ConfigError, ShapeError, StructureError
from thalweg.objective import Objective
from thalweg.paths.curves import train_curve
from thalweg.paths.leg import blend_leg
from thalweg.paths.methods import Method, Settings, connect
from thalweg.paths.pair import Pair
from thalweg.paths.path import Path
from thalweg.paths.profile import profile
from thalweg.paths.widening import widened

FAST = Settings(knots=2, rebasin_steps=2)


def drawn(make: Any, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        return make().double().eval()


def pair_on(make: Any, x: Any, y: Tensor, freeze: tuple[str, ...] = ()) -> Pair:
    nets = [drawn(make, seed) for seed in (0, 1)]
    for name in freeze:
        for net in nets:
            net.get_parameter(name).requires_grad_(False)
        nets[1].get_parameter(name).data.copy_(nets[0].get_parameter(name))
    return Pair.of(Objective(nets[0], nn.CrossEntropyLoss(), (x, y)), *nets)


X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(40) % 3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


class Scripted(nn.Module):
    """A part of it no torch function mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.between = torch.jit.script(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.between(self.first(x)))
        return result


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_seen_is_not_reused() -> None:
    net = Scripted().double()
    objective = Objective(net, nn.CrossEntropyLoss(), (X, Y))
    start = {n: p.detach() for n, p in net.named_parameters()}
    weight, last = start["first.weight"].clone(), start["last.weight"].clone()
    last[:, 0] = 0
    weight[0] += 5  # a unit that nothing reads moves: the outputs stay
    a = {**start, "last.weight": last}
    b = {**a, "first.weight": weight}
    c = {**b, "first.weight": weight + 1}
    path = Path(objective.space, (blend_leg("dead", a, b), blend_leg("all", b, c)))
    found = profile(path, objective, points=9, refine=False)
    plain = [float(objective.value(path.at(float(t)))) for t in found.times]
    torch.testing.assert_close(found.train_loss, torch.tensor(plain, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert "cannot be seen" in found.reuse


class Tied(nn.Module):
    """A token matrix that is embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.hidden = nn.Embedding(7, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.hidden(self.tokens(x))), self.tokens.weight)


def test_a_weight_that_is_used_twice_is_not_fitted() -> None:
    x = torch.arange(28).reshape(28) % 7
    pair = pair_on(Tied, x, (x + 1) % 7)
    site = pair.execution.site("tokens.weight")
    assert site is not None
    assert site.calls == 2
    blends = connect(pair, "joint", FAST).path.legs[0].moving() or {}
    assert blends["tokens.weight"].kind == "linear"
    assert blends["hidden.weight"].kind == "knots"


@pytest.mark.parametrize("freeze", [("0.weight",), ("2.weight", "2.bias")])
@pytest.mark.parametrize("name", ["weights", "ot", "ot+wa"])
def test_units_that_frozen_parameters_make_or_read_keep_their_order(name: str, freeze: tuple[str, ...]) -> None:
    pair = pair_on(mlp, X, Y, freeze)
    if not pair.view.groups:  # a frozen middle layer reads the first group and makes the second
        with pytest.raises(StructureError, match="no interchangeable units"):
            connect(pair, name, FAST)
        return
    found = connect(pair, name, FAST)
    met = pair.objective.outputs(found.path.at(found.meets))
    torch.testing.assert_close(met, pair.objective.outputs(pair.theta_b), rtol=1e-10, atol=1e-10)
    assert any("keep their order" in note for note in found.notes)


@pytest.mark.parametrize("name", ["linear+wa", "linear+ridge", "ot+wa", "joint"])
def test_a_frozen_bias_stays(name: str) -> None:
    path = connect(pair_on(mlp, X, Y, ("2.bias",)), name, FAST).path
    assert "2.bias" not in path.parameters(0.5)


class SharedBias(nn.Module):
    """Two linear maps with one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return result


@pytest.mark.parametrize("name", ["linear+wa", "linear+ridge", "ot+wa", "joint", "linear+butterfly"])
def test_a_bias_that_two_maps_share_is_not_fitted_and_the_path_arrives(name: str) -> None:
    pair = pair_on(SharedBias, X, Y)
    path = connect(pair, name, FAST).path
    assert torch.equal(path.at(1.0), pair.theta_b)


def test_transport_goes_with_every_schedule() -> None:
    pair = pair_of("mlp")
    for schedule in ("simultaneous", "joint"):
        own = Method("mine", "", match="transport", schedule=schedule, ridge=1e-4)  # type: ignore[arg-type]
        found = connect(pair, own, FAST)
        assert set(found.permutations) == {g.name for g in pair.view.groups}
        assert torch.equal(found.path.at(1.0), pair.theta_b)


def test_methods_and_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="ridge of 0 or more"):
        Method("mine", "", schedule="joint")
    with pytest.raises(ConfigError, match="knots"):
        Settings(knots=0)


def test_names_that_the_module_has_not_and_names_that_are_missing_are_told() -> None:
    objective = Objective(built("batch norm", 0), nn.CrossEntropyLoss(), data("batch norm"))
    state = built("batch norm", 1).state_dict()
    with pytest.raises(ShapeError, match=r"extra\.weight besides"):
        Pair.of(objective, built("batch norm", 0), {**state, "extra.weight": torch.zeros(1)})
    lacking = {n: t for n, t in state.items() if "running_mean" not in n}
    with pytest.raises(ShapeError, match="running_mean"):
        Pair.of(objective, built("batch norm", 0), lacking)


class Keyed(nn.Module):
    """Takes its input by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, *, features: Tensor) -> Tensor:
        result: Tensor = self.net(features)
        return result


def test_inputs_by_keyword_work_in_wider_networks() -> None:
    found = widened(pair_on(Keyed, {"features": X}, Y), 0.5)
    assert sum(found.extra.values()) == 5


def test_zero_and_minus_zero_are_two_ends() -> None:
    leg = blend_leg("w", {"w": torch.tensor([0.0])}, {"w": torch.tensor([-0.0])})
    assert bool(leg.parameters(1.0)["w"].signbit())


def test_a_last_mini_batch_of_one_sample_does_not_stop_a_curve() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    objective = Objective(net, nn.CrossEntropyLoss(), (X[:33], Y[:33]))
    theta = objective.theta(net)
    curve = train_curve(
        objective, theta, theta + 1, epochs=1, batch_size=16, generator=torch.Generator().manual_seed(0)
    )
    assert curve.status == "finished"
