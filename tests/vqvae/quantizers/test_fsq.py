"""Finite scalar quantization: levels, token ids, gradient, and how evenly it uses its levels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import quantizers as reference
from tests.reference.random_weights import noise
from vqvae.quantizers import FiniteScalarQuantizer

LEVELS = st.lists(st.integers(2, 9), min_size=1, max_size=4)


def latents(channels: int, seed: int = 0) -> Tensor:
    return noise(2, channels, 3, 4, seed=seed)


@settings(max_examples=20)
@given(levels=LEVELS, seed=st.integers(0, 2**31))
def test_agrees_with_the_reference(levels: list[int], seed: int) -> None:
    encoder_latents = 2 * latents(len(levels), seed)
    output = FiniteScalarQuantizer(levels=levels)(encoder_latents)
    values, token_ids = reference.fsq(encoder_latents, levels)
    assert torch.equal(output.token_ids, token_ids)
    torch.testing.assert_close(output.quantized_latents, values)


@settings(max_examples=20)
@given(levels=LEVELS)
def test_every_token_id_has_its_own_values(levels: list[int]) -> None:
    quantizer = FiniteScalarQuantizer(levels=levels)
    assert quantizer.codebook_size == math.prod(levels)
    token_ids = torch.arange(quantizer.codebook_size)[:, None, None]
    values = quantizer.decode(token_ids)
    assert len(values.flatten(1).unique(dim=0)) == quantizer.codebook_size
    # Latents of a value: shrink it to the middle of its interval, then undo the bound.
    widths = torch.tensor(levels)[:, None, None]
    middles = values * (widths - 1) / widths
    assert torch.equal(quantizer.encode(2 * torch.atanh(middles) / 1.6), token_ids)


def test_values_are_equally_spaced_from_minus_1_to_1() -> None:
    for count in (2, 3, 8, 17):
        values = FiniteScalarQuantizer(levels=[count]).decode(torch.arange(count)[:, None, None])
        torch.testing.assert_close(values.flatten(), torch.linspace(-1, 1, count))


def test_encode_decode_and_forward_agree() -> None:
    quantizer = FiniteScalarQuantizer(levels=[8, 5, 5, 5])
    encoder_latents = latents(4)
    before = encoder_latents.clone()
    output = quantizer(encoder_latents)
    assert torch.equal(encoder_latents, before)
    assert torch.equal(quantizer.encode(encoder_latents), output.token_ids)
    torch.testing.assert_close(quantizer.decode(output.token_ids), output.quantized_latents)
    assert output.token_ids.dtype == torch.int64
    assert output.loss == 0
    assert output.metrics == {}


def test_gradient_is_that_without_rounding() -> None:
    levels = [8, 3]
    encoder_latents = latents(2).requires_grad_()
    upstream = torch.randn(encoder_latents.shape)
    output = FiniteScalarQuantizer(levels=levels)(encoder_latents)
    (gradient,) = torch.autograd.grad((output.quantized_latents * upstream).sum(), encoder_latents)
    bound = torch.tanh(0.8 * encoder_latents)  # the same function as 2 * sigmoid(1.6 x) - 1
    smooth = bound * (torch.tensor(levels) / (torch.tensor(levels) - 1))[:, None, None]
    (expected,) = torch.autograd.grad((smooth * upstream).sum(), encoder_latents)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("level_count", [3, 5, 8, 17])
def test_normal_latents_use_levels_evenly(level_count: int) -> None:
    encoder_latents = noise(1, 1, 200, 200)

    def effective_levels(indices: Tensor) -> float:
        fractions = torch.bincount(indices.flatten(), minlength=level_count) / indices.numel()
        return float(torch.special.entr(fractions).sum().exp())

    ours = effective_levels(FiniteScalarQuantizer(levels=[level_count]).encode(encoder_latents))
    rounded_tanh = ((torch.tanh(encoder_latents) + 1) / 2 * (level_count - 1)).round().long()
    assert ours > 0.99 * level_count
    assert ours > effective_levels(rounded_tanh)


def test_huge_latents_saturate() -> None:
    huge = torch.tensor([-1e30, 1e30]).view(2, 1, 1, 1).expand(2, 2, 1, 1)
    assert FiniteScalarQuantizer(levels=[4, 5]).encode(huge).flatten().tolist() == [0, 19]


def test_has_no_state_and_keeps_half_precision() -> None:
    quantizer = FiniteScalarQuantizer(levels=[8, 8])
    assert not quantizer.state_dict()
    assert not list(quantizer.parameters())
    output = quantizer(latents(2).bfloat16())
    assert output.quantized_latents.dtype == torch.bfloat16
    assert torch.equal(output.token_ids, quantizer.encode(latents(2).bfloat16().float()))


@pytest.mark.parametrize("levels", [[], [8, 1]])
def test_refuses_bad_levels(levels: list[int]) -> None:
    with pytest.raises(ValueError, match="levels"):
        FiniteScalarQuantizer(levels=levels)
