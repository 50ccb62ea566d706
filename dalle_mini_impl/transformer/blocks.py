"""The Transformer block: attention, then a feed-forward network, each beside an identity.

By default pre-norm (Xiong et al. 2020, arXiv:2002.04745) with a SwiGLU feed-forward network
(Shazeer 2020, arXiv:2002.05202); ``BlockOptions`` names what the papers of 2017 and 2021 do
instead.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_mini_impl.transformer.attention import (
    KeysAndValues,
    LayerCache,
    MultiHeadAttention,
    build_norm,
)
from dalle_mini_impl.transformer.feed_forward import ChannelDropout, FeedForward, GatedFeedForward
from dalle_mini_impl.transformer.positions import Rotation


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """How a block is built, apart from its sizes."""

    norm: Literal["pre", "post"] = "pre"
    """Before each branch (Xiong et al. 2020, arXiv:2002.04745), or after each sum (Vaswani et al.
    2017, arXiv:1706.03762, section 3.1)."""
    feed_forward: Literal["swiglu", "relu", "gelu"] = "swiglu"
    """SwiGLU (Shazeer 2020, arXiv:2002.05202), ReLU (Vaswani et al. 2017, equation 2) or GELU
    (Hendrycks & Gimpel 2016, arXiv:1606.08415; in GPT-2, Radford et al. 2019, in DALL-E and in ViT,
    Dosovitskiy et al. 2021)."""
    use_bias: bool = False
    """Biases in projections and norms, as in the papers of 2017 and 2021."""
    use_qk_norm: bool = True
    """Normalise queries and keys per head (Henry et al. 2020, arXiv:2010.04245)."""
    has_cross_attention: bool = False
    """Attend to an encoder's output between the two branches (Vaswani et al. 2017, section 3.2.3,
    encoder-decoder attention)."""


VASWANI_2017 = BlockOptions(norm="post", feed_forward="relu", use_bias=True, use_qk_norm=False)
RADFORD_2019 = BlockOptions(feed_forward="gelu", use_bias=True, use_qk_norm=False)  # DALL-E's too
DOSOVITSKIY_2021 = BlockOptions(feed_forward="gelu", use_bias=True, use_qk_norm=False)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention where asked for, and a feed-forward network."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        dropout_probability: float = 0.0,
        options: BlockOptions = BlockOptions(),
    ) -> None:
        """Build one block.

        Args:
            hidden_size: Width of the residual stream.
            num_heads: Must divide ``hidden_size``.
            intermediate_size: Width inside the feed-forward network.
            dropout_probability: Fraction of each branch's channels dropped in training.
            options: Norms, nonlinearity, biases and cross-attention.
        """
        super().__init__()
        self.is_pre_norm = options.norm == "pre"
        self.has_cross_attention = options.has_cross_attention
        use_bias = options.use_bias
        self.attention_norm = build_norm(hidden_size, use_bias=use_bias)
        self.attention = MultiHeadAttention(
            hidden_size=hidden_size,
            num_heads=num_heads,
            use_qk_norm=options.use_qk_norm,
            use_bias=use_bias,
        )
        if options.has_cross_attention:
            self.cross_attention_norm = build_norm(hidden_size, use_bias=use_bias)
            self.cross_attention = MultiHeadAttention(
                hidden_size=hidden_size,
                num_heads=num_heads,
                use_qk_norm=options.use_qk_norm,
                use_bias=use_bias,
            )
        self.feed_forward_norm = build_norm(hidden_size, use_bias=use_bias)
        self.feed_forward = _build_feed_forward(hidden_size, intermediate_size, options)
        self.dropout = ChannelDropout(dropout_probability)
        self.recomputes_activations = False

    def forward(
        self,
        hidden_states: Float[Tensor, "batch length hidden"],
        *,
        rotation: Rotation | None = None,
        attention_mask: Bool[Tensor, "#batch #heads #length key_length"] | None = None,
        is_causal: bool = False,
        cache: LayerCache | None = None,
        context: Float[Tensor, "batch context_length hidden"] | KeysAndValues | None = None,
        context_mask: Bool[Tensor, "#batch #heads #length context_length"] | None = None,
    ) -> Float[Tensor, "batch length hidden"]:
        """Run the block.

        Args:
            hidden_states: The residual stream.
            rotation: Rotary angles of these positions, or None.
            attention_mask: True = may attend.
            is_causal: Position i attends to positions <= i.
            cache: Keys and values of earlier positions of this layer.
            context: What cross-attention reads: an encoder's output, or what
                ``cross_attention.project`` made of it; for blocks that have cross-attention.
            context_mask: True = may attend, of cross-attention.

        Returns:
            The residual stream after all branches.

        Raises:
            ValueError: If a block with cross-attention gets no context, or one without gets some.
        """
        if self.has_cross_attention == (context is None):
            expected = "one" if self.has_cross_attention else "none without cross-attention"
            raise ValueError(
                f"context: got {'none' if context is None else 'one'}, expected {expected}"
            )
        run = partial(
            self._run,
            rotation=rotation,
            attention_mask=attention_mask,
            is_causal=is_causal,
            cache=cache,
            context=context,
            context_mask=context_mask,
        )
        if self.recomputes_activations and cache is None and torch.is_grad_enabled():
            # It sets dropout's generator back. Reentrant, its first pass would have no gradients,
            # and ``attend`` would go another way.
            return checkpoint(run, hidden_states, use_reentrant=False)
        return run(hidden_states)

    def _run(
        self,
        hidden_states: Tensor,
        *,
        rotation: Rotation | None,
        attention_mask: Tensor | None,
        is_causal: bool,
        cache: LayerCache | None,
        context: Tensor | KeysAndValues | None,
        context_mask: Tensor | None,
    ) -> Tensor:
        attended = self.attention(
            self._before(self.attention_norm, hidden_states),
            rotation=rotation,
            attention_mask=attention_mask,
            is_causal=is_causal,
            cache=cache,
        )
        hidden_states = self._add(self.attention_norm, hidden_states, attended)
        if context is not None:
            read = self.cross_attention(
                self._before(self.cross_attention_norm, hidden_states),
                context=context,
                attention_mask=context_mask,
            )
            hidden_states = self._add(self.cross_attention_norm, hidden_states, read)
        transformed = self.feed_forward(self._before(self.feed_forward_norm, hidden_states))
        return self._add(self.feed_forward_norm, hidden_states, transformed)

    def _before(self, norm: nn.Module, hidden_states: Tensor) -> Tensor:
        return norm(hidden_states) if self.is_pre_norm else hidden_states

    def _add(self, norm: nn.Module, hidden_states: Tensor, branch: Tensor) -> Tensor:
        total = hidden_states + self.dropout(branch)
        return total if self.is_pre_norm else norm(total)


@runtime_checkable  # for the checks of types in the tests
class BlockSizes(Protocol):
    """What a model's config says of its blocks."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def num_heads(self) -> int:
        """Attention heads per block."""

    @property
    def intermediate_size(self) -> int:
        """Width inside the feed-forward network."""

    @property
    def dropout_probability(self) -> float:
        """Fraction of each branch's channels dropped in training."""


def build_blocks(
    sizes: BlockSizes, num_layers: int, options: BlockOptions = BlockOptions()
) -> nn.ModuleList:
    """Build blocks that are all alike.

    Args:
        sizes: Of each.
        num_layers: How many.
        options: Norms, nonlinearity, biases and cross-attention.

    Returns:
        The blocks, with fresh weights.
    """
    return nn.ModuleList(
        TransformerBlock(
            hidden_size=sizes.hidden_size,
            num_heads=sizes.num_heads,
            intermediate_size=sizes.intermediate_size,
            dropout_probability=sizes.dropout_probability,
            options=options,
        )
        for _ in range(num_layers)
    )


def recompute_activations(model: nn.Module) -> int:
    """Let every block keep only its input for the backward pass, and compute the rest again there.

    The numbers stay the same, dropout's too. Memory falls and time rises, by about a forward pass.

    Args:
        model: Changed in place.

    Returns:
        How many blocks it has.

    Source: Chen et al. 2016, arXiv:1604.06174, section 3, with a block as the segment.
    """
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    for block in blocks:
        block.recomputes_activations = True
    return len(blocks)


def _build_feed_forward(
    hidden_size: int, intermediate_size: int, options: BlockOptions
) -> GatedFeedForward | FeedForward:
    if options.feed_forward == "swiglu":
        return GatedFeedForward(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            use_bias=options.use_bias,
        )
    return FeedForward(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        activation=options.feed_forward,
        use_bias=options.use_bias,
    )
