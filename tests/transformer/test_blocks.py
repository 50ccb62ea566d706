"""The Transformer block: branches around a residual stream."""

from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dalle_mini_impl.transformer.block_config import BlockOptions
from dalle_mini_impl.transformer.blocks import TransformerBlock, recompute_activations
from dalle_mini_impl.transformer.feed_forward import ChannelDropout, GatedFeedForward
from dalle_mini_impl.transformer.masks import causal_mask, padding_mask
from tests.reference.torch_transformer import copy_block

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}


def block(dropout_probability: float = 0.0) -> TransformerBlock:
    torch.manual_seed(0)
    return TransformerBlock(
        hidden_size=8, num_heads=2, intermediate_size=12, dropout_probability=dropout_probability
    )


def test_feed_forward_is_swiglu() -> None:
    torch.manual_seed(0)
    layer = GatedFeedForward(4, 6)
    x = torch.randn(2, 3, 4)
    gate = x @ layer.gate.weight.T
    expected = (gate * torch.sigmoid(gate) * (x @ layer.value.weight.T)) @ layer.output.weight.T
    output = layer(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    weights = list(layer.parameters())
    gradients = torch.autograd.grad(output.square().sum(), weights)
    by_hand = torch.autograd.grad(expected.square().sum(), weights)
    torch.testing.assert_close(gradients, by_hand, rtol=0, atol=1e-6)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)


def test_branches_add_to_the_residual_stream() -> None:
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


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_blocks_equal_torchs_layers(
    norm: Literal["pre", "post"], activation: Literal["relu", "gelu"], training: bool
) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"norm": norm, "feed_forward": activation, "use_bias": True}
    shape: dict[str, Any] = {
        "dim_feedforward": 24,
        "dropout": 0.0,
        "activation": activation,
        "layer_norm_eps": 1e-6,
        "batch_first": True,
        "norm_first": norm == "pre",
    }
    sizes = {"hidden_size": 12, "num_heads": 3, "intermediate_size": 24}
    encoder_layer = nn.TransformerEncoderLayer(12, 3, **shape).train(training)
    decoder_layer = nn.TransformerDecoderLayer(12, 3, **shape).train(training)
    encoder = TransformerBlock(**sizes, options=BlockOptions(use_qk_norm=False, **options))
    decoder = TransformerBlock(
        **sizes, options=BlockOptions(use_qk_norm=False, has_cross_attention=True, **options)
    )
    for mine, theirs in ((encoder, encoder_layer), (decoder, decoder_layer)):
        copy_block(mine.train(training), theirs)
    source, target = torch.randn(2, 7, 12), torch.randn(2, 5, 12)
    is_token = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    with torch.set_grad_enabled(training):
        context = encoder(source, attention_mask=padding_mask(is_token))
        expected = encoder_layer(source, src_key_padding_mask=~is_token)
        torch.testing.assert_close(context[is_token], expected[is_token], **TOLERANCE)
        # torch's modules say True = may NOT attend.
        expected = decoder_layer(
            target, expected, tgt_mask=~causal_mask(5), memory_key_padding_mask=~is_token
        )
        got = decoder(target, is_causal=True, context=context, context_mask=padding_mask(is_token))
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_a_projected_context_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    layer = TransformerBlock(
        hidden_size=8,
        num_heads=2,
        intermediate_size=12,
        options=BlockOptions(has_cross_attention=True),
    )
    x, context = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    projected = layer.cross_attention.project(context)
    assert torch.equal(layer(x, context=projected), layer(x, context=context))
    assert not torch.equal(layer(x, context=context + 1), layer(x, context=context))


def test_context_and_cross_attention_go_together() -> None:
    options = BlockOptions(has_cross_attention=True)
    reads = TransformerBlock(hidden_size=8, num_heads=2, intermediate_size=12, options=options)
    x = torch.randn(1, 3, 8)
    with pytest.raises(ValueError, match="context: got none, expected one"):
        reads(x)
    with pytest.raises(ValueError, match="context: got one, expected none"):
        block()(x, context=x)


def test_a_gated_block_may_have_biases() -> None:
    options = BlockOptions(use_bias=True)
    layer = TransformerBlock(hidden_size=8, num_heads=2, intermediate_size=12, options=options)
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            assert module.bias is not None
    assert layer.attention_norm.bias is not None


def test_recomputing_keeps_only_inputs_and_the_same_gradients() -> None:
    layers = nn.Sequential(*(block(dropout_probability=0.5) for _ in range(3)))
    x, found = torch.randn(4, 6, 8, requires_grad=True), []
    for recomputes in (False, True):
        if recomputes:
            assert recompute_activations(layers) == 3
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda none: none):
            layers(x)
        torch.manual_seed(1)
        output = layers(x)
        torch.rand(7)  # the backward pass finds the generator elsewhere
        found.append(torch.autograd.grad(output.square().sum(), [x, *layers.parameters()]))
        after = torch.rand(1)
        numbers = sum(tensor.numel() for tensor in kept)
        assert (numbers == 3 * x.numel()) == recomputes, numbers
        found[-1] += (output, after)
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_model_without_blocks_recomputes_nothing() -> None:
    assert recompute_activations(nn.Linear(2, 2)) == 0
