"""Classifier-free guidance: the formula, and the schedule."""

import math

import pytest
import torch

from dalle_mini_impl.sampling.guidance import guide, scale_at


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 7, generator=generator), torch.randn(3, 7, generator=generator)


def test_scale_one_is_conditional_and_zero_is_unconditional() -> None:
    conditional, null = pair()
    torch.testing.assert_close(guide(conditional, null, guidance_scale=1.0), conditional)
    assert torch.equal(guide(conditional, null, guidance_scale=0.0), null)


def test_the_formula_by_hand() -> None:
    conditional, null = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 1.0]])
    guided = guide(conditional, null, guidance_scale=3.0)
    torch.testing.assert_close(guided, torch.tensor([[2.0, -8.0]]))


def test_inputs_are_not_edited() -> None:
    inputs = pair()
    guide(*inputs, guidance_scale=5.0).zero_()
    assert all(map(torch.equal, inputs, pair()))


@pytest.mark.parametrize("scale", [-0.1, math.nan, math.inf])
def test_other_scales_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=f"guidance_scale: got {scale}"):
        guide(*pair(), guidance_scale=scale)


def test_a_constant_schedule_is_constant() -> None:
    scales = {scale_at(step, 9, guidance_scale=4.0, schedule="constant") for step in range(9)}
    assert scales == {4.0}


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 6.0])
def test_the_cosine_schedule_goes_from_off_to_full(guidance_scale: float) -> None:
    scales = [
        scale_at(step, 16, guidance_scale=guidance_scale, schedule="cosine") for step in range(16)
    ]
    assert scales[-1] == pytest.approx(guidance_scale)
    assert scales[0] == pytest.approx(1.0, abs=0.001)
    assert scales == sorted(scales, reverse=guidance_scale < 1)
    half_way = 1 + (guidance_scale - 1) * (1 - math.cos(math.pi / 4)) / 2  # power 2: (1/2) ** 2
    assert scales[7] == pytest.approx(half_way)
