"""Memory and time of a run, estimated from a few steps on this machine."""

import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from dalle_mini_impl.config import read_config
from dalle_mini_impl.data.check import DataReport
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.hardware import keep_freed_memory, use_fast_float32
from dalle_mini_impl.models.dalle_config import DalleConfig
from dalle_mini_impl.models.text_to_image import TextToImageModel, build_text_to_image
from dalle_mini_impl.training.config import DEFAULT_MAX_STEPS, TrainingConfig
from dalle_mini_impl.training.cross_entropy import token_nats
from dalle_mini_impl.training.dalle import DalleRunConfig, with_base
from dalle_mini_impl.training.vqvae import VQVAERunConfig
from dalle_mini_impl.transformer.blocks import recompute_activations
from vqvae import VQVAE
from vqvae.image_tokenizer import ImageTokenizer
from vqvae.pretrained.hub import is_hub_name, tokenizer_folder
from vqvae.pretrained.load import load_tokenizer

_STATE_COPIES = 4  # weights, gradients, and two moments of the optimizer
_TIMED_STEPS = 3


def read_run(
    preset: Path,
) -> tuple[VQVAERunConfig | DalleRunConfig, ImageTokenizer | None]:
    """Read a preset of either kind and find its image tokenizer.

    For a decoder whose tokenizer is not trained yet, that is the one of ``vqvae.yaml`` in the same
    folder; None where there is no such file.
    """
    if not preset.is_file() or "vqvae_dir:" not in preset.read_text("utf-8"):
        config = read_config(VQVAERunConfig, preset)
        return config, tokenizer_of(config, None)
    neighbor = preset.with_name("vqvae.yaml")
    tokenizer_run = read_config(VQVAERunConfig, neighbor) if neighbor.is_file() else None
    run = with_base(read_config(DalleRunConfig, preset))
    return run, tokenizer_of(run, tokenizer_run)


def tokenizer_of(
    config: VQVAERunConfig | DalleRunConfig, tokenizer_run: VQVAERunConfig | None
) -> ImageTokenizer | None:
    """Load the image tokenizer of a run, or build it with fresh weights where it is not trained.

    Raises:
        UserError: If the folder of the tokenizer does not hold one.
    """
    if isinstance(config, VQVAERunConfig):
        return VQVAE(config.vqvae)
    if Path(config.vqvae_dir).is_dir() or is_hub_name(config.vqvae_dir):
        try:
            folder = tokenizer_folder(config.vqvae_dir)
            return load_tokenizer(folder, image_size=config.vqvae_image_size)
        except ValueError as error:
            raise UserError(f"vqvae_dir: {error}") from None
    return None if tokenizer_run is None else VQVAE(tokenizer_run.vqvae)


def estimate_lines(
    config: VQVAERunConfig | DalleRunConfig,
    vqvae: ImageTokenizer,
    report: DataReport,
) -> list[str]:
    """Estimate memory and time of a run on the images of a report; sizes are per process."""
    num_train = report.split_sizes.get(config.data.train_split, 0)
    splits = {config.data.train_split, config.data.validation_split}
    num_images = sum(report.split_sizes.get(split, 0) for split in splits)
    num_captions = sum(report.num_captions.get(split, 0) for split in splits)
    # As in a run: both change the speed of a step.
    use_fast_float32()
    keep_freed_memory()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    height, width = vqvae.config.pixel_size
    pixel_bytes = num_images * 3 * height * width
    lines = [
        f"pixels in memory: {_readable(pixel_bytes)} ({num_images} of {height} x {width})",
        f"reading the images: {num_images * report.seconds_per_image:.0f} s",
    ]
    if isinstance(config, VQVAERunConfig):
        model: nn.Module = vqvae.to(device).train()
    else:
        grid = vqvae.image_grid_size[0] * vqvae.image_grid_size[1]
        # Tokens of images and captions are kept as int32.
        token_bytes = 4 * (
            num_images * config.num_views * grid + num_captions * config.text.text_length
        )
        encoding = _encoding_seconds(vqvae.to(device).eval()) * num_images * config.num_views
        lines += [
            f"token table: {_readable(token_bytes)} ({grid} tokens an image)",
            f"encoding the images: {encoding:.0f} s",
        ]
        model = _build_dalle(config, vqvae).to(device).train()
        if config.training.activation_checkpointing:
            recompute_activations(model)
    state = sum(parameter.numel() for parameter in model.parameters()) * 4 * _STATE_COPIES
    lines.append(f"weights, gradients and optimizer: {_readable(state)}, activations come on top")
    seconds = _step_seconds(model, config.training, vqvae, device)
    return [*lines, _time_line(config.training, seconds, num_train)]


def _build_dalle(config: DalleRunConfig, vqvae: ImageTokenizer) -> TextToImageModel:
    return build_text_to_image(
        DalleConfig(
            decoder=config.decoder,
            vocab_size=config.text.vocab_size,
            text_length=config.text.text_length,
            codebook_levels=vqvae.codebook_levels,
            image_grid_size=vqvae.image_grid_size,
        )
    )


@torch.inference_mode()
def _encoding_seconds(vqvae: ImageTokenizer) -> float:
    device = next(vqvae.parameters()).device
    pixels = torch.zeros(16, 3, *vqvae.config.pixel_size, device=device)
    vqvae.encode_to_token_ids(pixels)  # the first call allocates
    started = time.perf_counter()
    vqvae.encode_to_token_ids(pixels).cpu()
    return (time.perf_counter() - started) / len(pixels)


def _step_seconds(
    model: nn.Module, training: TrainingConfig, vqvae: ImageTokenizer, device: torch.device
) -> float:
    """Time forward and backward of one update on one process, without the optimizer."""
    # One micro-batch is timed; an update takes as many as it accumulates.
    parts = training.gradient_accumulation_steps
    batch = max(1, training.global_batch_size // parts)
    seconds = []
    for _ in range(_TIMED_STEPS):
        started = time.perf_counter()
        loss = _some_loss(model, batch, vqvae, device)
        loss.backward()
        float(loss.detach())  # waits for a GPU
        model.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    # The fastest one: the first allocates, and other programs slow down others.
    return min(seconds) * parts


def _some_loss(
    model: nn.Module, batch: int, vqvae: ImageTokenizer, device: torch.device
) -> torch.Tensor:
    # Contents do not change the time of a step.
    if isinstance(model, TextToImageModel):
        config = model.config
        text = torch.ones(batch, config.text_length, dtype=torch.long, device=device)
        image = torch.zeros(batch, config.image_length, dtype=torch.long, device=device)
        logits = model(text, image)
        return token_nats(logits.image.flatten(0, 1), image.flatten()).mean()
    pixels = torch.zeros(batch, 3, *vqvae.config.pixel_size, device=device)
    output = model(pixels, generator=torch.Generator(device).manual_seed(0))
    return F.l1_loss(output.reconstruction, pixels) + output.quantizer_loss


def _time_line(training: TrainingConfig, seconds: float, num_train: int) -> str:
    steps, minutes = training.max_steps, training.max_minutes
    if steps is None and minutes is None:
        steps = DEFAULT_MAX_STEPS
    if minutes is not None:
        affordable = max(1, int(minutes * 60 / seconds))
        steps = affordable if steps is None else min(steps, affordable)
    assert steps is not None
    epochs = steps * training.global_batch_size / max(1, num_train)
    return (
        f"training: a step takes about {seconds:.3f} s on one process; {steps} steps take about "
        f"{steps * seconds / 60:.1f} minutes and show each image {epochs:.1f} times"
    )


def _readable(num_bytes: int | float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.1f} GiB"
