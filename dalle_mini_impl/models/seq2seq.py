"""The Transformer of "Attention Is All You Need": an encoder reads, a decoder writes.

    source s0 s1 ... sn  ->  encoder  ->  context
    start  t0  t1 ... tm                               the decoder's inputs
      |    |   |      |      (each attends to itself, to what is before it, and to the context)
      t0   t1  t2 ... end                              what each position predicts

As in Vaswani et al. 2017 (arXiv:1706.03762), one table serves both embeddings and the output, and
is scaled by sqrt(hidden_size) on the way in (section 3.4); positions are sinusoidal (3.5). With
``norm: pre`` (Xiong et al. 2020, arXiv:2002.04745) each of the two stacks ends with a norm.
Dropout drops whole channels instead of single numbers, as in all our blocks.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_mini_impl.transformer.attention import build_norm
from dalle_mini_impl.transformer.block_config import (
    VASWANI_2017,
    require_dropout_probability,
    require_positive,
)
from dalle_mini_impl.transformer.blocks import build_blocks, project_context
from dalle_mini_impl.transformer.feed_forward import ChannelDropout
from dalle_mini_impl.transformer.key_value_cache import KeysAndValues, KeyValueCache
from dalle_mini_impl.transformer.masks import padding_mask
from dalle_mini_impl.transformer.positions import sinusoidal_positions

PAD_TOKEN_ID = 0  # on the right of shorter rows; never attended in a source, never predicted


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """Sizes of an encoder-decoder Transformer."""

    hidden_size: int = 256
    """Width of the residual stream."""
    num_encoder_layers: int = 3
    """Blocks of the encoder."""
    num_decoder_layers: int = 3
    """Blocks of the decoder."""
    num_heads: int = 4
    """Attention heads per block."""
    intermediate_size: int = 1024
    """Width of the feed-forward network; four times the hidden size in the paper."""
    dropout_probability: float = 0.1
    """Fraction of the channels of each branch, and of the embeddings, dropped in training."""
    norm: Literal["pre", "post"] = "post"
    """After each sum as in the paper, or before each branch."""

    def __post_init__(self) -> None:
        counts = ("hidden_size", "num_encoder_layers", "num_decoder_layers", "num_heads")
        require_positive(self, (*counts, "intermediate_size"), prefix="model.")
        if self.hidden_size % self.num_heads or self.hidden_size % 2:
            raise ValueError(
                f"model.hidden_size: got {self.hidden_size}, expected an even multiple of "
                f"num_heads {self.num_heads}"
            )
        require_dropout_probability(self, prefix="model.")


class EncoderDecoder(nn.Module):
    """Reads a row of tokens and writes another one, both of one vocabulary.

    ``vocab_size`` counts the pad; two tokens are added to it, start and end. Sources and targets
    are padded on the right with ``PAD_TOKEN_ID``, and every source holds at least one token.
    """

    def __init__(self, config: EncoderDecoderConfig, *, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        # Behind the tokenizer's own ids, which therefore need no shift.
        self.start_token_id, self.end_token_id = vocab_size, vocab_size + 1
        width = config.hidden_size
        self.embedding = nn.Embedding(vocab_size + 2, width)
        self.dropout = ChannelDropout(config.dropout_probability)
        encoder_options = replace(VASWANI_2017, norm=config.norm)
        decoder_options = replace(encoder_options, has_cross_attention=True)
        self.encoder_blocks = build_blocks(config, config.num_encoder_layers, encoder_options)
        self.decoder_blocks = build_blocks(config, config.num_decoder_layers, decoder_options)
        # A post-norm stack ends with the norm of its last block; a pre-norm stack needs its own.
        is_pre = config.norm == "pre"
        self.encoder_norm = build_norm(width, use_bias=True) if is_pre else nn.Identity()
        self.decoder_norm = build_norm(width, use_bias=True) if is_pre else nn.Identity()
        initialize_weights(self)

    def forward(
        self,
        source_token_ids: Int[Tensor, "batch source_length"],
        target_token_ids: Int[Tensor, "batch target_length"],
    ) -> Float[Tensor, "batch target_length_plus_1 vocab_plus_2"]:
        """Predict every target token, and the end after the last one.

        Targets come without start and end. Logits after a row's end mean nothing.
        """
        context, context_mask = self.encode(source_token_ids)
        start = target_token_ids.new_full((len(target_token_ids), 1), self.start_token_id)
        hidden_states = self.embed(torch.cat([start, target_token_ids], dim=1))
        for block in self.decoder_blocks:
            # Target pads need no mask: they follow all tokens, so that causality hides them.
            hidden_states = block(
                hidden_states, is_causal=True, context=context, context_mask=context_mask
            )
        return self.logits(hidden_states)

    def encode(self, source_token_ids: Int[Tensor, "batch source_length"]) -> "Context":
        """Read the sources."""
        mask = padding_mask(source_token_ids != PAD_TOKEN_ID)
        hidden_states = self.embed(source_token_ids)
        for block in self.encoder_blocks:
            hidden_states = block(hidden_states, attention_mask=mask)
        return Context(self.encoder_norm(hidden_states), mask)

    def start_decoding(
        self,
        source_token_ids: Int[Tensor, "batch source_length"],
        *,
        rows_per_source: int,
        max_length: int,
    ) -> "DecoderState":
        """Read the sources and reserve a cache for ``max_length`` calls of ``decode_one``."""
        # Each source has ``rows_per_source`` adjacent rows, the hypotheses of a beam search.
        context, mask = self.encode(source_token_ids)
        context = context.repeat_interleave(rows_per_source, dim=0)
        mask = mask.repeat_interleave(rows_per_source, dim=0)
        cache = KeyValueCache(
            num_layers=self.config.num_decoder_layers,
            batch_size=len(context),
            num_heads=self.config.num_heads,
            max_length=max_length,
            head_dim=self.config.hidden_size // self.config.num_heads,
            device=context.device,
            dtype=context.dtype,
        )
        return DecoderState(cache, project_context(self.decoder_blocks, context), mask)

    def decode_one(
        self, token_ids: Int[Tensor, " rows"], state: "DecoderState"
    ) -> Float[Tensor, "rows vocab_plus_2"]:
        """Add one token to each row, the start token first, and predict the next one."""
        positions = torch.full_like(token_ids, state.length).unsqueeze(1)  # (rows, 1)
        # The cache is as long as the longest row; what lies behind this position is not written
        # yet.
        mask = state.cache.mask_at(positions)  # (rows, 1, 1, max_length)
        hidden_states = self.embed(token_ids[:, None], first_position=state.length)
        for index, block in enumerate(self.decoder_blocks):
            hidden_states = block(
                hidden_states,
                attention_mask=mask,
                cache=state.cache.layer(index, positions),
                context=state.contexts[index],
                context_mask=state.context_mask,
            )
        state.length += 1
        return self.logits(hidden_states)[:, -1]

    def embed(
        self, token_ids: Int[Tensor, "batch length"], *, first_position: int = 0
    ) -> Float[Tensor, "batch length hidden"]:
        """Look up tokens and add their positions."""
        width, length = self.config.hidden_size, token_ids.shape[1]
        positions = torch.arange(first_position, first_position + length, device=token_ids.device)
        table = sinusoidal_positions(positions[:, None], hidden_size=width)
        # Fresh rows have length one, positions sqrt(width / 2): the factor makes both count.
        return self.dropout(self.embedding(token_ids) * width**0.5 + table)

    def logits(
        self, hidden_states: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length vocab_plus_2"]:
        """Score every token by the table that embeds it."""
        return F.linear(self.decoder_norm(hidden_states), self.embedding.weight)


class Context(NamedTuple):
    """The encoder's output."""

    hidden_states: Float[Tensor, "batch source_length hidden"]
    attention_mask: Bool[Tensor, "batch 1 1 source_length"]


@dataclass
class DecoderState:
    """What a token-by-token decoder remembers between two tokens."""

    cache: KeyValueCache
    contexts: list[KeysAndValues]
    """What each block's cross-attention reads."""
    context_mask: Tensor
    length: int = 0
    """Tokens of each row so far, the start token included."""


def initialize_weights(model: EncoderDecoder) -> None:
    """Set every weight of a fresh model: Glorot's uniform matrices, as in the paper's own code."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    # So that embeddings (times sqrt(hidden_size)) and logits begin with variance one.
    nn.init.normal_(model.embedding.weight, std=model.config.hidden_size**-0.5)
