"""The Transformer block: attention, then a feed-forward network, each around a residual stream.

By default pre-norm (Xiong et al. 2020, arXiv:2002.04745) with a SwiGLU feed-forward network
(Shazeer 2020, arXiv:2002.05202); ``BlockOptions`` names the choices of the papers of 2017 to 2021.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_mini_impl.transformer.attention import MultiHeadAttention, build_norm
from dalle_mini_impl.transformer.block_config import DEFAULT_OPTIONS, BlockOptions, BlockSizes
from dalle_mini_impl.transformer.feed_forward import ChannelDropout, FeedForward, GatedFeedForward
from dalle_mini_impl.transformer.key_value_cache import KeysAndValues, LayerCache
from dalle_mini_impl.transformer.positions import Rotation


class TransformerBlock(nn.Module):
    """Self-attention, optional cross-attention, and a feed-forward network."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        dropout_probability: float = 0.0,
        options: BlockOptions = DEFAULT_OPTIONS,
    ) -> None:
        super().__init__()
        self.is_pre_norm = options.norm == "pre"
        self.has_cross_attention = options.has_cross_attention
        use_bias = options.use_bias
        build_attention = partial(
            MultiHeadAttention,
            hidden_size=hidden_size,
            num_heads=num_heads,
            use_qk_norm=options.use_qk_norm,
            use_bias=use_bias,
        )
        self.attention_norm = build_norm(hidden_size, use_bias=use_bias)
        self.attention = build_attention()
        if options.has_cross_attention:
            self.cross_attention_norm = build_norm(hidden_size, use_bias=use_bias)
            self.cross_attention = build_attention()
        self.feed_forward_norm = build_norm(hidden_size, use_bias=use_bias)
        self.feed_forward = _build_feed_forward(hidden_size, intermediate_size, options)
        self.dropout = ChannelDropout(dropout_probability)
        self.recomputes_activations = False

    def forward(
        self, hidden_states: Float[Tensor, "batch length hidden"], **inputs: Any
    ) -> Float[Tensor, "batch length hidden"]:
        """Run the block; ``inputs`` are those of ``transform``."""
        recomputes = self.recomputes_activations and inputs.get("cache") is None
        if recomputes and torch.is_grad_enabled():
            # The second pass restores the state of dropout's generator. Not reentrant: a first
            # pass without gradients would send ``attend`` down its other path.
            return checkpoint(self.transform, hidden_states, use_reentrant=False, **inputs)
        return self.transform(hidden_states, **inputs)

    def transform(
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
        """Add the output of every branch to the residual stream.

        Cross-attention reads ``context``: an encoder's output, or its ``project_context``.
        """
        if self.has_cross_attention == (context is None):
            expected = "one" if self.has_cross_attention else "none without cross-attention"
            raise ValueError(
                f"context: got {'none' if context is None else 'one'}, expected {expected}"
            )
        # 1. Each position gathers from others of its own sequence.
        attended = self.attention(
            self._before_branch(self.attention_norm, hidden_states),
            rotation=rotation,
            attention_mask=attention_mask,
            is_causal=is_causal,
            cache=cache,
        )
        hidden_states = self._add_branch(self.attention_norm, hidden_states, attended)
        # 2. Each position gathers from the encoder's output.
        if context is not None:
            attended = self.cross_attention(
                self._before_branch(self.cross_attention_norm, hidden_states),
                context=context,
                attention_mask=context_mask,
            )
            hidden_states = self._add_branch(self.cross_attention_norm, hidden_states, attended)
        # 3. Each position is transformed on its own.
        transformed = self.feed_forward(self._before_branch(self.feed_forward_norm, hidden_states))
        return self._add_branch(self.feed_forward_norm, hidden_states, transformed)

    # Pre-norm normalizes the input of a branch and leaves the residual stream alone; post-norm
    # normalizes the stream itself, after the sum.

    def _before_branch(self, norm: nn.Module, hidden_states: Tensor) -> Tensor:
        return norm(hidden_states) if self.is_pre_norm else hidden_states

    def _add_branch(self, norm: nn.Module, hidden_states: Tensor, branch: Tensor) -> Tensor:
        total = hidden_states + self.dropout(branch)
        return total if self.is_pre_norm else norm(total)


def build_blocks(
    sizes: BlockSizes, num_layers: int, options: BlockOptions = DEFAULT_OPTIONS
) -> nn.ModuleList:
    """Build ``num_layers`` blocks of equal sizes and options, with fresh weights."""
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


def project_context(
    blocks: nn.ModuleList, context: Float[Tensor, "batch context_length hidden"]
) -> list[KeysAndValues]:
    """Compute each block's cross-attention keys and values, which stay the same at all steps."""
    attentions = [block.get_submodule("cross_attention") for block in blocks]
    return [each.project(context) for each in attentions if isinstance(each, MultiHeadAttention)]


def recompute_activations(model: nn.Module) -> int:
    """Let every block keep only its input for the backward pass; return the number of blocks.

    Source: Chen et al. 2016, arXiv:1604.06174, section 3, with a block as the segment.
    """
    # The numbers stay the same, dropout's too. Time rises by about a forward pass.
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    for block in blocks:
        block.recomputes_activations = True
    return len(blocks)


def _build_feed_forward(
    hidden_size: int, intermediate_size: int, options: BlockOptions
) -> GatedFeedForward | FeedForward:
    if options.feed_forward == "swiglu":
        return GatedFeedForward(hidden_size, intermediate_size, use_bias=options.use_bias)
    return FeedForward(
        hidden_size,
        intermediate_size,
        activation=options.feed_forward,
        use_bias=options.use_bias,
    )
