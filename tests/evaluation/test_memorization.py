"""Memorization of hand-made tokens, and the data-copying test on sets with a known result."""

import math

import pytest
import torch

from dalle_mini_impl.data.pairs import Pair
from dalle_mini_impl.evaluation.memorization import (
    data_copying_test,
    measure_memorization,
    nearest_agreement,
)
from dalle_mini_impl.evaluation.samples import Samples

TRAIN = torch.tensor([[0] * 20, [1] * 20, [0, 1] * 10])


def cloud(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def samples(token_ids: torch.Tensor) -> Samples:
    pairs = [Pair(str(i), (f"image {i}",), {}) for i in range(len(token_ids))]
    return Samples(pairs, torch.zeros(len(token_ids), 3, 16, 16, dtype=torch.uint8), token_ids)


def test_agreement_with_the_nearest_image() -> None:
    rows = torch.tensor([[0] * 20, [1] * 18 + [7] * 2, [1, 0] * 10, [7] * 20])
    assert nearest_agreement(rows, TRAIN).tolist() == pytest.approx([1.0, 0.9, 0.5, 0.0])


def test_memorized_images_are_counted_above_threshold() -> None:
    rows = [[0] * 20, [1] * 19 + [7], [1] * 18 + [7] * 2, [7] * 20]
    held_out = torch.tensor([[0] * 10 + [7] * 10, [7] * 20])
    sizes = {"generated": 4, "held_out": 2, "reconstructed": 2, "copied": 2, "train": 3}
    features = {name: cloud(count, seed) for seed, (name, count) in enumerate(sizes.items())}
    section = measure_memorization(
        samples(torch.tensor(rows)), samples(held_out), samples(TRAIN), features, seed=0
    )
    found = section.figures["tokens"]
    assert found["generated"]["agreement"].value == pytest.approx((1 + 0.95 + 0.9 + 0) / 4)
    assert found["held-out images"]["agreement"].value == pytest.approx(0.25)
    assert found["generated"]["memorized"].value == 0.5
    assert found["held-out images"]["memorized"].value == 0.0
    assert "nearest" in section.images


def test_one_cell_has_the_z_of_mann_and_whitney() -> None:
    generated, held_out, train = cloud(30, 0) * 0.9, cloud(40, 1), cloud(100, 2)
    found = data_copying_test(generated, held_out, train)
    (cell,) = found.cells
    distances = [torch.cdist(part, train).min(dim=1).values for part in (generated, held_out)]
    farther = sum(float(a > b) for a in distances[0] for b in distances[1])
    z = (farther - 600) / math.sqrt(30 * 40 * 71 / 12)
    assert (cell.num_train, cell.num_held_out, cell.num_generated) == (100, 40, 30)
    assert found.score == pytest.approx(cell.z)
    assert cell.z == pytest.approx(z)


def test_score_separates_copies_from_new_images() -> None:
    train, held_out = cloud(600, 0), cloud(200, 1)
    copies = data_copying_test(train[:200] + 0.01 * cloud(200, 2), held_out, train)
    fresh = data_copying_test(cloud(200, 3), held_out, train)
    far = data_copying_test(2 * cloud(200, 4), held_out, train)
    assert len(copies.cells) > 1
    scores = [float("nan") if each.score is None else each.score for each in (copies, fresh, far)]
    assert scores[0] < -5
    assert abs(scores[1]) < 2
    assert scores[2] > 2
    total = sum(cell.num_held_out for cell in far.cells)
    weighted = sum(cell.num_held_out * cell.z for cell in far.cells)
    assert far.score == pytest.approx(weighted / total)
    assert data_copying_test(cloud(200, 3), held_out, train) == fresh
