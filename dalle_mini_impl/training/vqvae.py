"""Training the image tokenizer: images in, its folder out.

The loss is a reconstruction loss (absolute error and wavelets, or DALL-E's logit-Laplace
likelihood) plus the quantizer's own; perceptual, causal and adversarial terms are options.
"""

from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from dalle_mini_impl.data.augmentation import shifted_pixels
from dalle_mini_impl.data.images import bytes_to_pixels, pixels_to_images
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.config import DataConfig, TrainingConfig, require
from dalle_mini_impl.training.run import RunContext, run_training
from dalle_mini_impl.training.schedule import anneal
from dalle_mini_impl.training.task import ImageGrid
from dalle_mini_impl.training.tracking import TrackingConfig
from vqvae import VQVAE, VQVAEConfig
from vqvae.logit_laplace import logit_laplace_loss
from vqvae.losses.adversarial import (
    AdversarialVQVAE,
    DiscriminatorConfig,
    PatchDiscriminator,
    adaptive_weight,
    adversarial_terms,
    last_layer_of,
)
from vqvae.losses.causal import NextFeatureVQVAE
from vqvae.losses.perceptual import PerceptualDistance
from vqvae.losses.reconstruction import SSIM_WINDOW, WAVELET_MULTIPLE, reconstruction_loss
from vqvae.metrics import (
    codebook_perplexity,
    codebook_usage,
    hard_soft_gap,
    psnr,
    token_counts,
)
from vqvae.model import VQVAEOutput
from vqvae.perturbation import Perturbation
from vqvae.pretrained.load import load_tokenizer
from vqvae.quantizers import GumbelQuantizer, VectorQuantizer

EVALUATION_BATCH_SIZE = 64
NUM_SHOWN = 8
RESTARTS_END_AT = 0.8  # of the run: ids must be final before the decoder trains on them
# Adam's steps do not depend on it, but gradients are clipped together, and the discriminator's are
# some thirty times as long as the tokenizer's.
DISCRIMINATOR_SCALE = 0.01
ADVERSARIAL_METRICS = (
    "generator_loss",
    "feature_matching_loss",
    "discriminator_loss",
    "generator_weight",
)


@dataclass(frozen=True, kw_only=True)
class VQVAETaskConfig:
    """The tokenizer's loss and its augmentation."""

    wavelet_weight: float = 0.5
    """Weight of the wavelet loss relative to the absolute error. Not read with logit-Laplace
    outputs (``vqvae.decoder_output``), whose likelihood is the loss."""
    ms_ssim_weight: float = 0.0
    """Weight of 1 - MS-SSIM relative to the absolute error; not read there either."""
    max_shift: int = 0
    """Largest random shift of a training image, in pixels."""
    gumbel_kl_weight: float = 1e-3
    """Final weight of the KL to the uniform prior, per token, from 0 at the start. DALL-E's beta of
    6.6 is divided by the pixel values of a token, 3 times downsampling squared: 6.6 / 192 at 8.
    Read by ``gumbel`` only."""
    gumbel_kl_ends_at: float = 0.5
    """Progress in (0, 1] at which that weight is reached, along half a cosine."""
    gumbel_final_temperature: float = 1 / 16
    """Temperature at the end, from 1 at the start. Read by ``gumbel`` only."""
    gumbel_temperature_ends_at: float = 0.8
    """Progress in (0, 1] at which that temperature is reached, along half a cosine."""
    perceptual_weight: float = 0.0
    """Weight of a distance in features of EfficientNet-Lite0 (arXiv:1801.03924); needs the extra
    ``perceptual``."""
    perturbed_image_fraction: float = 0.0
    """Fraction of the training images in which some tokens are replaced before they are decoded
    (arXiv:2503.08354)."""
    perturbed_token_fraction: float = 0.3
    """Largest fraction of such an image's tokens that is replaced."""
    perturbed_neighbors: int = 8
    """Nearest codes of which one takes the token's place."""
    next_feature_weight: float = 0.0
    """Weight of the error of a small causal Transformer, trained along, that predicts each cell's
    feature from those before (arXiv:2412.16326), as a fraction of the features' variance."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value >= 0, f"task.{name}", value, "at least 0")
        temperature = self.gumbel_final_temperature
        require(temperature > 0, "task.gumbel_final_temperature", temperature, "above 0")
        for name in ("perturbed_image_fraction", "perturbed_token_fraction"):
            value = getattr(self, name)
            require(value <= 1, f"task.{name}", value, "at most 1")
        num_neighbors = self.perturbed_neighbors
        require(num_neighbors >= 1, "task.perturbed_neighbors", num_neighbors, "at least 1")
        for name in ("gumbel_kl_ends_at", "gumbel_temperature_ends_at"):
            value = getattr(self, name)
            require(0 < value <= 1, f"task.{name}", value, "above 0 and up to 1")


@dataclass(frozen=True, kw_only=True)
class VQVAERunConfig:
    """Options of ``train_vqvae.py``."""

    data: DataConfig
    """Images to learn from, with or without captions."""
    output_dir: str
    """Folder of the run: checkpoints, metrics, sample grids, and ``model/`` at the end."""
    init_from: str | None = None
    """Folder of a tokenizer of ours, or a model folder with one, that the run starts from;
    ``vqvae`` does not count then."""
    vqvae: VQVAEConfig = field(default_factory=VQVAEConfig)
    """The tokenizer."""
    task: VQVAETaskConfig = field(default_factory=VQVAETaskConfig)
    """Its loss."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """Its opponent, if any: PatchGAN."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Budget and optimizer."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where metrics go."""

    def __post_init__(self) -> None:
        require(
            not self.training.activation_checkpointing,
            "training.activation_checkpointing",
            "true",
            "false: the image tokenizer has no Transformer blocks",
        )
        require(
            not (self.task.next_feature_weight and self.vqvae.image_grid_size == (1, 1)),
            "task.next_feature_weight",
            self.task.next_feature_weight,
            "0 for images of one token (vqvae.image_size), which has no next one",
        )
        if self.vqvae.decoder_output == "logit_laplace":
            return
        size, sides = self.vqvae.image_size, self.vqvae.pixel_size
        require(
            not (self.task.wavelet_weight and any(side % WAVELET_MULTIPLE for side in sides)),
            "vqvae.image_size",
            size,
            f"a multiple of {WAVELET_MULTIPLE} for the wavelet loss; or set task.wavelet_weight to "
            "0",
        )
        require(
            not (self.task.ms_ssim_weight and min(sides) < SSIM_WINDOW),
            "vqvae.image_size",
            size,
            f"at least {SSIM_WINDOW} for MS-SSIM; or set task.ms_ssim_weight to 0",
        )
        smallest = self.discriminator.smallest_side
        require(
            not (self.discriminator.is_on and min(sides) < smallest),
            "vqvae.image_size",
            size,
            f"at least {smallest} for a discriminator of {self.discriminator.num_layers} layers; "
            "or lower discriminator.num_layers",
        )
        require(
            not (self.discriminator.adaptive and self.training.compile),
            "discriminator.adaptive",
            "true",
            "false with training.compile, which keeps no gradients for a second look",
        )


def train_vqvae(config: VQVAERunConfig, *, resume: str | None = None) -> Path:
    """Train an image tokenizer; see ``run_training``."""
    return run_training(with_base(config), build_task, resume=resume)


def with_base(config: VQVAERunConfig) -> VQVAERunConfig:
    """Take all sizes from the tokenizer that the run starts from, if there is one."""
    if config.init_from is None:
        return config
    return replace(config, vqvae=open_base(config.init_from).config)


def open_base(folder: str) -> VQVAE:
    """Open the tokenizer that a run starts from."""
    path = Path(folder)
    try:
        base = load_tokenizer(path / "vqvae" if (path / "vqvae").is_dir() else path)
        if not isinstance(base, VQVAE):
            raise ValueError(f"{folder} is another library's; expected a tokenizer of ours")
    except ValueError as error:
        raise UserError(f"init_from: {error}") from None
    return base


def build_task(config: VQVAERunConfig, run: RunContext) -> "VQVAETask":
    """Read the data and build the image tokenizer, before it is trained."""
    train, held_out = run.load_splits(
        config.data, pixel_size=config.vqvae.pixel_size, needs_captions=False
    )
    sample_weights = train.weights(config.data.balance_by)
    torch.manual_seed(config.training.seed)
    vqvae = open_base(config.init_from) if config.init_from else VQVAE(config.vqvae)
    try:
        task = VQVAETask(
            train.pixels,
            held_out.pixels,
            config.task,
            sample_weights=sample_weights,
            vqvae=vqvae,
            discriminator=config.discriminator,
        )
    except ValueError as error:
        raise UserError(f"task.perceptual_weight: {error}") from None
    task.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return task


class VQVAETask:
    """Images as bytes in memory, and the tokenizer's loss on them.

    Raises:
        ValueError: If the network of the perceptual loss is not installed.
    """

    identity = ""  # pixels mean the same everywhere
    selection_metric: str | None = None

    def __init__(
        self,
        train: UInt8[Tensor, "samples 3 height width"],
        held_out: UInt8[Tensor, "held_out_samples 3 height width"],
        config: VQVAETaskConfig,
        *,
        sample_weights: Tensor | None,
        vqvae: VQVAE,
        discriminator: DiscriminatorConfig | None = None,
    ) -> None:
        self.train, self.held_out, self.config = train, held_out, config
        self.sample_weights = sample_weights
        self.vqvae = vqvae
        self.discriminator = discriminator or DiscriminatorConfig()
        # What only training needs is trained with the tokenizer and left behind at the end.
        self.model: nn.Module = NextFeatureVQVAE(vqvae) if config.next_feature_weight else vqvae
        if self.discriminator.is_on:
            critic = PatchDiscriminator(
                channels=self.discriminator.channels, num_layers=self.discriminator.num_layers
            )
            self.model = AdversarialVQVAE(self.model, critic)
        self.perceptual = PerceptualDistance() if config.perceptual_weight else None
        self.perturbation: Perturbation | None = None
        if config.perturbed_image_fraction:
            self.perturbation = Perturbation(
                config.perturbed_image_fraction,
                config.perturbed_token_fraction,
                config.perturbed_neighbors,
            )
        self.num_samples = len(train)
        self.num_uniforms = 2  # shift down, shift right
        self.tokens_per_sample = prod(vqvae.image_grid_size)

    def make_batch(
        self, sample_ids: Int[Tensor, " batch"], uniforms: Float[Tensor, "batch 2"]
    ) -> dict[str, Tensor]:
        """Look up the images and shift them."""
        images = self.train[sample_ids]
        return {"pixels": shifted_pixels(images, uniforms, max_shift=self.config.max_shift)}

    def loss(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        *,
        progress: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the reconstruction loss plus the quantizer's own, and what options add."""
        # 1. Reconstruct.
        self._follow_schedules(progress)
        pixels = batch["pixels"]
        output = model(pixels, generator=generator, perturbation=self.perturbation)
        reconstruction_term = self._reconstruction_loss(output, pixels)
        # 2. Measure.
        with torch.no_grad():
            counts = token_counts(output.token_ids, self.vqvae.codebook_size)
            metrics = {
                "reconstruction_loss": reconstruction_term.detach(),
                "psnr_db": psnr(output.reconstruction.detach(), pixels),
                "batch_codebook_perplexity": codebook_perplexity(counts),
                **output.quantizer_metrics,
            }
        # 3. Add what is switched on. The perceptual term counts as reconstruction: the adaptive
        # weight of the discriminator balances against both.
        if self.perceptual is not None:
            distance = self.perceptual.to(pixels.device)(output.reconstruction, pixels)
            metrics["perceptual_distance"] = distance.detach()
            reconstruction_term = reconstruction_term + self.config.perceptual_weight * distance
        loss = reconstruction_term + output.quantizer_loss
        if output.next_feature_loss is not None:
            metrics["next_feature_loss"] = output.next_feature_loss.detach()
            loss = loss + self.config.next_feature_weight * output.next_feature_loss
        # 4. The opponent's turn, once it takes part.
        if self.discriminator.is_on:
            trained: Any = getattr(model, "module", model)  # inside DDP, on several processes
            if progress >= self.discriminator.starts_at:
                term, adversarial_metrics = self._adversarial_term(
                    trained, reconstruction_term, output.reconstruction, pixels
                )
            else:
                term, adversarial_metrics = _idle_discriminator(trained, loss)
            loss, metrics = loss + term, metrics | adversarial_metrics
        return loss, metrics

    def _follow_schedules(self, progress: float) -> None:
        """Anneal Gumbel's temperature and KL weight; freeze VQ's codes towards the end."""
        config, quantizer = self.config, self.vqvae.quantizer
        if isinstance(quantizer, GumbelQuantizer):
            final, over = config.gumbel_final_temperature, config.gumbel_temperature_ends_at
            quantizer.temperature.fill_(anneal(progress, start=1.0, end=final, over=over))
            final, over = config.gumbel_kl_weight, config.gumbel_kl_ends_at
            quantizer.kl_weight = anneal(progress, start=0.0, end=final, over=over)
        elif isinstance(quantizer, VectorQuantizer):
            quantizer.freeze_restarts = progress >= RESTARTS_END_AT

    def _reconstruction_loss(self, output: VQVAEOutput, pixels: Tensor) -> Tensor:
        if output.logit_laplace is not None:
            return logit_laplace_loss(output.logit_laplace, pixels)
        return reconstruction_loss(
            output.reconstruction,
            pixels,
            wavelet_weight=self.config.wavelet_weight,
            ms_ssim_weight=self.config.ms_ssim_weight,
        )

    def _adversarial_term(
        self, trained: AdversarialVQVAE, loss: Tensor, reconstruction: Tensor, pixels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what the discriminator adds to the loss, and metrics."""
        config = self.discriminator
        terms = adversarial_terms(trained.discriminator, reconstruction, pixels)
        weight = torch.tensor(config.weight, device=pixels.device)
        if config.adaptive:
            # VQGAN (Esser et al. 2021, arXiv:2012.09841, equation 7): the hinge loss pulls at the
            # last layer as strongly as the reconstruction loss does. Of the model that computed
            # them: `find_batch_size` tries a copy.
            weight = weight * adaptive_weight(loss, terms.generator, last_layer_of(trained))
        metrics = {f"{name}_loss": term.detach() for name, term in terms._asdict().items()}
        # One optimizer step for both opponents: `adversarial_terms` detaches each from the other.
        total = weight * terms.generator + DISCRIMINATOR_SCALE * terms.discriminator
        total = total + config.feature_matching_weight * terms.feature_matching
        return total, metrics | {"generator_weight": weight}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure PSNR and codebook usage on held-out images."""
        vqvae = self.vqvae
        is_gumbel = isinstance(vqvae.quantizer, GumbelQuantizer)
        device = next(vqvae.parameters()).device
        counts = torch.zeros(vqvae.codebook_size, dtype=torch.long, device=device)
        totals = {"psnr_db": 0.0} | ({"hard_soft_gap_db": 0.0} if is_gumbel else {})
        noise = torch.Generator(device).manual_seed(0)  # the same in every evaluation
        # Through hard tokens, as in generation, whatever the quantizer trains with.
        for images in self.held_out.split(EVALUATION_BATCH_SIZE):
            pixels = bytes_to_pixels(images.to(device))
            token_ids = vqvae.encode_to_token_ids(pixels)
            hard = vqvae.decode_from_token_ids(token_ids)
            counts += token_counts(token_ids, vqvae.codebook_size)
            fraction = len(images) / len(self.held_out)
            totals["psnr_db"] += float(psnr(hard, pixels)) * fraction
            if isinstance(vqvae.quantizer, GumbelQuantizer):
                # How much better the mixture of codes is that Gumbel-softmax trains with.
                latents = vqvae.quantizer.soft_latents(vqvae.encoder(pixels), generator=noise)
                soft = vqvae.decode_from_latents(latents)
                totals["hard_soft_gap_db"] += float(hard_soft_gap(soft, hard, pixels)) * fraction
        totals["codebook_usage"] = float(codebook_usage(counts))
        totals["codebook_perplexity"] = float(codebook_perplexity(counts))
        return {f"validation/{name}": value for name, value in totals.items()}

    @torch.no_grad()
    def make_image_grids(self) -> list[ImageGrid]:
        """Show held-out images next to their reconstructions."""
        device = next(self.vqvae.parameters()).device
        num_shown = min(NUM_SHOWN, len(self.held_out))
        chosen = torch.linspace(0, len(self.held_out) - 1, num_shown).long()
        pixels = bytes_to_pixels(self.held_out[chosen].to(device))
        reconstructions = self.vqvae.decode_from_token_ids(self.vqvae.encode_to_token_ids(pixels))
        pairs = zip(pixels_to_images(pixels), pixels_to_images(reconstructions), strict=True)
        images = [image for pair in pairs for image in pair]
        return [ImageGrid("reconstructions", images, ["original", "reconstruction"] * num_shown)]

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer, without discriminator and predictor."""
        self.vqvae.save_pretrained(folder)


def _idle_discriminator(
    trained: AdversarialVQVAE, loss: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Keep the discriminator as it is, with gradients of 0: DDP waits for every gradient."""
    nothing = 0.0 * sum(weight.sum() for weight in trained.discriminator.parameters())
    zero = loss.new_zeros(())
    return zero + nothing, dict.fromkeys(ADVERSARIAL_METRICS, zero)
