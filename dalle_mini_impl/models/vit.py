"""The Vision Transformer: an image is a row of patches, read in both directions.

As in Dosovitskiy et al. 2021 (arXiv:2010.11929): a linear map of flattened patches, a learned
position for each, pre-norm blocks with GELU and biases, and a class token whose last state is
classified; or the mean of the patches, as in their appendix D.3. Dropout drops whole channels
instead of single numbers, as in all our blocks.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dalle_mini_impl.transformer.attention import build_norm
from dalle_mini_impl.transformer.block_config import (
    DOSOVITSKIY_2021,
    require_dropout_probability,
    require_positive,
)
from dalle_mini_impl.transformer.blocks import build_blocks
from dalle_mini_impl.transformer.feed_forward import ChannelDropout


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of a Vision Transformer; the image's size and the classes follow from the data."""

    patch_size: int = 4
    """Side of a patch in pixels; must divide the image's side."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads per block."""
    intermediate_size: int = 512
    """Width of the feed-forward network; four times the hidden size in the paper."""
    dropout_probability: float = 0.1
    """Fraction of the channels of each branch, and of the embeddings, dropped in training."""
    pooling: Literal["class_token", "mean"] = "class_token"
    """What is classified: a token of its own as in the paper, or the mean of the patches."""

    def __post_init__(self) -> None:
        sizes = ("patch_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
        require_positive(self, sizes)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, expected a multiple of num_heads "
                f"{self.num_heads}"
            )
        require_dropout_probability(self)


class VisionTransformer(nn.Module):
    """Classifies square images, in [-1, 1], with ``image_size`` pixels along each side."""

    def __init__(
        self, config: ViTConfig, *, image_size: int, num_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        if image_size % config.patch_size:
            raise ValueError(
                f"model.patch_size: got {config.patch_size}, expected a divisor of the image's "
                f"side {image_size}"
            )
        self.config = config
        self.image_size, self.num_channels, self.num_classes = image_size, num_channels, num_classes
        width, has_class_token = config.hidden_size, config.pooling == "class_token"
        num_patches = (image_size // config.patch_size) ** 2
        self.patch_embedding = nn.Linear(num_channels * config.patch_size**2, width)
        if has_class_token:
            self.class_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(num_patches + has_class_token, width))
        self.dropout = ChannelDropout(config.dropout_probability)
        self.blocks = build_blocks(config, config.num_layers, DOSOVITSKIY_2021)
        self.output_norm = build_norm(width, use_bias=True)
        self.head = nn.Linear(width, num_classes)
        initialize_weights(self)

    def forward(
        self, pixels: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch num_classes"]:
        """Score the classes: logits in nats."""
        return self.head(self.pool(self.features(pixels)))

    def features(
        self, pixels: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch length hidden"]:
        """Compute the normalized states of the patches, after that of the class token, if any."""
        side = self.config.patch_size
        # The channel is the slowest axis of a patch, as in the kernel of a convolution, so that
        # weights of other implementations fit.
        patches = rearrange(
            pixels,
            "batch channels (rows height) (columns width)"
            " -> batch (rows columns) (channels height width)",
            height=side,
            width=side,
        )
        hidden_states = self.patch_embedding(patches)  # (batch, num_patches, hidden)
        if self.config.pooling == "class_token":
            class_token = self.class_token.expand(len(pixels), 1, -1)
            hidden_states = torch.cat([class_token, hidden_states], dim=1)
        # Learned positions, one-dimensional: the paper found two-dimensional ones no better
        # (appendix D.4).
        hidden_states = self.dropout(hidden_states + self.positions)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.output_norm(hidden_states)

    def pool(self, features: Float[Tensor, "batch length hidden"]) -> Float[Tensor, "batch hidden"]:
        """Take the class token's state, or the mean of the patches'."""
        return features[:, 0] if self.config.pooling == "class_token" else features.mean(dim=1)


def initialize_weights(model: VisionTransformer) -> None:
    """Set every weight of a fresh model: Glorot's uniform matrices, as in the paper's own code."""
    for name, parameter in model.named_parameters():
        # A head of zeros starts at equal probabilities (section 3.2 of the paper, for fine-tuning).
        if name.endswith("bias") or name.startswith("head"):
            nn.init.zeros_(parameter)
        elif name in ("positions", "class_token"):
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
