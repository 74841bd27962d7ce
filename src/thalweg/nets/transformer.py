"""Transformers with every width explicit: a pre-norm encoder that classifies, and a small language model."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from thalweg.errors import ConfigError, ShapeError
from thalweg.nets.widths import checked_widths

Stream = Float[Tensor, "batch tokens dim"]


@dataclass(frozen=True)
class BlockWidths:
    """Widths of one transformer block.

    Args:
        num_heads: heads of the attention.
        key_dim: width of the queries and keys of one head.
        value_dim: width of the values of one head.
        hidden: units of the MLP.

    Raises:
        ConfigError: a width that is not positive.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    hidden: int

    def __post_init__(self) -> None:
        checked_widths("BlockWidths", astuple(self))


class Attention(nn.Module):
    """out(softmax(Q Kᵀ/√key_dim) V), head by head.

    Args:
        dim: width of the stream.
        widths: widths of the block.
        is_causal: whether a token sees only itself and those before it.

    Example:
        >>> tuple(Attention(6, BlockWidths(2, 3, 4, 5))(torch.zeros(1, 7, 6)).shape)
        (1, 7, 6)
    """

    def __init__(self, dim: int, widths: BlockWidths, *, is_causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.is_causal = widths.num_heads, is_causal
        self.query = nn.Linear(dim, widths.num_heads * widths.key_dim)
        self.key = nn.Linear(dim, widths.num_heads * widths.key_dim)
        self.value = nn.Linear(dim, widths.num_heads * widths.value_dim)
        self.out = nn.Linear(widths.num_heads * widths.value_dim, dim)

    def forward(self, x: Stream) -> Stream:
        """Mix the tokens."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)) with GELU.

    Args:
        dim: width of the stream.
        widths: widths of the block.
        is_causal: whether a token sees only itself and those before it.

    Example:
        >>> tuple(Block(6, BlockWidths(2, 3, 4, 5))(torch.zeros(1, 7, 6)).shape)
        (1, 7, 6)
    """

    def __init__(self, dim: int, widths: BlockWidths, *, is_causal: bool = False) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, widths, is_causal=is_causal)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, widths.hidden), nn.GELU(), nn.Linear(widths.hidden, dim))

    def forward(self, x: Stream) -> Stream:
        """Add the attention and the MLP to the stream."""
        x = x + self.attention(self.attention_norm(x))
        result: Tensor = x + self.mlp(self.mlp_norm(x))
        return result


class EncoderClassifier(nn.Module):
    """Classifies a sequence of vectors: embedding, learned positions, blocks, mean over the tokens, linear.

    Args:
        num_features: width of each token's input.
        num_tokens: greatest number of tokens.
        dim: width of the stream.
        blocks: widths of each block.
        num_classes: number of outputs.

    Raises:
        ConfigError: no block, or a width that is not positive.

    Example:
        >>> net = EncoderClassifier(num_features=8, num_tokens=8, dim=6, blocks=[BlockWidths(2, 3, 3, 10)])
        >>> tuple(net(torch.zeros(5, 8, 8)).shape)
        (5, 10)
    """

    def __init__(
        self,
        *,
        num_features: int,
        num_tokens: int,
        dim: int = 32,
        blocks: Sequence[BlockWidths] = (BlockWidths(4, 8, 8, 64),) * 2,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        _require_widths(blocks, num_features, num_tokens, dim, num_classes)
        self.embed = nn.Linear(num_features, dim)
        self.positions = nn.Embedding(num_tokens, dim)
        self.blocks = nn.ModuleList(Block(dim, widths) for widths in blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Float[Tensor, "batch tokens features"]) -> Float[Tensor, "batch classes"]:
        """Compute the logits.

        Raises:
            ShapeError: more tokens than there are positions.
        """
        stream = self.embed(x) + _positions(self.positions, x.shape[1])
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.head(self.norm(stream).mean(dim=1))
        return logits


class GPT(nn.Module):
    """Causal language model: token and position embeddings, blocks, norm, and the tied token matrix as head.

    Args:
        vocabulary: number of tokens.
        context: greatest length of a sequence.
        dim: width of the stream.
        blocks: widths of each block.

    Raises:
        ConfigError: no block, or a width that is not positive.

    Example:
        >>> net = GPT(vocabulary=11, context=8, dim=6, blocks=[BlockWidths(2, 3, 3, 10)])
        >>> tuple(net(torch.zeros(2, 5, dtype=torch.long)).shape)
        (2, 5, 11)
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        context: int,
        dim: int = 32,
        blocks: Sequence[BlockWidths] = (BlockWidths(4, 8, 8, 128),) * 2,
    ) -> None:
        super().__init__()
        _require_widths(blocks, vocabulary, context, dim)
        self.tokens = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, widths, is_causal=True) for widths in blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens vocabulary"]:
        """Compute the logits of the next token at every place.

        Raises:
            ShapeError: more tokens than the context.
        """
        stream = self.tokens(ids) + _positions(self.positions, ids.shape[1])
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.head(self.norm(stream))
        return logits


def _require_widths(blocks: Sequence[BlockWidths], *widths: int) -> None:
    checked_widths("the widths", widths)
    if not blocks:
        raise ConfigError("Expected at least one block. Got none. Pass blocks=[BlockWidths(...)].")


def _positions(table: nn.Embedding, num_tokens: int) -> Float[Tensor, "tokens dim"]:
    if num_tokens > table.num_embeddings:
        raise ShapeError(
            f"Expected at most {table.num_embeddings} tokens. Got {num_tokens}. "
            "Shorten the sequence or build the net for a longer one."
        )
    result: Tensor = table(torch.arange(num_tokens, device=table.weight.device))
    return result
