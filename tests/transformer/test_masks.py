"""Masks: True = may attend."""

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.transformer.masks import (
    ImageMask,
    causal_mask,
    dalle_layers,
    dalle_mask,
    padding_mask,
)

# Three queries of each kind on a grid of 4 x 4, by hand: Q is the query's cell, x the cells that it
# attends to. Text is left out: every image token attends to all of it.
MASKS = {
    "row": """
        . . . .    . . . .    x Q . .
        . . x x    . . . .    . . . .
        x x Q .    . . . x    . . . .
        . . . .    x x x Q    . . . .
    """,
    "column": """
        . . x .    . . . x    . Q . .
        . . x .    . . . x    . . . .
        . . Q .    . . . x    . . . .
        . . . .    . . . Q    . . . .
    """,
    "convolution": """
        . . . .    . . . .    x Q . .
        . x x x    . . . x    . . . .
        . x Q .    x x . x    . . . .
        . . . .    Q . . .    . . . .
    """,
}


def test_causal_mask_shows_the_past_and_oneself() -> None:
    mask = causal_mask(4)
    assert mask.dtype == torch.bool
    for query in range(4):
        for key in range(4):
            assert bool(mask[query, key]) == (key <= query)


def test_padding_mask_shows_tokens() -> None:
    is_token = torch.tensor([[True, False, True], [True, True, False]])
    mask = padding_mask(is_token)
    assert mask.shape == (2, 1, 1, 3)
    assert torch.equal(mask[:, 0, 0], is_token)


def mask_by_hand(kind: str) -> dict[int, Tensor]:
    """The grids of ``MASKS``: the cells that each query cell may attend to."""
    lines = [line.split() for line in MASKS[kind].strip().splitlines()]
    found = {}
    for grid in range(3):
        marks = [mark for line in lines for mark in line[4 * grid : 4 * grid + 4]]
        found[marks.index("Q")] = torch.tensor([mark != "." for mark in marks])
    return found


@pytest.mark.parametrize("kind", ["row", "column", "convolution"])
def test_dalle_masks_match_handwritten_ones(kind: ImageMask) -> None:
    mask = dalle_mask(kind, num_text_positions=2, grid_size=(4, 4), kernel_size=3)
    assert mask.shape == (18, 18)
    by_hand = mask_by_hand(kind)
    assert len(by_hand) == 3
    for cell, seen in by_hand.items():
        assert torch.equal(mask[2 + cell, 2:], seen), cell
    assert torch.equal(mask[:2], torch.tensor([[True] + 17 * [False], 2 * [True] + 16 * [False]]))
    assert mask[2:, :2].all()
    assert mask.diagonal().all()
    assert not mask.triu(1).any()


def test_the_published_sizes() -> None:
    """Numbers of image tokens that the last token attends to, on 32 x 32 with a kernel of 11."""
    counts = {}
    kinds: list[ImageMask] = ["row", "column", "convolution"]
    for kind in kinds:
        mask = dalle_mask(kind, num_text_positions=1, grid_size=(32, 32), kernel_size=11)
        counts[kind] = int(mask[-6, 1:].sum())  # five columns from the right: no wrap
    assert counts == {"row": 33, "column": 32, "convolution": 5 * 11 + 6}


def test_a_kernel_larger_than_the_grid_sees_the_past() -> None:
    mask = dalle_mask("convolution", num_text_positions=1, grid_size=(3, 4), kernel_size=11)
    assert torch.equal(mask, causal_mask(13))


def test_layers_follow_the_published_pattern() -> None:
    assert dalle_layers(1) == ["convolution"]
    assert dalle_layers(6) == ["row", "column", "row", "row", "row", "convolution"]
    kinds = dalle_layers(64)
    columns = [number for number, kind in enumerate(kinds, start=1) if kind == "column"]
    assert columns == list(range(2, 64, 4))
    assert [number for number, kind in enumerate(kinds, 1) if kind == "convolution"] == [64]
