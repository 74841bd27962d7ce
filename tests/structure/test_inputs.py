"""Example batches by position and by keyword; weights that are divided by a norm of their own."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from thalweg.embeddings import embed, reduce
from thalweg.errors import StructureError
from thalweg.structure import View, trace, verified


class Named(nn.Module):
    """Takes its arguments by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, *, left: Tensor, right: Tensor | None = None) -> Tensor:
        h = self.out(torch.tanh(self.one(left)))
        return h if right is None else h + right


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"left": torch.randn(5, 3, generator=generator), "right": torch.randn(5, 2, generator=generator)}


def test_a_dict_is_passed_by_name_in_trace_embed_and_reduce():
    net, inputs = Named().double(), batch()
    view = trace(net, inputs)
    assert [(g.name, g.size) for g in view.groups] == [("one", 4)]
    assert view.error <= 1e-12
    made = embed(net, inputs, {"one": 7})
    assert made.error <= 1e-12
    assert reduce(made.module, inputs).reduction.widths == {"one": (7, 4)}


def test_a_hand_written_view_is_verified_on_a_dict():
    net = Named()
    right = View.of_spec(net, {"h": [("one.weight", 0), ("one.bias", 0), ("out.weight", 1)]})
    wrong = View.of_spec(net, {"h": [("one.weight", 0), ("out.weight", 1)]})
    assert verified(right, net, batch()).error <= 1e-12
    assert verified(wrong, net, batch()).rejected == ("h",)


def test_a_dict_in_a_tuple_is_one_argument():
    class Single(Named):
        def forward(self, parts: dict[str, Tensor]) -> Tensor:
            return super().forward(**parts)

    assert [g.size for g in trace(Single(), (batch(),)).groups] == [4]


def test_a_dict_with_a_name_that_the_module_does_not_take_is_refused():
    with pytest.raises(StructureError, match="unexpected keyword argument 'middle'"):
        trace(Named(), {**batch(), "middle": torch.zeros(1)})


@pytest.mark.parametrize("normed", [(0,), (2,), (0, 2)])
def test_spectral_norm_gives_groups_that_may_be_permuted_and_not_split(normed):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for place in normed:
        spectral_norm(net[place])
    view = trace(net, torch.randn(5, 3))
    assert view.frozen_by == {}
    assert view.error <= 1e-9
    (group,) = view.groups
    assert group.size == 4
    assert group.obstacle is not None


def test_spectral_norm_of_a_convolution_is_traced_too():
    net = nn.Sequential(spectral_norm(nn.Conv2d(2, 4, 3)), nn.ReLU(), spectral_norm(nn.Conv2d(4, 3, 3)), nn.Flatten())
    view = trace(net.double(), torch.randn(2, 2, 6, 6))
    assert view.frozen_by == {}
    assert [(g.size, g.is_duplicable) for g in view.groups] == [(4, False)]
    assert view.error <= 1e-9


def test_a_product_of_a_weight_matrix_and_a_weight_vector_can_still_be_split():
    class LowRank(nn.Module):
        """The bias is a product of weights."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
            self.outer = nn.Parameter(torch.randn(2, 4, dtype=torch.float64))
            self.inner = nn.Parameter(torch.randn(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight, self.outer @ self.inner)

    x = torch.randn(5, 3)
    (group,) = trace(LowRank(), x).groups
    assert (group.size, group.is_duplicable) == (4, True)
    assert embed(LowRank(), x, {group.name: 6}).error <= 1e-12
