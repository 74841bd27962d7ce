"""The traced view of every network of the zoo, and its proof: permutations keep the outputs."""

import pytest
import torch
from tests.random_nets import random_net
from tests.zoo import CASES, Case
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from thalweg.structure import RULES, View, permute, random_permutations, rescale, trace, verified
from thalweg.structure.rules.pointwise import pointwise
from thalweg.structure.tree import Fixed

cases = pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def double(value: tuple) -> tuple:
    return tuple(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in value)


def outputs(module: nn.Module, state: dict[str, Tensor], inputs: tuple) -> Tensor:
    with torch.no_grad():
        found = tree_leaves(functional_call(module, {n: t.clone() for n, t in state.items()}, inputs))
    return torch.cat([t.reshape(-1) for t in found if isinstance(t, Tensor)])


def relative_change(module: nn.Module, state: dict[str, Tensor], inputs: tuple) -> float:
    before = outputs(module, state_of(module), inputs)
    return float((outputs(module, state, inputs) - before).abs().max() / before.abs().max())


@cases
def test_the_expected_groups_are_found(case: Case) -> None:
    found = sorted(g.size for g in trace(case.build(), case.example()).groups)
    allowed = list(case.expected_groups) + list(case.optional_groups)
    for size in case.expected_groups:
        assert size in found
    for size in found:
        assert size in allowed
        allowed.remove(size)


@cases
def test_permuting_all_groups_at_once_keeps_the_outputs(case: Case) -> None:
    if not case.expected_groups:
        pytest.skip("a net without groups")
    module, inputs = case.build().double().eval(), double(case.example())
    view = trace(module, inputs)
    assert view.rejected == ()
    assert view.error <= 1e-9
    moved = permute(view, state_of(module), random_permutations(view, torch.Generator().manual_seed(3)))
    assert any(moved[n] is not t for n, t in state_of(module).items())
    if case.name != "zero_head":
        assert relative_change(module, moved, inputs) <= 1e-12


@cases
def test_rescaling_homogeneous_groups_keeps_the_outputs(case: Case) -> None:
    module, inputs = case.build().double().eval(), double(case.example())
    view = trace(module, inputs)
    generator = torch.Generator().manual_seed(4)
    for group in view.groups:
        if group.is_homogeneous:
            factors = torch.rand(group.size, generator=generator, dtype=torch.float64).numpy() + 0.5
            scaled = rescale(view, state_of(module), {group.name: factors})
            assert any(not torch.equal(scaled[n], t) for n, t in state_of(module).items())
            assert relative_change(module, scaled, inputs) <= 1e-9


def test_relu_nets_are_homogeneous_and_tanh_nets_are_not() -> None:
    for activation, expected in ((nn.ReLU(), True), (nn.LeakyReLU(), True), (nn.Tanh(), False), (nn.GELU(), False)):
        net = nn.Sequential(nn.Linear(2, 4), activation, nn.Linear(4, 1))
        assert trace(net, torch.randn(3, 2)).groups[0].is_homogeneous is expected


@pytest.mark.parametrize("seed", range(60))
def test_random_nets_keep_their_outputs_under_permutation(seed: int) -> None:
    module, inputs = random_net(seed)
    view = trace(module, inputs, generator=torch.Generator().manual_seed(seed))
    assert view.rejected == ()
    assert view.error <= 1e-9
    assert dict(view.frozen_by) == {}


@pytest.mark.parametrize("seed", range(20))
def test_a_wrong_spec_is_caught_in_random_nets(seed: int) -> None:
    """Move one member of one group elsewhere: verification must drop that group."""
    module, inputs = random_net(seed)
    view = trace(module, inputs, verify=False)
    group = next(g for g in view.groups if len(g.members) > 1)
    member = next(m for m in group.members if m.role == "consumer" or m is group.members[-1])
    axes = dict(view.axes)
    axes[member.tensor] = tuple(
        Fixed(t.size) if d == member.dim else t for d, t in enumerate(view.axes[member.tensor])
    )
    wrong = View(view.groups, axes)
    assert group.name in verified(wrong, module, inputs).rejected


def test_a_wrong_hand_written_spec_is_caught_and_the_right_one_is_not() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    right = {"first": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]}
    wrong = {"first": [("0.weight", 0), ("0.bias", 0), ("2.weight", 0)]}
    forgotten = {"first": [("0.weight", 0), ("2.weight", 1)]}
    inputs = torch.randn(5, 2)
    assert verified(View.of_spec(net, right), net, inputs).rejected == ()
    assert verified(View.of_spec(net, wrong), net, inputs).rejected == ("first",)
    assert verified(View.of_spec(net, forgotten), net, inputs).rejected == ("first",)


def test_a_zero_head_does_not_hide_a_wrong_spec() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    nn.init.zeros_(net[2].weight)
    view = View.of_spec(net, {"hidden": [("0.weight", 0), ("2.weight", 1)]})
    assert verified(view, net, torch.randn(5, 2)).rejected == ("hidden",)


def test_a_group_that_the_example_does_not_reach_is_dropped() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.live, self.dead, self.head = nn.Linear(2, 3), nn.Linear(2, 4), nn.Linear(7, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([torch.tanh(self.live(x)), 0 * torch.tanh(self.dead(x))], dim=1))

    view = trace(Masked(), torch.randn(5, 2))
    assert "live" in [g.name for g in view.groups]


def test_the_one_unit_of_a_layer_of_width_one_is_found() -> None:
    net = nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    view = trace(net, torch.randn(5, 3))
    assert [(g.name, g.size) for g in view.groups] == [("0", 1), ("2", 4)]
    assert [(m.tensor, m.dim, m.role) for m in view.groups[0].members] == [
        ("0.weight", 0, "producer"),
        ("0.bias", 0, "producer"),
        ("2.weight", 1, "consumer"),
    ]


def test_frozen_operations_are_named() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.linalg.qr(self.one(x).unsqueeze(-1) @ x.unsqueeze(1))[0][..., 0])

    view = trace(Sorted(), torch.randn(3, 2))
    assert view.groups == ()
    assert list(view.frozen_by) == ["linalg_qr"]


def test_a_rule_of_ones_own_thaws_an_operation() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.pixel_shuffle(self.one(x)[:, :, None, None], 1)[:, :, 0, 0])

    def same_axes(call) -> None:
        call.define(call.out, call.info(call.args[0]).axes)

    assert trace(Shifted(), torch.randn(3, 2)).groups == ()
    view = trace(Shifted(), torch.randn(3, 2), rules=RULES | {"pixel_shuffle": same_axes})
    assert [g.size for g in view.groups] == [4]


def test_the_pointwise_rule_serves_an_operation_of_ones_own() -> None:
    library = torch.library.Library("thalweg_tests", "DEF")
    library.define("bump(Tensor x) -> Tensor")
    library.impl("bump", lambda x: x * x / (1 + x * x), "CPU")

    class Bump(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.ops.thalweg_tests.bump(self.one(x)))

    assert dict(trace(Bump(), torch.randn(3, 2)).frozen_by) == {"thalweg_tests::bump": 1}
    view = trace(Bump(), torch.randn(3, 2), rules=RULES | {"thalweg_tests::bump": pointwise})
    assert [(g.size, g.zero_preserving) for g in view.groups] == [(4, True)]


def test_the_module_and_its_mode_are_untouched() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1)).train()
    before = {n: t.clone() for n, t in state_of(net).items()}
    trace(net, torch.randn(8, 2))
    assert net.training
    assert net[1].training
    for name, tensor in state_of(net).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_tracing_twice_gives_the_same_view() -> None:
    module, inputs = CASES["resnet"].build(), CASES["resnet"].example()
    assert trace(module, inputs).to_json() == trace(module, inputs).to_json()


def test_roles_and_flags_of_a_transformer() -> None:
    view = trace(CASES["encoder"].build(), CASES["encoder"].example())
    stream = next(g for g in view.groups if g.size == 10)
    assert stream.coupling == "average"
    assert {m.role for m in stream.members} == {"producer", "consumer"}
    assert [g.bilinear for g in view.groups if g.name.endswith("/1")] == [True, True]
    tied = trace(CASES["gpt"].build(), CASES["gpt"].example())
    assert next(g for g in tied.groups if g.size == 12).is_tied
