"""Memorization: generated images against the training set, in tokens and in features.

A generated image that agrees in most of its tokens with one training image may be memorized. The
same fraction for held-out images, which cannot be memorized, is the baseline. The data-copying
test of Meehan et al. compares distances: are generated images nearer to the training set than
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
from dalle_mini_impl.evaluation.bootstrap import Estimate, bootstrap_mean
from dalle_mini_impl.evaluation.distribution import Features
from dalle_mini_impl.evaluation.report import Section, Table, percent
from dalle_mini_impl.evaluation.samples import Samples, evenly_spaced, to_images

MEMORIZED_THRESHOLD = 0.9  # fraction of equal tokens above which an image counts as memorized
NUM_SHOWN = 32
HELD_OUT_PER_CELL = 50  # on average
MAX_CELLS = 10
MIN_GENERATED_PER_CELL = 20
TEXT = (
    f"An image counts as memorized if more than {MEMORIZED_THRESHOLD:.0%} of its tokens agree with "
    "one training image; held-out images, which cannot be memorized, show what to expect. C_T is "
    "the data-copying test of Meehan et al. 2020 on the features of the section above: below -3, "
    "generated images are nearer to training images than held-out images are; above 3, farther. "
    "Generated images come from the tokenizer, so the fair comparison is with reconstructed "
    "held-out images. The last row is the score of a model that generates the nearest training "
    "image each time."
)


@dataclass(frozen=True)
class DataCopyingCell:
    """One cell of the feature space in the data-copying test."""

    num_train: int
    num_held_out: int
    num_generated: int
    z: float
    """Below 0: generated images are nearer to the training set than held-out images are."""


@dataclass(frozen=True)
class DataCopyingTest:
    """Result of the data-copying test."""

    score: float | None
    """C_T; far below 0 (say -3) is copying, far above 0 is underfitting. None if no cell has
    enough images."""
    cells: list[DataCopyingCell]
    """Those with enough images."""


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
        generated: Generated images and their captions.
        held_out: The held-out images of the same captions.
        train: The training set.
        features: Of ``generated``, ``held_out`` and ``train``; of ``reconstructed``, the held-out
            images after the image tokenizer, and of ``copied``, the reconstructed training images
            nearest to them.
        seed: Of the data-copying test.

    Raises:
        UserError: If scipy is not installed.
    """
    # Held-out images are not in the training set: their agreement is what similar images have.
    agreement = {
        "generated": nearest_agreement(generated.image_token_ids, train.image_token_ids),
        "held-out images": nearest_agreement(held_out.image_token_ids, train.image_token_ids),
    }
    tokens = {
        name: {
            "agreement": bootstrap_mean(values.numpy()),
            "memorized": bootstrap_mean((values > MEMORIZED_THRESHOLD).float().numpy()),
        }
        for name, values in agreement.items()
    }
    # The last pair bounds the score from below: a model that only copies.
    compared = {
        "generated images against held-out images": ("generated", "held_out"),
        "generated images against reconstructed held-out images": ("generated", "reconstructed"),
        "copied images against reconstructed held-out images": ("copied", "reconstructed"),
    }
    # Features see what tokens miss: a copy that is shifted by a pixel has other tokens.
    tests = {
        name: data_copying_test(features[made], features[seen], features["train"], seed=seed)
        for name, (made, seen) in compared.items()
    }
    return Section(
        "Memorization",
        TEXT,
        {
            "num_generated": len(generated),
            "num_train": len(train),
            "tokens": tokens,
            "data_copying_test": {name: asdict(found) for name, found in tests.items()},
        },
        [_token_table(tokens), _test_table(tests)],
        {"nearest": _sheet(generated, train, features, agreement["generated"])},
    )


def nearest_agreement(
    token_ids: Int[Tensor, "batch image_length"], train: Int[Tensor, "train image_length"]
) -> Float[Tensor, " batch"]:
    """Compute the fraction of equal tokens of each image and its nearest training image."""
    # Cell by cell: (train, image_length) == (image_length,), for one image at a time.
    return torch.stack([(train == row).float().mean(dim=1).max() for row in token_ids])


def data_copying_test(
    generated: Float[Tensor, "generated features"],
    held_out: Float[Tensor, "held_out features"],
    train: Float[Tensor, "train features"],
    *,
    seed: int = 0,
) -> DataCopyingTest:
    """Test whether generated images are nearer to the training set than held-out images are.

    The score is the mean z of the cells, weighted by their numbers of held-out images. UserError if
    scipy is not installed.

    Source: Meehan, Chaudhuri and Dasgupta 2020, arXiv:2004.05675, section 3.
    """
    try:
        from scipy.cluster.vq import kmeans2, vq
    except ImportError:
        raise UserError(
            "scipy: not installed, expected by evaluate.py: pip install -e '.[eval]'"
        ) from None
    # 1. Cells: clusters of the training set, so that each image is compared with its like.
    count = min(MAX_CELLS, max(1, len(held_out) // HELD_OUT_PER_CELL), len(train))
    centers, train_cells = kmeans2(train.numpy(), count, minit="++", rng=seed)
    held_out_cells = vq(held_out.numpy(), centers)[0]
    generated_cells = vq(generated.numpy(), centers)[0]
    # 2. In each cell with enough images: are distances to its training images unusually small?
    cells = []
    for cell in range(count):
        own = train[train_cells == cell]
        seen, made = held_out[held_out_cells == cell], generated[generated_cells == cell]
        # The normal approximation of U needs some images: 20, or all where there are fewer.
        if len(made) >= min(MIN_GENERATED_PER_CELL, len(generated)) and len(seen) and len(own):
            z = _z(_nearest(made, own)[0], _nearest(seen, own)[0])
            cells.append(DataCopyingCell(len(own), len(seen), len(made), z))
    # 3. Weigh the cells by the data.
    total = sum(cell.num_held_out for cell in cells)
    if not total:
        return DataCopyingTest(None, [])
    return DataCopyingTest(sum(cell.z * cell.num_held_out for cell in cells) / total, cells)


def _nearest(images: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Return distance and index of the nearest training image."""
    nearest = torch.cdist(images, train).min(dim=1)  # (images, train)
    return nearest.values, nearest.indices


def _z(generated: Float[Tensor, " generated"], held_out: Float[Tensor, " held_out"]) -> float:
    """Compute Mann and Whitney's U of two sets of distances as a normal deviate."""
    from scipy.stats import mannwhitneyu

    # Normal approximation without ties: mean n m / 2, variance n m (n + m + 1) / 12.
    n, m = len(generated), len(held_out)
    statistic = mannwhitneyu(generated.numpy(), held_out.numpy()).statistic
    return float((statistic - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12))


def _token_table(tokens: Mapping[str, Mapping[str, Estimate]]) -> Table:
    return Table(
        "tokens in common with the nearest training image",
        ("images", "mean fraction", "memorized"),
        [
            (name, percent(found["agreement"]), percent(found["memorized"]))
            for name, found in tokens.items()
        ],
    )


def _test_table(tests: Mapping[str, DataCopyingTest]) -> Table:
    rows = []
    for name, found in tests.items():
        score = "too few images" if found.score is None else f"{found.score:.2f}"
        cells = ", ".join(f"{cell.z:.1f} ({cell.num_generated})" for cell in found.cells)
        rows.append((name, score, cells))
    columns = ("images", "C_T", "z of each cell (generated images in it)")
    return Table("data-copying test", columns, rows)


def _sheet(
    generated: Samples, train: Samples, features: Mapping[str, Features], agreement: Tensor
) -> Image.Image:
    """Lay out generated images, each next to the training image with the nearest features."""
    chosen = evenly_spaced(len(generated), NUM_SHOWN)
    nearest = _nearest(features["generated"][chosen], features["train"])[1].tolist()
    images, captions = [], []
    for index, other in zip(chosen, nearest, strict=True):
        images += to_images(torch.stack([generated.pixels[index], train.pixels[other]]))
        captions += [
            f"generated ({agreement[index]:.0%}): {generated.captions[index]}",
            f"training: {train.captions[other]}",
        ]
    return make_grid(images, columns=8, captions=captions)
