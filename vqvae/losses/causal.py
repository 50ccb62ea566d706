"""Causally regularized tokenization (CRT): tokens that are easier to predict for a decoder.

Source: Ramanujan et al. 2024 (arXiv:2412.16326): a causal Transformer of 2 layers is trained along
with the tokenizer. It predicts the encoder's features before quantization in raster order, and its
L2 error at the next feature is added to the loss with weight 4. The gradient reaches the encoder.
Their code is not public, and we know the paper from its abstract and from summaries only: whether
they stop the gradient at the target is unknown to us.

Deviations: bounded features, an error relative to their variance, and no warmup; see the comments.
Both networks share one optimizer. Since the error is a fraction of the variance, the recommended
weight is 0.1, not 4.
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
SMALLEST_VARIANCE = 1e-4  # values within one of 8 levels, evenly spread, have 7e-3


class NextFeaturePredictor(nn.Module):
    """Predicts the feature of each cell but the first from those of the cells before it.

    The grid has at least 2 cells.
    """

    def __init__(self, *, code_dim: int, num_cells: int) -> None:
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
        # The first predictions are 0, so that an untrained Transformer does not affect the encoder:
        # this stands in for the paper's warmup of the weight over 1,000 steps.
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, features: Float[Tensor, "batch code_dim height width"]
    ) -> Float[Tensor, "batch later_cells code_dim"]:
        """Predict the features of the second cell to the last, in raster order."""
        # Position i reads cell i and predicts cell i + 1.
        state = self.stem(rearrange(features, "b c h w -> b (h w) c")[:, :-1]) + self.positions
        mask = nn.Transformer.generate_square_subsequent_mask(state.shape[1], device=state.device)
        for layer in self.layers:
            state = layer(state, src_mask=mask, is_causal=True)
        return self.head(self.norm(state))


def next_feature_loss(
    predictions: Float[Tensor, "batch later_cells code_dim"],
    features: Float[Tensor, "batch code_dim height width"],
) -> Float[Tensor, ""]:
    """Return the mean over channels of squared error over variance, the same at any scale.

    0 for exact predictions of the second cell to the last, 1 for those of each channel's mean.
    """
    # Divided by each channel's variance in the (micro-)batch. It has gradients, and so have the
    # targets: the encoder gains nothing by shrinking features or losing an unpredictable channel.
    targets = rearrange(features, "b c h w -> b (h w) c")[:, 1:].float()
    errors = (predictions.float() - targets).square().mean(dim=(0, 1))
    return (errors / (targets.var(dim=(0, 1), correction=0) + SMALLEST_VARIANCE)).mean()


class NextFeatureVQVAE(nn.Module):
    """The tokenizer and its predictor as one module, so that a checkpoint holds both."""

    def __init__(self, vqvae: VQVAE) -> None:
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
        """Call the tokenizer, and add the loss of the predictor."""
        output = self.vqvae(pixels, generator=generator, perturbation=perturbation)
        # The quantizer's bounded features, in the space of its codes. FSQ and cosine codes do not
        # depend on the scale of the encoder's unbounded ones, and a predictable feature would grow
        # without a bound.
        features = self.vqvae.quantizer.features(output.encoder_latents)
        loss = next_feature_loss(self.predictor(features), features)
        return output._replace(next_feature_loss=loss)
