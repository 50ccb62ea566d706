"""The Transformer block: two branches, each beside an identity."""

import torch
from torch.nn import functional as F

from dalle_mini_impl.transformer.blocks import ChannelDropout, GatedFeedForward, TransformerBlock
from dalle_mini_impl.transformer.masks import padding_mask


def block(dropout_probability: float = 0.0) -> TransformerBlock:
    torch.manual_seed(0)
    return TransformerBlock(
        hidden_size=8, num_heads=2, intermediate_size=12, dropout_probability=dropout_probability
    )


def test_feed_forward_is_swiglu() -> None:
    torch.manual_seed(0)
    layer = GatedFeedForward(hidden_size=4, intermediate_size=6)
    x = torch.randn(2, 3, 4)
    gate = x @ layer.gate.weight.T
    expected = (gate * torch.sigmoid(gate) * (x @ layer.value.weight.T)) @ layer.output.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)


def test_branches_stand_beside_identities() -> None:
    layer, x = block(), torch.randn(2, 5, 8)
    attended = x + layer.attention(layer.attention_norm(x))
    expected = attended + layer.feed_forward(layer.feed_forward_norm(attended))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)
    for output in (layer.attention.output, layer.feed_forward.output):
        torch.nn.init.zeros_(output.weight)
    assert torch.equal(layer(x), x)


def test_norms_come_first() -> None:
    layer, x = block(), torch.randn(2, 5, 8)
    # Scaling and shifting the stream changes no branch, since each normalises its input.
    torch.testing.assert_close(
        layer.attention(layer.attention_norm(3 * x + 1)),
        layer.attention(layer.attention_norm(x)),
        rtol=0,
        atol=1e-4,
    )
    assert layer.attention_norm.bias is None
    torch.testing.assert_close(layer.attention_norm(x), F.layer_norm(x, (8,), eps=1e-6))


def test_dropout_is_for_training_only() -> None:
    layer, x = block(dropout_probability=0.5), torch.randn(1, 4, 8)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_dropout_hides_channels_at_all_positions() -> None:
    torch.manual_seed(0)
    layer, x = ChannelDropout(0.25), torch.ones(40, 3, 200)
    factors = layer(x)
    assert torch.equal(factors, factors[:, :1].expand_as(factors))
    hidden = factors[:, 0] == 0
    assert abs(float(hidden.float().mean()) - 0.25) < 0.02
    assert len(hidden.unique(dim=0)) == 40  # each sample hides its own
    torch.testing.assert_close(factors[factors != 0], torch.full_like(factors[factors != 0], 4 / 3))
    assert torch.equal(layer.eval()(x), x)


def test_bidirectional_block_with_padding() -> None:
    layer, x = block(), torch.randn(1, 5, 8)
    is_token = torch.tensor([[True, True, True, False, False]])
    padded = layer(x, attention_mask=padding_mask(is_token))
    torch.testing.assert_close(padded[:, :3], layer(x[:, :3]), rtol=0, atol=1e-5)
