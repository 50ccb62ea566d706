"""How likely the decoder finds reference images, given their own caption, another one, or none.

The loss of an image's tokens is a code length for them, not a likelihood of its pixels: compare
only models of the same image tokenizer.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from dalle_mini_impl.data.image_grid import make_grid
from dalle_mini_impl.evaluation.bootstrap import Estimate, bootstrap_mean
from dalle_mini_impl.evaluation.report import Section, Table, number, render_heatmap
from dalle_mini_impl.evaluation.samples import Samples, derangement
from dalle_mini_impl.models.dalle_config import PAD_TOKEN_ID
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.progress import log_now_and_then
from dalle_mini_impl.sampling.likelihood import image_token_log_likelihoods

CAPTIONS = ("its caption", "no caption", "another caption")
TEXT = (
    "Loss on the tokens of reference images in nats per token: with its own caption, with none, "
    "and with the caption of another image of the same split; bits per image with its own. These "
    "are code lengths of tokens: compare only models of the same image tokenizer."
)


def measure_likelihood(
    pipeline: TextToImagePipeline, splits: Mapping[str, Samples], *, max_samples: int, seed: int
) -> Section:
    """Measure the loss on the tokens of reference images, by split and by position.

    ``splits`` has ``train`` and at least one other; ``seed`` pairs images with other captions.
    """
    progress = log_now_and_then("likelihoods: passes done")
    model, device = pipeline.dalle, pipeline.device
    figures: dict[str, dict[str, dict[str, Estimate]]] = {}
    counts: dict[str, int] = {}
    by_cell: dict[str, dict[str, Float[Tensor, "rows columns"]]] = {}
    for split, samples in splits.items():
        chosen = samples.subsample(max_samples)
        text = pipeline.text_tokenizer.encode(chosen.captions)
        others = text[derangement(len(text), seed=seed)]
        texts = dict(
            zip(CAPTIONS, (text, torch.full_like(text, PAD_TOKEN_ID), others), strict=True)
        )
        figures[split], by_cell[split], counts[split] = {}, {}, len(chosen)
        image = chosen.image_token_ids.to(device)
        # The first two differ by the log-likelihood ratio of image and caption; the third tells
        # whether it is the words that help, or the presence of any caption.
        for what, captions in texts.items():
            nats = -image_token_log_likelihoods(model, captions.to(device), image).cpu()
            by_cell[split][what] = nats.mean(dim=0).reshape(pipeline.vqvae.image_grid_size)
            per_token = bootstrap_mean(nats.mean(dim=1).numpy())
            bits = nats.shape[1] / math.log(2)  # tokens of an image, each in bits
            figures[split][what] = {
                "nats_per_token": per_token,
                "bits_per_image": Estimate(
                    per_token.value * bits, per_token.low * bits, per_token.high * bits
                ),
            }
            progress(len(CAPTIONS) * (len(figures) - 1) + len(figures[split]), 3 * len(splits))
    # Maps of one split are enough: the one with the least noise.
    largest = max((split for split in splits if split != "train"), key=lambda s: len(splits[s]))
    return _section(figures, counts, by_cell[largest], largest)


def _section(
    figures: dict[str, dict[str, dict[str, Estimate]]],
    counts: Mapping[str, int],
    by_cell: Mapping[str, Float[Tensor, "rows columns"]],
    shown: str,
) -> Section:
    by_split = [
        (
            split,
            str(counts[split]),
            *(number(found[what]["nats_per_token"]) for what in CAPTIONS),
            number(found[CAPTIONS[0]]["bits_per_image"], 1),
        )
        for split, found in figures.items()
    ]
    # One scale for the three maps, so that they can be compared.
    highest = max(float(values.max()) for values in by_cell.values())
    maps = [render_heatmap(values, low=0.0, high=highest) for values in by_cell.values()]
    num_rows = len(by_cell[CAPTIONS[0]])
    by_row = [
        (str(row + 1), *(f"{float(values[row].mean()):.3f}" for values in by_cell.values()))
        for row in range(num_rows)
    ]
    return Section(
        "Decoder",
        f"{TEXT} `loss_by_position.png` is of `{shown}`: black is 0, white {highest:.2f} nats.",
        {
            "splits": figures,
            "by_cell": {
                "split": shown,
                **{what: values.tolist() for what, values in by_cell.items()},
            },
        },
        [
            Table("loss", ("split", "images", *CAPTIONS, "bits per image"), by_split),
            Table(f"loss by row of the image, {shown}", ("row", *CAPTIONS), by_row),
        ],
        {"loss_by_position": make_grid(maps, columns=3, captions=list(by_cell))},
    )
