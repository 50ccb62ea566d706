"""Schedules: exact at their corners, and never outside their range."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle_mini_impl.training.schedule import anneal, learning_rate_factor

SCHEDULES = ("wsd", "cosine", "inverse_sqrt")


def factor(step: int, progress: float, schedule: str = "wsd", **options: float) -> float:
    settings = {"warmup_steps": 10, "decay_fraction": 0.25} | options
    return learning_rate_factor(step, progress, schedule=schedule, **settings)  # type: ignore[arg-type]


def test_wsd_rises_stays_and_falls_to_zero() -> None:
    assert [factor(step, 0.0) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    falling = [factor(99, progress) for progress in (0.5, 0.75, 0.875, 0.9, 1.0)]
    assert falling == pytest.approx([1.0, 1.0, 0.5, 0.4, 0.0])
    assert factor(99, 0.5, decay_fraction=1.0) == pytest.approx(0.5)


def test_cosine_is_half_a_cosine() -> None:
    for progress in (0.0, 0.25, 0.5, 1.0):
        expected = 0.5 * (1 + math.cos(math.pi * progress))
        assert factor(99, progress, "cosine") == pytest.approx(expected)
    assert factor(0, 0.0, "cosine") == pytest.approx(0.1)


def test_inverse_square_root_is_that_of_the_paper() -> None:
    hidden_size, warmup = 512, 40
    peak = (hidden_size * warmup) ** -0.5
    for step in (1, 7, 39, 40, 41, 160, 5000):  # counted from 1, as in the paper
        expected = hidden_size**-0.5 * min(step**-0.5, step * warmup**-1.5)
        got = peak * factor(step - 1, 0.7, "inverse_sqrt", warmup_steps=warmup)
        assert got == pytest.approx(expected)


def test_without_warm_up_the_first_step_is_a_full_one() -> None:
    assert factor(0, 0.0, warmup_steps=0) == 1.0


@given(
    st.integers(0, 10**6),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 100),
    st.floats(1e-3, 1),
    st.sampled_from(SCHEDULES),
)
def test_factors_never_rise_after_the_warm_up(
    step: int, first: float, second: float, warmup: int, decay: float, schedule: str
) -> None:
    early, late = sorted((first, second))
    options = {"warmup_steps": warmup, "decay_fraction": decay}
    assert 0 <= factor(step, late, schedule, **options) <= 1
    step += warmup
    assert factor(step, late, schedule, **options) <= factor(step, early, schedule, **options)


def test_annealing_goes_from_start_to_end_and_stays() -> None:
    values = [anneal(p, start=1.0, end=0.25, over=0.5) for p in (0.0, 0.25, 0.5, 0.9)]
    assert values == pytest.approx([1.0, 0.625, 0.25, 0.25])
    assert anneal(0.25, start=0.0, end=2.0, over=0.5) == pytest.approx(1.0)
