"""The Transformer block: attention, then a feed-forward network, each beside an identity.

Pre-norm (Xiong et al. 2020, arXiv:2002.04745) with a SwiGLU feed-forward network (Shazeer
2020, arXiv:2002.05202) instead of the post-norm and ReLU of 2017.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_mini_impl.transformer.attention import LayerCache, MultiHeadAttention, build_norm
from dalle_mini_impl.transformer.positions import Rotation


class GatedFeedForward(nn.Module):
    """SwiGLU: one projection gates another."""

    def __init__(self, *, hidden_size: int, intermediate_size: int) -> None:
        """Build the three projections.

        Args:
            hidden_size: Width of the residual stream.
            intermediate_size: Width between the projections.
        """
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.value = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.output = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(
        self, hidden_states: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length hidden"]:
        """Transform each position on its own."""
        return self.output(F.silu(self.gate(hidden_states)) * self.value(hidden_states))


class ChannelDropout(nn.Module):
    """Dropout that hides a channel of a sample at all positions at once.

    As strong a regulariser as hiding single numbers (Gal & Ghahramani 2016, arXiv:1512.05287) and
    far cheaper: drawing one random number per activation took a quarter of a training step on CPUs.
    """

    def __init__(self, probability: float) -> None:
        """Remember the share.

        Args:
            probability: Share of channels hidden in training, in [0, 1).
        """
        super().__init__()
        self.probability = probability

    def forward(
        self, hidden_states: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length hidden"]:
        """Hide channels in training; do nothing in evaluation."""
        if not self.training or self.probability == 0:
            return hidden_states
        mask = torch.ones_like(hidden_states[:, :1])
        return hidden_states * F.dropout(mask, self.probability)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward network."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        dropout_probability: float = 0.0,
        use_qk_norm: bool = True,
    ) -> None:
        """Build one block.

        Args:
            hidden_size: Width of the residual stream.
            num_heads: Must divide ``hidden_size``.
            intermediate_size: Width inside the feed-forward network.
            dropout_probability: Share of each branch's channels dropped in training.
            use_qk_norm: Normalise queries and keys per head.
        """
        super().__init__()
        self.attention_norm = build_norm(hidden_size)
        self.attention = MultiHeadAttention(
            hidden_size=hidden_size, num_heads=num_heads, use_qk_norm=use_qk_norm
        )
        self.feed_forward_norm = build_norm(hidden_size)
        self.feed_forward = GatedFeedForward(
            hidden_size=hidden_size, intermediate_size=intermediate_size
        )
        self.dropout = ChannelDropout(dropout_probability)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch length hidden"],
        *,
        rotation: Rotation | None = None,
        attention_mask: Bool[Tensor, "#batch #heads #length key_length"] | None = None,
        is_causal: bool = False,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch length hidden"]:
        """Run the block.

        Args:
            hidden_states: The residual stream.
            rotation: Rotary angles of these positions, or None.
            attention_mask: True = may attend.
            is_causal: Position i attends to positions <= i.
            cache: Keys and values of earlier positions of this layer.

        Returns:
            The residual stream after both branches.
        """
        attended = self.attention(
            self.attention_norm(hidden_states),
            rotation=rotation,
            attention_mask=attention_mask,
            is_causal=is_causal,
            cache=cache,
        )
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(
            self.feed_forward(self.feed_forward_norm(hidden_states))
        )
