"""Text to image as DALL-E mini does: an encoder reads the caption, a decoder writes the image.

    t0  t1 ... tn  ->  encoder  ->  context
    start  i0  i1 ... im-1                         the decoder's inputs
      |    |   |       |     (each attends to itself, to what is before it, and to the context)
      i0   i1  i2 ...  im                          what each position predicts

Every caption token sees the whole caption (Vaswani et al. 2017, arXiv:1706.03762, section 3.1),
which no token of a decoder-only model does; in return captions are not predicted, so that no loss
teaches the model about captions but that of the images. All else is as in ``dalle.py``: pads that
are learned and attended, the blocks, rotary positions of the grid, and the next cell that each
position is told.

Source: Dayma et al. 2021, https://github.com/borisdayma/dalle-mini (a BART encoder and decoder);
it masks pads and has learned positions, GLU and other norms.
"""

from dataclasses import replace

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_mini_impl.models.dalle_config import PAD_TOKEN_ID, DalleConfig
from dalle_mini_impl.models.dalle_shared import (
    DalleLogits,
    FactorizedEmbedding,
    build_cache,
    initialize_weights,
    steps_and_cells,
)
from dalle_mini_impl.transformer.attention import build_norm
from dalle_mini_impl.transformer.blocks import BlockOptions, build_blocks
from dalle_mini_impl.transformer.key_value_cache import KeyValueCache
from dalle_mini_impl.transformer.positions import Rotation, grid_coordinates, rotation_after


class DalleEncoderDecoder(nn.Module):
    """A caption encoder and a decoder of image tokens; used like ``Dalle``."""

    grid_coordinates: Tensor

    def __init__(self, config: DalleConfig) -> None:
        """Build the model with fresh weights.

        Args:
            config: Its sizes.

        Raises:
            ValueError: If they are those of another architecture.
        """
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
        options = replace(BlockOptions(), has_cross_attention=True)
        self.blocks = build_blocks(decoder, decoder.num_layers, options)
        self.output_norm = build_norm(width)
        self.image_head = FactorizedEmbedding(config.codebook_levels, width)
        self.register_buffer(
            "grid_coordinates", grid_coordinates(*config.image_grid_size), persistent=False
        )
        initialize_weights(self, num_branches=3 * decoder.num_layers)

    def forward(
        self,
        text_token_ids: Int[Tensor, "batch text_length"],
        image_token_ids: Int[Tensor, "batch image_length"],
        *,
        image_order: Int[Tensor, "batch image_length"] | None = None,
    ) -> DalleLogits:
        """Predict every image token from the caption and the image tokens before it.

        Args:
            text_token_ids: Captions, padded with ``PAD_TOKEN_ID``.
            image_token_ids: Tokens in the order in which they are generated.
            image_order: Grid cell (raster index) of each of them; raster order when None.

        Returns:
            Logits of the image tokens, in generation order, and none of the caption.
        """
        if image_order is None:
            cells = torch.arange(self.config.image_length, device=image_token_ids.device)
            image_order = repeat(cells, "cell -> batch cell", batch=len(image_token_ids))
        context = self.encode(text_token_ids)
        cells, next_cells = image_order[:, :-1], image_order[:, 1:]
        start = self.embed_start(image_order[:, 0])
        hidden_states = torch.cat(
            [start, self.embed_image(image_token_ids[:, :-1], next_cells)], dim=1
        )
        rotation = self.rotation(cells, num_starts=1)
        for block in self.blocks:
            hidden_states = block(hidden_states, rotation=rotation, is_causal=True, context=context)
        return DalleLogits(text=None, image=self.logits(hidden_states))

    def encode(
        self, text_token_ids: Int[Tensor, "batch text_length"]
    ) -> Float[Tensor, "batch text_length hidden"]:
        """Read the captions; their pads are learned, so that a null caption has something to say.

        Args:
            text_token_ids: Captions, padded.

        Returns:
            What cross-attention reads.
        """
        is_pad = (text_token_ids == PAD_TOKEN_ID).unsqueeze(-1)
        tokens = torch.where(is_pad, self.text_pads.weight, self.text_embedding(text_token_ids))
        hidden_states = tokens + self.text_positions.weight
        for block in self.encoder_blocks:
            hidden_states = block(hidden_states)
        return self.encoder_norm(hidden_states)

    def prefill(
        self,
        text_token_ids: Int[Tensor, "batch text_length"],
        cache: KeyValueCache,
        *,
        first_cell: int | Int[Tensor, " batch"] = 0,
    ) -> Float[Tensor, "batch codebook_size"]:
        """Read the captions, once for all steps, and begin the images.

        Args:
            text_token_ids: Captions, padded.
            cache: Empty; holds what the captions say to each layer, and the start, afterwards.
            first_cell: Grid cell that is generated first, of all rows or of each.

        Returns:
            Logits of the first image token.
        """
        context = self.encode(text_token_ids)
        cache.contexts = [
            block.get_submodule("cross_attention").project(context)  # type: ignore[operator]
            for block in self.blocks
        ]
        target = first_cell
        if not isinstance(target, Tensor):
            target = torch.full((len(text_token_ids),), target, device=text_token_ids.device)
        return self._advance(self.embed_start(target), cache, rotation=None)

    def decode_one(
        self,
        image_token_ids: Int[Tensor, " batch"],
        cache: KeyValueCache,
        *,
        cell: int,
        next_cell: int,
    ) -> Float[Tensor, "batch codebook_size"]:
        """Add one sampled token to the cache and predict the next one.

        Args:
            image_token_ids: The token just generated in each row.
            cache: Holds everything before it.
            cell: Grid cell of the sampled token.
            next_cell: Grid cell that is generated next.

        Returns:
            Logits of the token of ``next_cell``.
        """
        own = torch.full((len(image_token_ids), 1), cell, device=image_token_ids.device)
        hidden_states = self.embed_image(image_token_ids[:, None], torch.full_like(own, next_cell))
        return self._advance(hidden_states, cache, rotation=self.rotation(own))

    def decode_window(
        self,
        image_token_ids: Int[Tensor, "batch window"],
        cache: KeyValueCache,
        *,
        first_steps: Int[Tensor, " batch"],
        image_order: Int[Tensor, "batch image_length"] | None = None,
    ) -> Float[Tensor, "batch window codebook_size"]:
        """Predict what follows each of several sampled or guessed tokens, as ``Dalle`` does.

        Args:
            image_token_ids: Tokens of consecutive steps.
            cache: Holds the caption and every earlier image token of each row.
            first_steps: Step of each row's first token; no window may reach beyond the last step
                but one.
            image_order: Grid cell (raster index) of each step; raster order when None.

        Returns:
            Logits of the token of the next step after each one.
        """
        steps, cells, next_cells = steps_and_cells(first_steps, image_token_ids, image_order)
        hidden_states = self.embed_image(image_token_ids, next_cells)
        rotation = self.rotation(cells)
        positions = steps + 1  # the start stands before the image
        mask = cache.mask_at(positions)
        for index, block in enumerate(self.blocks):
            hidden_states = block(
                hidden_states,
                rotation=rotation,
                attention_mask=mask,
                cache=cache.scatter_layer(index, positions),
                context=cache.contexts[index],
            )
        return self.logits(hidden_states)

    def _advance(
        self, hidden_states: Tensor, cache: KeyValueCache, *, rotation: Rotation | None
    ) -> Tensor:
        """Run one more position of each row through the decoder; return the logits after it."""
        for index, block in enumerate(self.blocks):
            hidden_states = block(
                hidden_states,
                rotation=rotation,
                cache=cache.layer(index),
                context=cache.contexts[index],
            )
        return self.logits(hidden_states)[:, -1]

    def embed_start(self, first_cell: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1 hidden"]:
        """Embed the position before the image, which is told the first grid cell."""
        return (self.image_start + self.target_positions(first_cell)).unsqueeze(1)

    def embed_image(
        self,
        image_token_ids: Int[Tensor, "batch length"],
        next_cells: Int[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length hidden"]:
        """Embed sampled tokens, and which cell comes next."""
        embedded = F.embedding(image_token_ids, self.image_embedding.table())
        return embedded + self.target_positions(next_cells)

    def rotation(self, cells: Int[Tensor, "batch length"], *, num_starts: int = 0) -> Rotation:
        """Rotary angles of the start (zero) and of grid cells."""
        coordinates, head_dim = self.grid_coordinates[cells], self.config.decoder.head_dim
        return rotation_after(num_starts, coordinates, head_dim=head_dim)

    def logits(
        self, hidden_states: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length codebook_size"]:
        """Score every image token."""
        return F.linear(self.output_norm(hidden_states), self.image_head.table())

    def new_cache(self, batch_size: int) -> KeyValueCache:
        """Reserve a cache for ``batch_size`` rows of this model, on its device and dtype."""
        return build_cache(self.config, batch_size, like=self.image_head.rows)
