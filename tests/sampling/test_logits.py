"""Filters and noise: which tokens stay, and that samples follow the softmax."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from dalle_mini_impl.sampling.logits import gumbel_noise, keep_top_k, keep_top_p

ROW = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12)


@hypothesis_settings(max_examples=60)
@given(row=ROW, top_k=st.integers(0, 14))
@example(row=[1.0, 1.0, 1.0], top_k=1)
def test_top_k_keeps_the_likeliest(row: list[float], top_k: int) -> None:
    logits = torch.tensor([row, row[::-1]])
    before = logits.clone()
    kept = keep_top_k(logits, top_k)
    assert torch.equal(logits, before)
    assert torch.equal(kept[1], kept[0].flip(0))
    limit = -math.inf if top_k == 0 else sorted(row, reverse=True)[min(top_k, len(row)) - 1]
    assert kept[0].tolist() == [value if value >= limit else -math.inf for value in before[0]]


@hypothesis_settings(max_examples=60)
@given(row=ROW, top_p=st.floats(0, 1, exclude_min=True))
@example(row=[3.0, 1.0], top_p=1e-60)
@example(row=[0.0, 0.0, 0.0, 0.0], top_p=0.5)
def test_top_p_keeps_the_smallest_set_with_the_mass(row: list[float], top_p: float) -> None:
    logits = torch.tensor([row, row[::-1]])
    before = logits.clone()
    kept = keep_top_p(logits, top_p)
    assert torch.equal(logits, before)
    stays = kept[0].isfinite()
    assert torch.equal(kept[0][stays], before[0][stays])
    assert kept[1].isfinite().sum() == stays.sum()
    probabilities = before[0].double().softmax(-1)
    assert stays[probabilities.argmax()] or probabilities[stays].max() == probabilities.max()
    if not stays.all():
        assert before[0][stays].min() >= before[0][~stays].max()
    assert probabilities[stays].sum() >= top_p - 1e-5
    without_last = probabilities[stays].sum() - probabilities[stays].min()
    assert stays.sum() == 1 or without_last <= top_p + 1e-5


def test_top_p_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.4], [0.8, 0.15, 0.05]]).log()
    kept = keep_top_p(logits, 0.6).isfinite()
    assert kept.tolist() == [[False, True, True], [True, False, False]]


def test_filters_after_each_other() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    kept = keep_top_p(keep_top_k(logits, 2), 0.9999999)
    assert kept.tolist() == [[5.0, 4.0, -math.inf, -math.inf]]


@pytest.mark.parametrize("top_p", [0.0, -0.5, 1.01, math.nan])
def test_other_masses_are_refused(top_p: float) -> None:
    with pytest.raises(ValueError, match=f"top_p: got {top_p}"):
        keep_top_p(torch.zeros(1, 2), top_p)


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k: got -1"):
        keep_top_k(torch.zeros(1, 2), -1)


def noise_of(*seeds: int, num_steps: int = 4, vocab_size: int = 5) -> Tensor:
    """(steps, images, tokens)."""
    steps, options = range(num_steps), {"vocab_size": vocab_size}
    return torch.stack([gumbel_noise(torch.tensor(seeds), steps=step, **options) for step in steps])


def squares32(counter: int, key: int) -> int:
    """The source's listing, in whole numbers."""

    def turned(x: int) -> int:
        return (x >> 32 | x << 32) % 2**64

    x = y = counter * key % 2**64
    z = (y + key) % 2**64
    for added in (y, z, y):
        x = turned((x * x + added) % 2**64)
    return (x * x + z) % 2**64 >> 32


def splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63 - 1])
def test_noise_is_made_of_the_published_bits(seed: int) -> None:
    key = splitmix64(seed) | 1
    noise = noise_of(seed, num_steps=3, vocab_size=7)
    for step in range(3):
        for token in range(7):
            uniform = ((squares32(step * 7 + token, key) >> 9) + 0.5) / 2**23
            expected = -math.log(-math.log(uniform))
            assert float(noise[step, 0, token]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_each_image_may_be_at_a_step_of_its_own() -> None:
    seeds = torch.tensor([1, 2])
    own = gumbel_noise(seeds, steps=torch.tensor([[0], [3]]), vocab_size=9)
    for row, step in enumerate((0, 3)):
        assert torch.equal(own[row], gumbel_noise(seeds, steps=step, vocab_size=9)[row])


def test_noise_is_always_finite() -> None:
    noise = noise_of(*range(50), num_steps=20, vocab_size=1000)
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_samples_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, -2.5])
    num_seeds, num_steps = 400, 100
    noise = noise_of(*range(num_seeds), num_steps=num_steps)
    generated = (logits + noise).argmax(-1)
    count = num_seeds * num_steps
    expected = count * logits.double().softmax(-1)
    observed = generated.flatten().bincount(minlength=5)
    # 23.5 is passed by chance once in 10,000 times (4 degrees of freedom).
    assert ((observed - expected) ** 2 / expected).sum() < 23.5
    # Pairs of successive steps, and of images with successive seeds, must be independent.
    for pairs in (generated[1:] * 5 + generated[:-1], generated[:, 1:] * 5 + generated[:, :-1]):
        fraction = torch.outer(logits.double().softmax(-1), logits.double().softmax(-1)).flatten()
        expected_pairs = pairs.numel() * fraction
        observed_pairs = pairs.flatten().bincount(minlength=25)
        # 24 degrees of freedom; neighboring pairs overlap, hence the wide limit.
        assert ((observed_pairs - expected_pairs) ** 2 / expected_pairs).sum() < 60
