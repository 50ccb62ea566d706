"""Attention masks. **True means may attend**, everywhere in this project, as in torch's SDPA.

The masks of DALL-E (Ramesh et al. 2021, arXiv:2102.12092, appendix B.1 and figure 11) say which
earlier image tokens an image token attends to, in raster order. Every image token attends to all
text in all of them, and text is causal.
"""

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor


def causal_mask(
    length: int, *, device: torch.device | str = "cpu"
) -> Bool[Tensor, "length length"]:
    """Let position i attend to positions <= i.

    Args:
        length: Positions of the sequence.
        device: Where the mask lives.

    Returns:
        Lower-triangular mask, (query, key).
    """
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def padding_mask(
    is_token: Bool[Tensor, "batch key_length"],
) -> Bool[Tensor, "batch 1 1 key_length"]:
    """Let every position attend to the real tokens of its row, in both directions.

    Args:
        is_token: True where a token stands, False where the row is padded.

    Returns:
        A mask that broadcasts over heads and queries.
    """
    return is_token[:, None, None, :]


ImageMask = Literal["row", "column", "convolution"]


def dalle_layers(num_layers: int) -> list[ImageMask]:
    """Tell which of DALL-E's masks each layer has.

    Counted from 1, layer i attends along columns where (i - 2) mod 4 = 0 and along rows elsewhere,
    but for the last layer, whose mask is a convolution's.

    Args:
        num_layers: Layers of the decoder, 64 in the paper.

    Returns:
        One kind per layer, the first layer's first.

    Source: Ramesh et al. 2021, arXiv:2102.12092, appendix B.1.
    """
    kinds: list[ImageMask] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, num_layers)]
    return [*kinds, "convolution"]


def dalle_mask(
    kind: ImageMask, *, num_text_positions: int, grid_size: tuple[int, int], kernel_size: int
) -> Bool[Tensor, "length length"]:
    """Let image tokens attend to all text and to some earlier image tokens.

    ``row``: a token itself and the ``width`` tokens before it in raster order, so that the last
    one stands above it (the paper's "previous 5" of a grid 4 wide, which count the token itself).
    ``column``: what stands in its column, down to itself. ``convolution``: the upper half of a
    square window around it. The window counts raster positions, as the row mask does: what leaves
    the grid on the left goes on at the end of the row above. That is how we read the paper's
    "wraparound behavior (similar to the row attention)"; it makes the mask a function of the
    distance alone, as the row mask is. Others wrap on a torus or stop at the border.

    Args:
        kind: Which earlier image tokens.
        num_text_positions: Positions before the first image token.
        grid_size: Image tokens along (height, width).
        kernel_size: Side of the square window, odd; 11 in the paper.

    Returns:
        (query, key), the text's positions first; every position attends to itself.

    Source: Ramesh et al. 2021, arXiv:2102.12092, figure 11; Child et al. 2019, arXiv:1904.10509.
    """
    height, width = grid_size
    cells = torch.arange(height * width)
    distance = cells.unsqueeze(1) - cells  # how far before the query, in raster order
    if kind == "row":
        is_near = distance <= width
    elif kind == "column":
        is_near = distance % width == 0
    else:
        reach = kernel_size // 2
        above = width * torch.arange(reach + 1)[:, None, None]
        is_near = ((distance - above).abs() <= reach).any(dim=0)
    mask = causal_mask(num_text_positions + height * width, device=cells.device)
    mask[num_text_positions:, num_text_positions:] &= is_near
    return mask
