"""Are the drawings, as a set, like true pictures? Distance, precision and recall, with baselines.

Every figure compares half of a set with the true pictures of the other captions, over many random
halvings, so that true pictures can be compared with true pictures in the same way. Its interval is
the range over the halvings: halves of a sample vary about as much as whole samples drawn anew
(Shao and Wu 1989). Drawing with replacement would serve means, but not nearest neighbours: a
picture drawn twice has one at distance 0.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dalle_mini_impl.evaluation.bootstrap import Estimate, percentile_estimate
from dalle_mini_impl.evaluation.sections import Section, Table, number, percent

NUM_HALVINGS = 200
NUM_DIRECTIONS = 256
NUM_NEIGHBOURS = 3
MIN_PICTURES = 16
PLAIN_FEATURES = (
    "Features: colours and contrasts of the Laplacian pyramid on 8 x 8 cells "
    "(`evaluation/features.py`); they need no weights."
)
NETWORK_FEATURES = (
    "Features: means and deviations of the channels of EfficientNet-Lite0 at four sizes "
    "(`evaluation/features.py`), which was trained on photographs."
)

Features = Float[Tensor, "_ features"]


def random_directions(num_features: int, *, seed: int) -> Float[Tensor, "features directions"]:
    """Draw unit vectors.

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


def share_inside(
    distances: Float[Tensor, "samples reference"], own: Float[Tensor, "reference reference"]
) -> float:
    """Count the pictures that lie in the manifold of a reference set.

    Args:
        distances: Of each picture to each reference picture.
        own: Among the reference pictures.

    Returns:
        Share of pictures closer to some reference picture than its third neighbour is: precision
        where the reference is true, recall where it is drawn.

    Source: Kynkaanniemi et al. 2019, arXiv:1904.06991, equation 1, with k = 3.
    """
    radii = own.kthvalue(NUM_NEIGHBOURS + 1, dim=1).values  # the first is the picture itself
    inside: Bool[Tensor, " samples"] = (distances <= radii).any(dim=1)
    return float(inside.float().mean())


def compare_sets(
    true: Features, others: Mapping[str, Features], *, seed: int
) -> dict[str, dict[str, Estimate]]:
    """Compare sets of pictures with the true ones.

    Args:
        true: Features of the true pictures.
        others: Sets of as many pictures.
        seed: Decides directions and halvings.

    Returns:
        Name of the set -> distance, precision and recall.
    """
    count = len(true)
    directions = random_directions(true.shape[1], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(count, generator=generator) for _ in range(NUM_HALVINGS)]
    projected_true, own_true = true @ directions, _distances(true, true)
    results = {}
    for name, features in others.items():
        projected = features @ directions
        across, own = _distances(features, true), _distances(features, features)
        found: dict[str, list[float]] = {"distance": [], "precision": [], "recall": []}
        for order in orders:
            a, b = order[: count // 2], order[count // 2 : 2 * (count // 2)]
            found["distance"].append(sliced_distance(projected[a], projected_true[b]))
            between = across[a][:, b]
            found["precision"].append(share_inside(between, own_true[b][:, b]))
            found["recall"].append(share_inside(between.T, own[a][:, a]))
        results[name] = {what: percentile_estimate(values) for what, values in found.items()}
    return results


def _distances(left: Features, right: Features) -> Float[Tensor, "left right"]:
    # The plain way: through products, equal pictures would not be at distance 0.
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")


def measure_distribution(
    true: Features, others: Mapping[str, Features], *, seed: int, by_network: bool = False
) -> Section:
    """Compare the drawings as a set with true pictures, and put baselines beside.

    Args:
        true: Features of the true pictures of the captions that were drawn.
        others: Drawings first, then the baselines.
        seed: Of all random choices.
        by_network: Whether the features are those of a network.

    Returns:
        The section; without figures where there are too few pictures.
    """
    title = "Distribution by a network" if by_network else "Distribution"
    text = (
        f"{NETWORK_FEATURES if by_network else PLAIN_FEATURES} "
        "Sliced Wasserstein distance: 0 is best, "
        "but no smaller than that of true pictures. Precision and recall: Kynkaanniemi et al. "
        f"2019, k = {NUM_NEIGHBOURS}. Every row compares half of its pictures with the true "
        f"pictures of the other captions; interval: the middle 95 % of {NUM_HALVINGS} random "
        "halvings. FID is left out: its network's weights do not come with this project."
    )
    if len(true) < MIN_PICTURES:
        reason = f"too few pictures: {len(true)}, wanted {MIN_PICTURES}"
        return Section(title, f"{text} Left out here: {reason}.", {"left_out": reason})
    found = compare_sets(true, {**others, "true pictures": true}, seed=seed)
    figures: dict[str, Any] = {"num_pictures": len(true), **found}
    rows = [
        (name, number(row["distance"], 4), percent(row["precision"]), percent(row["recall"]))
        for name, row in found.items()
    ]
    columns = ("set", "sliced Wasserstein", "precision", "recall")
    return Section(title, text, figures, [Table("distribution", columns, rows)])
