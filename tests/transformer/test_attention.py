"""Attention: both paths of ``attend`` against torch's, masks, and multi-head attention."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_mini_impl.transformer import attention
from dalle_mini_impl.transformer.attention import MultiHeadAttention, attend
from dalle_mini_impl.transformer.masks import causal_mask, padding_mask

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}


def heads(length: int, head_dim: int, seed: int, *, batch: int = 2, num_heads: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, num_heads, length, head_dim, generator=generator)


def random_mask(*shape: int) -> Tensor:
    """A random mask in which every query may attend to its first key at least."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(9)) < 0.5
    mask[..., 0] = True
    return mask


MASKS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "all": (6, 6, {}),
    "causal": (6, 6, {"is_causal": True}),
    "mask per head": (4, 7, {"attention_mask": random_mask(2, 3, 4, 7)}),
    "mask for all heads": (4, 7, {"attention_mask": random_mask(2, 1, 4, 7)}),
    "mask for all rows": (4, 7, {"attention_mask": random_mask(1, 1, 4, 7)}),
    "padding": (4, 7, {"attention_mask": random_mask(2, 1, 1, 7)}),
}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("head_dim", [1, 4, 33])
def test_written_out_attention_equals_the_fused_one(case: str, head_dim: int) -> None:
    query_length, key_length, options = MASKS[case]
    lengths = (query_length, key_length, key_length)
    queries, keys, values = inputs = [
        heads(length, head_dim, seed).requires_grad_() for seed, length in enumerate(lengths)
    ]
    written = attend(queries, keys, values, **options)
    fused = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=options.get("attention_mask"),
        is_causal=options.get("is_causal", False),
    )
    torch.testing.assert_close(written, fused, **TOLERANCE)
    cotangent = heads(query_length, head_dim, 7)
    for mine, theirs in zip(
        torch.autograd.grad(written, inputs, cotangent),
        torch.autograd.grad(fused, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)


@pytest.mark.parametrize("case", MASKS)
def test_both_paths_give_the_same_numbers(case: str) -> None:
    query_length, key_length, options = MASKS[case]
    queries, keys, values = (
        heads(query_length, 8, 0),
        heads(key_length, 8, 1),
        heads(key_length, 8, 2),
    )
    fused = attend(queries, keys, values, **options)
    written = attend(queries.requires_grad_(), keys, values, **options)
    torch.testing.assert_close(written, fused, **TOLERANCE)


def test_the_path_is_chosen_by_gradient_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("fused")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    short, long = (heads(n, 1, 0, batch=1, num_heads=1) for n in (512, 513))
    attend(short.clone().requires_grad_(), short, short)
    for queries in (short, long.clone().requires_grad_()):
        with pytest.raises(AssertionError, match="fused"):
            attend(queries, queries, queries)


def test_long_sequences_with_gradients_get_the_same_numbers() -> None:
    length = attention.WRITTEN_OUT_MAX_LENGTH + 3
    x = heads(length, 4, 0, batch=1, num_heads=1)
    scores = (x @ x.transpose(-1, -2) / 2).masked_fill(~causal_mask(length), float("-inf"))
    expected = scores.softmax(-1) @ x
    got = attend(x.clone().requires_grad_(), x, x, is_causal=True)
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_true_means_may_attend(needs_gradient: bool) -> None:
    x = heads(5, 8, 0)
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 3] = True  # everyone sees only the fourth
    mixed = attend(x.clone().requires_grad_(needs_gradient), x, x, attention_mask=mask)
    torch.testing.assert_close(mixed.detach(), x[:, :, 3:4].expand_as(x), **TOLERANCE)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_causal_is_refused_where_it_is_ambiguous(needs_gradient: bool) -> None:
    x = heads(5, 8, 0).requires_grad_(needs_gradient)
    with pytest.raises(ValueError, match="attention_mask: got one and is_causal"):
        attend(x, x, x, is_causal=True, attention_mask=causal_mask(5)[None, None])
    with pytest.raises(ValueError, match="is_causal: got 2 queries and 5 keys"):
        attend(x[:, :, :2], x, x, is_causal=True)


def copy_of_torch(theirs: nn.MultiheadAttention, *, use_bias: bool) -> MultiHeadAttention:
    mine = MultiHeadAttention(
        hidden_size=theirs.embed_dim,
        num_heads=theirs.num_heads,
        use_qk_norm=False,
        use_bias=use_bias,
    )
    with torch.no_grad():
        if use_bias:  # torch starts them at zero, where a mistake would not show
            nn.init.normal_(theirs.in_proj_bias)
            nn.init.normal_(theirs.out_proj.bias)
        for index, layer in enumerate((mine.query, mine.key, mine.value)):
            layer.weight.copy_(theirs.in_proj_weight.chunk(3)[index])
            if use_bias:
                layer.bias.copy_(theirs.in_proj_bias.chunk(3)[index])
        mine.output.weight.copy_(theirs.out_proj.weight)
        if use_bias:
            mine.output.bias.copy_(theirs.out_proj.bias)
    return mine


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_multi_head_attention_equals_torchs(use_bias: bool, training: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, bias=use_bias, batch_first=True)
    mine = copy_of_torch(theirs, use_bias=use_bias).train(training)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    is_token = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    with torch.set_grad_enabled(training):
        # torch's module says True = may NOT attend.
        cases = [
            (mine(x), theirs(x, x, x)),
            (mine(x, is_causal=True), theirs(x, x, x, attn_mask=~causal_mask(5))),
            (
                mine(x, context=context, attention_mask=padding_mask(is_token)),
                theirs(x, context, context, key_padding_mask=~is_token),
            ),
        ]
    for got, (expected, _) in cases:
        torch.testing.assert_close(got, expected, **TOLERANCE)


def test_padding_masked_attention_ignores_pads_entirely() -> None:
    torch.manual_seed(0)
    layer = MultiHeadAttention(hidden_size=8, num_heads=2)
    x = torch.randn(2, 6, 8)
    is_token = torch.tensor([[True] * 6, [True, True, False, True, False, False]])
    for needs_gradient in (False, True):
        with torch.set_grad_enabled(needs_gradient):
            before = layer(x, context=x, attention_mask=padding_mask(is_token))
            changed = x.masked_fill(~is_token[..., None], 1e4)
            after = layer(x, context=changed, attention_mask=padding_mask(is_token))
            alone = layer(x[1:], context=x[1:, [0, 1, 3]])
            later = x.clone()
            later[1, 3] += 1  # a real token: positions before and after it see the change
            moved = layer(x, context=later, attention_mask=padding_mask(is_token)) - before
        assert torch.equal(before, after)
        torch.testing.assert_close(before[1:], alone, **TOLERANCE)
        assert moved[1].abs().amax(dim=-1).min() > 1e-3
        assert not moved[0].any()


def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant() -> None:
    torch.manual_seed(0)
    layer = MultiHeadAttention(hidden_size=8, num_heads=2)
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        before = layer(x)
        layer.query.weight *= 50
        layer.key.weight *= 20
        torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-3)
        layer.query_norm.get_parameter("weight").mul_(50)
        assert (layer(x) - before).abs().max() > 0.01


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="num_heads: got 3, expected a divisor of hidden_size 8"):
        MultiHeadAttention(hidden_size=8, num_heads=3)
