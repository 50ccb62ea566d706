"""How likely the decoder finds held-out images, given their caption, another one, or none.

The loss of an image's tokens is a code length for them, not a likelihood of its pixels: compare
models of the same image tokenizer alone.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_mini_impl.data.image_grid import make_grid
from dalle_mini_impl.evaluation.bootstrap import Estimate, bootstrap_mean
from dalle_mini_impl.evaluation.report import Section, Table, number, render_heatmap
from dalle_mini_impl.evaluation.samples import Samples
from dalle_mini_impl.models.dalle_config import PAD_TOKEN_ID
from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.progress import log_now_and_then
from dalle_mini_impl.sampling.likelihood import image_token_log_likelihoods

CAPTIONS = ("its caption", "no caption", "another caption")


def image_token_nats(
    model: TextToImageModel,
    text_token_ids: Int[Tensor, "batch text_length"],
    image_token_ids: Int[Tensor, "batch image_length"],
) -> Float[Tensor, "batch image_length"]:
    """Compute -log p of each image token, given the caption and the tokens before it.

    Args:
        model: In evaluation mode.
        text_token_ids: Captions, padded.
        image_token_ids: One image per caption.

    Returns:
        Nats, on the CPU.
    """
    device = model.image_head.rows.device
    logs = image_token_log_likelihoods(model, text_token_ids.to(device), image_token_ids.to(device))
    return -logs.cpu()


def shuffled(count: int, *, seed: int) -> Int[Tensor, " count"]:
    """Give every place another one: a permutation with no fixed point.

    Args:
        count: Of places.
        seed: Decides which.

    Returns:
        Indices; for a single place, itself.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    found = torch.empty_like(order)
    found[order] = order.roll(1)  # one cycle through all places
    return found


def measure_likelihood(
    pipeline: TextToImagePipeline,
    splits: Mapping[str, Samples],
    *,
    max_samples: int,
    seed: int,
) -> Section:
    """Measure the loss on the tokens of true images.

    Args:
        pipeline: The model.
        splits: Images by split, the training split among them.
        max_samples: Images per split, spread over all of it.
        seed: Decides whose caption is "another" one.

    Returns:
        Nats per token and bits per image, by split and by position.
    """
    progress = log_now_and_then("likelihoods: passes done")
    figures: dict[str, dict[str, dict[str, Estimate]]] = {}
    rows, by_cell = [], {}
    for index, (name, split) in enumerate(splits.items()):
        chosen = split.spread(max_samples)
        text = pipeline.text_tokenizer.encode(chosen.captions)
        given = (text, torch.full_like(text, PAD_TOKEN_ID), text[shuffled(len(text), seed=seed)])
        figures[name] = {}
        for number_of, (what, captions) in enumerate(zip(CAPTIONS, given, strict=True)):
            nats = image_token_nats(pipeline.dalle, captions, chosen.image_token_ids)
            by_cell[name, what] = nats.mean(dim=0)
            per_token = bootstrap_mean(nats.mean(dim=1).numpy())
            bits = nats.shape[1] / math.log(2)
            per_image = Estimate(
                per_token.value * bits, per_token.low * bits, per_token.high * bits
            )
            figures[name][what] = {"nats_per_token": per_token, "bits_per_image": per_image}
            progress(3 * index + number_of + 1, 3 * len(splits))
        found = figures[name]
        rows.append((
            name,
            str(len(chosen)),
            *(number(found[what]["nats_per_token"]) for what in CAPTIONS),
            number(found[CAPTIONS[0]]["bits_per_image"], 1),
        ))  # fmt: skip
    held_out = [name for name in splits if name != "train"]
    shown = max(held_out, key=lambda name: len(splits[name]))
    return _section(figures, rows, {what: by_cell[shown, what] for what in CAPTIONS}, shown,
                    pipeline.vqvae.image_grid_size)  # fmt: skip


def _section(
    figures: dict[str, dict[str, dict[str, Estimate]]],
    rows: list[tuple[str, ...]],
    by_cell: Mapping[str, Float[Tensor, " image_length"]],
    shown: str,
    grid: tuple[int, int],
) -> Section:
    maps = {what: nats.reshape(grid) for what, nats in by_cell.items()}
    highest = max(float(values.max()) for values in maps.values())
    images = [render_heatmap(values, low=0.0, high=highest) for values in maps.values()]
    by_row = [
        (str(row + 1), *(f"{float(values[row].mean()):.3f}" for values in maps.values()))
        for row in range(grid[0])
    ]
    return Section(
        "Decoder",
        "Loss on the tokens of true images in nats per token: with its own caption, with none, "
        "and with the caption of another image of the same split; bits per image with its own. "
        "These are code lengths of tokens: compare models of the same image tokenizer alone. "
        f"`loss_by_position.png` is of `{shown}`: black is 0, white {highest:.2f} nats.",
        {
            "splits": figures,
            "by_cell": {
                "split": shown,
                **{what: values.tolist() for what, values in maps.items()},
            },
        },
        [
            Table("loss", ("split", "images", *CAPTIONS, "bits per image"), rows),
            Table(f"loss by row of the image, {shown}", ("row", *CAPTIONS), by_row),
        ],
        {"loss_by_position": make_grid(images, columns=3, captions=list(maps))},
    )
