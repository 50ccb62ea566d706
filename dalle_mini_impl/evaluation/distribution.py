"""Are the generated images, as a set, like true images? Distance, precision and recall, with baselines.

Every figure compares half of a set with the true images of the other captions, over many random
halvings, so that true images can be compared with true images in the same way. Its interval is
the range over the halvings: halves of a sample vary about as much as whole samples generated anew
(Shao and Wu 1989). Generating with replacement would serve means, but not nearest neighbors: an
image generated twice has one at distance 0.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from dalle_mini_impl.evaluation.bootstrap import Estimate, percentile_estimate
from dalle_mini_impl.evaluation.report import Section, Table, number, percent
from dalle_mini_impl.evaluation.samples import BATCH_SIZE, Pixels, to_floats
from vqvae.losses.perceptual import PerceptualDistance

NUM_HALVINGS = 200
NUM_DIRECTIONS = 256
NUM_NEIGHBOURS = 3
MIN_IMAGES = 16
PLAIN_FEATURES = (
    "Features: colors and contrasts of the Laplacian pyramid on 8 x 8 cells "
    "(`evaluation/features.py`); they need no weights."
)
NETWORK_FEATURES = (
    "Features: means and deviations of the channels of EfficientNet-Lite0 at four sizes "
    "(`evaluation/features.py`), which was trained on photographs."
)
Features = Float[Tensor, "_ features"]
GRID = 8  # cells along each side
Describe = Callable[[Float[Tensor, "batch 3 height width"]], list[Tensor]]


class FeatureSpace:
    """Features whose parts weigh the same in a set of reference images."""

    def __init__(self, reference: Pixels, *, describe: Describe | None = None) -> None:
        """Measure how much each part varies.

        Args:
            reference: True images, at least two different ones.
            describe: What makes parts, each (batch, features), of images with pixels in [-1, 1];
                colors and contrasts when None.
        """
        self._describe = describe or colours_and_contrasts
        parts = self._parts(reference)
        self._scales = [
            (part - part.mean(dim=0)).square().sum(dim=1).mean().sqrt().clamp(min=1e-6)
            for part in parts
        ]

    def __call__(self, pixels: Pixels) -> Float[Tensor, "samples features"]:
        """Describe images.

        Args:
            pixels: Bytes, at least 8 x 8.

        Returns:
            Features; their squared distances add up over the parts.
        """
        parts = self._parts(pixels)
        scaled = [part / scale for part, scale in zip(parts, self._scales, strict=True)]
        return torch.cat(scaled, dim=1)

    @torch.inference_mode()
    def _parts(self, pixels: Pixels) -> list[Tensor]:
        batches = [self._describe(to_floats(part)) for part in pixels.split(BATCH_SIZE)]
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def random_directions(num_features: int, *, seed: int) -> Float[Tensor, "features directions"]:
    """Generate unit vectors.

    Args:
        num_features: Their length.
        seed: Decides which.

    Returns:
        One per column.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_features, NUM_DIRECTIONS, generator=generator)
    return directions / directions.norm(dim=0)


def sliced_distance(
    left: Float[Tensor, "samples directions"], right: Float[Tensor, "samples directions"]
) -> float:
    """Average the Wasserstein-1 distances of projections.

    Args:
        left: Projections of one set.
        right: Of another set of the same size.

    Returns:
        The sliced Wasserstein distance in units of the features.

    Source: Rabin et al. 2011.
    """
    return float((left.sort(dim=0).values - right.sort(dim=0).values).abs().mean())


def fraction_inside(
    distances: Float[Tensor, "samples reference"], own: Float[Tensor, "reference reference"]
) -> float:
    """Count the images that lie in the manifold of a reference set.

    Args:
        distances: Of each image to each reference image.
        own: Among the reference images.

    Returns:
        Fraction of images closer to some reference image than its third neighbor is: precision
        where the reference is true, recall where it is generated.

    Source: Kynkaanniemi et al. 2019, arXiv:1904.06991, equation 1, with k = 3.
    """
    radii = own.kthvalue(NUM_NEIGHBOURS + 1, dim=1).values  # the first is the image itself
    inside: Bool[Tensor, " samples"] = (distances <= radii).any(dim=1)
    return float(inside.float().mean())


def compare_sets(
    reference: Features, others: Mapping[str, Features], *, seed: int
) -> dict[str, dict[str, Estimate]]:
    """Compare sets of images with the true ones.

    Args:
        reference: Features of the true images.
        others: Sets of as many images.
        seed: Decides directions and halvings.

    Returns:
        Name of the set -> distance, precision and recall.
    """
    count = len(reference)
    directions = random_directions(reference.shape[1], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(count, generator=generator) for _ in range(NUM_HALVINGS)]
    projected_reference, own_reference = reference @ directions, _distances(reference, reference)
    results = {}
    for name, features in others.items():
        projected = features @ directions
        across, own = _distances(features, reference), _distances(features, features)
        found: dict[str, list[float]] = {"distance": [], "precision": [], "recall": []}
        for order in orders:
            a, b = order[: count // 2], order[count // 2 : 2 * (count // 2)]
            found["distance"].append(sliced_distance(projected[a], projected_reference[b]))
            between = across[a][:, b]
            found["precision"].append(fraction_inside(between, own_reference[b][:, b]))
            found["recall"].append(fraction_inside(between.T, own[a][:, a]))
        results[name] = {what: percentile_estimate(values) for what, values in found.items()}
    return results


def _distances(left: Features, right: Features) -> Float[Tensor, "left right"]:
    # The plain way: through products, equal images would not be at distance 0.
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")


def measure_distribution(
    reference: Features, others: Mapping[str, Features], *, seed: int, by_network: bool = False
) -> Section:
    """Compare the generated images as a set with true images, and put baselines beside.

    Args:
        reference: Features of the true images of the captions that were generated.
        others: CandidateTokens first, then the baselines.
        seed: Of all random choices.
        by_network: Whether the features are those of a network.

    Returns:
        The section; without figures where there are too few images.
    """
    title = "Distribution by a network" if by_network else "Distribution"
    text = (
        f"{NETWORK_FEATURES if by_network else PLAIN_FEATURES} "
        "Sliced Wasserstein distance: 0 is best, "
        "but no smaller than that of true images. Precision and recall: Kynkaanniemi et al. "
        f"2019, k = {NUM_NEIGHBOURS}. Every row compares half of its images with the true "
        f"images of the other captions; interval: the middle 95 % of {NUM_HALVINGS} random "
        "halvings. FID is left out: its network's weights do not come with this project."
    )
    if len(reference) < MIN_IMAGES:
        reason = f"too few images: {len(reference)}, expected {MIN_IMAGES}"
        return Section(title, f"{text} Left out here: {reason}.", {"left_out": reason})
    found = compare_sets(reference, {**others, "true images": reference}, seed=seed)
    figures: dict[str, Any] = {"num_images": len(reference), **found}
    rows = [
        (name, number(row["distance"], 4), percent(row["precision"]), percent(row["recall"]))
        for name, row in found.items()
    ]
    columns = ("set", "sliced Wasserstein", "precision", "recall")
    return Section(title, text, figures, [Table("distribution", columns, rows)])


def colours_and_contrasts(pixels: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
    """Describe images by their Laplacian pyramids.

    Args:
        pixels: In [-1, 1], at least 8 x 8.

    Returns:
        The colors, and the contrasts of each finer band: each (batch, 3 * 8 * 8).
    """
    side = GRID
    while 2 * side <= min(pixels.shape[2:]):
        side *= 2
    level = F.adaptive_avg_pool2d(pixels, side)
    parts = []
    while side > GRID:
        coarse = F.avg_pool2d(level, 2)
        band = level - F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        parts.append(F.adaptive_avg_pool2d(band.square(), GRID).sqrt().flatten(1))
        level, side = coarse, side // 2
    return [level.flatten(1), *parts]


def network_or_none() -> Describe | None:
    """Load EfficientNet-Lite0, if the package of its weights is installed (extra ``eval``).

    Returns:
        What describes images by the means and deviations of its channels at four sizes.
    """
    try:
        network = PerceptualDistance()
    except ValueError:
        return None

    def describe(pixels: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        stages = [stage.flatten(2) for stage in network.features(pixels)]
        return [torch.cat([each.mean(2), each.std(2, unbiased=False)], dim=1) for each in stages]

    return describe
