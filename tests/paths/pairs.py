"""Pairs of small networks of many kinds, drawn at random: what must be exact needs no training."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.nets import CNN, MLP, BlockWidths, EncoderClassifier, ResNet
from thalweg.objective import Objective
from thalweg.paths.pair import Pair

NETS: dict[str, Any] = {
    "two layers": lambda: MLP((6, 12, 3), "relu"),
    "mlp": lambda: MLP((6, 10, 8, 3), "tanh"),
    "no bias": lambda: MLP((6, 10, 8, 3), "relu", bias=False, output_bias=False),
    "cnn": lambda: CNN((4, 5), hidden=(7,), image_size=8, num_classes=3),
    "batch norm": lambda: CNN((4, 5), hidden=(7,), image_size=8, num_classes=3, norm="batch"),
    "resnet": lambda: ResNet(stem=4, channels=(4, 6), hidden=((5,), (6,)), in_channels=1, num_classes=3),
    "transformer": lambda: EncoderClassifier(
        num_features=8, num_tokens=8, dim=6, blocks=[BlockWidths(2, 3, 3, 10)], num_classes=3
    ),
}


def built(kind: str, seed: int) -> nn.Module:
    """Build a network of a kind; every entry of it, BatchNorm's too, is drawn."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        net: nn.Module = NETS[kind]().double().eval()
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.data += 0.2 * (torch.rand_like(tensor) if "var" in name else torch.randn_like(tensor))
    return net


def data(kind: str, samples: int = 60) -> tuple[Tensor, Tensor]:
    """Draw inputs that fit, and classes."""
    generator = torch.Generator().manual_seed(7)
    shape = {"cnn": (1, 8, 8), "batch norm": (1, 8, 8), "resnet": (1, 8, 8), "transformer": (8, 8)}.get(kind, (6,))
    x = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (samples,), generator=generator)


@functools.cache
def pair_of(kind: str, samples: int = 60) -> Pair:
    """Give two networks of a kind and their landscape."""
    objective = Objective(built(kind, 0), nn.CrossEntropyLoss(), data(kind, samples), batch_size=25)
    return Pair.of(objective, built(kind, 0), built(kind, 1))
