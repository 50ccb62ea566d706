"""Does the model copy? Drawn pictures against the training set, in tokens and in features.

A drawing that shares most of its tokens with one training picture may be a copy. The same share
for held-out true pictures says how much is to be expected from pictures that cannot be copies. The
test of Meehan et al. asks the same of distances: are drawings nearer to the training set than
held-out pictures are?
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

COPY_THRESHOLD = 0.9  # share of equal tokens above which a picture counts as a copy
NUM_SHOWN = 32
HELD_OUT_PER_CELL = 50  # on average
MAX_CELLS = 10
MIN_GENERATED_PER_CELL = 20

Features = Float[Tensor, "_ features"]


def nearest_agreement(
    token_ids: Int[Tensor, "batch image_length"], train: Int[Tensor, "train image_length"]
) -> Float[Tensor, " batch"]:
    """Find, for each picture, the largest share of tokens that it has in common with one other.

    Args:
        token_ids: Pictures.
        train: Pictures to compare with.

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
    """Below 0: drawings are nearer to the training set than held-out pictures are."""


@dataclass(frozen=True)
class CopyingTest:
    """Result of the data-copying test."""

    score: float | None
    """C_T; far below 0 (say -3) is copying, far above 0 is missing the training pictures. None if
    no cell has enough pictures."""
    cells: list[CopyingCell]
    """Those with enough pictures."""


def data_copying_test(
    generated: Float[Tensor, "drawn features"],
    held_out: Float[Tensor, "held_out features"],
    train: Float[Tensor, "train features"],
    *,
    seed: int = 0,
) -> CopyingTest:
    """Test whether drawings are nearer to the training set than held-out pictures are.

    Args:
        drawn: Features of drawings.
        held_out: Of true pictures outside the training set.
        train: Of the training set.
        seed: Of the k-means that finds the cells.

    Returns:
        The score: the z of each cell, weighted by its share of held-out pictures.

    Raises:
        UserError: If scipy is not installed.

    Source: Meehan, Chaudhuri and Dasgupta 2020, arXiv:2004.05675, section 3.
    """
    try:
        from scipy.cluster.vq import kmeans2, vq
    except ImportError:
        raise UserError(
            "scipy: not installed, wanted by evaluate.py: pip install -e '.[eval]'"
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
    """Distance to the nearest training picture, and which it is."""
    nearest = torch.cdist(images, train).min(dim=1)
    return nearest.values, nearest.indices


def _z(generated: Float[Tensor, " drawn"], held_out: Float[Tensor, " held_out"]) -> float:
    """Mann and Whitney's U of two samples as a normal deviate; below 0: drawn are smaller."""
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
    """Compare drawings and held-out pictures with all training pictures.

    Args:
        drawn: CandidateTokens, with the captions that they were drawn from.
        held_out: The true pictures of the same captions.
        train: The training set.
        features: Of ``generated``, ``held_out`` and ``train``; of ``reconstructions``, the held-out pictures
            after the image tokenizer, and of ``copies``, rebuilt training pictures near them.
        seed: Of the data-copying test.

    Returns:
        Shares of copies, the data-copying test, and drawings beside their nearest pictures.
    """
    agreement = {
        "drawings": nearest_agreement(generated.image_token_ids, train.image_token_ids),
        "held-out pictures": nearest_agreement(held_out.image_token_ids, train.image_token_ids),
    }
    tokens = {
        name: {
            "agreement": bootstrap_mean(fractions.numpy()),
            "copies": bootstrap_mean((fractions > COPY_THRESHOLD).float().numpy()),
        }
        for name, fractions in agreement.items()
    }
    pairs = {
        "drawings against held-out pictures": ("drawn", "held_out"),
        "drawings against rebuilt held-out pictures": ("drawn", "rebuilt"),
        "copies against rebuilt held-out pictures": ("copies", "rebuilt"),
    }
    tests = {
        name: data_copying_test(features[made], features[seen], features["train"], seed=seed)
        for name, (made, seen) in pairs.items()
    }
    return Section(
        "Memorisation",
        f"Copies share more than {COPY_THRESHOLD:.0%} of their tokens with one training picture; "
        "held-out pictures, which cannot be copies, show what to expect. C_T is the data-copying "
        "test of Meehan et al. 2020 on the features of the section above: below -3 drawings are "
        "nearer to training pictures than held-out pictures are, above 3 farther. CandidateTokens come "
        "from the tokenizer, so their fair partners are rebuilt held-out pictures. The last row is "
        "what a model would score that draws the nearest training picture each time.",
        {
            "num_generated": len(generated),
            "num_train": len(train),
            "tokens": tokens,
            "data_copying_test": {name: asdict(found) for name, found in tests.items()},
        },
        [
            Table(
                "tokens in common with the nearest training picture",
                ("pictures", "mean share", "copies"),
                [
                    (name, percent(found["agreement"]), percent(found["copies"]))
                    for name, found in tokens.items()
                ],
            ),
            Table(
                "data-copying test",
                ("pictures", "C_T", "z of each cell (drawings in it)"),
                [
                    (
                        name,
                        "too few pictures" if found.score is None else f"{found.score:.2f}",
                        ", ".join(f"{cell.z:.1f} ({cell.num_generated})" for cell in found.cells),
                    )
                    for name, found in tests.items()
                ],
            ),
        ],
        {"nearest": _sheet(generated, train, features, agreement["drawings"])},
    )


def _sheet(
    generated: Samples, train: Samples, features: Mapping[str, Features], agreement: Tensor
) -> Image.Image:
    """CandidateTokens, each beside the training picture with the nearest features."""
    chosen = spread_indices(len(generated), NUM_SHOWN)
    nearest = _nearest(features["drawn"][chosen], features["train"])[1].tolist()
    images, captions = [], []
    for index, other in zip(chosen, nearest, strict=True):
        images += to_images(torch.stack([generated.pixels[index], train.pixels[other]]))
        captions += [
            f"drawn ({agreement[index]:.0%}): {generated.captions[index]}",
            f"training: {train.captions[other]}",
        ]
    return make_grid(images, columns=8, captions=captions)
