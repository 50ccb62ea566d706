"""A whole tokenizer run: data in, model folder out."""

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from dalle_mini_impl.data.augmentation import shift_images
from dalle_mini_impl.data.images import pixels_to_images
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.config import DataConfig, TrainingConfig
from dalle_mini_impl.training.run import begin_run, run_task
from dalle_mini_impl.training.run_dataset import RunRecords, load_pairs
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
from vqvae.perturbation import Perturbation
from vqvae.quantizers import GumbelQuantizer, VectorQuantizer

EVALUATION_BATCH_SIZE = 64
NUM_SHOWN = 8
RESTARTS_END_AT = 0.8  # of the run: ids must be final before the decoder trains on them
# Adam's steps do not depend on it, but gradients are clipped together, and the discriminator's are
# some thirty times as long as the tokenizer's.
DISCRIMINATOR_SCALE = 0.01


@dataclass(frozen=True, kw_only=True)
class VQVAETaskConfig:
    """What the tokenizer's loss is made of, and how its data is varied.

    Raises:
        ValueError: If a weight is negative or a fraction of the run not in (0, 1].
    """

    wavelet_weight: float = 0.5
    """Weight of the wavelet loss beside the absolute error. Not read where the decoder gives
    logit-Laplace distributions (``vqvae.decoder_output``): their likelihood is the loss."""
    ms_ssim_weight: float = 0.0
    """Weight of 1 - MS-SSIM beside the absolute error; not read there either."""
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
    perturbed_neighbours: int = 8
    """Nearest codes of which one takes the token's place."""
    next_feature_weight: float = 0.0
    """Weight of the error of a small Transformer that is trained along and predicts each cell's
    feature from those before (arXiv:2412.16326), as a fraction of the features' variance."""

    def __post_init__(self) -> None:
        """Refuse negative weights."""
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"task.{name}: got {value}, expected at least 0")
        if self.gumbel_final_temperature == 0:
            raise ValueError("task.gumbel_final_temperature: got 0, expected above 0")
        for name in ("perturbed_image_fraction", "perturbed_token_fraction"):
            if getattr(self, name) > 1:
                raise ValueError(f"task.{name}: got {getattr(self, name)}, expected at most 1")
        if self.perturbed_neighbours < 1:
            raise ValueError("task.perturbed_neighbours: got 0, expected at least 1")
        for name in ("gumbel_kl_ends_at", "gumbel_temperature_ends_at"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"task.{name}: got {getattr(self, name)}, expected above 0 and up to 1"
                )


@dataclass(frozen=True, kw_only=True)
class VQVAERunConfig:
    """Options of ``train_vqvae.py``.

    Raises:
        ValueError: If the images' size does not fit the loss.
    """

    data: DataConfig
    """Images to learn from; captions are not read."""
    output_dir: str
    """Folder of the run: checkpoints, metrics, sample grids, and ``model/`` at the end."""
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
        """Refuse what would fail only when the images are read, or training has begun."""
        if self.training.activation_checkpointing:
            raise ValueError(
                "training.activation_checkpointing: got true, expected false: the image tokenizer "
                "has no Transformer blocks"
            )
        if self.task.next_feature_weight and self.vqvae.image_grid_size == (1, 1):
            raise ValueError(
                f"task.next_feature_weight: got {self.task.next_feature_weight}, expected 0 for "
                "images of one token (vqvae.image_size), which has no next one"
            )
        if self.vqvae.decoder_output == "logit_laplace":
            return
        size = self.vqvae.image_size
        if self.task.wavelet_weight and size % WAVELET_MULTIPLE:
            raise ValueError(
                f"vqvae.image_size: got {size}, expected a multiple of {WAVELET_MULTIPLE} for the "
                "wavelet loss; or set task.wavelet_weight to 0"
            )
        if self.task.ms_ssim_weight and size < SSIM_WINDOW:
            raise ValueError(
                f"vqvae.image_size: got {size}, expected at least {SSIM_WINDOW} for MS-SSIM; "
                "or set task.ms_ssim_weight to 0"
            )
        smallest = self.discriminator.smallest_side
        if self.discriminator.is_on and size < smallest:
            raise ValueError(
                f"vqvae.image_size: got {size}, expected at least {smallest} for a discriminator of "
                f"{self.discriminator.num_layers} layers; or lower discriminator.num_layers"
            )
        if self.discriminator.adaptive and self.training.compile:
            raise ValueError(
                "discriminator.adaptive: got true, expected false with training.compile, which keeps "
                "no gradients for a second look"
            )


class VQVAETask:
    """Images as bytes in memory, and the tokenizer's loss on them."""

    identity = ""  # pixels mean the same everywhere

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
        """Collect what training needs.

        Args:
            train: Training images.
            held_out: Images that are only measured.
            config: Loss weights and augmentation.
            sample_weights: How often each image is expected, or None.
            vqvae: The tokenizer that is trained.
            discriminator: How a discriminator takes part, if the trained model has one.

        Raises:
            ValueError: If the network of the perceptual loss is not installed.
        """
        self.train, self.held_out, self.config = train, held_out, config
        self.sample_weights = sample_weights
        self.vqvae = vqvae
        self.discriminator = discriminator or DiscriminatorConfig()
        self.perceptual = PerceptualDistance() if config.perceptual_weight else None
        self.perturbation = Perturbation(
            config.perturbed_image_fraction,
            config.perturbed_token_fraction,
            config.perturbed_neighbours,
        )
        self.num_samples = len(train)
        self.num_uniforms = 2
        self.tokens_per_sample = prod(vqvae.image_grid_size)

    def make_batch(
        self, sample_ids: Int[Tensor, " batch"], uniforms: Float[Tensor, "batch num_uniforms"]
    ) -> dict[str, Tensor]:
        """Look up the images and shift them."""
        images = self.train[sample_ids]
        if self.config.max_shift:
            steps = 2 * self.config.max_shift + 1
            images = shift_images(images, (uniforms * steps).long() - self.config.max_shift)
        return {"pixels": images.float() / 127.5 - 1}

    def loss(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        *,
        progress: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the reconstruction loss plus the quantizer's own, and what options add."""
        quantizer = self.vqvae.quantizer
        if isinstance(quantizer, GumbelQuantizer):
            final, over = (
                self.config.gumbel_final_temperature,
                self.config.gumbel_temperature_ends_at,
            )
            quantizer.temperature.fill_(anneal(progress, start=1.0, end=final, over=over))
            final, over = self.config.gumbel_kl_weight, self.config.gumbel_kl_ends_at
            quantizer.kl_weight = anneal(progress, start=0.0, end=final, over=over)
        elif isinstance(quantizer, VectorQuantizer):
            quantizer.freeze_restarts = progress >= RESTARTS_END_AT
        pixels = batch["pixels"]
        perturbs = self.perturbation.image_fraction > 0
        output = model(
            pixels, generator=generator, **({"perturbation": self.perturbation} if perturbs else {})
        )
        if output.logit_laplace is not None:
            reconstruction = logit_laplace_loss(output.logit_laplace, pixels)
        else:
            reconstruction = reconstruction_loss(
                output.reconstruction,
                pixels,
                wavelet_weight=self.config.wavelet_weight,
                ms_ssim_weight=self.config.ms_ssim_weight,
            )
        with torch.no_grad():
            counts = token_counts(output.token_ids, self.vqvae.codebook_size)
            metrics = {
                "reconstruction_loss": reconstruction.detach(),
                "psnr_db": psnr(output.reconstruction.detach(), pixels),
                "batch_codebook_perplexity": codebook_perplexity(counts),
                **output.quantizer_metrics,
            }
        if self.perceptual is not None:
            distance = self.perceptual.to(pixels.device)(output.reconstruction, pixels)
            metrics["perceptual_distance"] = distance.detach()
            reconstruction = reconstruction + self.config.perceptual_weight * distance
        loss = reconstruction + output.quantizer_loss
        if output.next_feature_loss is not None:
            metrics["next_feature_loss"] = output.next_feature_loss.detach()
            loss = loss + self.config.next_feature_weight * output.next_feature_loss
        if self.discriminator.is_on:
            trained: Any = getattr(model, "module", model)  # DDP's, on several processes
            takes_part = progress >= self.discriminator.starts_at
            adversarial_loss = self._adversarial_terms if takes_part else self._no_adversarial_terms
            terms, found = adversarial_loss(trained, reconstruction, output.reconstruction, pixels)
            loss, metrics = loss + terms, metrics | found
        return loss, metrics

    def _adversarial_terms(
        self, trained: AdversarialVQVAE, loss: Tensor, reconstruction: Tensor, pixels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what the discriminator adds to the loss, and metrics."""
        config = self.discriminator
        terms = adversarial_terms(trained.discriminator, reconstruction, pixels)
        weight = torch.tensor(config.weight, device=pixels.device)
        if config.adaptive:
            layer = last_layer_of(self.vqvae)
            weight = weight * adaptive_weight(loss, terms.generator, layer)
        metrics = {f"{name}_loss": term.detach() for name, term in terms._asdict().items()}
        total = weight * terms.generator + DISCRIMINATOR_SCALE * terms.discriminator
        total = total + config.feature_matching_weight * terms.feature_matching
        return total, metrics | {"generator_weight": weight}

    def _no_adversarial_terms(
        self, trained: AdversarialVQVAE, loss: Tensor, *_: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Keep the discriminator as it is, with gradients of 0: DDP waits for every gradient."""
        nothing = 0.0 * sum(weight.sum() for weight in trained.discriminator.parameters())
        names = ("generator_loss", "feature_matching_loss", "discriminator_loss")
        zero = loss.new_zeros(())
        return zero + nothing, dict.fromkeys((*names, "generator_weight"), zero)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measure PSNR and use of the codebook on held-out images."""
        vqvae = self.vqvae
        device = next(model.parameters()).device
        counts = torch.zeros(vqvae.codebook_size, dtype=torch.long, device=device)
        totals = {"psnr_db": 0.0, "hard_soft_gap_db": 0.0}
        noise = torch.Generator(device).manual_seed(0)  # the same however often it is measured
        for images in self.held_out.split(EVALUATION_BATCH_SIZE):
            pixels = images.to(device).float() / 127.5 - 1
            token_ids = vqvae.encode_to_token_ids(pixels)
            hard = vqvae.decode_from_token_ids(token_ids)
            counts += token_counts(token_ids, vqvae.codebook_size)
            fraction = len(images) / len(self.held_out)
            totals["psnr_db"] += float(psnr(hard, pixels)) * fraction
            if isinstance(vqvae.quantizer, GumbelQuantizer):
                latents = vqvae.quantizer.soft_latents(vqvae.encoder(pixels), generator=noise)
                soft = vqvae.decode_from_latents(latents)
                totals["hard_soft_gap_db"] += float(hard_soft_gap(soft, hard, pixels)) * fraction
        if not isinstance(vqvae.quantizer, GumbelQuantizer):
            del totals["hard_soft_gap_db"]
        totals["codebook_usage"] = float(codebook_usage(counts))
        totals["codebook_perplexity"] = float(codebook_perplexity(counts))
        return {f"validation/{name}": value for name, value in totals.items()}

    @torch.no_grad()
    def make_image_grids(self, model: nn.Module) -> list[ImageGrid]:
        """Show held-out images beside their reconstructions."""
        device = next(model.parameters()).device
        chosen = torch.linspace(0, len(self.held_out) - 1, min(NUM_SHOWN, len(self.held_out)))
        pixels = self.held_out[chosen.long()].to(device).float() / 127.5 - 1
        reconstructions = self.vqvae.decode_from_token_ids(self.vqvae.encode_to_token_ids(pixels))
        images, captions = [], []
        for original, copy in zip(
            pixels_to_images(pixels), pixels_to_images(reconstructions), strict=True
        ):
            images += [original, copy]
            captions += ["original", "reconstruction"]
        return [ImageGrid("reconstructions", images, captions)]


def train_vqvae(
    config: VQVAERunConfig,
    *,
    resume: str | None = None,
) -> Path:
    """Train an image tokenizer.

    Args:
        config: The run.
        resume: None, ``latest`` or a checkpoint folder.

    Returns:
        The folder of the trained tokenizer.

    Raises:
        UserError: If the data or the folders do not serve.
    """
    with begin_run(config, resume) as accelerator:
        return _train(config, resume, accelerator)


def _train(
    config: VQVAERunConfig,
    resume: str | None,
    accelerator: Accelerator,
) -> Path:
    """Do it, in a folder that is this run's own."""
    records = RunRecords(
        folder=Path(config.output_dir),
        writes=accelerator.is_main_process,
        resumes=resume is not None,
    )
    size = config.vqvae.image_size
    train, held_out = (
        load_pairs(config.data, split, image_size=size, records=records)
        for split in (config.data.train_split, config.data.validation_split)
    )
    torch.manual_seed(config.training.seed)
    vqvae = VQVAE(config.vqvae)
    with_predictor = NextFeatureVQVAE(vqvae) if config.task.next_feature_weight else vqvae
    model = _beside_discriminator(with_predictor, config.discriminator)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sample_weights = train.weights(config.data.balance_by)
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
    return run_task(
        model,
        task,
        config,
        accelerator=accelerator,
        resume=resume,
        save_pretrained=vqvae.save_pretrained,
    )


def _beside_discriminator(vqvae: nn.Module, config: DiscriminatorConfig) -> nn.Module:
    """Return what is trained: the tokenizer, with a discriminator beside it if there is one."""
    if not config.is_on:
        return vqvae
    critic = PatchDiscriminator(channels=config.channels, num_layers=config.num_layers)
    return AdversarialVQVAE(vqvae, critic)
