"""Masks: True = may attend."""

import torch

from dalle_mini_impl.transformer.masks import causal_mask, padding_mask


def test_causal_mask_shows_the_past_and_oneself() -> None:
    mask = causal_mask(4)
    assert mask.dtype == torch.bool
    for query in range(4):
        for key in range(4):
            assert bool(mask[query, key]) == (key <= query)


def test_padding_mask_shows_tokens() -> None:
    is_token = torch.tensor([[True, False, True], [True, True, False]])
    mask = padding_mask(is_token)
    assert mask.shape == (2, 1, 1, 3)
    assert torch.equal(mask[:, 0, 0], is_token)
