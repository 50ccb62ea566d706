"""DALL-E: one causal Transformer over caption tokens followed by image tokens.

    text_start  t0  t1 ... tn   i0  i1 ... im-1         inputs
        |       |   |      |    |   |      |
        t0      t1  t2 ... i0   i1  i2 ... im           what each position predicts

Differences from Ramesh et al. 2021 (arXiv:2102.12092), each usual since: dense causal attention,
SwiGLU and QK-norm, rotary positions on the image grid, and separate heads for text and
image, so that no position ever scores tokens of the other kind. As there, captions are padded
to a fixed length with one learned pad per position, which is attended and never predicted.

Each position is also told which grid cell it predicts next (the target-aware embedding of RAR,
Yu et al. 2024, arXiv:2411.00776), so that the same weights can generate in any order.

Options of ``DecoderConfig`` restore all of the paper's own choices except its single head.
"""

import torch
from jaxtyping import Bool, Float, Int
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
from dalle_mini_impl.transformer.blocks import build_blocks
from dalle_mini_impl.transformer.key_value_cache import KeyValueCache
from dalle_mini_impl.transformer.masks import dalle_layers, dalle_mask
from dalle_mini_impl.transformer.positions import Rotation, build_image_positions, grid_rotation


class Dalle(nn.Module):
    """The decoder over caption and image tokens.

    Everywhere, captions are padded with ``PAD_TOKEN_ID``; image tokens come in the order in which
    they are generated, and ``image_order`` is the grid cell (raster index) of each of them, raster
    order when None. ``raster_order_only`` decoders support nothing else.
    """

    image_masks: Tensor

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        self.config = config
        decoder, width = config.decoder, config.decoder.hidden_size

        self.text_start = nn.Parameter(torch.empty(width))
        self.text_embedding = nn.Embedding(config.vocab_size, width)
        self.text_positions = nn.Embedding(config.text_length, width)
        # A pad per position is attended like any token, so that short captions need no mask.
        self.text_pads = nn.Embedding(config.text_length, width)
        self.image_embedding = FactorizedEmbedding(config.codebook_levels, width)
        self.target_positions: nn.Embedding | None = None
        if decoder.has_target_positions:
            self.target_positions = nn.Embedding(config.image_length, width)
        self.image_positions = build_image_positions(
            decoder.positions, config.image_grid_size, width
        )

        self.blocks = build_blocks(decoder, decoder.num_layers, decoder.block_options)
        if decoder.attention == "dalle":
            self._build_masks()
        self.output_norm = build_norm(width, use_bias=decoder.block_options.use_bias)
        self.text_head = nn.Linear(width, config.vocab_size, bias=False)
        self.image_head = FactorizedEmbedding(config.codebook_levels, width)
        # Two branches per block: attention and feed-forward.
        initialize_weights(self, num_branches=2 * decoder.num_layers)

    def forward(
        self,
        text_token_ids: Int[Tensor, "batch text_length"],
        image_token_ids: Int[Tensor, "batch image_length"],
        *,
        image_order: Int[Tensor, "batch image_length"] | None = None,
    ) -> DalleLogits:
        """Predict every token from the ones before it, image tokens in generation order."""
        if image_order is None:
            image_order = raster_order(self.config, image_token_ids)
        # Position i holds token i in its own cell, and predicts the token of the next cell: the
        # last token is never an input, and the caption's last position gets the first cell.
        cells, next_cells = image_order[:, :-1], image_order[:, 1:]
        text = self.embed_text(text_token_ids, image_order[:, 0])
        image = self.embed_image(image_token_ids[:, :-1], cells, next_cells)
        hidden_states = torch.cat([text, image], dim=1)  # (batch, sequence, hidden)
        rotation = self.rotation(cells, num_text_positions=text.shape[1])
        for block, mask in zip(self.blocks, self.layer_masks(), strict=True):
            hidden_states = block(
                hidden_states, rotation=rotation, attention_mask=mask, is_causal=mask is None
            )
        hidden_states = self.output_norm(hidden_states)
        # The caption's last position predicts an image token, so text logits end before it.
        text_length = self.config.text_length
        return DalleLogits(
            text=self.text_head(hidden_states[:, :text_length]),
            image=F.linear(hidden_states[:, text_length:], self.image_head.table()),
        )

    def predict_text(
        self, text_token_ids: Int[Tensor, "batch text_length"]
    ) -> Float[Tensor, "batch text_length vocab"]:
        """Compute the text logits of ``forward`` without an image: no text position sees one."""
        # The last position, which predicts the first image token, is dropped: any cell will do.
        any_cell = torch.zeros_like(text_token_ids[:, 0])
        hidden_states = self.embed_text(text_token_ids, any_cell)
        for block in self.blocks:
            hidden_states = block(hidden_states, is_causal=True)
        return self.text_head(self.output_norm(hidden_states[:, :-1]))

    def prefill(
        self,
        text_token_ids: Int[Tensor, "batch text_length"],
        cache: KeyValueCache,
        *,
        image_order: Int[Tensor, "batch image_length"] | None = None,
    ) -> Float[Tensor, "batch codebook_size"]:
        """Read the captions into an empty cache; return the logits of the first image token."""
        # Raster order begins with cell 0.
        first_cell = torch.zeros_like(text_token_ids[:, 0])
        if image_order is not None:
            first_cell = image_order[:, 0]
        hidden_states = self.embed_text(text_token_ids, first_cell)
        for index, block in enumerate(self.blocks):
            # No rotation: rotary angles are of grid cells, and text positions are learned.
            hidden_states = block(hidden_states, is_causal=True, cache=cache.layer(index))
        return self.image_logits(hidden_states[:, -1])

    def decode_window(
        self,
        image_token_ids: Int[Tensor, "batch window"],
        cache: KeyValueCache,
        *,
        first_steps: Int[Tensor, " batch"],
        image_order: Int[Tensor, "batch image_length"] | None = None,
    ) -> Float[Tensor, "batch window codebook_size"]:
        """Predict the token after each token of a window of steps, from ``first_steps`` on.

        The cache holds the captions and all tokens of earlier steps. No window may include the
        last step, which predicts nothing.
        """
        steps, cells, next_cells = steps_and_cells(first_steps, image_token_ids, image_order)
        hidden_states = self.embed_image(image_token_ids, cells, next_cells)
        rotation = self.rotation(cells, num_text_positions=0)
        positions = steps + 1 + self.config.text_length  # text_start, the caption, then the image
        # Each token overwrites its cache slot and attends only to positions up to its own, so a
        # rejected draft needs no cleanup: it is overwritten before anything attends to it.
        dense_mask = cache.mask_at(positions)
        layer_masks = self.layer_masks(positions)
        for index, (block, mask) in enumerate(zip(self.blocks, layer_masks, strict=True)):
            hidden_states = block(
                hidden_states,
                rotation=rotation,
                attention_mask=dense_mask if mask is None else mask,
                cache=cache.layer(index, positions),
            )
        return self.image_logits(hidden_states)

    def embed_text(
        self,
        text_token_ids: Int[Tensor, "batch text_length"],
        first_cell: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch text_length_plus_1 hidden"]:
        """Embed text_start and the caption, whose last position predicts ``first_cell``."""
        is_pad = (text_token_ids == PAD_TOKEN_ID).unsqueeze(-1)
        # Row 0 of the token table is looked up too and never used: each position has its own pad.
        tokens = torch.where(is_pad, self.text_pads.weight, self.text_embedding(text_token_ids))
        tokens = tokens + self.text_positions.weight  # (batch, text_length, hidden)
        start = self.text_start.expand(len(tokens), 1, -1)
        if self.target_positions is None:
            return torch.cat([start, tokens], dim=1)
        last = tokens[:, -1:] + self.target_positions(first_cell).unsqueeze(1)
        return torch.cat([start, tokens[:, :-1], last], dim=1)

    def embed_image(
        self,
        image_token_ids: Int[Tensor, "batch length"],
        cells: Int[Tensor, "batch length"],
        next_cells: Int[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length hidden"]:
        """Embed image tokens, their cells, and the cells that they predict."""
        embedded = self.image_embedding(image_token_ids)
        # Without its target, a position could not know which cell comes next in a random order.
        if self.target_positions is not None:
            embedded = embedded + self.target_positions(next_cells)
        return self.image_positions(embedded, cells)

    def rotation(
        self, cells: Int[Tensor, "batch length"], *, num_text_positions: int
    ) -> Rotation | None:
        """Compute the rotary angles of grid cells after some text, if positions are rotary."""
        if self.config.decoder.positions != "rotary":
            return None
        return grid_rotation(
            cells,
            grid_width=self.config.image_grid_size[1],
            head_dim=self.config.decoder.head_dim,
            num_unrotated=num_text_positions,
        )

    def image_logits(
        self, hidden_states: Float[Tensor, "batch *length hidden"]
    ) -> Float[Tensor, "batch *length codebook_size"]:
        """Compute the logits over the codebook with the factorized head."""
        return F.linear(self.output_norm(hidden_states), self.image_head.table())

    def _build_masks(self) -> None:
        """Build each kind of DALL-E's masks once, and note which one each layer has."""
        kinds = dalle_layers(self.config.decoder.num_layers)
        different_kinds = sorted(set(kinds))
        self.mask_of_layer = [different_kinds.index(kind) for kind in kinds]
        masks = [
            dalle_mask(
                kind,
                num_text_positions=self.config.text_length + 1,  # text_start and the caption
                grid_size=self.config.image_grid_size,
                kernel_size=self.config.decoder.kernel_size,
            )[:-1, :-1]  # the last image token is predicted and never read
            for kind in different_kinds
        ]
        self.register_buffer("image_masks", torch.stack(masks), persistent=False)

    def layer_masks(
        self, positions: Int[Tensor, "batch length"] | None = None
    ) -> list[Bool[Tensor, "batch 1 length key_length"] | None]:
        """Return each layer's mask for the queries at ``positions``, or for all; None is causal."""
        if self.config.decoder.attention == "dense":
            return [None] * len(self.blocks)
        # One mask per kind of layer, not one per layer: DALL-E has 64 layers of three kinds.
        masks = self.image_masks  # (kind, sequence, sequence)
        rows = masks.unsqueeze(1) if positions is None else masks[:, positions]
        return [rows[kind].unsqueeze(1) for kind in self.mask_of_layer]

    def new_cache(self, batch_size: int) -> KeyValueCache:
        """Reserve a cache for ``batch_size`` rows of this model, on its device and dtype."""
        return build_cache(self.config, batch_size, like=self.image_head.rows)
