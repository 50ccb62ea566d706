"""Tokens that a decoder can foretell: a small Transformer predicts each feature from those before.

Source: Ramanujan et al. 2024 (arXiv:2412.16326, "CRT"): beside the tokenizer trains a causal
Transformer of 2 layers; it reads the encoder's features before quantization in raster order, and
its L2 error in the next one is added to the loss with weight 4. The gradient reaches the encoder.
Their code is not public, and we read the abstract and notes of others on the paper: whether they
stop the gradient at the target, we do not know.

What we do otherwise:

* The features are those that the quantizer rounds, in the space of its codes, not the encoder's
  unbounded ones: of those, FSQ and cosine codes do not see the scale, and a predictable feature
  would become more so by growing without end.
* Each channel's error is divided by the channel's variance in the batch, and the variance has
  gradients too: an encoder gains nothing by shrinking its features, and a channel that cannot be
  foretold nothing by dying. The target has gradients as well. Each process and each micro-batch
  takes its own variance.
* The weight is there from the first step, not raised over 1,000 steps: the first predictions are
  0, so that an untrained Transformer teaches the encoder nothing. One optimizer serves both. As the
  error is a fraction of the variance, the weight is another one: 0.1 is recommended, not 4.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vqvae.model import VQVAE, VQVAEOutput
from vqvae.perturbation import Perturbation

HIDDEN_SIZE = 64
NUM_LAYERS = 2
NUM_HEADS = 4
POSITION_STD = 0.02
SMALLEST_VARIANCE = 1e-4  # the values of one of 8 levels, evenly spread, have 7e-3


class NextFeaturePredictor(nn.Module):
    """Predicts the feature of each cell but the first from those of the cells before it."""

    def __init__(self, *, code_dim: int, num_cells: int) -> None:
        """Start with random weights; the first predictions are 0.

        Args:
            code_dim: Channels of the features.
            num_cells: Of the grid, at least 2.
        """
        super().__init__()
        self.stem = nn.Linear(code_dim, HIDDEN_SIZE)
        self.positions = nn.Parameter(POSITION_STD * torch.randn(num_cells - 1, HIDDEN_SIZE))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                HIDDEN_SIZE,
                NUM_HEADS,
                4 * HIDDEN_SIZE,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(NUM_LAYERS)
        )
        self.norm = nn.LayerNorm(HIDDEN_SIZE)
        self.head = nn.Linear(HIDDEN_SIZE, code_dim)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, features: Float[Tensor, "batch code_dim height width"]
    ) -> Float[Tensor, "batch later_cells code_dim"]:
        """Predict in raster order.

        Args:
            features: Of all cells; the last one is not read.

        Returns:
            Predictions of the second cell to the last.
        """
        state = self.stem(rearrange(features, "b c h w -> b (h w) c")[:, :-1]) + self.positions
        mask = nn.Transformer.generate_square_subsequent_mask(state.shape[1], device=state.device)
        for layer in self.layers:
            state = layer(state, src_mask=mask, is_causal=True)
        return self.head(self.norm(state))


def next_feature_loss(
    predictions: Float[Tensor, "batch later_cells code_dim"],
    features: Float[Tensor, "batch code_dim height width"],
) -> Float[Tensor, ""]:
    """Hold predictions against what came.

    Args:
        predictions: Of the second cell to the last.
        features: Of all cells.

    Returns:
        The mean over channels of squared error over variance: 0 if all was foretold, 1 if no more
        than each channel's mean. The same for features of any scale.
    """
    came = rearrange(features, "b c h w -> b (h w) c")[:, 1:].float()
    errors = (predictions.float() - came).square().mean(dim=(0, 1))
    return (errors / (came.var(dim=(0, 1), correction=0) + SMALLEST_VARIANCE)).mean()


class NextFeatureVQVAE(nn.Module):
    """The tokenizer and its predictor as one module, so that a checkpoint holds both."""

    def __init__(self, vqvae: VQVAE) -> None:
        """Put a fresh predictor beside a tokenizer.

        Args:
            vqvae: What is expected in the end; its grid has at least 2 cells.
        """
        super().__init__()
        self.vqvae = vqvae
        height, width = vqvae.image_grid_size
        self.predictor = NextFeaturePredictor(
            code_dim=vqvae.quantizer.code_dim, num_cells=height * width
        )

    def forward(
        self,
        pixels: Float[Tensor, "batch 3 image_height image_width"],
        *,
        generator: torch.Generator | None = None,
        perturbation: Perturbation | None = None,
    ) -> VQVAEOutput:
        """Do what the tokenizer does, and add the loss of the predictor."""
        output = self.vqvae(pixels, generator=generator, perturbation=perturbation)
        features = self.vqvae.quantizer.features(output.encoder_latents)
        loss = next_feature_loss(self.predictor(features), features)
        return output._replace(next_feature_loss=loss)
