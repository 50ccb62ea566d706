"""All figures of a model on the emoji data: composition, likelihood, copying."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dalle_mini_impl.data.images import image_to_pixels
from dalle_mini_impl.data.pairs import open_pairs
from dalle_mini_impl.data.pixels import load_all_pixels
from dalle_mini_impl.evaluation.copying import report_copying
from dalle_mini_impl.evaluation.emoji_grid import GridReport, evaluate_grid
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.rerank import image_log_likelihood

BATCH_SIZE = 64


def evaluate_emoji(
    pipeline: TextToImagePipeline, data_dir: Path, **grid_options: Any
) -> tuple[dict[str, float], GridReport]:
    """Measure a model on the held-out grid cells and compare with the training pictures.

    Args:
        pipeline: The model.
        data_dir: Folder that ``prepare_emoji.py`` wrote.
        **grid_options: Passed on to ``evaluate_grid``.

    Returns:
        Named figures, and the drawings.

    Raises:
        UserError: If the folder holds no emoji data.
    """
    grid = evaluate_grid(pipeline, data_dir, **grid_options)
    train, train_captions = _tokens(pipeline, data_dir, "train")
    held_out, held_out_captions = _tokens(pipeline, data_dir, "test_compose")
    drawn = _encode(pipeline, torch.stack([image_to_pixels(image) for image in grid.drawn]))
    copying = report_copying(drawn, held_out, train)
    step = max(1, len(train) // 400)
    held_out_nats = _image_nats(pipeline, held_out, held_out_captions)
    train_nats = _image_nats(pipeline, train[::step], train_captions[::step])
    figures = {
        "num_cells": float(grid.num_cells),
        "grid_accuracy": grid.grid_accuracy,
        "gender_accuracy": grid.gender_accuracy,
        "tone_accuracy": grid.tone_accuracy,
        "style_accuracy": grid.style_accuracy,
        "held_out_image_nats_per_token": held_out_nats,
        "train_image_nats_per_token": train_nats,
        **vars(copying),
    }
    return figures, grid


def _tokens(
    pipeline: TextToImagePipeline, data_dir: Path, split: str
) -> tuple[Int[Tensor, "samples image_length"], list[str]]:
    pairs = open_pairs(str(data_dir), split=split)
    pixels, kept, _ = load_all_pixels(pairs, image_size=pipeline.vqvae.config.image_size)
    return _encode(pipeline, pixels.float() / 127.5 - 1), [pairs[i].captions[0] for i in kept]


@torch.inference_mode()
def _encode(pipeline: TextToImagePipeline, pixels: Tensor) -> Int[Tensor, "samples image_length"]:
    device = next(pipeline.vqvae.parameters()).device
    parts = [
        pipeline.vqvae.encode_to_token_ids(part.to(device)).flatten(1).cpu()
        for part in pixels.split(BATCH_SIZE)
    ]
    return torch.cat(parts)


def _image_nats(pipeline: TextToImagePipeline, token_ids: Tensor, captions: list[str]) -> float:
    """Average -log p(image | caption) over pictures and tokens."""
    device = pipeline.dalle.text_head.weight.device
    text = pipeline.captions.encode(captions).to(device)
    total = image_log_likelihood(pipeline.dalle, text, token_ids.to(device)).sum()
    return -float(total) / token_ids.numel()
