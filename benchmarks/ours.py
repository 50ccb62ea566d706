"""This project's decoder in every comparison; with ours_pictures.py all that calls the package.

It takes the road that users take (the trainer's own step, `generate_image_token_ids`, the default
config), so that whatever makes the package faster shows without a change here.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ceilings import attention_flops, count_flops
from benchmarks.sizes import Size, random_pairs
from benchmarks.timing import Job, NotMeasuredError, Precision, require_training
from dalle_mini_impl.data.text_tokenizer import TextTokenizer, train_text_tokenizer
from dalle_mini_impl.data.token_dataset import TokenDataset
from dalle_mini_impl.hardware import build_accelerator, use_fast_float32
from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.models.dalle_config import DalleConfig, DecoderConfig
from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.native.build import UnavailableError
from dalle_mini_impl.native.decoder import NativeDecoder, NativeWeights
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.generate import SamplingConfig, generate_image_token_ids
from dalle_mini_impl.training.config import TrainingConfig
from dalle_mini_impl.training.dalle import DalleTask, DalleTaskConfig
from dalle_mini_impl.training.task import Task
from dalle_mini_impl.training.trainer import Trainer
from vqvae import VQVAE, VQVAEConfig

COLDEST = 1e-6  # a temperature at which the likeliest token is always generated
# By how much a sampled token may be less likely than the best one of an uncached pass, in nats.
TOLERATED_NATS: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 0.1}
TOLERATED_NATS_INT8 = 0.2
GUIDANCE_SCALE = 3.0


def matmul_setting() -> str:
    """Name the matrix product that training and generation choose for themselves on this machine."""
    before = torch.get_float32_matmul_precision()
    try:
        use_fast_float32()
        return torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)


def build_decoder(size: Size) -> Dalle:
    """Build a decoder of a size, with plain image tokens as peers have and without dropout."""
    decoder = DecoderConfig(
        hidden_size=size.width,
        num_layers=size.layers,
        num_heads=size.heads,
        dropout_probability=0.0,
    )
    config = DalleConfig(
        decoder=decoder,
        vocab_size=size.vocab,
        text_length=size.text_length,
        codebook_levels=(size.codebook,),
        image_grid_size=(size.grid, size.grid),
    )
    return Dalle(config)


def build_pipeline(dalle: Dalle, vqvae: VQVAE) -> TextToImagePipeline:
    """Put a decoder into a pipeline with a caption tokenizer of its vocabulary."""
    vocab_size = dalle.config.vocab_size
    words = (f"{2654435761 * number % 2**32:08x}" for number in range(4 * vocab_size))
    tokenizer = train_text_tokenizer(words, vocab_size=vocab_size)  # so many words fill it
    text_tokenizer = TextTokenizer(tokenizer, dalle.config.text_length)
    return TextToImagePipeline(dalle=dalle, vqvae=vqvae, text_tokenizer=text_tokenizer)


def build_trainer(
    model: nn.Module,
    task: Task,
    *,
    batch: int,
    precision: Precision,
    **options: Any,
) -> Trainer:
    """Build the trainer of a run that never saves and, unless told otherwise, never ends."""
    endless = {"max_steps": 10**9, "learning_rate": 3e-4, "warmup_steps": 0}
    config = TrainingConfig(global_batch_size=batch, **(endless | options))
    accelerator = build_accelerator("bf16" if precision == "bfloat16" else "no")
    folder = Path(tempfile.gettempdir())  # for checkpoints, which are never written
    return Trainer(task, config, accelerator=accelerator, output_dir=folder)


def trainer_step(trainer: Trainer) -> Callable[[], float]:
    """Make the trainer's own step callable: batch, loss, gradients, clipping, update."""

    def step() -> float:
        metrics = trainer._step(trainer._batches(trainer.state.step))
        trainer.state.step += 1
        return float(metrics["loss"])

    return step


def count_trainer_flops(trainer: Trainer, *, with_batched: bool = False) -> float:
    """Count the arithmetic of a step, which must not be compiled meanwhile: it would stay eager."""
    made, trainer.wrapped = trainer.wrapped, trainer.model
    flops = count_flops(trainer_step(trainer), with_batched=with_batched)
    trainer.wrapped = made
    return flops


def decoder_training(
    size: Size,
    precision: Precision,
    *,
    verify_steps: int = 3,
    activation_checkpointing: bool = False,
    compiled: bool = False,
) -> Job:
    """Train a decoder on made-up tokens.

    Args:
        size: Of the decoder and its batch.
        precision: Float32, or bf16 as `mixed_precision` gives it.
        verify_steps: Steps over which the loss must fall.
        activation_checkpointing: Whether blocks are computed again in the backward pass.
        compiled: Whether torch.compile makes the step.

    Returns:
        One training step; items are tokens.
    """
    torch.manual_seed(0)
    text, image = random_pairs(size)
    tokens = TokenDataset(
        image_token_ids=image[:, None].int(),
        text_token_ids=text.int(),
        caption_offsets=torch.arange(size.batch + 1),
    )
    trainer = build_trainer(
        dalle := build_decoder(size),
        _decoder_task(dalle, tokens),
        batch=size.batch,
        precision=precision,
        activation_checkpointing=activation_checkpointing,
        compile=compiled,
    )
    step = trainer_step(trainer)
    flops = count_trainer_flops(trainer) + attention_flops(
        layers=size.layers, width=size.width, length=size.length, rows=size.batch
    )
    require_training(step, steps=verify_steps, compiled=compiled)
    return Job(run=step, items=size.tokens, flops=flops)


def _decoder_task(dalle: Dalle, tokens: TokenDataset) -> DalleTask:
    config = dalle.config
    side = config.image_grid_size[0]
    vqvae = VQVAE(
        VQVAEConfig(
            image_size=side * 2,
            patch_size=2,
            channels=(8,),
            quantizer="vq",
            vq_codebook_size=config.codebook_size,
        )
    )
    return DalleTask(
        tokens,
        tokens,
        DalleTaskConfig(),
        sample_weights=None,
        identity="",
        pipeline=build_pipeline(dalle, vqvae),
        fixed_prompts=(),
    )


def decoder_sampler(
    size: Size, precision: Precision, native: NativeWeights | None = None
) -> Callable[..., Job]:
    """Prepare the generating of images' tokens, and prove that its cache does not change them.

    Args:
        size: Of the decoder.
        precision: Float32 gives the same images everywhere; bf16 weights are half as large.
        native: Generate with the compiled pass and such weights.

    Returns:
        A function of ``batch`` and ``guided`` that returns the job; items are images.
    """
    torch.manual_seed(0)
    model = build_decoder(size).eval()
    with torch.no_grad():
        model.image_head.rows.normal_(std=0.02)  # fresh heads are zero, and all tokens alike
    reduced = model.to(torch.bfloat16) if precision == "bfloat16" else model
    compiled = compile_native(reduced, native) if native else None
    tolerated = TOLERATED_NATS_INT8 if native == "int8" else TOLERATED_NATS[precision]
    require_cache_is_exact(reduced, size, tolerated_nats=tolerated, native=compiled)
    weights: list[Tensor] = [model.image_head.rows]
    weights += [part.weight for part in model.blocks.modules() if isinstance(part, nn.Linear)]

    def job(*, batch: int, guided: bool) -> Job:
        text, _ = random_pairs(size, batch=batch)
        scale = GUIDANCE_SCALE if guided else 1.0
        sampling_config = SamplingConfig(guidance_scale=scale, guidance_schedule="constant")
        return Job(
            run=lambda: generate_image_token_ids(
                compiled or reduced,
                text,
                seeds=torch.arange(batch),
                sampling_config=sampling_config,
            ),
            items=batch,
            flops=2.0 * sum(map(torch.numel, weights)) * batch * (1 + guided) * size.image_length,
        )

    return job


def compile_native(model: TextToImageModel, weights: NativeWeights) -> NativeDecoder:
    """Compile the decoder's pass.

    Args:
        model: Whose pass.
        weights: What they are packed as.

    Returns:
        The compiled pass.

    Raises:
        NotMeasuredError: If nothing can be compiled here.
    """
    try:
        return NativeDecoder(model, weights)
    except UnavailableError as error:
        raise NotMeasuredError(str(error)) from None


def require_cache_is_exact(
    model: Dalle, size: Size, *, tolerated_nats: float, native: NativeDecoder | None = None
) -> None:
    """Compare cached generating with one uncached pass over the sampled tokens.

    Args:
        model: In evaluation mode.
        size: Its size.
        tolerated_nats: How much less likely than the likeliest token a generated one may be.
        native: The compiled pass over its weights, to generate with that.

    Raises:
        ValueError: If cached generation, told to take the likeliest token, took another.
    """
    text, _ = random_pairs(size, batch=2)
    sampling_config = SamplingConfig(guidance_scale=1.0, temperature=COLDEST)
    drawer = native or model
    generated = generate_image_token_ids(
        drawer, text, seeds=torch.arange(2), sampling_config=sampling_config
    )
    tokens = generated.image_token_ids
    with torch.inference_mode():
        logits = model(text, tokens).image.float()
    gap = (logits.max(-1).values - logits.gather(2, tokens.unsqueeze(2)).squeeze(2)).max()
    if tokens.shape[1] != size.image_length or not gap <= tolerated_nats:
        raise ValueError(f"cached and uncached generation differ by {gap:.2g} nats")
