"""Multi-head attention ("Attention Is All You Need", section 3.2) behind one door, ``attend``.

Masks follow torch's scaled_dot_product_attention: **True means may attend**.
Deviations from the paper, each usual today: queries and keys may be normalised per head
(QK-norm, Henry et al. 2020, arXiv:2010.04245), rotated by position (RoPE), and there is no bias
unless it is asked for.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_mini_impl.transformer.masks import causal_mask
from dalle_mini_impl.transformer.positions import Rotation, rotate

WRITTEN_OUT_MAX_LENGTH = 512  # beyond it the length ** 2 scores of training cost too much memory


@runtime_checkable  # for the checks of types in the tests
class LayerCache(Protocol):
    """What attention needs of a key-value cache: append, and get everything back."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values and return all stored so far."""
        ...


class KeysAndValues(NamedTuple):
    """A context as one layer attends to it: what stays the same in every step of a decoder."""

    keys: Float[Tensor, "batch heads key_length head_dim"]
    values: Float[Tensor, "batch heads key_length head_dim"]


def attend(
    queries: Float[Tensor, "batch heads query_length head_dim"],
    keys: Float[Tensor, "batch heads key_length head_dim"],
    values: Float[Tensor, "batch heads key_length head_dim"],
    *,
    attention_mask: Bool[Tensor, "#batch #heads #query_length key_length"] | None = None,
    is_causal: bool = False,
    dropout_probability: float = 0.0,
) -> Float[Tensor, "batch heads query_length head_dim"]:
    """Mix the values by how well each query fits each key.

    The fastest path is chosen by a measured rule: on a CPU, with gradients and at most
    ``WRITTEN_OUT_MAX_LENGTH`` keys, written-out products train faster than torch's fused kernel;
    everywhere else the fused kernel wins. Both give the same numbers (tested).

    Args:
        queries: One row per position that asks.
        keys: One row per position that may be attended.
        values: What each attended position gives.
        attention_mask: True = may attend; every query needs a key that it may attend to. Not
            together with ``is_causal``.
        is_causal: Position i attends to positions <= i; needs equal lengths.
        dropout_probability: Fraction of attention weights dropped, in [0, 1).

    Returns:
        The mixed values.

    Raises:
        ValueError: If ``is_causal`` comes with a mask, or with keys that are not the queries' own.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1.
    """
    if is_causal and attention_mask is not None:
        raise ValueError("attention_mask: got one and is_causal, expected only one of the two")
    if is_causal and queries.shape[-2] != keys.shape[-2]:
        raise ValueError(
            f"is_causal: got {queries.shape[-2]} queries and {keys.shape[-2]} keys, "
            "expected as many of both"
        )
    written_out = (
        queries.device.type == "cpu"
        and queries.requires_grad
        and keys.shape[-2] <= WRITTEN_OUT_MAX_LENGTH
    )
    if not written_out:
        return F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=attention_mask,
            is_causal=is_causal,
            dropout_p=dropout_probability,
        )
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)
    if is_causal:
        attention_mask = causal_mask(scores.shape[-1], device=scores.device)
    if attention_mask is not None:
        # Adding a small table is cheaper than masked_fill's full-size mask and its backward.
        bias = torch.zeros_like(attention_mask, dtype=scores.dtype)
        scores = scores + bias.masked_fill(~attention_mask, float("-inf"))
    weights = scores.softmax(dim=-1)
    if dropout_probability > 0:
        weights = F.dropout(weights, dropout_probability)
    return weights @ values


def build_norm(size: int, *, use_bias: bool = False) -> nn.LayerNorm:
    """Build the norm of every layer here: LayerNorm with a scale and, unless asked for, no bias.

    RMSNorm, which most recent decoders use, learns as well, but torch has no fused backward of it
    on CPUs: a forward and backward pass took 3.4 times as long there.

    Args:
        size: Length of the normalised last axis.
        use_bias: Learn a bias too, as Ba et al. 2016 (arXiv:1607.06450) do.

    Returns:
        The module.
    """
    return nn.LayerNorm(size, eps=1e-6, bias=use_bias)


class MultiHeadAttention(nn.Module):
    """Self-attention, or cross-attention when a context is given."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        dropout_probability: float = 0.0,
        use_qk_norm: bool = True,
        use_bias: bool = False,
    ) -> None:
        """Build the four projections.

        Args:
            hidden_size: Width of the residual stream.
            num_heads: Must divide ``hidden_size``.
            dropout_probability: Fraction of attention weights dropped in training.
            use_qk_norm: Normalise queries and keys per head.
            use_bias: Give the projections a bias, as the paper of 2017 does.

        Raises:
            ValueError: If ``num_heads`` does not divide ``hidden_size``.
        """
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"num_heads: got {num_heads}, expected a divisor of hidden_size {hidden_size}"
            )
        self.num_heads = num_heads
        self.dropout_probability = dropout_probability
        head_dim = hidden_size // num_heads
        self.query = nn.Linear(hidden_size, hidden_size, bias=use_bias)
        self.key = nn.Linear(hidden_size, hidden_size, bias=use_bias)
        self.value = nn.Linear(hidden_size, hidden_size, bias=use_bias)
        self.output = nn.Linear(hidden_size, hidden_size, bias=use_bias)
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
        """Let every position gather from the positions that it may attend to.

        Args:
            hidden_states: Positions that ask.
            context: Positions that answer, or what ``project`` made of them; ``hidden_states``
                itself when None.
            rotation: Rotary angles of these positions, or None.
            attention_mask: True = may attend.
            is_causal: Position i attends to positions <= i.
            cache: Keys and values of earlier positions; the new ones are appended.

        Returns:
            One mixed row per position that asks.
        """
        queries = self.query_norm(self._split(self.query(hidden_states))).transpose(1, 2)
        if not isinstance(context, KeysAndValues):
            context = self.project(hidden_states if context is None else context)
        keys, values = context
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        if cache is not None:
            keys, values = cache.append(keys, values)
        mixed = attend(
            queries,
            keys,
            values,
            attention_mask=attention_mask,
            is_causal=is_causal,
            dropout_probability=self.dropout_probability if self.training else 0.0,
        )
        return self.output(rearrange(mixed, "batch heads length dim -> batch length (heads dim)"))

    def project(self, context: Float[Tensor, "batch key_length hidden"]) -> KeysAndValues:
        """Make keys and values, once for all calls whose context stays the same.

        Args:
            context: Positions that answer.

        Returns:
            What ``forward`` takes in place of the context.
        """
        keys = self.key_norm(self._split(self.key(context)))
        values = self._split(self.value(context))
        # (batch, heads, length, head_dim) only now: norms are faster on contiguous rows
        return KeysAndValues(keys.transpose(1, 2), values.transpose(1, 2))

    def _split(self, projected: Tensor) -> Tensor:
        split = "batch length (heads head_dim) -> batch length heads head_dim"
        return rearrange(projected, split, heads=self.num_heads)
