"""The generated images as a set: distance, precision and recall against reference images.

Every figure compares half of a set with the reference images of the other captions, over many
random halvings, so that reference images can be compared with reference images in the same way. Its
interval is the range over the halvings: halves of a sample vary about as much as whole samples
generated anew (Shao and Wu 1989). A bootstrap would work for means, but not nearest neighbors: an
image that is resampled twice has a neighbor at distance 0.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from dalle_mini_impl.data.images import bytes_to_pixels
from dalle_mini_impl.evaluation.bootstrap import Estimate, percentile_estimate
from dalle_mini_impl.evaluation.report import REFERENCE, Section, Table, number, percent
from dalle_mini_impl.evaluation.samples import BATCH_SIZE, Pixels
from vqvae.losses.perceptual import PerceptualDistance

NUM_HALVINGS = 200
NUM_DIRECTIONS = 256
NUM_NEIGHBORS = 3
MIN_IMAGES = 16
GRID = 8  # cells along each side of an image
PLAIN_FEATURES = (
    "Features: colors and contrasts of the Laplacian pyramid on 8 x 8 cells; they need no weights."
)
NETWORK_FEATURES = (
    "Features: channel means and standard deviations of EfficientNet-Lite0, which was trained on "
    "photographs, at four scales."
)
TEXT = (
    "Sliced Wasserstein distance: smaller is better, but no smaller than that of reference images. "
    "Precision and recall: Kynkaanniemi et al. 2019, k = 3. Every row compares half of its images "
    f"with the reference images of the other captions; interval: the middle 95 % of {NUM_HALVINGS} "
    "random halvings. There is no FID: its network's weights do not come with this project."
)
Features: TypeAlias = Float[Tensor, "_ features"]
Describe: TypeAlias = Callable[[Float[Tensor, "batch 3 height width"]], list[Tensor]]


class FeatureSpace:
    """Maps images to features, whose parts weigh the same in a set of reference images.

    ``describe`` maps pixels in [-1, 1] to parts, each (batch, features): colors and contrasts when
    None. The reference set needs two different images of at least 8 x 8 pixels.
    """

    def __init__(self, reference: Pixels, *, describe: Describe | None = None) -> None:
        self._describe = describe or colors_and_contrasts
        # The root mean square distance of the reference images from their mean, part by part:
        # without it the part with the most numbers would decide every distance.
        self._scales = [
            (part - part.mean(dim=0)).square().sum(dim=1).mean().sqrt().clamp(min=1e-6)
            for part in self._parts(reference)
        ]

    def __call__(self, pixels: Pixels) -> Float[Tensor, "samples features"]:
        """Describe images; squared distances of the results add up over the parts."""
        parts = zip(self._parts(pixels), self._scales, strict=True)
        return torch.cat([part / scale for part, scale in parts], dim=1)

    @torch.inference_mode()
    def _parts(self, pixels: Pixels) -> list[Tensor]:
        batches = [self._describe(bytes_to_pixels(part)) for part in pixels.split(BATCH_SIZE)]
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def measure_distribution(
    reference: Features, others: Mapping[str, Features], *, seed: int, by_network: bool = False
) -> Section:
    """Compare generated images, and baselines, with reference images of the same captions.

    All sets have the same size; with too few images the section has no figures.
    """
    title = "Distribution by a network" if by_network else "Distribution"
    text = f"{NETWORK_FEATURES if by_network else PLAIN_FEATURES} {TEXT}"
    if len(reference) < MIN_IMAGES:
        reason = f"too few images: {len(reference)}, expected {MIN_IMAGES}"
        return Section(title, f"{text} Left out here: {reason}.", {"left_out": reason})
    found = compare_sets(reference, {**others, REFERENCE: reference}, seed=seed)
    figures: dict[str, Any] = {"num_images": len(reference), **found}
    rows = [
        (name, number(row["distance"], 4), percent(row["precision"]), percent(row["recall"]))
        for name, row in found.items()
    ]
    columns = ("set", "sliced Wasserstein", "precision", "recall")
    return Section(title, text, figures, [Table("distribution", columns, rows)])


def compare_sets(
    reference: Features, others: Mapping[str, Features], *, seed: int
) -> dict[str, dict[str, Estimate]]:
    """Compute distance, precision and recall of sets against a reference set of the same size."""
    count = len(reference)
    # All sets share directions and halvings, so that their figures differ by the images alone.
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
            # Half of the set against the reference images of the other captions: no image meets
            # the reference image of its own caption.
            a, b = order[: count // 2], order[count // 2 : 2 * (count // 2)]
            found["distance"].append(sliced_distance(projected[a], projected_reference[b]))
            # Recall swaps the roles: reference images in the manifold of the set.
            between = across[a][:, b]
            found["precision"].append(fraction_inside(between, own_reference[b][:, b]))
            found["recall"].append(fraction_inside(between.T, own[a][:, a]))
        results[name] = {what: percentile_estimate(values) for what, values in found.items()}
    return results


def random_directions(num_features: int, *, seed: int) -> Float[Tensor, "features directions"]:
    """Sample unit vectors, one per column."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_features, NUM_DIRECTIONS, generator=generator)
    return directions / directions.norm(dim=0)


def sliced_distance(
    left: Float[Tensor, "samples directions"], right: Float[Tensor, "samples directions"]
) -> float:
    """Average the Wasserstein-1 distances of the projections of two sets of the same size.

    Source: Rabin et al. 2011, the sliced Wasserstein distance.
    """
    # In one dimension the optimal transport pairs the values by rank.
    return float((left.sort(dim=0).values - right.sort(dim=0).values).abs().mean())


def fraction_inside(
    distances: Float[Tensor, "samples reference"], own: Float[Tensor, "reference reference"]
) -> float:
    """Compute the fraction of images in the manifold of a reference set.

    Args:
        distances: Of each image to each reference image.
        own: Among the reference images.

    Returns:
        Fraction of images closer to some reference image than its third neighbor is: precision
        for reference images that are real, recall for generated ones.

    Source: Kynkaanniemi et al. 2019, arXiv:1904.06991, equation 1, with k = 3.
    """
    # The manifold: a ball around each reference image, as far as its third neighbor.
    radii = own.kthvalue(NUM_NEIGHBORS + 1, dim=1).values  # the first is the image itself
    inside: Bool[Tensor, " samples"] = (distances <= radii).any(dim=1)
    return float(inside.float().mean())


def _distances(left: Features, right: Features) -> Float[Tensor, "left right"]:
    # By matrix products, the fast way, equal images would not be at distance 0.
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")


def colors_and_contrasts(pixels: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
    """Describe pixels in [-1, 1], at least 8 x 8, by their Laplacian pyramids.

    Returns:
        The colors, and the contrasts of each finer band: each (batch, 3 * 8 * 8).
    """
    # The finest level has the largest side GRID * 2 ** n that the image has pixels for.
    side = GRID
    while 2 * side <= min(pixels.shape[2:]):
        side *= 2
    level = F.adaptive_avg_pool2d(pixels, side)
    parts = []
    while side > GRID:
        # A band of the pyramid is what halving the size loses; its root mean square is contrast.
        coarse = F.avg_pool2d(level, 2)
        band = level - F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        parts.append(F.adaptive_avg_pool2d(band.square(), GRID).sqrt().flatten(1))
        level, side = coarse, side // 2
    return [level.flatten(1), *parts]


def network_or_none() -> Describe | None:
    """Load EfficientNet-Lite0, if the package of its weights is installed (extra ``eval``)."""
    try:
        network = PerceptualDistance()
    except ValueError:
        return None

    def describe(pixels: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        # Mean and deviation of each channel: what is in the image, not where it is.
        stages = [
            stage.flatten(2) for stage in network.features(pixels)
        ]  # (batch, channels, cells)
        return [torch.cat([each.mean(2), each.std(2, unbiased=False)], dim=1) for each in stages]

    return describe
