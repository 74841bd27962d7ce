"""The permutation stage reaches the order exactly, and free slots keep the function all the way."""

import json
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from thalweg.errors import ConfigError, ShapeError, StructureError
from thalweg.paths.leg import BlendLeg, LazyLeg, Leg
from thalweg.paths.path import Path
from thalweg.paths.permutation import PermutationKind, permutation_path
from thalweg.paths.permutation_arrangement import Arrangement, pack_arrangements, unpack_arrangements
from thalweg.paths.permutation_slots import slot_rounds, unit_importance
from thalweg.space import Space
from thalweg.structure import trace
from thalweg.structure.symmetry import permute, random_permutations
from thalweg.structure.tree import IntArray
from thalweg.structure.view import View

KINDS: tuple[PermutationKind, ...] = ("swaps", "reflections", "free_slots")


class TwoReaders(nn.Module):
    """Units that two layers read, and a stream whose units are read by what makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 9)
        self.block = nn.Sequential(nn.Linear(9, 7), nn.GELU(), nn.Linear(7, 9))
        self.left, self.right = nn.Linear(9, 2), nn.Linear(9, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Give both."""
        stream = torch.tanh(self.first(x))
        stream = stream + self.block(stream)
        return torch.cat([self.left(stream), self.right(stream)], dim=-1)


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 11), nn.ReLU(), nn.Linear(11, 8), nn.Tanh(), nn.Linear(8, 2)), (5, 4)),
    "convolutions and BatchNorm": (_convolutional, (3, 1, 5, 5)),
    "two readers and a stream": (TwoReaders, (5, 3)),
}


def _network(kind: str) -> tuple[nn.Module, View, dict[str, Tensor], Tensor]:
    make, shape = NETS[kind]
    generator = torch.Generator().manual_seed(3)
    net = make().double().eval()
    state: dict[str, Tensor] = {}
    for name, tensor in net.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        state[name] = tensor if not tensor.is_floating_point() else drawn.abs() + 0.1 if "var" in name else drawn
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    return net, trace(net, inputs), state, inputs


def _everything(leg: Leg, s: float) -> dict[str, Tensor]:
    """Parameters at s, and buffers on the straight line between those of the leg's ends."""
    assert isinstance(leg, LazyLeg)
    assert isinstance(leg.start, Arrangement)
    assert isinstance(leg.end, Arrangement)
    first, last = leg.start.state(), leg.end.state()
    buffers = {n: t.lerp(last[n], s) if t.is_floating_point() else t for n, t in first.items()}
    return {**buffers, **leg.parameters(s)}


def _equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", NETS)
def test_every_group_reaches_its_order_bit_for_bit(net: str, kind: PermutationKind) -> None:
    module, view, state, _ = _network(net)
    space = Space.of(module)
    for name, order in random_permutations(view, torch.Generator().manual_seed(1)).items():
        path = permutation_path(space, view, state, name, order, kind=kind, at_once=2)
        permuted = permute(view, state, {name: order})
        assert _equal(path.parameters(0.0), state)
        assert _equal(path.parameters(1.0), permuted)
        assert _equal(path.start_buffers, state)
        assert _equal(path.end_buffers, permuted)
        assert set(path.start_buffers) | set(space.names) == set(state)
        for before, after in pairwise(path.legs):
            assert not isinstance(before, LazyLeg) or not isinstance(after, LazyLeg) or before.end is after.start


@pytest.mark.parametrize("net", NETS)
def test_units_travel_through_free_slots_without_a_change_of_the_function(net: str) -> None:
    module, view, state, inputs = _network(net)
    for name, order in random_permutations(view, torch.Generator().manual_seed(2)).items():
        path = permutation_path(Space.of(module), view, state, name, order, slots=3)
        away, *travel, back = path.legs
        assert isinstance(away, BlendLeg)
        assert isinstance(back, BlendLeg)
        outputs = functional_call(module, _everything(travel[0], 0.0), (inputs,))
        scale = float(outputs.abs().max())
        for leg in travel:
            for s in (0.0, 0.3, 0.8, 1.0):
                found = functional_call(module, _everything(leg, s), (inputs,))
                assert float((found - outputs).abs().max()) <= 1e-12 * scale
        assert any(not torch.equal(travel[0].parameters(0.5)[n], t) for n, t in travel[0].parameters(0.0).items())


def _walked(order: IntArray, free: IntArray, rounds: list[list[tuple[int, int]]]) -> list[int | None]:
    """Carry out a plan slowly: a place holds a unit or nothing."""
    held: list[int | None] = [None if unit in free else unit for unit in range(len(order))]
    for moves in rounds:
        assert len({to for _, to in moves}) == len(moves) <= len(free)
        assert all(held[to] is None and held[left] is not None for left, to in moves)
        for left, to in moves:
            held[to] = held[left]
        for left, _ in moves:
            held[left] = None
    return held


@given(seed=st.integers(0, 10**6), size=st.integers(1, 30), share=st.floats(0, 1))
@settings(max_examples=25)
def test_a_plan_moves_units_only_to_free_places_and_all_to_their_own(seed: int, size: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    order = generator.permutation(size)
    free = generator.permutation(size)[: max(1, round(share * size))]
    rounds = slot_rounds(order, free)
    assert _walked(order, free, rounds) == [None if unit in free else unit for unit in order]
    assert all(rounds)


def test_one_slot_takes_one_move_more_for_each_cycle() -> None:
    order = np.array([1, 2, 0, 4, 3, 5, 6])
    rounds = slot_rounds(order, np.array([6]))
    assert [len(moves) for moves in rounds] == [1] * (3 + 1 + 2 + 1)


@pytest.mark.parametrize("seed", range(2))
def test_two_thousand_units_travel_in_sixty_legs(seed: int) -> None:
    generator = np.random.default_rng(seed)
    order, free = generator.permutation(2000), generator.permutation(2000)[:100]
    rounds = slot_rounds(order, free)
    assert 2 * len(rounds) + 3 <= 60
    assert _walked(order, free, rounds) == [None if unit in set(free) else unit for unit in order]


def _hidden(size: int = 12) -> tuple[nn.Module, View, dict[str, Tensor], IntArray]:
    net = nn.Sequential(nn.Linear(2, size), nn.ReLU(), nn.Linear(size, 2))
    view = View.of_spec(net, {"h": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]})
    order = np.random.default_rng(0).permutation(size)
    return net, view, {n: p.detach().clone() for n, p in net.named_parameters()}, order


def _path(**options: object) -> Path:
    net, view, state, order = _hidden()
    return permutation_path(Space.of(net), view, state, "h", order, **options)  # type: ignore[arg-type]


def _cycles(order: IntArray) -> int:
    parent = np.arange(len(order))
    for _ in order:
        parent = np.minimum(parent, parent[order])
    return len(set(parent.tolist()))


def test_swaps_take_a_leg_for_each_unit_less_one_for_each_cycle() -> None:
    order = _hidden()[3]
    path = _path(kind="swaps")
    assert len(path.legs) == 12 - _cycles(order)
    for leg in path.legs:
        moved = leg.parameters(0.0)["0.bias"] != leg.parameters(1.0)["0.bias"]
        assert int(moved.sum()) == 2


def test_reflections_swap_disjoint_units_at_once() -> None:
    path = _path(kind="reflections", at_once=100)
    assert len(path.legs) == 2
    for leg in path.legs:
        assert isinstance(leg, LazyLeg)
        assert isinstance(leg.start, Arrangement)
        assert isinstance(leg.end, Arrangement)
        step = np.array([list(leg.start.parents).index(unit) for unit in leg.end.parents])
        np.testing.assert_array_equal(step[step], np.arange(12))
    assert len(_path(kind="reflections").legs) == 12 - _cycles(_hidden()[3])


def test_units_that_nothing_reads_need_not_be_freed() -> None:
    net, view, state, order = _hidden()
    state["2.weight"][:, [3, 8]] = 0
    assert set(np.flatnonzero(unit_importance(view, state, "h") == 0)) == {3, 8}
    path = permutation_path(Space.of(net), view, state, "h", order, slots=2)
    assert all(isinstance(leg, LazyLeg) for leg in path.legs)
    assert _equal(path.parameters(1.0), permute(view, state, {"h": order}))


def test_what_frees_units_may_change_other_weights_and_importance_is_yours() -> None:
    net, view, state, order = _hidden()
    told = []

    def kill(given: Mapping[str, Tensor], units: IntArray) -> dict[str, Tensor]:
        told.append(sorted(units.tolist()))
        weight = given["2.weight"].clone()
        weight[:, units] = 0
        return {**given, "2.weight": 2 * weight, "2.bias": given["2.bias"] + 1}

    importance = np.ones(12)
    importance[[1, 4]] = 0
    path = permutation_path(Space.of(net), view, state, "h", order, slots=2, kill=kill, importance=importance)
    assert told == [[1, 4]]
    assert torch.equal(path.legs[1].parameters(0.5)["2.bias"], state["2.bias"] + 1)
    assert _equal(path.legs[1].parameters(0.0), kill(state, np.array([1, 4])))
    assert _equal(path.parameters(1.0), permute(view, state, {"h": order}))


def test_by_default_a_twentieth_is_freed_and_at_least_two() -> None:
    assert _path().legs[0].label == "h: free 2 units"


@pytest.mark.parametrize("kind", KINDS)
def test_the_own_order_moves_nothing(kind: PermutationKind) -> None:
    net, view, state, _ = _hidden()
    path = permutation_path(Space.of(net), view, state, "h", np.arange(12), kind=kind)
    assert len(path.legs) == 1
    assert path.length() == 0.0


def test_arrangements_survive_as_plain_data() -> None:
    legs = [*_path().legs, *_path(kind="swaps").legs]
    places = [leg.end for leg in legs if isinstance(leg, LazyLeg)]
    given = [place for place in places if isinstance(place, Arrangement)]
    tensors, meta = pack_arrangements(given)
    back = unpack_arrangements(tensors, json.loads(json.dumps(meta)))
    assert len({id(a.base) for a in back}) == 2
    assert len(back) == len(given)
    for made, wanted in zip(back, given, strict=True):
        assert _equal(made.state(), wanted.state())
        assert list(made.parameters()) == list(wanted.parameters())
    alone = Arrangement.unpack(*given[3].pack())
    assert _equal(alone.parameters(), given[3].parameters())


def test_the_path_runs_backwards() -> None:
    path = _path()
    assert_close(path.reversed().at(0.3), path.at(0.7), rtol=0, atol=1e-6)


def test_bad_requests_are_refused() -> None:
    net, view, state, order = _hidden()
    space = Space.of(net)
    with pytest.raises(ConfigError, match="at_once of 1 or more"):
        permutation_path(space, view, state, "h", order, kind="swaps", at_once=0)
    with pytest.raises(ConfigError, match="slots from 1 to 12"):
        permutation_path(space, view, state, "h", order, slots=13)
    with pytest.raises(ShapeError, match="Name each unit once"):
        permutation_path(space, view, state, "h", np.zeros(12, dtype=np.int64))
    with pytest.raises(ShapeError, match="one for each unit"):
        permutation_path(space, view, state, "h", order, importance=np.ones(3))
    with pytest.raises(StructureError, match="Expected one of the groups"):
        permutation_path(space, view, state, "k", order)


def test_free_slots_need_units_that_can_be_duplicated_singly() -> None:
    net = nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Linear(6, 2)).double()
    view = trace(net, torch.randn(4, 2, dtype=torch.float64))
    state = {n: p.detach() for n, p in net.named_parameters()}
    order = np.roll(np.arange(6), 1)
    with pytest.raises(StructureError, match="an average runs over its units"):
        permutation_path(Space.of(net), view, state, view.groups[0].name, order)
    path = permutation_path(Space.of(net), view, state, view.groups[0].name, order, kind="reflections")
    assert _equal(path.parameters(1.0), permute(view, state, {view.groups[0].name: order}))
