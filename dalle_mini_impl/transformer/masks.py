"""Attention masks. **True means may attend**, everywhere in this project, as in torch's SDPA.

The masks of DALL-E (Ramesh et al. 2021, arXiv:2102.12092, appendix B.1 and figure 11) say which
earlier image tokens an image token attends to, in raster order. Every image token attends to all
text in all of them, and text is causal.
"""

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

ImageMask = Literal["row", "column", "convolution"]


def causal_mask(
    length: int, *, device: torch.device | str = "cpu"
) -> Bool[Tensor, "length length"]:
    """Let position i attend to positions <= i: lower-triangular, (query, key)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def padding_mask(
    is_token: Bool[Tensor, "batch key_length"],
) -> Bool[Tensor, "batch 1 1 key_length"]:
    """Let every position attend to the real tokens of its row, in both directions."""
    return is_token[:, None, None, :]  # for all heads and queries


def dalle_layers(num_layers: int) -> list[ImageMask]:
    """Name the mask of each layer, the first layer's first.

    Source: Ramesh et al. 2021, arXiv:2102.12092, appendix B.1, which counts layers from 1.
    """
    # Columns where (i - 2) mod 4 = 0, rows elsewhere; the last layer alone is convolutional.
    kinds: list[ImageMask] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, num_layers)]
    return [*kinds, "convolution"]


def dalle_mask(
    kind: ImageMask, *, num_text_positions: int, grid_size: tuple[int, int], kernel_size: int
) -> Bool[Tensor, "length length"]:
    """Let image tokens attend to all text and to some earlier image tokens; (query, key).

    Source: Ramesh et al. 2021, arXiv:2102.12092, figure 11; Child et al. 2019, arXiv:1904.10509.
    """
    height, width = grid_size
    cells = torch.arange(height * width)
    distance = cells.unsqueeze(1) - cells  # (query, key): how far before the query, in raster order
    if kind == "row":
        # The token and the ``width`` tokens before it, the farthest of which is the cell above: the
        # paper's "previous 5" of a grid 4 wide, which count the token itself.
        is_near = distance <= width
    elif kind == "column":
        is_near = distance % width == 0
    else:
        # The upper half of a square window. The cell ``up`` rows above and ``right`` columns to the
        # right lies up * width - right before the query. Whatever leaves the grid on the left thus
        # continues at the end of the row above: our reading of the paper's "wraparound behavior
        # (similar to the row attention)". Others wrap on a torus or stop at the border.
        reach = kernel_size // 2
        above = width * torch.arange(reach + 1)[:, None, None]
        is_near = ((distance - above).abs() <= reach).any(dim=0)
    # Later cells (negative distances) may look near; the causal mask hides them.
    mask = causal_mask(num_text_positions + height * width, device=cells.device)
    mask[num_text_positions:, num_text_positions:] &= is_near
    return mask
