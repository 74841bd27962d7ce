"""Random deep networks and a loss for them, at points that are not critical."""

import itertools

import torch
from torch import Tensor, nn

from thalweg.objective import Objective
from thalweg.structure import View, trace

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "sigmoid": nn.Sigmoid}


def deep_net(widths: list[int], activation: str, generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for one, two in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(one, two), ACTIVATIONS[activation]()]
    net = nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1])).double()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(generator=generator)
    return net


def data(net: nn.Sequential, generator: torch.Generator, count: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, net[0].in_features, generator=generator, dtype=torch.float64)
    return x, torch.randn(count, net[-1].out_features, generator=generator, dtype=torch.float64)


def landscape(module: nn.Module, pairs: tuple[Tensor, Tensor]) -> Objective:
    return Objective(module, lambda o, t: ((o - t) ** 2).mean() + (o**4).mean() / 10, pairs)


def view_of(net: nn.Module, pairs: tuple[Tensor, Tensor]) -> View:
    return trace(net, pairs[0])


def worst(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())
