"""Metrics of reconstruction and codebook use, against known values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqvae.metrics import codebook_perplexity, codebook_usage, hard_soft_gap, psnr, token_counts


def test_psnr_of_known_errors() -> None:
    pixels = torch.zeros(2, 3, 4, 4)
    reconstruction = pixels.clone()
    reconstruction[0] += 0.2  # 20 log10(2 / 0.2) = 20 dB
    reconstruction[1] += 0.02  # 40 dB
    torch.testing.assert_close(psnr(reconstruction[:1], pixels[:1]), torch.tensor(20.0))
    torch.testing.assert_close(psnr(reconstruction, pixels), torch.tensor(30.0))


def test_psnr_is_capped_and_clamps_the_reconstruction_only() -> None:
    pixels = torch.ones(2, 3, 4, 4)
    assert psnr(pixels, pixels) == 100
    overshoot = torch.full_like(pixels, 1.5)
    assert psnr(overshoot, pixels) == 100
    assert overshoot.min() == 1.5


def test_psnr_refuses_to_broadcast() -> None:
    # A TypeError if jaxtyping checks the shapes first.
    with pytest.raises((ValueError, TypeError), match="reconstruction"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4))


def test_hard_soft_gap_is_the_loss_in_decibel() -> None:
    pixels = torch.zeros(1, 3, 4, 4)
    gap = hard_soft_gap(pixels + 0.02, pixels + 0.2, pixels)
    torch.testing.assert_close(gap, torch.tensor(20.0))


def test_token_counts_and_usage() -> None:
    counts = token_counts(torch.tensor([[[0, 2], [2, 2]]]), 4)
    assert counts.tolist() == [1, 0, 3, 0]
    assert codebook_usage(counts) == 0.5
    with pytest.raises(ValueError, match="token_ids: got 4, expected ids below 4"):
        token_counts(torch.tensor([4]), 4)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(0, 10**9), min_size=1, max_size=20).filter(any))
def test_perplexity_lies_between_1_and_the_number_of_used_codes(counts: list[int]) -> None:
    used = sum(count > 0 for count in counts)
    perplexity = float(codebook_perplexity(torch.tensor(counts)))
    assert 1 - 1e-5 <= perplexity <= used * (1 + 1e-5)


def test_perplexity_of_even_counts_is_the_number_of_codes() -> None:
    counts = torch.tensor([0, 7, 7, 7, 0])
    torch.testing.assert_close(codebook_perplexity(counts), torch.tensor(3.0))
    with pytest.raises(ValueError, match="counts: got a sum of 0"):
        codebook_perplexity(torch.zeros(4, dtype=torch.int64))
