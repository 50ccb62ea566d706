"""Multi-head attention ("Attention Is All You Need", section 3.2); ``attend`` is its entry point.

Masks follow torch's scaled_dot_product_attention: **True means may attend**.
Deviations from the paper, each common today: queries and keys may be normalized per head
(QK-norm, Henry et al. 2020, arXiv:2010.04245) and rotated by position (RoPE), and biases are off
by default.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_mini_impl.transformer.key_value_cache import KeysAndValues, LayerCache
from dalle_mini_impl.transformer.masks import causal_mask
from dalle_mini_impl.transformer.positions import Rotation, rotate

WRITTEN_OUT_MAX_LENGTH = 512  # beyond it the length ** 2 scores of training cost too much memory


def attend(
    queries: Float[Tensor, "batch heads query_length head_dim"],
    keys: Float[Tensor, "batch heads key_length head_dim"],
    values: Float[Tensor, "batch heads key_length head_dim"],
    *,
    attention_mask: Bool[Tensor, "#batch #heads #query_length key_length"] | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "batch heads query_length head_dim"]:
    """Compute softmax(queries keys^T / sqrt(head_dim)) values by the faster of two equal paths.

    Every query needs at least one key that it may attend to. ``is_causal`` (position i attends to
    positions <= i) excludes a mask and needs as many queries as keys.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1.
    """
    if is_causal and attention_mask is not None:
        raise ValueError("attention_mask: got one and is_causal, expected only one of the two")
    if is_causal and queries.shape[-2] != keys.shape[-2]:
        raise ValueError(
            f"is_causal: got {queries.shape[-2]} queries and {keys.shape[-2]} keys, "
            "expected equal lengths"
        )
    # Measured: on CPUs, with gradients, short rows train faster by written-out products than by
    # torch's fused kernel. Everywhere else the kernel wins.
    is_training_on_cpu = queries.device.type == "cpu" and queries.requires_grad
    is_short = keys.shape[-2] <= WRITTEN_OUT_MAX_LENGTH
    path = written_out_attention if is_training_on_cpu and is_short else fused_attention
    return path(queries, keys, values, attention_mask, is_causal)


def fused_attention(
    queries: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Run torch's kernel, which never holds all scores in memory."""
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=attention_mask, is_causal=is_causal
    )


def written_out_attention(
    queries: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Run equation 1 as matrix products."""
    # Scaling the queries costs head_dim products per row; scaling the scores would cost key_length.
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)  # (..., query, key)
    if is_causal:
        attention_mask = causal_mask(scores.shape[-1], device=scores.device)
    if attention_mask is not None:
        # Adding a small table is cheaper than masked_fill's full-size mask and its backward.
        bias = torch.zeros_like(attention_mask, dtype=scores.dtype)
        scores = scores + bias.masked_fill(~attention_mask, float("-inf"))
    return scores.softmax(dim=-1) @ values  # (batch, heads, query_length, head_dim)


class MultiHeadAttention(nn.Module):
    """Self-attention, or cross-attention when a context is given."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        use_qk_norm: bool = True,
        use_bias: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"num_heads: got {num_heads}, expected a divisor of hidden_size {hidden_size}"
            )
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.query = nn.Linear(hidden_size, hidden_size, bias=use_bias)
        self.key = nn.Linear(hidden_size, hidden_size, bias=use_bias)
        self.value = nn.Linear(hidden_size, hidden_size, bias=use_bias)
        self.output = nn.Linear(hidden_size, hidden_size, bias=use_bias)
        # QK-norm bounds every score by the norms' own scales, so that no softmax can saturate.
        self.query_norm = build_norm(head_dim) if use_qk_norm else nn.Identity()
        self.key_norm = build_norm(head_dim) if use_qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: Float[Tensor, "batch query_length hidden"],
        *,
        context: Float[Tensor, "batch key_length hidden"] | KeysAndValues | None = None,
        rotation: Rotation | None = None,
        attention_mask: Bool[Tensor, "#batch #heads #query_length key_length"] | None = None,
        is_causal: bool = False,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch query_length hidden"]:
        """Attend from ``hidden_states`` to a context (projected or not), or to themselves if None.

        A cache holds the keys and values of earlier positions and takes in the new ones.
        """
        queries = self.query_norm(self._split_heads(self.query(hidden_states)))
        queries = queries.transpose(1, 2)  # (batch, heads, query_length, head_dim)
        if not isinstance(context, KeysAndValues):
            context = self.project(hidden_states if context is None else context)
        keys, values = context  # (batch, heads, key_length, head_dim) each
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        if cache is not None:
            keys, values = cache.update(keys, values)  # key_length grows by the cached positions
        attended = attend(queries, keys, values, attention_mask=attention_mask, is_causal=is_causal)
        merged = rearrange(attended, "batch heads length head_dim -> batch length (heads head_dim)")
        return self.output(merged)

    def project(self, context: Float[Tensor, "batch key_length hidden"]) -> KeysAndValues:
        """Compute the keys and values of a context, once for all calls that attend to it."""
        keys = self.key_norm(self._split_heads(self.key(context)))
        values = self._split_heads(self.value(context))
        # Transposed only now, after the norm, which is faster on contiguous rows.
        return KeysAndValues(keys.transpose(1, 2), values.transpose(1, 2))

    def _split_heads(self, projected: Tensor) -> Tensor:
        pattern = "batch length (heads head_dim) -> batch length heads head_dim"
        return rearrange(projected, pattern, heads=self.num_heads)


def build_norm(size: int, *, use_bias: bool = False) -> nn.LayerNorm:
    """Build the norm of every layer: LayerNorm over the last axis, by default without bias."""
    # RMSNorm, which most recent decoders use, learns as well, but torch has no fused backward of it
    # on CPUs: a forward and backward pass took 3.4 times as long there.
    return nn.LayerNorm(size, eps=1e-6, bias=use_bias)
