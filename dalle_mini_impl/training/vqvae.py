"""A whole tokenizer run: data in, model folder out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.config import TrainingConfig
from dalle_mini_impl.training.run import begin_run, run_task
from dalle_mini_impl.training.run_dataset import RunRecords, load_pairs
from dalle_mini_impl.training.sources import DataConfig
from dalle_mini_impl.training.tracking import TrackingConfig
from dalle_mini_impl.training.vqvae_task import VQVAETask, VQVAETaskConfig
from vqvae import VQVAE, VQVAEConfig
from vqvae.losses.adversarial import AdversarialVQVAE, DiscriminatorConfig, PatchDiscriminator
from vqvae.losses.causal import NextFeatureVQVAE
from vqvae.losses.reconstruction import SSIM_WINDOW, WAVELET_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class VQVAERunConfig:
    """Options of ``train_vqvae.py``.

    Raises:
        ValueError: If the pictures' size does not fit the loss.
    """

    data: DataConfig
    """Pictures to learn from; captions are not read."""
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
        """Refuse what would fail only when the pictures are read, or training has begun."""
        if self.training.activation_checkpointing:
            raise ValueError(
                "training.activation_checkpointing: got true, wanted false: the image tokenizer "
                "has no Transformer blocks"
            )
        if self.task.next_feature_weight and self.vqvae.image_grid_size == (1, 1):
            raise ValueError(
                f"task.next_feature_weight: got {self.task.next_feature_weight}, wanted 0 for "
                "pictures of one token (vqvae.image_size), which has no next one"
            )
        if self.vqvae.decoder_output == "logit_laplace":
            return
        size = self.vqvae.image_size
        if self.task.wavelet_weight and size % WAVELET_MULTIPLE:
            raise ValueError(
                f"vqvae.image_size: got {size}, wanted a multiple of {WAVELET_MULTIPLE} for the "
                "wavelet loss; or set task.wavelet_weight to 0"
            )
        if self.task.ms_ssim_weight and size < SSIM_WINDOW:
            raise ValueError(
                f"vqvae.image_size: got {size}, wanted at least {SSIM_WINDOW} for MS-SSIM; "
                "or set task.ms_ssim_weight to 0"
            )
        smallest = self.discriminator.smallest_side
        if self.discriminator.is_on and size < smallest:
            raise ValueError(
                f"vqvae.image_size: got {size}, wanted at least {smallest} for a discriminator of "
                f"{self.discriminator.num_layers} layers; or lower discriminator.num_layers"
            )
        if self.discriminator.adaptive and self.training.compile:
            raise ValueError(
                "discriminator.adaptive: got true, wanted false with training.compile, which keeps "
                "no gradients for a second look"
            )


def train_vqvae(
    config: VQVAERunConfig,
    *,
    resume: str | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train an image tokenizer.

    Args:
        config: The run.
        resume: None, ``latest`` or a checkpoint folder.
        show: Receives plain lines about the run, on the main process.

    Returns:
        The folder of the trained tokenizer.

    Raises:
        UserError: If the data or the folders do not serve.
    """
    with begin_run(config, resume, show) as (accelerator, say):
        return _train(config, resume, accelerator, say)


def _train(
    config: VQVAERunConfig,
    resume: str | None,
    accelerator: Accelerator,
    show: Callable[[str], None],
) -> Path:
    """Do it, in a folder that is this run's own."""
    records = RunRecords(
        folder=Path(config.output_dir),
        writes=accelerator.is_main_process,
        resumes=resume is not None,
    )
    size = config.vqvae.image_size
    train, held_out = (
        load_pairs(config.data, split, image_size=size, records=records, show=show)
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
        show=show,
        save_pretrained=vqvae.save_pretrained,
    )


def _beside_discriminator(vqvae: nn.Module, config: DiscriminatorConfig) -> nn.Module:
    """Return what is trained: the tokenizer, with a discriminator beside it if there is one."""
    if not config.is_on:
        return vqvae
    critic = PatchDiscriminator(channels=config.channels, num_layers=config.num_layers)
    return AdversarialVQVAE(vqvae, critic)
