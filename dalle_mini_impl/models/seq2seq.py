"""The Transformer of "Attention Is All You Need": an encoder reads, a decoder writes.

    source s0 s1 ... sn  ->  encoder  ->  context
    start  t0  t1 ... tm                               the decoder's inputs
      |    |   |      |      (each attends to itself, to what is before it, and to the context)
      t0   t1  t2 ... end                              what each position predicts

As in Vaswani et al. 2017 (arXiv:1706.03762), one table serves both embeddings and the output, and
is scaled by sqrt(hidden_size) on the way in (section 3.4); positions are sinusoidal (3.5). With
``norm: pre`` (Xiong et al. 2020, arXiv:2002.04745) each of the two stacks ends with a norm.
Dropout hides whole channels instead of single numbers, as in all our blocks.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_mini_impl.transformer.attention import KeysAndValues, build_norm
from dalle_mini_impl.transformer.blocks import VASWANI_2017, build_blocks
from dalle_mini_impl.transformer.feed_forward import ChannelDropout
from dalle_mini_impl.transformer.key_value_cache import KeyValueCache
from dalle_mini_impl.transformer.masks import padding_mask
from dalle_mini_impl.transformer.positions import sinusoidal_positions

PAD_TOKEN_ID = 0  # on the right of shorter rows; never attended in a source, never predicted


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """Sizes of an encoder-decoder Transformer.

    Raises:
        ValueError: If a size is out of range.
    """

    hidden_size: int = 256
    """Width of the residual stream."""
    num_encoder_layers: int = 3
    """Blocks that read."""
    num_decoder_layers: int = 3
    """Blocks that write."""
    num_heads: int = 4
    """Attention heads per block."""
    intermediate_size: int = 1024
    """Width of the feed-forward network; four times the hidden size in the paper."""
    dropout_probability: float = 0.1
    """Fraction of the channels of each branch, and of the embeddings, dropped in training."""
    norm: Literal["pre", "post"] = "post"
    """After each sum as in the paper, or before each branch."""

    def __post_init__(self) -> None:
        """Refuse sizes that no model can be built from."""
        for name in (
            "hidden_size",
            "num_encoder_layers",
            "num_decoder_layers",
            "num_heads",
            "intermediate_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}: got {getattr(self, name)}, expected at least 1")
        if self.hidden_size % self.num_heads or self.hidden_size % 2:
            raise ValueError(
                f"model.hidden_size: got {self.hidden_size}, expected an even multiple of "
                f"num_heads {self.num_heads}"
            )
        if not 0 <= self.dropout_probability < 1:
            raise ValueError(
                f"model.dropout_probability: got {self.dropout_probability}, expected 0 to below 1"
            )


class Context(NamedTuple):
    """What the encoder made of the sources."""

    hidden_states: Float[Tensor, "batch source_length hidden"]
    attention_mask: Bool[Tensor, "batch 1 1 source_length"]


class DecoderState:
    """Where a token-by-token decoder stands: its cache, and the projected context."""

    def __init__(
        self, cache: KeyValueCache, contexts: list[KeysAndValues], context_mask: Tensor
    ) -> None:
        """Begin before the first token.

        Args:
            cache: Empty.
            contexts: Of each decoder block.
            context_mask: True = may attend.
        """
        self.cache, self.contexts, self.context_mask = cache, contexts, context_mask


class EncoderDecoder(nn.Module):
    """Reads a row of tokens and writes another one, both of one vocabulary."""

    def __init__(self, config: EncoderDecoderConfig, *, vocab_size: int) -> None:
        """Build the model with fresh weights.

        Args:
            config: Its sizes.
            vocab_size: Number of different tokens, pad included. Two are added: start and end.
        """
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.start_token_id, self.end_token_id = vocab_size, vocab_size + 1
        width = config.hidden_size
        self.embedding = nn.Embedding(vocab_size + 2, width)
        self.dropout = ChannelDropout(config.dropout_probability)
        self.encoder_blocks = _build_blocks(config, config.num_encoder_layers, is_decoder=False)
        self.decoder_blocks = _build_blocks(config, config.num_decoder_layers, is_decoder=True)
        is_pre = config.norm == "pre"
        self.encoder_norm, self.decoder_norm = (
            build_norm(width, use_bias=True) if is_pre else nn.Identity() for _ in range(2)
        )
        initialize_weights(self)

    def forward(
        self,
        source_token_ids: Int[Tensor, "batch source_length"],
        target_token_ids: Int[Tensor, "batch target_length"],
    ) -> Float[Tensor, "batch target_length_plus_1 vocab_plus_2"]:
        """Predict every target token, and the end after the last one.

        Args:
            source_token_ids: Padded on the right; every row holds a token at least.
            target_token_ids: Padded on the right, without start and end.

        Returns:
            Logits in nats; those after a row's end mean nothing.
        """
        context, mask = self.encode(source_token_ids)
        start = target_token_ids.new_full((len(target_token_ids), 1), self.start_token_id)
        hidden_states = self.embed(torch.cat([start, target_token_ids], dim=1))
        for block in self.decoder_blocks:  # pads stand after all tokens: causal hides them
            hidden_states = block(hidden_states, is_causal=True, context=context, context_mask=mask)
        return self.logits(hidden_states)

    def encode(self, source_token_ids: Int[Tensor, "batch source_length"]) -> Context:
        """Read the sources.

        Args:
            source_token_ids: Padded on the right; every row holds a token at least.

        Returns:
            One row per source token, and where there is one.
        """
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
    ) -> DecoderState:
        """Read the sources and reserve a cache.

        Args:
            source_token_ids: Padded on the right.
            rows_per_source: Hypotheses that are written side by side for each source.
            max_length: Calls of ``decode_one`` that will come.

        Returns:
            The state for ``decode_one``; the rows of a source stand together.
        """
        context, mask = self.encode(source_token_ids)
        context, mask = (part.repeat_interleave(rows_per_source, dim=0) for part in (context, mask))
        cache = KeyValueCache(
            num_layers=self.config.num_decoder_layers,
            batch_size=len(context),
            num_heads=self.config.num_heads,
            max_length=max_length,
            head_dim=self.config.hidden_size // self.config.num_heads,
            device=context.device,
            dtype=context.dtype,
        )
        projected = [
            block.get_submodule("cross_attention").project(context)  # type: ignore[operator]
            for block in self.decoder_blocks
        ]
        return DecoderState(cache, projected, mask)

    def decode_one(
        self, token_ids: Int[Tensor, " rows"], state: DecoderState
    ) -> Float[Tensor, "rows vocab_plus_2"]:
        """Add one token to each row and predict the next one.

        Args:
            token_ids: The token just written in each row; the start token first.
            state: Changed in place.

        Returns:
            Logits in nats.
        """
        hidden_states = self.embed(token_ids[:, None], first_position=state.cache.length)
        for index, block in enumerate(self.decoder_blocks):
            hidden_states = block(
                hidden_states,
                cache=state.cache.layer(index),
                context=state.contexts[index],
                context_mask=state.context_mask,
            )
        return self.logits(hidden_states)[:, -1]

    def embed(
        self, token_ids: Int[Tensor, "batch length"], *, first_position: int = 0
    ) -> Float[Tensor, "batch length hidden"]:
        """Look up tokens and add where they stand."""
        width, length = self.config.hidden_size, token_ids.shape[1]
        positions = torch.arange(first_position, first_position + length, device=token_ids.device)
        table = sinusoidal_positions(positions[:, None], hidden_size=width)
        return self.dropout(self.embedding(token_ids) * width**0.5 + table)

    def logits(
        self, hidden_states: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length vocab_plus_2"]:
        """Score every token by the table that embeds it."""
        return F.linear(self.decoder_norm(hidden_states), self.embedding.weight)


def _build_blocks(
    config: EncoderDecoderConfig, num_layers: int, *, is_decoder: bool
) -> nn.ModuleList:
    options = replace(VASWANI_2017, norm=config.norm, has_cross_attention=is_decoder)
    return build_blocks(config, num_layers, options)


def initialize_weights(model: EncoderDecoder) -> None:
    """Set every weight of a fresh model: Glorot's uniform matrices, as in the paper's own code.

    The table is normal with standard deviation hidden_size ** -0.5, so that embeddings and logits
    begin with variance one.

    Args:
        model: Changed in place.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.embedding.weight, std=model.config.hidden_size**-0.5)
