"""Nets as a user may write them; the tests copy this file into an empty folder, where it is the user's own."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class OddCNN(nn.Module):
    """Non-square kernels, BatchNorm, and an adaptive pool before the linear layers."""

    def __init__(self, first: int = 4, second: int = 5, hidden: int = 6) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, first, (3, 5), padding=(1, 2))
        self.norm_one = nn.BatchNorm2d(first)
        self.two = nn.Conv2d(first, second, (1, 3), stride=(1, 2), bias=False)
        self.norm_two = nn.BatchNorm2d(second)
        self.pool = nn.AdaptiveAvgPool2d((2, 3))
        self.hidden = nn.Linear(6 * second, hidden)
        self.out = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.norm_one(self.one(x)).relu(), 2)
        x = self.pool(functional.gelu(self.norm_two(self.two(x))))
        return self.out(self.hidden(x.flatten(1)).tanh())


def wide_cnn() -> nn.Module:
    return OddCNN(8, 10, 12)


class Flat(OddCNN):
    """The same weights, other outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten()


def stops() -> nn.Module:
    raise SystemExit(3)


class Block(nn.Module):
    def __init__(self, old: int, inner: int, new: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(old, inner, 3, stride, 1, bias=False)
        self.norm_one = nn.BatchNorm2d(inner)
        self.two = nn.Conv2d(inner, new, 3, 1, 1, bias=False)
        self.norm_two = nn.BatchNorm2d(new)
        is_same = old == new and stride == 1
        self.project = (
            nn.Identity() if is_same else nn.Sequential(nn.Conv2d(old, new, 1, stride), nn.BatchNorm2d(new))
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm_one(self.one(x)).relu()
        return (self.norm_two(self.two(inner)) + self.project(x)).relu()


class OddResNet(nn.Module):
    """Identity and projection shortcuts; the stream's channels are one group per stage."""

    def __init__(self, stem: int = 4, inner: int = 3, last: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, padding=1)
        self.blocks = nn.Sequential(Block(stem, inner, stem, 1), Block(stem, inner, last, 2))
        self.out = nn.Linear(last, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(self.stem(x).relu()).mean((2, 3)))


class Unruly(nn.Module):
    """One operation that has no rule, between two groups that have them."""

    def __init__(self, before: int = 4, after: int = 5) -> None:
        super().__init__()
        self.one = nn.Linear(3, before)
        self.two = nn.Linear(before, before)
        self.three = nn.Linear(before, after)
        self.out = nn.Linear(after, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x).tanh())
        return self.out(self.three(x.cumsum(1).tanh()).tanh())


class TinyGPT(nn.Module):
    """One attention block; the token table is the output matrix too."""

    def __init__(self, width: int = 8, heads: int = 2, hidden: int = 6, length: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(11, width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width, generator=torch.Generator().manual_seed(3)))
        self.norm_one, self.norm_two, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.mix = nn.Linear(width, 3 * width)
        self.back = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.out = nn.Linear(width, 11, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.tokens(words) + self.places[: words.shape[1]]
        batch, length, width = x.shape
        parts = self.mix(self.norm_one(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.back(mixed.transpose(1, 2).reshape(batch, length, width))
        return self.out(self.norm_out(x + self.down(functional.gelu(self.up(self.norm_two(x))))))


class FixedSize(nn.Module):
    """The code of `forward` says how wide the first hidden layer is: it does not run with another width."""

    def __init__(self, width: int = 6, other: int = 4) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(3, width), nn.Linear(width, other), nn.Linear(other, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(x).tanh().view(-1, 6)).tanh())


class FixedScale(FixedSize):
    """It runs with another width, and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x).tanh()
        return self.out(self.two(hidden * 6 / hidden.shape[1]).tanh())


class Normed(nn.Module):
    """An average runs over the units: they can be split evenly only."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.one, self.norm, self.out = nn.Linear(3, width), nn.LayerNorm(width, eps=0.0), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.one(x)).tanh())


class Own(nn.Module):
    """Nothing tells what goes in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 3))
        self.out = nn.Parameter(torch.ones(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).tanh() @ self.out.T


class Answer:
    """An output that is no tuple and no dict."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Wrapped(FixedScale):
    def forward(self, x: Tensor) -> Answer:
        return Answer(super().forward(x))


def two_layers(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(2))


def needs(width: int) -> nn.Module:
    return nn.Linear(width, width)


def raises() -> nn.Module:
    raise RuntimeError("no\nluck")


def nothing() -> None:
    return None


NUMBER = 3
BATCH = torch.zeros(2, 3)
EMPTY = ()


def images() -> tuple[Tensor, ...]:
    return (torch.randn(3, 2, 9, 15, generator=torch.Generator().manual_seed(4)),)


def no_images() -> Tensor:
    raise FileNotFoundError("no images here")
