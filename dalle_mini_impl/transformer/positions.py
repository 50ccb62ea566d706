"""Where a token stands: rotary angles and position tables, in one and two dimensions."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles, one row per position."""

    cosine: Float[Tensor, "... length half_head_dim"]
    sine: Float[Tensor, "... length half_head_dim"]


def rotary_angles(
    positions: Int[Tensor, "*shape axes"], *, head_dim: int, base: float = 10_000.0
) -> Float[Tensor, "*shape half_head_dim"]:
    """Turn coordinates into rotary angles, an equal fraction of the head for each axis.

    Args:
        positions: Coordinates of each position along each axis, for example (row, column).
        head_dim: Must be a multiple of twice the number of axes.
        base: Wavelength base, dimensionless.

    Returns:
        Angles in radians.

    Raises:
        ValueError: If the head does not divide among the axes.

    Source: Su et al. 2021, arXiv:2104.09864, equation 15; split over axes as in axial RoPE
        (Heo et al. 2024, arXiv:2403.13298).
    """
    num_axes = positions.shape[-1]
    if head_dim % (2 * num_axes):
        raise ValueError(f"head_dim: got {head_dim}, expected a multiple of {2 * num_axes}")
    num_frequencies = head_dim // (2 * num_axes)
    exponents = torch.arange(num_frequencies, device=positions.device) / num_frequencies
    frequencies = base**-exponents
    return (positions.float().unsqueeze(-1) * frequencies).flatten(-2)


def rotate(
    heads: Float[Tensor, "batch heads length head_dim"], rotation: Rotation
) -> Float[Tensor, "batch heads length head_dim"]:
    """Rotate each pair (i, i + head_dim / 2) of a query or key by its position's angle.

    Args:
        heads: Queries or keys.
        rotation: Angles that broadcast over batch and heads.

    Returns:
        A new tensor of the same dtype.
    """
    first, second = heads.chunk(2, dim=-1)
    cosine, sine = rotation.cosine.to(heads.dtype), rotation.sine.to(heads.dtype)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def rotation_after(
    num_unrotated: int, positions: Int[Tensor, "batch length axes"], *, head_dim: int
) -> Rotation:
    """Rotate positions by their coordinates, and those before them not at all.

    Args:
        num_unrotated: Positions before them, which learn where they stand from a table.
        positions: Coordinates of each position along each axis.
        head_dim: Must be a multiple of twice the number of axes.

    Returns:
        One row per position, which broadcasts over heads.
    """
    angles = rotary_angles(positions, head_dim=head_dim).unsqueeze(1)
    angles = F.pad(angles, (0, 0, num_unrotated, 0))
    return Rotation(angles.cos(), angles.sin())  # (batch, 1, length, half_head_dim)


def sinusoidal_positions(
    positions: Int[Tensor, "*shape axes"], *, hidden_size: int
) -> Float[Tensor, "*shape hidden"]:
    """Build the fixed sine and cosine table, an equal fraction of the width for each axis.

    Args:
        positions: Coordinates of each position along each axis.
        hidden_size: Must be a multiple of twice the number of axes.

    Returns:
        Rows to be added to the token embeddings.

    Raises:
        ValueError: If the width does not divide among the axes.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5; sines and cosines stand in two
        halves instead of alternating.
    """
    if hidden_size % (2 * positions.shape[-1]):
        raise ValueError(
            f"hidden_size: got {hidden_size}, expected a multiple of {2 * positions.shape[-1]}"
        )
    angles = rotary_angles(positions, head_dim=hidden_size)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def grid_coordinates(height: int, width: int) -> Int[Tensor, "length 2"]:
    """List (row, column) of every grid cell in raster order.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.

    Returns:
        int64 coordinates.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns], dim=-1).flatten(0, 1)
