"""CLIP: two towers that embed an image and its caption at the same point of the unit sphere.

After Radford et al. 2021 (arXiv:2103.00020): a causal Transformer reads the caption and the state
of its last token is projected, a Vision Transformer reads the image, both embeddings are scaled to
length one, and training pulls each image towards its own caption and away from the others of the
batch, by softmax over the batch as in that paper, or by a sigmoid of each pair (SigLIP, Zhai et
al. 2023, arXiv:2303.15343). Deviations: a batch may hold a caption or an image twice, and all
matching pairs count (Yang et al. 2022, arXiv:2204.03610); GELU is exact; captions have no start
and end tokens.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_mini_impl.models.vit import VisionTransformer, ViTConfig
from dalle_mini_impl.transformer.attention import build_norm
from dalle_mini_impl.transformer.block_config import (
    DOSOVITSKIY_2021,
    require_dropout_probability,
    require_positive,
)
from dalle_mini_impl.transformer.blocks import build_blocks
from dalle_mini_impl.transformer.feed_forward import ChannelDropout

PAD_TOKEN_ID = 0  # on the right of shorter captions
MAX_SCALE = 100.0  # Radford et al. 2021, section 2.5
START = {"softmax": (1 / 0.07, 0.0), "sigmoid": (10.0, -10.0)}  # scale and bias, of both papers


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """Sizes of the Transformer that reads captions."""

    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 3
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads per block."""
    intermediate_size: int = 512
    """Width of the feed-forward network; four times the hidden size in the paper."""
    dropout_probability: float = 0.1
    """Fraction of the channels of each branch, and of the embeddings, dropped in training."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_layers", "num_heads", "intermediate_size")
        require_positive(self, sizes, prefix="model.text.")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.text.hidden_size: got {self.hidden_size}, expected a multiple of num_heads "
                f"{self.num_heads}"
            )
        require_dropout_probability(self, prefix="model.text.")


@dataclass(frozen=True, kw_only=True)
class TowersConfig:
    """Sizes of both towers, and how they are compared."""

    image: ViTConfig = field(default_factory=ViTConfig)
    """The tower that reads images."""
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    """The tower that reads captions."""
    embedding_size: int = 128
    """Length of the embedding of an image or a caption."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Over the batch (CLIP), or of each pair (SigLIP, which also learns a bias)."""

    def __post_init__(self) -> None:
        require_positive(self, ("embedding_size",), prefix="model.")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """A whole model: its towers, and what they read."""

    towers: TowersConfig
    """Sizes of both."""
    image_size: int
    """Side of the images in pixels."""
    vocab_size: int
    """Number of different caption tokens, pad included."""
    text_length: int
    """Tokens per caption, padding included."""

    def __post_init__(self) -> None:
        require_positive(self, ("image_size", "vocab_size", "text_length"))


class TextTower(nn.Module):
    """Reads captions from left to right."""

    def __init__(
        self, config: TextTowerConfig, *, vocab_size: int, text_length: int, embedding_size: int
    ) -> None:
        super().__init__()
        width = config.hidden_size
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(text_length, width))
        self.dropout = ChannelDropout(config.dropout_probability)
        self.blocks = build_blocks(config, config.num_layers, DOSOVITSKIY_2021)
        self.output_norm = build_norm(width, use_bias=True)
        # CLIP projects without a bias: the embedding is scaled to length one right after.
        self.head = nn.Linear(width, embedding_size, bias=False)

    def forward(
        self, text_token_ids: Int[Tensor, "batch text_length"]
    ) -> Float[Tensor, "batch embedding"]:
        """Project the state of each caption's last token, of the first pad if it has none.

        Columns that hold nothing but pads may be cut off.
        """
        length = text_token_ids.shape[1]
        hidden_states = self.dropout(self.embedding(text_token_ids) + self.positions[:length])
        for block in self.blocks:
            hidden_states = block(hidden_states, is_causal=True)
        # Pads follow the last token, and causal attention hides them from it.
        last = ((text_token_ids != PAD_TOKEN_ID).sum(dim=1) - 1).clamp_min(0)  # (batch)
        rows = torch.arange(len(last), device=last.device)
        return self.head(self.output_norm(hidden_states[rows, last]))


class Clip(nn.Module):
    """Scores how well images, in [-1, 1], and padded captions fit."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config, towers = config, config.towers
        self.text_tower = TextTower(
            towers.text,
            vocab_size=config.vocab_size,
            text_length=config.text_length,
            embedding_size=towers.embedding_size,
        )
        # Its classifier serves as the projection into the shared space.
        self.image_tower = VisionTransformer(
            towers.image,
            image_size=config.image_size,
            num_channels=3,
            num_classes=towers.embedding_size,
        )
        scale, bias = START[towers.loss]
        # Learned as a logarithm: each step changes the scale by a factor, and it stays positive.
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        if towers.loss == "sigmoid":
            # Nearly all pairs of a batch are no match: without a negative bias, the first steps
            # would learn only that (SigLIP, section 3.2).
            self.bias = nn.Parameter(torch.tensor(bias))
        initialize_weights(self)

    def forward(
        self,
        text_token_ids: Int[Tensor, "texts text_length"],
        pixels: Float[Tensor, "images 3 height width"],
    ) -> Float[Tensor, "images texts"]:
        """Compare every image with every caption: scale x cosine, plus the sigmoid loss's bias."""
        images, texts = self.embed_images(pixels), self.embed_texts(text_token_ids)
        # bf16 is too coarse for cosines that are scaled by up to 100.
        with torch.autocast(images.device.type, enabled=False):
            cosines = images @ texts.T
        if self.training:
            # The weight itself is clamped, not its value here: a clamped value has no gradient, and
            # could not come back from the limit.
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(MAX_SCALE))
        logits = self.log_scale.exp() * cosines
        return logits + self.bias if self.config.towers.loss == "sigmoid" else logits

    def embed_texts(
        self, text_token_ids: Int[Tensor, "batch text_length"]
    ) -> Float[Tensor, "batch embedding"]:
        """Embed captions on the unit sphere, in float32 or better."""
        return F.normalize(_at_least_float32(self.text_tower(text_token_ids)), dim=-1)

    def embed_images(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch embedding"]:
        """Embed images on the unit sphere, in float32 or better."""
        return F.normalize(_at_least_float32(self.image_tower(pixels)), dim=-1)


def softmax_loss(
    logits: Float[Tensor, "images texts"], is_match: Bool[Tensor, "images texts"]
) -> Float[Tensor, ""]:
    """Average the cross-entropies of images over captions and of captions over images, in nats.

    Every row and column has at least one match; several share the target evenly.

    Source: Radford et al. 2021, arXiv:2103.00020, figure 3; targets as in Yang et al. 2022,
    arXiv:2204.03610, equations 2 and 3.
    """
    # The targets: equal probabilities of all matches of an image, and of a caption.
    matches = is_match.to(logits.dtype)
    images = F.cross_entropy(logits, matches / matches.sum(dim=1, keepdim=True))
    texts = F.cross_entropy(logits.T, (matches / matches.sum(dim=0, keepdim=True)).T)
    return (images + texts) / 2


def sigmoid_loss(
    logits: Float[Tensor, "images texts"], is_match: Bool[Tensor, "images texts"]
) -> Float[Tensor, ""]:
    """Classify each pair as match or not: nats per image, summed over the captions.

    Source: Zhai et al. 2023, arXiv:2303.15343, equation in section 3.2.
    """
    # log p(right answer) = log sigmoid(logit) for a match, log sigmoid(-logit) for any other pair.
    signs = torch.where(is_match, 1.0, -1.0).to(logits.dtype)
    # Divided by the images and not by the pairs, as in the paper's pseudocode.
    return -F.logsigmoid(signs * logits).sum(dim=1).mean()


def initialize_weights(model: Clip) -> None:
    """Set the weights that the Vision Transformer has not set itself."""
    # Close to CLIP's own initialization, whose matrices have about the size of Glorot's.
    for name, parameter in model.text_tower.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name in ("embedding.weight", "positions"):
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
    for head in (model.text_tower.head, model.image_tower.head):
        nn.init.normal_(head.weight, std=head.in_features**-0.5)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
