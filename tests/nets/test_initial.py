"""Initial points come from the generator alone and have the stated distributions."""

import pytest
import torch
from tests.zoo import CASES
from torch import nn
from torch.testing import assert_close

from thalweg import nets
from thalweg.errors import ConfigError
from thalweg.nets import default_init_, gaussian_init_


def test_the_gaussian_has_the_asked_variance_on_every_parameter() -> None:
    net = gaussian_init_(nn.Linear(300, 300), 1e-4, torch.Generator().manual_seed(0))
    assert net.weight.std().item() == pytest.approx(1e-2, rel=0.02)
    assert net.bias.std().item() == pytest.approx(1e-2, rel=0.15)


@pytest.mark.parametrize("variance", [-1.0, float("nan"), float("inf")])
def test_an_impossible_variance_is_refused(variance: float) -> None:
    with pytest.raises(ConfigError, match="Expected a variance that is finite and not negative"):
        gaussian_init_(nn.Linear(1, 1), variance, torch.Generator())


@pytest.mark.parametrize("make", [nets.two_layer, nets.resnet20, nets.vgg16], ids=["two_layer", "resnet20", "vgg16"])
def test_the_default_depends_on_the_generator_only(make) -> None:
    size = {"width": 4} if make is nets.two_layer else {"width_multiplier": 1 / 16}
    first, second = (default_init_(make(**size), torch.Generator().manual_seed(3)) for _ in range(2))
    other = default_init_(make(**size), torch.Generator().manual_seed(4))
    assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize("name", ["mlp", "vgg", "depthwise", "autoencoder", "lstm", "gru", "group_norm"])
def test_the_default_fills_the_same_range_as_pytorch(name: str) -> None:
    ours = default_init_(CASES[name].build(), torch.Generator().manual_seed(5))
    for module in ours.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.RNNBase):
            drawn = {n: p.detach().clone() for n, p in module.named_parameters(recurse=False)}
            bounds = dict.fromkeys(drawn, 0.0)
            for _ in range(30):  # PyTorch's own draws reach, but never pass, the bound
                module.reset_parameters()
                for n, p in module.named_parameters(recurse=False):
                    bounds[n] = max(bounds[n], p.abs().max().item())
            for n, value in drawn.items():
                assert value.abs().max().item() <= bounds[n] * 1.35


def test_norms_start_at_one_and_zero() -> None:
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.running_mean.fill_(7.0)
        norm.weight.fill_(7.0)
    default_init_(norm, torch.Generator())
    assert_close(norm.running_mean, torch.zeros(3))
    assert_close(norm.weight.detach(), torch.ones(3))


def test_an_embedding_keeps_its_padding_row_zero() -> None:
    embedding = default_init_(nn.Embedding(5, 4, padding_idx=2), torch.Generator().manual_seed(0))
    assert not embedding.weight[2].any()
    assert embedding.weight[[0, 1, 3, 4]].all()


def test_parameters_of_an_unknown_module_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Got Bilinear at '0' with parameters weight, bias"):
        default_init_(nn.Sequential(nn.Bilinear(1, 1, 1)), torch.Generator())
