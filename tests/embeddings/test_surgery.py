"""Resizing layers that have no tensor to tell their size."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from thalweg.embeddings import embed, reduce
from thalweg.errors import StructureError
from thalweg.structure import trace


class Images(nn.Module):
    def __init__(self, norm: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, channels, 3), norm, nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x)).relu().amax((2, 3)))


def vectors(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 2))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


NETS = {
    "layer norm": (vectors(nn.LayerNorm(4, elementwise_affine=False)), (5, 3)),
    "RMS norm": (vectors(nn.RMSNorm(4, elementwise_affine=False)), (5, 3)),
    "batch norm": (Images(nn.BatchNorm2d(8, affine=False, track_running_stats=False)), (3, 3, 8, 8)),
    "instance norm": (Images(nn.InstanceNorm2d(8)), (3, 3, 8, 8)),
    "one group": (Images(nn.GroupNorm(1, 8, affine=False)), (3, 3, 8, 8)),
    "four groups": (Images(nn.GroupNorm(4, 8, affine=False)), (3, 3, 8, 8)),
    "a group each": (Images(nn.GroupNorm(8, 8, affine=False)), (3, 3, 8, 8)),
}


@pytest.mark.parametrize("name", NETS)
def test_every_group_through_a_norm_without_tensors_is_resized_there_and_back(name):
    net, shape = NETS[name]
    net, x = net.double(), drawn(*shape)
    view = trace(net, x)
    assert view.groups
    for group in view.groups:
        made = embed(net, x, {group.name: 2 * group.size}, view=view)
        assert made.error <= 1e-12
        back = reduce(made.module, x)
        assert back.reduction.widths[group.name] == (2 * group.size, group.size)
        torch.testing.assert_close(back.module(x), net(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("layer norm", {"normalized_shape": (8,)}),
        ("RMS norm", {"normalized_shape": (8,)}),
        ("batch norm", {"num_features": 16}),
        ("instance norm", {"num_features": 16}),
        ("one group", {"num_channels": 16, "num_groups": 1}),
        ("a group each", {"num_channels": 16, "num_groups": 16}),
    ],
)
def test_the_layer_says_its_new_size_and_keeps_no_hook(name, sizes):
    net, shape = NETS[name]
    net, x = net.double(), drawn(*shape)
    (group,) = trace(net, x).groups
    wide = embed(net, x, {group.name: 2 * group.size}).module
    layer = dict(wide.named_modules()).get("norm", wide[1] if isinstance(wide, nn.Sequential) else None)
    assert {key: getattr(layer, key) for key in sizes} == sizes
    assert not layer._forward_pre_hooks


def test_a_pruned_net_is_resized_with_its_mask():
    net, x = vectors(nn.Identity()).double(), drawn(5, 3)
    prune.l1_unstructured(net[3], "weight", 0.4)
    made = embed(net, x, {"0": 7})
    assert made.error <= 1e-12
    assert made.module[3].weight_mask.shape == (2, 7)


def test_a_group_norm_whose_groups_cannot_be_told_is_named():
    class Mixed(Images):
        """Eight more channels, of whose groups the weights of the first eight say nothing."""

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x).relu()
            return self.out(self.norm(torch.cat([h, h], 1)).amax((2, 3))[:, :8])

    net, x = Mixed(nn.GroupNorm(1, 16, affine=False)).double(), drawn(3, 3, 8, 8)
    group = next(g for g in trace(net, x).groups if g.is_duplicable)
    with pytest.raises(StructureError, match=r"'norm' at .* It fixes its size and has no parameter to resize"):
        embed(net, x, {group.name: 2 * group.size})
