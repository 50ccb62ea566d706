"""Text to image as DALL-E mini does: an encoder reads the caption, a decoder writes the image.

    t0  t1 ... tn  ->  encoder  ->  context
    start  i0  i1 ... im-1                         the decoder's inputs
      |    |   |       |     (each attends to itself, to what is before it, and to the context)
      i0   i1  i2 ...  im                          what each position predicts

Every caption token sees the whole caption (Vaswani et al. 2017, arXiv:1706.03762, section 3.1),
which no token of a decoder-only model does; in return captions are not predicted, so that only
the loss of the images teaches the model about captions. All else is as in ``dalle.py``: pads are
learned and attended, blocks, rotary positions on the grid, and target positions.

Source: Dayma et al. 2021, https://github.com/borisdayma/dalle-mini (a BART encoder and decoder);
it masks pads and has learned positions, GLU and other norms.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_mini_impl.models.dalle_config import PAD_TOKEN_ID, DalleConfig
from dalle_mini_impl.models.dalle_shared import (
    DalleLogits,
    FactorizedEmbedding,
    build_cache,
    initialize_weights,
    raster_order,
    steps_and_cells,
)
from dalle_mini_impl.transformer.attention import build_norm
from dalle_mini_impl.transformer.block_config import BlockOptions
from dalle_mini_impl.transformer.blocks import build_blocks, project_context
from dalle_mini_impl.transformer.key_value_cache import KeyValueCache
from dalle_mini_impl.transformer.positions import Rotation, grid_rotation


class DalleEncoderDecoder(nn.Module):
    """A caption encoder and a decoder of image tokens, with the methods of ``Dalle``."""

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        decoder, width = config.decoder, config.decoder.hidden_size
        if not decoder.has_encoder:
            raise ValueError(
                f"decoder.architecture: got {decoder.architecture}, expected encoder_decoder"
            )
        self.config = config
        self.text_embedding = nn.Embedding(config.vocab_size, width)
        self.text_positions = nn.Embedding(config.text_length, width)
        self.text_pads = nn.Embedding(config.text_length, width)
        self.encoder_blocks = build_blocks(decoder, decoder.num_encoder_layers)
        self.encoder_norm = build_norm(width)

        self.image_start = nn.Parameter(torch.empty(width))
        self.image_embedding = FactorizedEmbedding(config.codebook_levels, width)
        self.target_positions = nn.Embedding(config.image_length, width)
        self.blocks = build_blocks(
            decoder, decoder.num_layers, BlockOptions(has_cross_attention=True)
        )
        self.output_norm = build_norm(width)
        self.image_head = FactorizedEmbedding(config.codebook_levels, width)
        # Three branches per decoder block: self-attention, cross-attention, feed-forward.
        initialize_weights(self, num_branches=3 * decoder.num_layers)

    def forward(
        self,
        text_token_ids: Int[Tensor, "batch text_length"],
        image_token_ids: Int[Tensor, "batch image_length"],
        *,
        image_order: Int[Tensor, "batch image_length"] | None = None,
    ) -> DalleLogits:
        """Predict every image token from the caption and the image tokens before it."""
        if image_order is None:
            image_order = raster_order(self.config, image_token_ids)
        context = self.encode(text_token_ids)
        # As in ``Dalle``: position i holds token i and predicts the token of the next cell.
        start = self.embed_start(image_order[:, 0])
        image = self.embed_image(image_token_ids[:, :-1], image_order[:, 1:])
        hidden_states = torch.cat([start, image], dim=1)  # (batch, image_length, hidden)
        rotation = self.rotation(image_order[:, :-1], num_starts=1)
        for block in self.blocks:
            hidden_states = block(hidden_states, rotation=rotation, is_causal=True, context=context)
        # The encoder sees every token at once: there is nothing left to predict of a caption.
        return DalleLogits(text=None, image=self.image_logits(hidden_states))

    def encode(
        self, text_token_ids: Int[Tensor, "batch text_length"]
    ) -> Float[Tensor, "batch text_length hidden"]:
        """Read the captions for cross-attention."""
        # Pads are learned and attended, so that a null caption has content as well.
        is_pad = (text_token_ids == PAD_TOKEN_ID).unsqueeze(-1)
        tokens = torch.where(is_pad, self.text_pads.weight, self.text_embedding(text_token_ids))
        hidden_states = tokens + self.text_positions.weight
        for block in self.encoder_blocks:
            # Neither causal nor masked: a token sees the whole caption, pads included.
            hidden_states = block(hidden_states)
        return self.encoder_norm(hidden_states)

    def prefill(
        self,
        text_token_ids: Int[Tensor, "batch text_length"],
        cache: KeyValueCache,
        *,
        image_order: Int[Tensor, "batch image_length"] | None = None,
    ) -> Float[Tensor, "batch codebook_size"]:
        """Encode the captions and read the start; return the logits of the first image token."""
        # The captions are projected here, once for all steps.
        cache.contexts = project_context(self.blocks, self.encode(text_token_ids))
        first_cell = torch.zeros_like(text_token_ids[:, 0])
        if image_order is not None:
            first_cell = image_order[:, 0]
        hidden_states = self.embed_start(first_cell)
        for index, block in enumerate(self.blocks):
            hidden_states = block(
                hidden_states, cache=cache.layer(index), context=cache.contexts[index]
            )
        return self.image_logits(hidden_states)[:, -1]

    def decode_window(
        self,
        image_token_ids: Int[Tensor, "batch window"],
        cache: KeyValueCache,
        *,
        first_steps: Int[Tensor, " batch"],
        image_order: Int[Tensor, "batch image_length"] | None = None,
    ) -> Float[Tensor, "batch window codebook_size"]:
        """Predict the token after each token of a window, as ``Dalle.decode_window`` does."""
        steps, cells, next_cells = steps_and_cells(first_steps, image_token_ids, image_order)
        hidden_states = self.embed_image(image_token_ids, next_cells)
        rotation = self.rotation(cells, num_starts=0)
        positions = steps + 1  # image_start comes first
        mask = cache.mask_at(positions)
        for index, block in enumerate(self.blocks):
            hidden_states = block(
                hidden_states,
                rotation=rotation,
                attention_mask=mask,
                cache=cache.layer(index, positions),
                context=cache.contexts[index],
            )
        return self.image_logits(hidden_states)

    def embed_start(self, first_cell: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1 hidden"]:
        """Embed the position before the image, which predicts ``first_cell``."""
        return (self.image_start + self.target_positions(first_cell)).unsqueeze(1)

    def embed_image(
        self,
        image_token_ids: Int[Tensor, "batch length"],
        next_cells: Int[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length hidden"]:
        """Embed image tokens and the cells that they predict."""
        return self.image_embedding(image_token_ids) + self.target_positions(next_cells)

    def rotation(self, cells: Int[Tensor, "batch length"], *, num_starts: int) -> Rotation:
        """Compute the rotary angles of grid cells, after a start that is not rotated."""
        return grid_rotation(
            cells,
            grid_width=self.config.image_grid_size[1],
            head_dim=self.config.decoder.head_dim,
            num_unrotated=num_starts,
        )

    def image_logits(
        self, hidden_states: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length codebook_size"]:
        """Score every image token by the factorized head."""
        return F.linear(self.output_norm(hidden_states), self.image_head.table())

    def new_cache(self, batch_size: int) -> KeyValueCache:
        """Reserve a cache for ``batch_size`` rows of this model, on its device and dtype."""
        return build_cache(self.config, batch_size, like=self.image_head.rows)
