"""Units as rows: every entry of a group once, and back to where it was, bit for bit."""

import re

import pytest
import torch
from tests.zoo import CASES, Case
from torch import Tensor, nn

from thalweg.errors import ShapeError, StructureError
from thalweg.matching import unit_rows, with_unit_rows
from thalweg.structure import Group, Member, View, permute, random_permutations, trace
from thalweg.structure.tree import SumTree, Units

PARTS = ("incoming", "outgoing", "butterfly")
NAMES = ("mlp", "shared_layer", "tied_autoencoder", "vgg", "resnet", "densenet", "channel_shuffle")
NAMES += ("group_norm", "branches", "vit", "stock_encoder", "gpt", "lstm", "frozen_parameters")
cases = pytest.mark.parametrize("case", [CASES[name] for name in NAMES], ids=lambda case: case.name)


def traced(case: Case) -> tuple[View, dict[str, Tensor]]:
    module = case.build()
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return trace(module, case.example()), {n: t.detach() for n, t in state.items()}


@cases
def test_rows_go_back_bit_for_bit(case: Case) -> None:
    view, state = traced(case)
    blank = {n: torch.full_like(t, 7) if t.is_floating_point() else t for n, t in state.items()}
    for group in view.groups:
        for part in PARTS:
            rows = unit_rows(view, group, state, part)
            assert rows.dtype == torch.float64
            same = with_unit_rows(view, group, state, part, rows)
            assert all(torch.equal(same[n], state[n]) for n in state)
            moved = with_unit_rows(view, group, blank, part, rows)
            assert torch.equal(unit_rows(view, group, moved, part), rows)
            untouched = state.keys() - {m.tensor for m in group.members}
            assert all(moved[n] is blank[n] for n in untouched)


@cases
def test_permuted_units_are_permuted_rows(case: Case) -> None:
    """Along members that lie along no other order of the same group."""
    view, state = traced(case)
    orders = random_permutations(view, torch.Generator().manual_seed(0))
    for group in view.groups:
        if len({m.tensor for m in group.members}) < len(group.members):
            continue
        moved = permute(view, state, {group.name: orders[group.name]})
        for part in PARTS:
            expected = unit_rows(view, group, state, part)[torch.from_numpy(orders[group.name])]
            assert torch.equal(unit_rows(view, group, moved, part), expected)


def test_a_flattened_channel_has_all_its_positions_and_no_running_statistics() -> None:
    view, state = traced(CASES["vgg"])
    channels = next(g for g in view.groups if g.size == 7)
    incoming, outgoing = (unit_rows(view, channels, state, part) for part in ("incoming", "outgoing"))
    assert incoming.shape == (7, 5 * 9 + 3)  # weights, bias, scale and shift
    read = state["9.weight"].double().reshape(6, 7, 4)  # 6 outputs of 7 channels of 4 positions
    assert torch.equal(outgoing, read.permute(1, 2, 0).reshape(7, -1))
    assert torch.equal(unit_rows(view, channels, state, "butterfly"), torch.cat([incoming, outgoing], 1))


def test_a_weight_that_makes_and_reads_stands_once() -> None:
    view, state = traced(CASES["tied_autoencoder"])
    for part, width in (("incoming", 5 + 1), ("outgoing", 5), ("butterfly", 5 + 1)):  # 5 weights and a bias
        assert unit_rows(view, view.groups[0], state, part).shape == (4, width)


def test_members_that_the_state_lacks_are_left_out() -> None:
    view, _ = traced(CASES["mlp"])
    assert unit_rows(view, view.groups[0], {}, "butterfly").shape == (view.groups[0].size, 0)


def uneven() -> tuple[View, dict[str, Tensor]]:
    """Unit 0 once, unit 1 twice."""
    axis = SumTree((Units("g", 2), Units("g", 1)))
    return View((Group("g", 2, (Member("w", 0, "producer"),)),), {"w": (axis,)}), {"w": torch.zeros(3)}


def test_unequal_positions_are_refused() -> None:
    view, state = uneven()
    with pytest.raises(StructureError, match=re.escape("equally many positions along dim 0 of 'w'. Got 1 to 2")):
        unit_rows(view, view.groups[0], state, "incoming")


def test_complex_tensors_are_refused() -> None:
    view = View((Group("g", 2, (Member("w", 0, "producer"),)),), {"w": (Units("g", 2),)})
    with pytest.raises(StructureError, match="Expected real tensors along 'g'"):
        unit_rows(view, view.groups[0], {"w": torch.zeros(2, dtype=torch.complex64)}, "incoming")


def test_another_network_and_other_rows_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    view = trace(net, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    state = {n: p.detach() for n, p in net.named_parameters()}
    with pytest.raises(ShapeError, match=re.escape("Expected '0.weight' to have 2 positions along dim 0.")):
        unit_rows(view, view.groups[0], {"0.weight": torch.zeros(5, 3)}, "incoming")
    with pytest.raises(ShapeError, match=re.escape("Expected rows of shape (2, 4) for 'incoming'")):
        with_unit_rows(view, view.groups[0], state, "incoming", torch.zeros(2, 3, dtype=torch.float64))
