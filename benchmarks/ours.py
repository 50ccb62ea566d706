"""This project's side of every comparison.

It runs what users run (the trainer's own step, `generate_image_token_ids`, the default config), so
that whatever makes the package faster shows without a change here.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.sizes import Size, random_pairs
from benchmarks.timing import Job, NotMeasuredError, Precision, Variant
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
from dalle_mini_impl.training.config import TextConfig, TrainingConfig
from dalle_mini_impl.training.dalle import DalleTask, DalleTaskConfig
from dalle_mini_impl.training.task import Task
from dalle_mini_impl.training.trainer import Trainer
from vqvae import VQVAE, VQVAEConfig

ARGMAX_TEMPERATURE = 1e-6  # at which the likeliest token is always sampled
# By how much a sampled token may be less likely than the best one of an uncached pass, in nats.
TOLERATED_NATS: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 0.1}
TOLERATED_NATS_INT8 = 0.2
GUIDANCE_SCALE = 3.0


def variant(name: str, build: Callable[[], Job], **options: Any) -> Variant:
    """Make a row of ours, with the matrix product that training and generation choose here."""
    return Variant(name, build, is_ours=True, matmul=matmul_setting(), **options)


def matmul_setting() -> str:
    """Return the matrix product that training and generation choose on this machine."""
    # The rule is in the package alone: let it choose, look, and undo it.
    before = torch.get_float32_matmul_precision()
    try:
        use_fast_float32()
        return torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)


def decoder_config(size: Size) -> DecoderConfig:
    """Configure a decoder without dropout, as peers have none."""
    sizes: dict[str, Any] = {"num_layers": size.layers, "num_heads": size.heads}
    return DecoderConfig(hidden_size=size.width, dropout_probability=0.0, **sizes)


def build_decoder(size: Size, *, random_heads: bool = False) -> Dalle:
    """Build a decoder with plain image tokens, as peers have."""
    config = DalleConfig(
        decoder=decoder_config(size),
        vocab_size=size.vocab,
        text_length=size.text_length,
        codebook_levels=(size.codebook,),
        image_grid_size=(size.grid, size.grid),
    )
    dalle = Dalle(config)
    return randomize_heads(dalle) if random_heads else dalle


def randomize_heads(dalle: Dalle) -> Dalle:
    """Make the tokens of an untrained decoder differ: fresh heads are zero."""
    for weight in (dalle.image_head.rows, dalle.text_head.weight):
        nn.init.normal_(weight, std=0.02)
    return dalle


def build_pipeline(dalle: Dalle, vqvae: VQVAE) -> TextToImagePipeline:
    """Build a pipeline with a caption tokenizer that fills the decoder's vocabulary."""
    vocab_size = dalle.config.vocab_size
    # So many different words fill the vocabulary; Knuth's multiplier scatters their digits.
    words = (f"{2654435761 * number % 2**32:08x}" for number in range(4 * vocab_size))
    tokenizer = train_text_tokenizer(words, vocab_size=vocab_size)
    text_tokenizer = TextTokenizer(tokenizer, dalle.config.text_length)
    return TextToImagePipeline(dalle=dalle, vqvae=vqvae, text_tokenizer=text_tokenizer)


def build_model(
    vqvae: VQVAE, decoder: DecoderConfig, text: TextConfig
) -> tuple[Dalle, TextToImagePipeline]:
    """Build an untrained decoder on a tokenizer's tokens, and a pipeline around it."""
    config = DalleConfig(
        decoder=decoder,
        vocab_size=text.vocab_size,
        text_length=text.text_length,
        codebook_levels=vqvae.codebook_levels,
        image_grid_size=vqvae.image_grid_size,
    )
    dalle = Dalle(config)
    return dalle, build_pipeline(dalle, vqvae)


def build_dalle_task(tokens: TokenDataset, pipeline: TextToImagePipeline) -> DalleTask:
    """Build the decoder's default task, with the same tokens for training and validation."""
    options: dict[str, Any] = {"sample_weights": None, "fixed_prompts": ()}
    return DalleTask(tokens, tokens, DalleTaskConfig(), pipeline=pipeline, **options)


def build_trainer(task: Task, *, batch: int, precision: Precision, **options: Any) -> Trainer:
    """Build the trainer of a run that never saves and, unless told otherwise, never ends."""
    endless = {"max_steps": 10**9, "learning_rate": 3e-4, "warmup_steps": 0}
    config = TrainingConfig(global_batch_size=batch, **(endless | options))
    accelerator = build_accelerator("bf16" if precision == "bfloat16" else "no")
    folder = Path(tempfile.gettempdir())  # for checkpoints, which are never written
    return Trainer(task, config, accelerator=accelerator, output_dir=folder)


def trainer_step(trainer: Trainer) -> Callable[[], float]:
    """Return the trainer's own step: batch, loss, gradients, clipping, update."""

    def step() -> float:
        metrics = trainer._step(trainer._batches(trainer.state.step))
        trainer.state.step += 1
        return float(metrics["loss"])

    return step


def count_trainer_flops(trainer: Trainer, *, with_batched: bool = False) -> float:
    """Count the arithmetic of a step."""
    # Eagerly: a model that is compiled under the counter stays eager afterwards.
    wrapped, trainer.wrapped = trainer.wrapped, trainer.model
    flops = timing.count_flops(trainer_step(trainer), with_batched=with_batched)
    trainer.wrapped = wrapped
    return flops


def decoder_training(size: Size, precision: Precision, **options: Any) -> Job:
    """Train a decoder on random tokens, one step per call; items are tokens.

    Further options are of TrainingConfig.
    """
    torch.manual_seed(0)
    text, image = random_pairs(size)
    tokens = TokenDataset(
        image_token_ids=image[:, None].int(),
        text_token_ids=text.int(),
        caption_offsets=torch.arange(size.batch + 1),
    )
    dalle = build_decoder(size)
    # A tokenizer only for the pipeline's shapes: no pixels are encoded here.
    codes: dict[str, Any] = {"quantizer": "vq", "vq_codebook_size": size.codebook}
    vqvae = VQVAE(VQVAEConfig(image_size=size.grid * 2, patch_size=2, channels=(8,), **codes))
    task = build_dalle_task(tokens, build_pipeline(dalle, vqvae))
    trainer = build_trainer(task, batch=size.batch, precision=precision, **options)
    step = trainer_step(trainer)
    flops = count_trainer_flops(trainer)
    flops += timing.attention_flops(size.layers, size.width, size.length, size.batch)
    timing.require_training(step, steps=3, compiled=trainer.config.compile)
    return Job(run=step, items=size.tokens, flops=flops)


def decoder_sampler(
    size: Size, precision: Precision, native: NativeWeights | None = None
) -> Callable[..., Job]:
    """Build a decoder, verify its cache and return what makes the job; items are images.

    With ``native`` weights the compiled pass generates.
    """
    torch.manual_seed(0)
    model = build_decoder(size, random_heads=True).eval()
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
    compiled = compile_native(model, native) if native else None
    tolerated = TOLERATED_NATS_INT8 if native == "int8" else TOLERATED_NATS[precision]
    require_cache_is_exact(model, size, tolerated_nats=tolerated, native=compiled)
    weights: list[Tensor] = [model.image_head.rows]
    weights += [part.weight for part in model.blocks.modules() if isinstance(part, nn.Linear)]

    def job(*, batch: int, guided: bool) -> Job:
        text, _ = random_pairs(size, batch=batch)
        scale = GUIDANCE_SCALE if guided else 1.0
        sampling_config = SamplingConfig(guidance_scale=scale, guidance_schedule="constant")
        return Job(
            run=lambda: generate_image_token_ids(
                compiled or model, text, seeds=torch.arange(batch), sampling_config=sampling_config
            ),
            items=batch,
            flops=2.0 * sum(map(torch.numel, weights)) * batch * (1 + guided) * size.image_length,
        )

    return job


def compile_native(model: TextToImageModel, weights: NativeWeights) -> NativeDecoder:
    """Compile the decoder's pass; a NotMeasuredError where nothing can be compiled."""
    try:
        return NativeDecoder(model, weights)
    except UnavailableError as error:
        raise NotMeasuredError(str(error)) from None


def require_cache_is_exact(
    model: Dalle, size: Size, *, tolerated_nats: float, native: NativeDecoder | None = None
) -> None:
    """Raise a ValueError if cached generation differs from one uncached pass.

    A sampled token may be ``tolerated_nats`` less likely than the likeliest one.
    """
    text, _ = random_pairs(size, batch=2)
    config = SamplingConfig(guidance_scale=1.0, temperature=ARGMAX_TEMPERATURE)
    tokens = generate_image_token_ids(
        native or model, text, seeds=torch.arange(2), sampling_config=config
    ).image_token_ids
    # The reference: one pass over the sampled tokens, in which no cache takes part.
    with torch.inference_mode():
        logits = model(text, tokens).image.float()  # (batch, image_length, codebook)
    gap = (logits.max(-1).values - logits.gather(2, tokens.unsqueeze(2)).squeeze(2)).max()
    if tokens.shape[1] != size.image_length or not gap <= tolerated_nats:
        raise ValueError(f"cached and uncached generation differ by {gap:.2g} nats")
