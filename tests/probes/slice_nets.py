"""Nets that the tests of slices run on: ordinary ones, and one for each way in which a shortcut may not hold."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


class Cnn(nn.Module):
    """Convolutions with BatchNorm, residual, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.two, self.out = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(x)).relu_()
        return self.out((x + self.two(x).relu()).mean((2, 3)))


class Tied(nn.Module):
    """One weight is first layer and last."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.up(x).tanh(), self.up.weight.T)


class Twice(nn.Module):
    """The first layer meets the data, and then something else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.layer(x).tanh()))


class Aliased(nn.Module):
    """The first layer is run twice on the data, and one result is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.layer(x)
        return self.out(self.layer(input=x).relu_() - kept)


class Clamped(nn.Module):
    """The weights that are used are not those of theta."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.clamp_(-0.3, 0.3)
        return self.out(self.layer(x).tanh())


class Branching(nn.Module):
    """A value of the whole batch decides what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.out(y.tanh() if float(y.detach().sum()) > 0 else y * y)


class Coupled(nn.Module):
    """Samples of a batch see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).tanh()
        return self.out(y - y.mean(0))


class Viewing(nn.Module):
    """`view` fails on images that lie channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.out = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(75, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).tanh()
        return self.out(y.view(len(y), -1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class Physical(nn.Module):
    """Takes a gradient with respect to its inputs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.layer(x).tanh().sum(), x, create_graph=True)
        return self.out(slope)


def frozen_first() -> nn.Module:
    net = mlp()
    net[0].requires_grad_(False)
    return net


def frozen_bias() -> nn.Module:
    net = mlp()
    net[0].bias.requires_grad_(False)
    return net


def weight_normed() -> nn.Module:
    net = mlp()
    torch.nn.utils.parametrizations.weight_norm(net[0])
    return net


def squares(outputs: Any, targets: Tensor) -> Tensor:
    """A loss of outputs in any container."""
    return torch.stack([(leaf - 0.1).square().mean() for leaf in tree_leaves(outputs)]).sum() + targets.sum()


IMAGE, ROW, SEQUENCE = (2, 5, 5), (4,), (6, 2)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, ROW),
    "cnn with batch norm": (Cnn, IMAGE),
    "tied": (Tied, ROW),
    "lstm": (Recurrent, SEQUENCE),
    "layer used twice": (Twice, ROW),
    "output changed in place": (Aliased, ROW),
    "weights clamped": (Clamped, ROW),
    "branch on a value": (Branching, ROW),
    "samples coupled": (Coupled, ROW),
    "view of an image": (Viewing, IMAGE),
    "gradient inside": (Physical, ROW),
    "first layer frozen": (frozen_first, ROW),
    "first bias frozen": (frozen_bias, ROW),
    "weight norm": (weight_normed, ROW),
}
