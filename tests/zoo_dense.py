"""Small dense networks of the zoo: plain modules as a user would write them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))


def two_layer() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1, bias=False))


def batch_norm_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 2))


class DataDependent(nn.Module):
    """Takes one of two branches, decided by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.second = nn.Linear(7, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = torch.tanh(h) if h.mean().item() > 0 else F.relu(h)
        h = self.second(h)
        h = F.gelu(h) if h.sum() > 0 else torch.sigmoid(h)
        return self.head(h)


class GatedMlp(nn.Module):
    """SwiGLU with a residual connection around it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.gate = nn.Linear(5, 7, bias=False)
        self.up = nn.Linear(5, 7, bias=False)
        self.down = nn.Linear(7, 5, bias=False)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.head(h)


class PackedGate(nn.Module):
    """A gated unit whose two halves come from one linear layer (`F.glu`)."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Linear(3, 14)
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.glu(self.packed(x), dim=-1))


class WeightNorm(nn.Module):
    """Weight-normalised layers: each weight is a direction and a length, two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(nn.Linear(3, 6))
        self.second = weight_norm(nn.Linear(6, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class SharedLayer(nn.Module):
    """One layer applied twice ties its inputs to its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x))
        h = torch.tanh(self.shared(h))
        return self.head(torch.tanh(self.shared(h)))


class TiedAutoencoder(nn.Module):
    """The decoder uses the transpose of the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 4)
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T, self.bias)


class NestedOutputs(nn.Module):
    """Two inputs in, a dict with a tuple inside out."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 5)
        self.right = nn.Linear(4, 6)
        self.head = nn.Linear(11, 2)
        self.aux = nn.Linear(6, 1)

    def forward(self, x: Tensor, z: Tensor) -> dict[str, object]:
        a, b = torch.tanh(self.left(x)), torch.tanh(self.right(z))
        return {
            "logits": self.head(torch.cat([a, b], dim=-1)),
            "extra": (self.aux(b), {"norm": b.norm(dim=-1)}),
        }


class FrozenParameters(nn.Module):
    """The first layer is not trained: its weights are no coordinates, yet they move with the units."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.second = nn.Linear(7, 5)
        self.head = nn.Linear(5, 2)
        self.first.requires_grad_(False)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Maxout(nn.Module):
    """Five units, each the maximum of three linear pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = nn.Linear(4, 15)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pieces(x).view(x.shape[0], 5, 3).amax(dim=-1))


class PreluRms(nn.Module):
    """A learned slope per unit, then a hand-written RMS norm over the units."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.prelu = nn.PReLU(7)
        self.weight = nn.Parameter(torch.ones(7))
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.prelu(self.first(x))
        h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + 1e-6) * self.weight
        return self.head(h)


class Mixture(nn.Module):
    """A soft mixture of experts in einsum: the gate is a softmax over the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 4)
        self.up = nn.Parameter(torch.zeros(4, 3, 5))
        self.down = nn.Parameter(torch.zeros(4, 5, 2))

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(dim=-1)
        hidden = torch.tanh(torch.einsum("bi,eih->beh", x, self.up))
        return torch.einsum("beh,eho,be->bo", hidden, self.down, share)


class MultiplicativeUnits(nn.Module):
    """Two streams meet in an outer product that is flattened into the head."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 5)
        self.right = nn.Linear(3, 4)
        self.head = nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        outer = torch.tanh(self.left(x)).unsqueeze(2) * torch.sigmoid(self.right(x)).unsqueeze(1)
        return self.head(outer.flatten(1))
