"""Distance, precision and recall on clouds with known figures."""

import pytest
import torch
from torch.nn import functional as F

from dalle_mini_impl.evaluation.distribution import (
    FeatureSpace,
    compare_sets,
    fraction_inside,
    measure_distribution,
    network_or_none,
    random_directions,
    sliced_distance,
)
from vqvae.losses import perceptual


def cloud(count: int, *, shift: float = 0.0, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(count, 8, generator=generator)


def test_distance_of_a_moved_set() -> None:
    points, directions = cloud(50), random_directions(8, seed=0)
    move = torch.arange(8.0)
    expected = float((move @ directions).abs().mean())
    found = sliced_distance(points @ directions, (points[torch.randperm(50)] + move) @ directions)
    assert found == pytest.approx(expected, rel=1e-4)


def test_inside_is_within_the_third_neighbor() -> None:
    reference = torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0])[:, None]
    own = torch.cdist(reference, reference)  # radii: 3, 2, 2, 3, 99
    images = torch.tensor([[-2.9], [-3.1], [6.1], [0.5], [198.5]])
    inside = [fraction_inside(torch.cdist(p[None], reference[:4]), own[:4, :4]) for p in images]
    assert inside == [1.0, 0.0, 0.0, 1.0, 0.0]
    inside = fraction_inside(torch.cdist(images, reference), own)
    assert inside == pytest.approx(0.8)  # 100 has radius 99


def test_figures_separate_good_sets_from_bad_ones() -> None:
    reference = cloud(200)
    others = {
        "good": cloud(200, seed=1),
        "moved": cloud(200, shift=9.0, seed=2),
        "collapsed": cloud(200, scale=0.05, seed=3),
        "same": reference,
    }
    found = compare_sets(reference, others, seed=0)
    good, same = found["good"], found["same"]
    for what in ("distance", "precision", "recall"):
        assert good[what].low < same[what].value < good[what].high
        assert same[what].low < same[what].value < same[what].high
    assert found["moved"]["distance"].low > 3 * good["distance"].high
    assert found["moved"]["precision"].value == found["moved"]["recall"].value == 0.0
    assert found["collapsed"]["precision"].value > 0.99
    assert found["collapsed"]["recall"].value < 0.05


def test_too_few_images_are_left_out() -> None:
    section = measure_distribution(cloud(15), {"generated": cloud(15, seed=1)}, seed=0)
    assert section.figures == {"left_out": "too few images: 15, expected 16"}
    assert not section.tables


@pytest.mark.parametrize("size", [16, 24, 32, 64])
def test_features_locate_color_and_contrast(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (6, 3, size, size), generator=generator, dtype=torch.uint8)
    space = FeatureSpace(pixels)
    features = space(pixels)
    parts = features - features.mean(dim=0)
    # Every part (colors, and each band) varies as much as every other.
    energies = parts.reshape(6, -1, 192).square().sum(dim=2).mean(dim=0)
    assert energies.tolist() == pytest.approx([1.0] * len(energies), rel=1e-3)
    flat = torch.full((1, 3, size, size), 200, dtype=torch.uint8)
    assert (space(flat)[:, 192:].abs() < 1e-4).all(), "a flat image has no contrast"
    redder = flat.clone()
    redder[:, 0, : size // 2, : size // 2] += 50
    changed = (space(redder) - space(flat))[0, :192].reshape(3, 8, 8).abs() > 1e-3
    assert changed[0, :4, :4].all()
    assert not changed[1:].any()
    assert not changed[0, 5:, 5:].any()


def test_network_separates_blurred_from_sharp_images(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 2, (64, 3, 8, 8), generator=generator).float() * 255
    sharp = F.interpolate(coarse, scale_factor=4.0)
    blurred = F.avg_pool2d(F.pad(sharp, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    reference, same, worse = sharp[:32].byte(), sharp[32:].byte(), blurred[32:].byte()
    network = network_or_none()
    assert network is not None
    space = FeatureSpace(reference, describe=network)
    found = compare_sets(space(reference), {"same": space(same), "worse": space(worse)}, seed=0)
    assert found["worse"]["distance"].low > 3 * found["same"]["distance"].high
    monkeypatch.setattr(perceptual, "PACKAGE", "no_such_package")
    assert network_or_none() is None
