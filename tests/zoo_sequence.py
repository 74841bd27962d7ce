"""Small sequence networks of the zoo: attention and recurrence, as a user would write them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Attention(nn.Module):
    """Separate q, k, v; the heads of values are wider than those of queries and keys."""

    def __init__(self, dim: int, heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(dim, heads * key_dim), nn.Linear(dim, heads * key_dim)
        self.v, self.out = nn.Linear(dim, heads * value_dim), nn.Linear(heads * value_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _EncoderBlock(nn.Module):
    def __init__(self, dim: int, heads: int, key_dim: int, value_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), _Attention(dim, heads, key_dim, value_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Two pre-norm blocks, mean over the tokens, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 10)
        self.blocks = nn.ModuleList([_EncoderBlock(10, 3, 2, 5, 11), _EncoderBlock(10, 7, 2, 3, 13)])
        self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


class VisionTransformer(nn.Module):
    """Patches by a strided convolution, a class token, packed qkv by reshape, permute and unbind."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 12, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, 12))
        self.positions = nn.Parameter(torch.zeros(1, 10, 12))
        self.norm1, self.qkv, self.proj = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(12), nn.Linear(12, 17), nn.Linear(17, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def attend(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 3, dim // 3).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / (dim // 3) ** 0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        x = x + self.attend(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm(x)[:, 0])


class StockEncoder(nn.Module):
    """`nn.TransformerEncoderLayer`, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 12)
        self.layer = nn.TransformerEncoderLayer(12, 4, dim_feedforward=7, batch_first=True, norm_first=True)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(dim=1))


class Gpt(nn.Module):
    """Causal language model: tied embeddings, learned positions, packed qkv by split."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(13, 12), nn.Embedding(8, 12)
        self.norm1, self.qkv, self.proj = nn.LayerNorm(12), nn.Linear(12, 3 * (2 + 2 + 5)), nn.Linear(15, 12)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(12), nn.Linear(12, 17), nn.Linear(17, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 13, bias=False)
        self.head.weight = self.tokens.weight

    def attend(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.qkv(x).split([6, 6, 15], dim=2)
        q, k, v = (p.view(batch, tokens, 3, p.shape[-1] // 3).transpose(1, 2) for p in parts)
        scores = (q @ k.transpose(-2, -1)) * k.shape[-1] ** -0.5
        mask = torch.tril(torch.ones(tokens, tokens, dtype=torch.bool, device=x.device))
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).contiguous().view(batch, tokens, 15))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        x = x + self.attend(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))
        return self.head(self.norm(x))


class Lstm(nn.Module):
    """Classifies by the state after the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class TwoLayerLstm(nn.Module):
    """Two stacked layers; the final hidden state of the upper one is read."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, num_layers=2)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(x)
        return self.head(hidden[-1])


class Gru(nn.Module):
    """Reads the state after the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


class ElmanCell(nn.Module):
    """A recurrence written by hand, its state created inside the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(3, 7)
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 7)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state)
