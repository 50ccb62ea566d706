"""Positions in one and two dimensions: rotary angles, and vectors added to embeddings."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

ROTARY_BASE = 10_000.0  # wavelengths grow from 2 pi to 2 pi times this
ImagePositions = Literal["rotary", "learned", "sinusoidal", "axial"]


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles, one row per position."""

    cosine: Float[Tensor, "... length half_head_dim"]
    sine: Float[Tensor, "... length half_head_dim"]


def rotate(
    heads: Float[Tensor, "batch heads length head_dim"], rotation: Rotation
) -> Float[Tensor, "batch heads length head_dim"]:
    """Rotate each pair (i, i + head_dim / 2) of queries or keys by the angle of its position."""
    # Both halves of a head hold one number of each pair, so that no numbers are interleaved.
    first, second = heads.chunk(2, dim=-1)  # (batch, heads, length, head_dim / 2) each
    cosine, sine = rotation.cosine.to(heads.dtype), rotation.sine.to(heads.dtype)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def rotary_angles(
    positions: Int[Tensor, "*shape axes"], *, head_dim: int
) -> Float[Tensor, "*shape half_head_dim"]:
    """Turn coordinates into angles in radians; each axis gets an equal part of the head.

    Raises:
        ValueError: If ``head_dim`` is no multiple of twice the number of axes.

    Source: Su et al. 2021, arXiv:2104.09864, equation 15; split over axes as in axial RoPE
        (Heo et al. 2024, arXiv:2403.13298).
    """
    num_axes = positions.shape[-1]
    if head_dim % (2 * num_axes):
        raise ValueError(f"head_dim: got {head_dim}, expected a multiple of {2 * num_axes}")
    num_frequencies = head_dim // (2 * num_axes)
    # Each axis turns its pairs from 1 radian per step down to almost 1 / ROTARY_BASE.
    exponents = torch.arange(num_frequencies, device=positions.device) / num_frequencies
    frequencies = ROTARY_BASE**-exponents
    return (positions.float().unsqueeze(-1) * frequencies).flatten(-2)  # (axes, frequencies) joined


def grid_coordinates(cells: Int[Tensor, "*shape"], *, grid_width: int) -> Int[Tensor, "*shape 2"]:
    """Split raster indices of grid cells into (row, column)."""
    return torch.stack([cells // grid_width, cells % grid_width], dim=-1)


def grid_rotation(
    cells: Int[Tensor, "batch length"], *, grid_width: int, head_dim: int, num_unrotated: int
) -> Rotation:
    """Rotate grid cells by (row, column), after ``num_unrotated`` positions of angle zero."""
    angles = rotary_angles(grid_coordinates(cells, grid_width=grid_width), head_dim=head_dim)
    # Angle zero leaves queries and keys of text as they are: it has learned positions.
    angles = F.pad(angles.unsqueeze(1), (0, 0, num_unrotated, 0))
    return Rotation(angles.cos(), angles.sin())  # (batch, 1, num_unrotated + length, half_head_dim)


def sinusoidal_positions(
    positions: Int[Tensor, "*shape axes"], *, hidden_size: int
) -> Float[Tensor, "*shape hidden"]:
    """Compute the fixed table of sines and cosines; each axis gets an equal part of the width.

    Raises:
        ValueError: If ``hidden_size`` is no multiple of twice the number of axes.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5; sines and cosines stand in two
        halves instead of alternating.
    """
    if hidden_size % (2 * positions.shape[-1]):
        raise ValueError(
            f"hidden_size: got {hidden_size}, expected a multiple of {2 * positions.shape[-1]}"
        )
    angles = rotary_angles(positions, head_dim=hidden_size)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class _Rotary(nn.Module):
    """Adds nothing: rotary positions act in attention, by ``grid_rotation``."""

    def forward(self, hidden_states: Tensor, cells: Tensor) -> Tensor:
        del cells
        return hidden_states


class _Learned(nn.Module):
    """Adds one learned vector per grid cell."""

    def __init__(self, grid_size: tuple[int, int], hidden_size: int) -> None:
        super().__init__()
        self.cells = nn.Embedding(grid_size[0] * grid_size[1], hidden_size)

    def forward(self, hidden_states: Tensor, cells: Tensor) -> Tensor:
        return hidden_states + self.cells(cells)


class _Axial(nn.Module):
    """Adds one learned vector per row and one per column, as DALL-E does."""

    def __init__(self, grid_size: tuple[int, int], hidden_size: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(grid_size[0], hidden_size)
        self.columns = nn.Embedding(grid_size[1], hidden_size)
        self.grid_width = grid_size[1]

    def forward(self, hidden_states: Tensor, cells: Tensor) -> Tensor:
        row, column = grid_coordinates(cells, grid_width=self.grid_width).unbind(-1)
        return hidden_states + self.rows(row) + self.columns(column)


class _Sinusoidal(nn.Module):
    """Adds the fixed table, over rows and columns."""

    def __init__(self, grid_size: tuple[int, int], hidden_size: int) -> None:
        super().__init__()
        self.grid_width, self.hidden_size = grid_size[1], hidden_size

    def forward(self, hidden_states: Tensor, cells: Tensor) -> Tensor:
        coordinates = grid_coordinates(cells, grid_width=self.grid_width)
        return hidden_states + sinusoidal_positions(coordinates, hidden_size=self.hidden_size)


def build_image_positions(
    kind: ImagePositions, grid_size: tuple[int, int], hidden_size: int
) -> nn.Module:
    """Build the module that adds the positions of grid cells (raster indices) to embeddings."""
    if kind == "rotary":
        return _Rotary()
    return {"learned": _Learned, "axial": _Axial, "sinusoidal": _Sinusoidal}[kind](
        grid_size, hidden_size
    )
