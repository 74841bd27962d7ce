"""Transformers: attention by its formula, causality, tied weights."""

import pytest
import torch
from torch.testing import assert_close

from thalweg.errors import ConfigError, ShapeError
from thalweg.nets import GPT, BlockWidths, EncoderClassifier
from thalweg.nets.transformer import Attention

WIDTHS = BlockWidths(num_heads=2, key_dim=3, value_dim=4, hidden=5)


def naive_attention(layer: Attention, x: torch.Tensor, *, is_causal: bool) -> torch.Tensor:
    """Attend head by head and token by token, as the formula says."""
    q, k, v = layer.query(x), layer.key(x), layer.value(x)
    mixed = torch.zeros_like(v)
    for head in range(2):
        keys, values = slice(3 * head, 3 * head + 3), slice(4 * head, 4 * head + 4)
        for token in range(len(x)):
            seen = token + 1 if is_causal else len(x)
            scores = (k[:seen, keys] @ q[token, keys]) / 3**0.5
            mixed[token, values] = scores.softmax(0) @ v[:seen, values]
    return layer.out(mixed)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_its_formula(is_causal: bool) -> None:
    layer = Attention(6, WIDTHS, is_causal=is_causal).double()
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = naive_attention(layer, x, is_causal=is_causal)
        assert_close(layer(x.unsqueeze(0))[0], expected, rtol=1e-10, atol=1e-12)


def test_a_language_model_does_not_look_ahead() -> None:
    net = GPT(vocabulary=11, context=8, dim=6, blocks=[WIDTHS, WIDTHS]).eval()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    changed = torch.tensor([[1, 2, 3, 9, 0]])
    with torch.no_grad():
        assert_close(net(ids)[:, :3], net(changed)[:, :3])
        assert not torch.equal(net(ids)[:, 3:], net(changed)[:, 3:])


def test_the_token_matrix_is_one_parameter() -> None:
    net = GPT(vocabulary=11, context=8, dim=6, blocks=[WIDTHS])
    assert net.head.weight is net.tokens.weight
    assert sum(name.endswith("tokens.weight") for name, _ in net.named_parameters()) == 1


def test_an_encoder_reads_the_order_of_its_tokens() -> None:
    net = EncoderClassifier(num_features=4, num_tokens=6, dim=8, blocks=[WIDTHS], num_classes=3).eval()
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert net(x).shape == (2, 3)
        assert not torch.equal(net(x), net(x.flip(1)))
        assert net(x[:, :2]).shape == (2, 3)


def test_too_many_tokens_are_refused() -> None:
    net = GPT(vocabulary=5, context=3, dim=6, blocks=[WIDTHS])
    with pytest.raises(ShapeError, match=r"Expected at most 3 tokens\. Got 4"):
        net(torch.zeros(1, 4, dtype=torch.long))


def test_wrong_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match="Expected BlockWidths as positive whole numbers"):
        BlockWidths(0, 1, 1, 1)
    with pytest.raises(ConfigError, match="Expected at least one block"):
        GPT(vocabulary=5, context=3, blocks=[])
