"""Positions: rotary angles, their relative property, and the fixed table."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from dalle_mini_impl.transformer.positions import (
    Rotation,
    grid_coordinates,
    rotary_angles,
    rotate,
    sinusoidal_positions,
)

COORDINATE = st.integers(0, 40)


def rotated(vector: Tensor, *coordinates: int) -> Tensor:
    angles = rotary_angles(torch.tensor([coordinates]), head_dim=len(vector))
    return rotate(vector[None, None, None], Rotation(angles.cos(), angles.sin())).flatten()


def test_grid_coordinates_are_in_raster_order() -> None:
    coordinates = grid_coordinates(torch.arange(6), grid_width=3)
    assert coordinates.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_angles_by_hand() -> None:
    angles = rotary_angles(torch.tensor([[3, 5]]), head_dim=8)
    torch.testing.assert_close(angles, torch.tensor([[3.0, 0.03, 5.0, 0.05]]))


def test_rotation_is_the_rotation_matrix_of_each_pair() -> None:
    vector = torch.tensor([1.0, 2.0, 3.0, 4.0])
    got = rotated(vector, 2, 5)
    for pair, angle in enumerate((2.0, 5.0)):
        x, y = vector[pair], vector[pair + 2]
        expected_x = math.cos(angle) * x - math.sin(angle) * y
        expected_y = math.sin(angle) * x + math.cos(angle) * y
        torch.testing.assert_close(got[pair], expected_x, rtol=0, atol=1e-5)
        torch.testing.assert_close(got[pair + 2], expected_y, rtol=0, atol=1e-5)


@hypothesis_settings(max_examples=30)
@given(query=st.tuples(COORDINATE, COORDINATE), key=st.tuples(COORDINATE, COORDINATE))
def test_scores_depend_on_offsets_only(query: tuple[int, int], key: tuple[int, int]) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 16)
    score = rotated(q, *query) @ rotated(k, *key)
    moved = rotated(q, query[0] + 7, query[1] + 3) @ rotated(k, key[0] + 7, key[1] + 3)
    torch.testing.assert_close(moved, score, rtol=0, atol=1e-4)
    torch.testing.assert_close(rotated(q, *query).norm(), q.norm())


def test_both_axes_count() -> None:
    vector = torch.ones(8)
    places = [rotated(vector, y, x) for y in range(3) for x in range(3)]
    for i, one in enumerate(places):
        assert all((one - other).abs().max() > 0.05 for other in places[:i])


def test_rotation_keeps_the_dtype() -> None:
    assert rotated(torch.ones(8, dtype=torch.bfloat16), 1, 2).dtype == torch.bfloat16


def test_sinusoidal_table_by_hand() -> None:
    table = sinusoidal_positions(torch.tensor([[[3, 5]]]), hidden_size=8)
    angles = [3.0, 3.0 / 100, 5.0, 5.0 / 100]
    expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    torch.testing.assert_close(table, torch.tensor([[expected]]))


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="head_dim: got 6, expected a multiple of 4"):
        rotary_angles(torch.tensor([[1, 2]]), head_dim=6)
    with pytest.raises(ValueError, match="hidden_size: got 6, expected a multiple of 4"):
        sinusoidal_positions(torch.tensor([[1, 2]]), hidden_size=6)
