"""Does the model copy? Sampled images against the training set, in tokens and in features.

A generation that shares most of its tokens with one training image may be a copy. The same share
for held-out true images says how much is to be expected from images that cannot be copies. The
test of Meehan et al. asks the same of distances: are generated images nearer to the training set than
held-out images are?
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from dalle_mini_impl.data.image_grid import make_grid
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.bootstrap import bootstrap_mean
from dalle_mini_impl.evaluation.report import Section, Table, percent
from dalle_mini_impl.evaluation.samples import Samples, spread_indices, to_images

COPY_THRESHOLD = 0.9  # fraction of equal tokens above which an image counts as a copy
NUM_SHOWN = 32
HELD_OUT_PER_CELL = 50  # on average
MAX_CELLS = 10
MIN_GENERATED_PER_CELL = 20

Features = Float[Tensor, "_ features"]


def nearest_agreement(
    token_ids: Int[Tensor, "batch image_length"], train: Int[Tensor, "train image_length"]
) -> Float[Tensor, " batch"]:
    """Find, for each image, the largest fraction of tokens that it has in common with one other.

    Args:
        token_ids: Images.
        train: Images to compare with.

    Returns:
        Shares in [0, 1].
    """
    return torch.stack([(train == row).float().mean(dim=1).max() for row in token_ids])


@dataclass(frozen=True)
class CopyingCell:
    """One cell of the feature space in the data-copying test."""

    num_train: int
    num_held_out: int
    num_generated: int
    z: float
    """Below 0: generated images are nearer to the training set than held-out images are."""


@dataclass(frozen=True)
class CopyingTest:
    """Result of the data-copying test."""

    score: float | None
    """C_T; far below 0 (say -3) is copying, far above 0 is missing the training images. None if
    no cell has enough images."""
    cells: list[CopyingCell]
    """Those with enough images."""


def data_copying_test(
    generated: Float[Tensor, "generated features"],
    held_out: Float[Tensor, "held_out features"],
    train: Float[Tensor, "train features"],
    *,
    seed: int = 0,
) -> CopyingTest:
    """Test whether generated images are nearer to the training set than held-out images are.

    Args:
        generated: Features of generated images.
        held_out: Of true images outside the training set.
        train: Of the training set.
        seed: Of the k-means that finds the cells.

    Returns:
        The score: the z of each cell, weighted by its fraction of held-out images.

    Raises:
        UserError: If scipy is not installed.

    Source: Meehan, Chaudhuri and Dasgupta 2020, arXiv:2004.05675, section 3.
    """
    try:
        from scipy.cluster.vq import kmeans2, vq
    except ImportError:
        raise UserError(
            "scipy: not installed, expected by evaluate.py: pip install -e '.[eval]'"
        ) from None
    count = min(MAX_CELLS, max(1, len(held_out) // HELD_OUT_PER_CELL), len(train))
    centres, train_cells = kmeans2(train.numpy(), count, minit="++", rng=seed)
    held_out_cells, generated_cells = (
        vq(part.numpy(), centres)[0] for part in (held_out, generated)
    )
    cells = []
    for cell in range(count):
        own = train[train_cells == cell]
        seen, made = held_out[held_out_cells == cell], generated[generated_cells == cell]
        if len(made) >= min(MIN_GENERATED_PER_CELL, len(generated)) and len(seen) and len(own):
            z = _z(_nearest(made, own)[0], _nearest(seen, own)[0])
            cells.append(CopyingCell(len(own), len(seen), len(made), z))
    total = sum(cell.num_held_out for cell in cells)
    if not total:
        return CopyingTest(None, [])
    return CopyingTest(sum(cell.z * cell.num_held_out for cell in cells) / total, cells)


def _nearest(images: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest training image, and which it is."""
    nearest = torch.cdist(images, train).min(dim=1)
    return nearest.values, nearest.indices


def _z(generated: Float[Tensor, " generated"], held_out: Float[Tensor, " held_out"]) -> float:
    """Mann and Whitney's U of two samples as a normal deviate; below 0: generated are smaller."""
    from scipy.stats import mannwhitneyu

    n, m = len(generated), len(held_out)
    statistic = mannwhitneyu(generated.numpy(), held_out.numpy()).statistic
    return float((statistic - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12))


def measure_memorization(
    generated: Samples,
    held_out: Samples,
    train: Samples,
    features: Mapping[str, Features],
    *,
    seed: int,
) -> Section:
    """Compare generated images and held-out images with all training images.

    Args:
        generated: CandidateTokens, with the captions that they were generated from.
        held_out: The true images of the same captions.
        train: The training set.
        features: Of ``generated``, ``held_out`` and ``train``; of ``reconstructions``, the held-out images
            after the image tokenizer, and of ``copies``, reconstructed training images near them.
        seed: Of the data-copying test.

    Returns:
        Fractions of copies, the data-copying test, and generated images beside their nearest images.
    """
    agreement = {
        "generated": nearest_agreement(generated.image_token_ids, train.image_token_ids),
        "held-out images": nearest_agreement(held_out.image_token_ids, train.image_token_ids),
    }
    tokens = {
        name: {
            "agreement": bootstrap_mean(fractions.numpy()),
            "copies": bootstrap_mean((fractions > COPY_THRESHOLD).float().numpy()),
        }
        for name, fractions in agreement.items()
    }
    pairs = {
        "generated images against held-out images": ("generated", "held_out"),
        "generated images against reconstructed held-out images": ("generated", "reconstructed"),
        "copies against reconstructed held-out images": ("copies", "reconstructed"),
    }
    tests = {
        name: data_copying_test(features[made], features[seen], features["train"], seed=seed)
        for name, (made, seen) in pairs.items()
    }
    return Section(
        "Memorisation",
        f"Copies share more than {COPY_THRESHOLD:.0%} of their tokens with one training image; "
        "held-out images, which cannot be copies, show what to expect. C_T is the data-copying "
        "test of Meehan et al. 2020 on the features of the section above: below -3 generated images are "
        "nearer to training images than held-out images are, above 3 farther. CandidateTokens come "
        "from the tokenizer, so their fair partners are reconstructed held-out images. The last row is "
        "what a model would score that generates the nearest training image each time.",
        {
            "num_generated": len(generated),
            "num_train": len(train),
            "tokens": tokens,
            "data_copying_test": {name: asdict(found) for name, found in tests.items()},
        },
        [
            Table(
                "tokens in common with the nearest training image",
                ("images", "mean share", "copies"),
                [
                    (name, percent(found["agreement"]), percent(found["copies"]))
                    for name, found in tokens.items()
                ],
            ),
            Table(
                "data-copying test",
                ("images", "C_T", "z of each cell (generated images in it)"),
                [
                    (
                        name,
                        "too few images" if found.score is None else f"{found.score:.2f}",
                        ", ".join(f"{cell.z:.1f} ({cell.num_generated})" for cell in found.cells),
                    )
                    for name, found in tests.items()
                ],
            ),
        ],
        {"nearest": _sheet(generated, train, features, agreement["generated"])},
    )


def _sheet(
    generated: Samples, train: Samples, features: Mapping[str, Features], agreement: Tensor
) -> Image.Image:
    """CandidateTokens, each beside the training image with the nearest features."""
    chosen = spread_indices(len(generated), NUM_SHOWN)
    nearest = _nearest(features["generated"][chosen], features["train"])[1].tolist()
    images, captions = [], []
    for index, other in zip(chosen, nearest, strict=True):
        images += to_images(torch.stack([generated.pixels[index], train.pixels[other]]))
        captions += [
            f"generated ({agreement[index]:.0%}): {generated.captions[index]}",
            f"training: {train.captions[other]}",
        ]
    return make_grid(images, columns=8, captions=captions)
