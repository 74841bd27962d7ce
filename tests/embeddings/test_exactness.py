"""A network cannot hide that its code fixes a size, and reduce merges only what is equal."""

import pytest
import torch
from torch import Tensor, nn

from thalweg.embeddings import embed, reduce
from thalweg.errors import StructureError


class Scaled(nn.Module):
    """Divides by the root of a width that its code remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 64), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) / self.a.out_features**0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_hidden_scale_is_found_in_every_precision(dtype: torch.dtype) -> None:
    with pytest.raises(StructureError, match="Its code fixes a size"):
        embed(Scaled().to(dtype), torch.randn(5, 3).to(dtype), {"a": 70})


def test_a_zero_head_does_not_hide_it() -> None:
    net = Scaled().double()
    nn.init.zeros_(net.b.weight)
    nn.init.zeros_(net.b.bias)
    with pytest.raises(StructureError, match="at perturbed weights"):
        embed(net, torch.randn(5, 3, dtype=torch.float64), {"a": 128})


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.003), (torch.float64, 1 + 1e-5)])
def test_units_that_nearly_agree_are_not_merged_by_default(dtype: torch.dtype, factor: float) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)
    with torch.no_grad():
        net[0].weight[1] = factor * net[0].weight[0]
        net[0].bias[1] = factor * net[0].bias[0]
    x = torch.randn(5, 2, dtype=dtype)
    assert reduce(net, x).reduction.merges == {}
    assert reduce(net, x, similarity=1.0).reduction.merges == {}
    assert reduce(net, x, similarity=0.99).reduction.widths == {"0": (3, 2)}


def test_a_unit_without_incoming_weights_counts_where_zero_gives_something() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        net[0].weight[1] = 0
        net[0].bias[1] = 0
    x = torch.randn(5, 2, dtype=torch.float64)
    assert reduce(net, x).reduction.merges == {}
    assert reduce(net, x, amplitude=1e-3).reduction.merges == {}
