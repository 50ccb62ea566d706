"""Which caption fits an image: Bayes over an enumerated world, and captions from the text head."""

import itertools
from collections.abc import Callable

import pytest
import torch

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.sampling.captioning import complete_text
from dalle_mini_impl.sampling.generate import ROWS_PER_BATCH
from dalle_mini_impl.sampling.likelihood import (
    image_log_likelihood,
    log_likelihood_ratio,
    score_pairs,
    text_log_likelihood,
)
from tests.reference.slow_sampling import captions

BuildDalle = Callable[..., Dalle]
TEXT = torch.tensor([[4, 2, 9, 0, 0], [4, 2, 0, 0, 0], [1, 1, 3, 5, 10]])


def test_text_is_predicted_as_with_an_image_after_it(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    with torch.inference_mode():
        image = torch.arange(36).reshape(3, 12) % 12
        torch.testing.assert_close(model.predict_text(TEXT), model(TEXT, image).text)


def test_likelihoods_of_all_captions_sum_to_one(build_dalle: BuildDalle) -> None:
    model = build_dalle(vocab_size=6, text_length=4)
    padded = torch.tensor([[*row, 0] for row in itertools.product(range(1, 6), repeat=3)])
    likelihoods = text_log_likelihood(model, padded)
    # What is missing to one are captions with pads inside, which no training ever shows.
    with torch.inference_mode():
        pads = model.predict_text(padded).softmax(-1)[:, :3, 0]
    assert float(likelihoods.exp().sum()) < 1
    first = text_log_likelihood(model, torch.tensor([[k, 0, 0, 0] for k in range(1, 6)]))
    assert float(first.exp().sum() + pads[0, 0]) == pytest.approx(1, abs=1e-5)
    by_first = likelihoods.exp().reshape(5, 5, 5)
    pairs = [[a, b, 0, 0] for a in range(1, 6) for b in range(1, 6)]
    second = text_log_likelihood(model, torch.tensor(pairs)).exp()
    third_pads = pads[:, 2].reshape(5, 5, 5)[..., 0]
    expected = second.reshape(5, 5) * (1 - third_pads)
    torch.testing.assert_close(by_first.sum(dim=2), expected, atol=1e-5, rtol=0)


def test_scores_are_bayes_rule(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    image = torch.randint(0, 12, (2, 12), generator=torch.Generator().manual_seed(0))
    scores = score_pairs(model, TEXT, image)
    for row, column in itertools.product(range(2), range(3)):
        pair = TEXT[column : column + 1], image[row : row + 1]
        given = image_log_likelihood(model, *pair)
        torch.testing.assert_close(scores.image_given_text[row, column], given[0])
        ratio = scores.image_given_text[row, column] - scores.image[row]
        torch.testing.assert_close(ratio, log_likelihood_ratio(model, *pair)[0], atol=1e-3, rtol=0)
    joint = (scores.image_given_text + text_log_likelihood(model, TEXT)).double().exp()
    alike = scores.image_given_text.double().exp()
    for use_prior, masses in ((True, joint), (False, alike)):
        probabilities = scores.probabilities(use_prior=use_prior).double()
        expected = masses / masses.sum(dim=1, keepdim=True)
        torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=0)
    assert not torch.equal(scores.probabilities(), scores.probabilities(use_prior=True))


def test_caption_score_does_not_depend_on_batch(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    text = captions(model, ROWS_PER_BATCH + 5)
    together = text_log_likelihood(model, text)
    alone = [text_log_likelihood(model, row) for row in text.split(1)]
    # One shape for all, but a library may round the rows of one product in several ways.
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-3, rtol=0)


def test_completions_begin_as_told_and_take_the_likeliest_tokens(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    longer = complete_text(model, TEXT, num_tokens=2)
    for before, after in zip(TEXT.tolist(), longer.tolist(), strict=True):
        start = [token for token in before if token]
        assert after[: len(start)] == start
        assert sum(token != 0 for token in after) == min(len(start) + 2, 5)
        for place in range(len(start), min(len(start) + 2, 5)):
            so_far = torch.tensor([after[:place] + [0] * (5 - place)])
            with torch.inference_mode():
                logits = model.predict_text(so_far)[0, place]
            assert after[place] == int(logits[1:].argmax()) + 1


def test_sampled_completions_follow_the_text_head(build_dalle: BuildDalle) -> None:
    model, count = build_dalle(), 4000
    start = torch.tensor([[4, 2, 0, 0, 0]]).expand(count, -1)
    seeds = torch.arange(count)
    generated = complete_text(model, start, num_tokens=1, seeds=seeds)
    assert torch.equal(generated, complete_text(model, start, num_tokens=1, seeds=seeds))
    with torch.inference_mode():
        expected = model.predict_text(start[:1])[0, 2].index_fill(0, torch.tensor(0), -torch.inf)
    probabilities = generated[:, 2].bincount(minlength=11) / count
    # Standard deviation of a fraction is below 0.008.
    assert (probabilities - expected.softmax(-1)).abs().max() < 0.03
    assert (generated[:, 2] != 0).all()
    alone = complete_text(model, start[:1], num_tokens=3, seeds=seeds[5:6])
    together = complete_text(model, start[:9], num_tokens=3, seeds=seeds[:9])
    assert torch.equal(alone[0], together[5])
