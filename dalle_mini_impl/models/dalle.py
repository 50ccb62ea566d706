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

Options of ``DecoderConfig`` bring back all of the paper's own choices but the one of heads.
"""

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
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
from dalle_mini_impl.transformer.blocks import build_blocks
from dalle_mini_impl.transformer.key_value_cache import KeyValueCache
from dalle_mini_impl.transformer.masks import dalle_layers, dalle_mask
from dalle_mini_impl.transformer.positions import (
    Rotation,
    grid_coordinates,
    rotation_after,
    sinusoidal_positions,
)


class Dalle(nn.Module):
    """The decoder over caption and image tokens."""

    grid_coordinates: Tensor
    image_masks: Tensor

    def __init__(self, config: DalleConfig) -> None:
        """Build the decoder with fresh weights.

        Args:
            config: Its sizes.
        """
        super().__init__()
        self.config = config
        decoder, width = config.decoder, config.decoder.hidden_size
        num_cells = config.image_length

        self.text_start = nn.Parameter(torch.empty(width))
        self.text_embedding = nn.Embedding(config.vocab_size, width)
        self.text_positions = nn.Embedding(config.text_length, width)
        self.text_pads = nn.Embedding(config.text_length, width)
        self.image_embedding = FactorizedEmbedding(config.codebook_levels, width)
        if decoder.has_target_positions:
            self.target_positions = nn.Embedding(num_cells, width)
        if decoder.positions == "learned":
            self.image_positions = nn.Embedding(num_cells, width)
        elif decoder.positions == "axial":
            self.row_positions = nn.Embedding(config.image_grid_size[0], width)
            self.column_positions = nn.Embedding(config.image_grid_size[1], width)

        self.blocks = build_blocks(decoder, decoder.num_layers, decoder.block_options)
        if decoder.attention == "dalle":
            kinds = dalle_layers(decoder.num_layers)
            self.mask_of_layer = [sorted(set(kinds)).index(kind) for kind in kinds]
            masks = [
                dalle_mask(
                    kind,
                    num_text_positions=config.text_length + 1,  # text_start stands before it
                    grid_size=config.image_grid_size,
                    kernel_size=decoder.kernel_size,
                )[:-1, :-1]  # the last image token is predicted and never read
                for kind in sorted(set(kinds))
            ]
            self.register_buffer("image_masks", torch.stack(masks), persistent=False)
        self.output_norm = build_norm(width, use_bias=decoder.block_options.use_bias)
        self.text_head = nn.Linear(width, config.vocab_size, bias=False)
        self.image_head = FactorizedEmbedding(config.codebook_levels, width)
        self.register_buffer(
            "grid_coordinates", grid_coordinates(*config.image_grid_size), persistent=False
        )
        initialize_weights(self, num_branches=2 * decoder.num_layers)

    def forward(
        self,
        text_token_ids: Int[Tensor, "batch text_length"],
        image_token_ids: Int[Tensor, "batch image_length"],
        *,
        image_order: Int[Tensor, "batch image_length"] | None = None,
    ) -> DalleLogits:
        """Predict every token from the ones before it.

        Args:
            text_token_ids: Captions, padded with ``PAD_TOKEN_ID``.
            image_token_ids: Tokens in the order in which they are generated.
            image_order: Grid cell (raster index) of each of them; raster order when None, and the
                only one of a decoder that ``raster_order_only``.

        Returns:
            Logits of the caption tokens and of the image tokens, in generation order.
        """
        if image_order is None:
            cells = torch.arange(self.config.image_length, device=image_token_ids.device)
            image_order = repeat(cells, "cell -> batch cell", batch=len(image_token_ids))
        text = self.embed_text(text_token_ids, image_order[:, 0])
        image = self.embed_image(image_token_ids[:, :-1], image_order[:, :-1], image_order[:, 1:])
        hidden_states = torch.cat([text, image], dim=1)  # (batch, sequence, hidden)
        rotation = self.rotation(image_order[:, :-1], num_text_positions=text.shape[1])
        for block, mask in zip(self.blocks, self.masks_of_layers(), strict=True):
            hidden_states = block(
                hidden_states, rotation=rotation, attention_mask=mask, is_causal=mask is None
            )
        hidden_states = self.output_norm(hidden_states)
        text_length = self.config.text_length
        return DalleLogits(
            text=self.text_head(hidden_states[:, :text_length]),
            image=F.linear(hidden_states[:, text_length:], self.image_head.table()),
        )

    def predict_text(
        self, text_token_ids: Int[Tensor, "batch text_length"]
    ) -> Float[Tensor, "batch text_length vocab"]:
        """Predict every caption token from the ones before it, without any image.

        Args:
            text_token_ids: Captions, padded.

        Returns:
            The same logits as ``forward`` gives, whatever the image: text stands before it.
        """
        hidden_states = self.embed_text(text_token_ids, torch.zeros_like(text_token_ids[:, 0]))
        for block in self.blocks:
            hidden_states = block(hidden_states, is_causal=True)
        return self.text_head(self.output_norm(hidden_states[:, :-1]))

    def prefill(
        self,
        text_token_ids: Int[Tensor, "batch text_length"],
        cache: KeyValueCache,
        *,
        first_cell: int | Int[Tensor, " batch"] = 0,
    ) -> Float[Tensor, "batch codebook_size"]:
        """Read the captions into an empty cache.

        Args:
            text_token_ids: Captions, padded.
            cache: Empty; holds the captions afterwards.
            first_cell: Grid cell that is generated first, of all rows or of each.

        Returns:
            Logits of the first image token.
        """
        target = first_cell
        if not isinstance(target, Tensor):
            target = torch.full((len(text_token_ids),), target, device=text_token_ids.device)
        hidden_states = self.embed_text(text_token_ids, target)
        for index, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, is_causal=True, cache=cache.layer(index))
        return F.linear(self.output_norm(hidden_states[:, -1]), self.image_head.table())

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
        target = torch.full_like(own, next_cell)
        hidden_states = self.embed_image(image_token_ids[:, None], own, target)
        rotation = self.rotation(own, num_text_positions=0)
        position = cell + self.config.text_length + 1  # in raster order; else there is no mask
        masks = self.masks_of_layers(torch.full_like(own[:1], position))
        for index, (block, mask) in enumerate(zip(self.blocks, masks, strict=True)):
            hidden_states = block(
                hidden_states,
                rotation=rotation,
                attention_mask=None if mask is None else mask[..., : position + 1],
                cache=cache.layer(index),
            )
        return F.linear(self.output_norm(hidden_states[:, -1]), self.image_head.table())

    def decode_window(
        self,
        image_token_ids: Int[Tensor, "batch window"],
        cache: KeyValueCache,
        *,
        first_steps: Int[Tensor, " batch"],
        image_order: Int[Tensor, "batch image_length"] | None = None,
    ) -> Float[Tensor, "batch window codebook_size"]:
        """Predict what follows each of several sampled or guessed tokens.

        Every row stands at a step of its own. What the cache holds from that step on is written
        anew, so that guesses can be taken back by reading the right tokens later.

        Args:
            image_token_ids: Tokens of consecutive steps.
            cache: Holds the caption and every earlier image token of each row.
            first_steps: Step of each row's first token. No window may reach beyond the last step
                but one: after the last one nothing is predicted.
            image_order: Grid cell (raster index) of each step; raster order when None.

        Returns:
            Logits of the token of the next step after each one.
        """
        steps, cells, next_cells = steps_and_cells(first_steps, image_token_ids, image_order)
        hidden_states = self.embed_image(image_token_ids, cells, next_cells)
        rotation = self.rotation(cells, num_text_positions=0)
        positions = steps + self.config.text_length + 1  # text_start stands before the caption
        everything = cache.mask_at(positions)
        masks = self.masks_of_layers(positions)
        for index, (block, mask) in enumerate(zip(self.blocks, masks, strict=True)):
            hidden_states = block(
                hidden_states,
                rotation=rotation,
                attention_mask=everything if mask is None else mask,
                cache=cache.scatter_layer(index, positions),
            )
        return F.linear(self.output_norm(hidden_states), self.image_head.table())

    def masks_of_layers(
        self, positions: Int[Tensor, "batch length"] | None = None
    ) -> list[Bool[Tensor, "batch 1 length key_length"] | None]:
        """Choose what each layer's queries may attend to.

        Args:
            positions: Of the queries in the sequence, caption included; all of them when None.

        Returns:
            For each layer a mask over all positions, or None where attention is dense.
        """
        if self.config.decoder.attention == "dense":
            return [None] * len(self.blocks)
        masks = self.image_masks
        rows = masks.unsqueeze(1) if positions is None else masks[:, positions]
        return [rows[kind].unsqueeze(1) for kind in self.mask_of_layer]

    def embed_text(
        self,
        text_token_ids: Int[Tensor, "batch text_length"],
        first_cell: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch text_length_plus_1 hidden"]:
        """Embed text_start and the caption; the last position may be told the first grid cell."""
        is_pad = (text_token_ids == PAD_TOKEN_ID).unsqueeze(-1)
        tokens = torch.where(is_pad, self.text_pads.weight, self.text_embedding(text_token_ids))
        tokens = tokens + self.text_positions.weight
        start = self.text_start.expand(len(tokens), 1, -1)
        if not self.config.decoder.has_target_positions:
            return torch.cat([start, tokens], dim=1)
        last = tokens[:, -1:] + self.target_positions(first_cell).unsqueeze(1)
        return torch.cat([start, tokens[:, :-1], last], dim=1)

    def embed_image(
        self,
        image_token_ids: Int[Tensor, "batch length"],
        cells: Int[Tensor, "batch length"],
        next_cells: Int[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length hidden"]:
        """Embed sampled tokens, where they stand, and perhaps which cell comes next."""
        embedded = F.embedding(image_token_ids, self.image_embedding.table())
        if self.config.decoder.has_target_positions:
            embedded = embedded + self.target_positions(next_cells)
        if self.config.decoder.positions == "learned":
            return embedded + self.image_positions(cells)
        if self.config.decoder.positions == "axial":
            rows, columns = self.grid_coordinates[cells].unbind(-1)
            return embedded + self.row_positions(rows) + self.column_positions(columns)
        if self.config.decoder.positions == "sinusoidal":
            return embedded + sinusoidal_positions(
                self.grid_coordinates[cells], hidden_size=self.config.decoder.hidden_size
            )
        return embedded

    def rotation(
        self, cells: Int[Tensor, "batch length"], *, num_text_positions: int
    ) -> Rotation | None:
        """Rotary angles of text positions (zero: they have a learned table) and grid cells."""
        if self.config.decoder.positions != "rotary":
            return None
        coordinates, head_dim = self.grid_coordinates[cells], self.config.decoder.head_dim
        return rotation_after(num_text_positions, coordinates, head_dim=head_dim)

    def new_cache(self, batch_size: int) -> KeyValueCache:
        """Reserve a cache for ``batch_size`` rows of this model, on its device and dtype."""
        return build_cache(self.config, batch_size, like=self.image_head.rows)
