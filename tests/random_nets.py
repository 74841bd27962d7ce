"""Random networks for property tests: a directed acyclic graph of layers, dense or convolutional."""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import randomize_

_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu, "sigmoid": torch.sigmoid}
_JOINS = ("add", "mul", "cat")


@dataclass(frozen=True)
class Node:
    """One value of the graph: an operation on earlier values, numbered from 0, the input."""

    kind: str
    sources: tuple[int, ...]
    width: int


class RandomNet(nn.Module):
    """Executes a graph; its last node is the output."""

    def __init__(self, nodes: list[Node], layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.nodes = nodes
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for number, node in enumerate(self.nodes[1:], start=1):
            sources = [values[i] for i in node.sources]
            if node.kind == "layer":
                values.append(self.layers[str(number)](*sources))
            elif node.kind == "add":
                values.append(sources[0] + sources[1])
            elif node.kind == "mul":
                values.append(sources[0] * torch.sigmoid(sources[1]))
            elif node.kind == "cat":
                values.append(torch.cat(sources, dim=1))
            elif node.kind == "pool":
                values.append(sources[0].mean(dim=(2, 3)))
            else:
                values.append(_ACTIVATIONS[node.kind](sources[0]))
        return values[-1]


class _Builder:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.is_conv = self.random.random() < 0.4
        self.nodes = [Node("input", (), self.random.randint(2, 4))]
        self.layers: dict[str, nn.Module] = {}

    def add(self, kind: str, sources: tuple[int, ...], width: int) -> int:
        self.nodes.append(Node(kind, sources, width))
        return len(self.nodes) - 1

    def layer(self, layer: nn.Module, source: int, width: int) -> int:
        number = self.add("layer", (source,), width)
        self.layers[str(number)] = layer
        return number

    def affine(self, source: int, width: int) -> int:
        old, bias = self.nodes[source].width, self.random.random() < 0.8
        if not self.is_conv:
            return self.layer(nn.Linear(old, width, bias=bias), source, width)
        size = self.random.choice((1, 3))
        return self.layer(nn.Conv2d(old, width, size, padding=size // 2, bias=bias), source, width)

    def norm(self, source: int) -> int:
        width = self.nodes[source].width
        if self.random.random() < 0.5:
            layer: nn.Module = nn.BatchNorm2d(width) if self.is_conv else nn.BatchNorm1d(width)
        else:
            layer = nn.GroupNorm(1, width) if self.is_conv else nn.LayerNorm(width)
        return self.layer(layer, source, width)

    def activation(self, source: int) -> int:
        return self.add(self.random.choice(sorted(_ACTIVATIONS)), (source,), self.nodes[source].width)

    def residual(self, source: int) -> int:
        width = self.nodes[source].width
        hidden = self.activation(self.affine(source, self.random.randint(2, 7)))
        return self.add("add", (self.affine(hidden, width), source), width)

    def join(self, left: int, right: int) -> int:
        kind = self.random.choice(_JOINS)
        if kind == "cat":
            return self.add(kind, (left, right), self.nodes[left].width + self.nodes[right].width)
        width = self.nodes[left].width
        if self.nodes[right].width != width:
            right = self.affine(right, width)
        return self.add(kind, (left, right), width)

    def step(self) -> None:
        values = range(1, len(self.nodes))
        recent = len(self.nodes) - 1
        source = recent if self.random.random() < 0.7 else self.random.choice(values)
        kind = self.random.choice(("affine", "affine", "activation", "norm", "residual", "join"))
        if kind == "affine":
            self.activation(self.affine(source, self.random.randint(2, 7)))
        elif kind == "join":
            self.join(source, self.random.choice(values))
        else:
            {"activation": self.activation, "norm": self.norm, "residual": self.residual}[kind](source)

    def finish(self) -> None:
        """Concatenate whatever nobody has read yet and put a linear head on it."""
        read = {i for node in self.nodes for i in node.sources}
        loose = tuple(i for i in range(1, len(self.nodes)) if i not in read)
        last = loose[0]
        if len(loose) > 1:
            last = self.add("cat", loose, sum(self.nodes[i].width for i in loose))
        if self.is_conv:
            last = self.add("pool", (last,), self.nodes[last].width)
        self.layer(nn.Linear(self.nodes[last].width, 2), last, 2)


def random_net(seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Draw a network of 2 to 8 stages and an input for it; the same seed gives the same net.

    Every parameter and statistic is random, every value reaches the output, and the module is in eval mode.
    """
    builder = _Builder(seed)
    builder.activation(builder.affine(0, builder.random.randint(2, 7)))
    for _ in range(builder.random.randint(1, 7)):
        builder.step()
    builder.finish()
    module = randomize_(RandomNet(builder.nodes, builder.layers), seed).eval()
    width = builder.nodes[0].width
    shape = (3, width, 4, 5) if builder.is_conv else (6, width)
    return module, (torch.randn(shape, generator=torch.Generator().manual_seed(seed)),)
