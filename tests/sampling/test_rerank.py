"""Ranking images by the decoder's own likelihoods."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.sampling.generate import (
    ROWS_PER_BATCH,
    SamplingConfig,
    generate_image_token_ids,
)
from dalle_mini_impl.sampling.likelihood import image_log_likelihood, log_likelihood_ratio
from dalle_mini_impl.sampling.rerank import best_of

BuildDalle = Callable[..., Dalle]


def test_likelihoods_of_all_images_sum_to_one(build_dalle: BuildDalle) -> None:
    model = build_dalle(codebook_levels=(3,), image_grid_size=(2, 2))
    images = torch.tensor(list(itertools.product(range(3), repeat=4)))
    text = torch.tensor([[4, 2, 9, 0, 0]]).expand(len(images), -1)
    likelihoods = image_log_likelihood(model, text, images)
    assert float(likelihoods.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert likelihoods.std() > 0.1


def test_log_ratio_is_a_difference_of_likelihoods(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    text = torch.tensor([[1, 2, 3, 0, 0], [0, 0, 0, 0, 0]])
    image = torch.arange(24).reshape(2, 12) % 12
    ratio = log_likelihood_ratio(model, text, image)
    given, free = (image_log_likelihood(model, part, image) for part in (text, 0 * text))
    torch.testing.assert_close(ratio, given - free)
    assert ratio[0].abs() > 0.1
    assert ratio[1] == 0  # the null caption says nothing


def test_score_does_not_depend_on_its_batch(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, 11, (ROWS_PER_BATCH + 5, 5), generator=generator)
    image = torch.randint(0, 12, (ROWS_PER_BATCH + 5, 12), generator=generator)
    together = log_likelihood_ratio(model, text, image)
    pairs = zip(text.split(1), image.split(1), strict=True)
    alone = [log_likelihood_ratio(model, *pair) for pair in pairs]
    # One shape for all, but a library may round the rows of one product in several ways.
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-3, rtol=0)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_log_ratio_equals_the_sum_while_sampling(build_dalle: BuildDalle, schedule: str) -> None:
    model = build_dalle()
    text = torch.tensor([[1, 2, 3, 0, 0], [7, 7, 1, 5, 6], [10, 0, 0, 0, 0]])
    sampling_config = SamplingConfig(guidance_scale=3.0, guidance_schedule=schedule)  # type: ignore[arg-type]
    generated = generate_image_token_ids(
        model, text, seeds=torch.arange(3), sampling_config=sampling_config
    )
    ratio = log_likelihood_ratio(model, text, generated.image_token_ids)
    assert ratio.abs().min() > 0.1
    assert (ratio - generated.log_likelihood_ratio).abs().max() <= 1e-3


@hypothesis_settings(max_examples=40)
@given(count=st.integers(0, 4), size=st.integers(1, 5), data=st.data())
def test_best_of_picks_the_largest_of_each_group(count: int, size: int, data: Any) -> None:
    group = st.lists(st.floats(-9, 9, width=32), min_size=size, max_size=size)
    groups = [data.draw(group) for _ in range(count)]
    scores = torch.tensor([score for group in groups for score in group])
    kept = best_of(scores, num_candidates=size)
    best = [index * size + group.index(max(group)) for index, group in enumerate(groups)]
    assert kept.tolist() == best


def test_groups_must_be_even() -> None:
    for count in (0, -1, 2):
        message = f"num_candidates: got {count}, expected a divisor of 3"
        with pytest.raises(ValueError, match=message):
            best_of(torch.zeros(3), num_candidates=count)
