"""Jacobi decoding: every image of a tiny model exactly as often as by sequential sampling."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.sampling.generate import generate_sequentially
from dalle_mini_impl.sampling.jacobi import jacobi_decode
from dalle_mini_impl.sampling.sampler import GeneratedTokens, SamplingConfig
from tests.reference.slow_sampling import captions, slow_allowed, slow_scale
from tests.reference.tiny import WITH_ENCODER

BuildDalle = Callable[..., Dalle]
NUM_IMAGES = 8_000
CAPTION = torch.tensor([[3, 7, 2, 0, 0]])


def decode(
    model: Any, text: Tensor, seeds: Tensor, config: SamplingConfig, **options: Any
) -> GeneratedTokens:
    return jacobi_decode(model, text, seeds=seeds, sampling_config=config, **options)


def build_tiny(build_dalle: BuildDalle, **decoder: Any) -> Dalle:
    """Three codes on six cells: 729 images, each token leaning on all the ones before it."""
    model = build_dalle(codebook_levels=(3,), image_grid_size=(2, 3), hidden_size=16, **decoder)
    with torch.no_grad():
        model.image_head.rows.mul_(3)
        model.image_embedding.rows.mul_(6)
    return model


def all_images(model: Any) -> Tensor:
    codes = range(model.config.codebook_size)
    return torch.tensor(list(itertools.product(codes, repeat=model.config.image_length)))


def slow_filter(logits: Tensor, sampling_config: SamplingConfig) -> Tensor:
    allowed = slow_allowed(logits, sampling_config)
    kept = torch.full_like(logits, -math.inf)
    kept[allowed] = logits[allowed]
    return kept.softmax(-1)


@torch.inference_mode()
def exact_probabilities(model: Any, images: Tensor, sampling_config: SamplingConfig) -> Tensor:
    """How often sequential sampling generates each image, by whole passes without a cache."""
    num_steps = model.config.image_length
    given = model(CAPTION.expand(len(images), -1), images).image.double()
    null = model(torch.zeros_like(CAPTION).expand(len(images), -1), images).image.double()
    probabilities = torch.ones(len(images), dtype=torch.float64)
    for step in range(num_steps):
        scale = slow_scale(sampling_config, step, num_steps)
        guided = scale * given[:, step] + (1 - scale) * null[:, step]
        guided /= sampling_config.temperature
        rows = torch.stack([slow_filter(row, sampling_config) for row in guided])
        probabilities *= rows.gather(1, images[:, step : step + 1]).squeeze(1)
    return probabilities


def surprise(counts: Tensor, probabilities: Tensor) -> float:
    """The chi-square statistic as a number of standard deviations (Wilson and Hilferty 1931).

    Cells that expect fewer than five are thrown together.
    """
    expected = probabilities / probabilities.sum() * counts.sum()
    is_rare = expected < 5
    counts = torch.cat([counts[~is_rare], counts[is_rare].sum(0, keepdim=True)])
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum(0, keepdim=True)])
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert len(counts) > 20
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


SAMPLING_CONFIGS = {
    "plain": SamplingConfig(guidance_scale=1.0),
    "temperature": SamplingConfig(guidance_scale=1.0, temperature=0.7),
    "top_k": SamplingConfig(guidance_scale=1.0, top_k=2, temperature=1.5),
    "top_p": SamplingConfig(guidance_scale=1.0, top_p=0.8, temperature=2.0),
    "constant": SamplingConfig(guidance_scale=2.0, guidance_schedule="constant"),
    "cosine": SamplingConfig(guidance_scale=3.0, guidance_schedule="cosine", temperature=1.5),
    "all": SamplingConfig(guidance_scale=2.0, temperature=2.0, top_k=2, top_p=0.9),
}


@pytest.mark.parametrize(
    ("name", "window", "decoder"),
    [*((name, 3, {}) for name in SAMPLING_CONFIGS), ("all", 5, {}), ("all", 3, WITH_ENCODER)],
)
def test_distribution_is_that_of_sequential_sampling(
    build_dalle: BuildDalle, name: str, window: int, decoder: dict[str, Any]
) -> None:
    tiny: Any = build_tiny(build_dalle, **decoder)
    images = all_images(tiny)
    probabilities = exact_probabilities(tiny, images, SAMPLING_CONFIGS[name])
    text, seeds = CAPTION.expand(NUM_IMAGES, -1), torch.arange(NUM_IMAGES)
    generated = decode(tiny, text, seeds, SAMPLING_CONFIGS[name], window=window)
    places = tiny.config.codebook_size ** torch.arange(tiny.config.image_length).flip(0)
    counts = (generated.image_token_ids * places).sum(1).bincount(minlength=len(images)).double()
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert counts[probabilities == 0].sum() == 0
    assert surprise(counts, probabilities) < 3.5  # one in 4,000 of correct samplers


def test_chi_square_sees_a_slightly_wrong_distribution(build_dalle: BuildDalle) -> None:
    tiny = build_tiny(build_dalle)
    images = all_images(tiny)
    right = exact_probabilities(tiny, images, SAMPLING_CONFIGS["plain"])
    wrong = exact_probabilities(tiny, images, SamplingConfig(guidance_scale=1.0, temperature=0.9))
    generator = torch.Generator().manual_seed(0)
    for source, low, high in ((right, -3.5, 3.5), (wrong, 5.0, math.inf)):
        generated = source.multinomial(NUM_IMAGES, replacement=True, generator=generator)
        counts = generated.bincount(minlength=len(images)).double()
        assert low < surprise(counts, right) < high


@pytest.mark.parametrize("window", [2, 4, 100])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_batch_of_n_is_n_batches_of_one(
    build_dalle: BuildDalle, guidance_scale: float, window: int
) -> None:
    model, sampling_config = build_dalle(), SamplingConfig(guidance_scale=guidance_scale)
    text, seeds = captions(model, 9), torch.arange(100, 109)
    together = decode(model, text, seeds, sampling_config, window=window)
    assert len(together.image_token_ids.unique(dim=0)) == 9
    for row in range(9):
        one = slice(row, row + 1)
        alone = decode(model, text[one], seeds[one], sampling_config, window=window)
        assert torch.equal(alone.image_token_ids[0], together.image_token_ids[row])
        assert alone.num_passes <= together.num_passes
        assert float(alone.log_likelihood_ratio[0]) == pytest.approx(
            float(together.log_likelihood_ratio[row]), abs=1e-3
        )


@pytest.mark.parametrize("window", [1, 3, 11])
def test_log_ratio_is_of_the_final_tokens(build_dalle: BuildDalle, window: int) -> None:
    model, sampling_config = build_dalle(), SamplingConfig(guidance_scale=2.0)
    text = captions(model, 8)
    generated = decode(model, text, torch.arange(8), sampling_config, window=window)
    with torch.inference_mode():
        log_probs = [
            model(some_text, generated.image_token_ids).image.log_softmax(-1)
            for some_text in (text, torch.zeros_like(text))
        ]
    chosen = generated.image_token_ids.unsqueeze(-1)
    expected = (log_probs[0] - log_probs[1]).gather(-1, chosen).sum((1, 2))
    assert torch.allclose(generated.log_likelihood_ratio, expected, atol=1e-4)
    unguided = decode(model, text, torch.arange(8), SamplingConfig(guidance_scale=1.0))
    assert torch.equal(unguided.log_likelihood_ratio, torch.zeros(8))


@pytest.mark.parametrize("window", [1, 2, 4, 11, 50])
def test_passes_are_counted_and_never_more_than_tokens(
    build_dalle: BuildDalle, window: int
) -> None:
    model = build_dalle()
    seen: list[str] = []  # the output norm runs once per pass
    model.output_norm.register_forward_hook(lambda *_: seen.append("pass"))
    hot = SamplingConfig(temperature=2.0)
    generated = decode(model, captions(model, 16), torch.arange(16), hot, window=window)
    length = model.config.image_length
    assert generated.num_passes == len(seen)
    assert 1 + math.ceil((length - 1) / window) <= generated.num_passes <= length
    if window == 1:
        assert generated.num_passes == length


def test_predictable_image_takes_few_passes(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    text, seeds = captions(model, 4), torch.arange(4)
    with torch.no_grad():
        for table in (model.image_embedding, model.target_positions):
            for parameter in table.parameters():
                parameter.zero_()
    cold = SamplingConfig(guidance_scale=2.0, temperature=1e-4, guidance_schedule="constant")
    fast = decode(model, text, seeds, cold, window=4)
    slow = generate_sequentially(model, text, seeds=seeds, sampling_config=cold)
    assert torch.equal(fast.image_token_ids, slow.image_token_ids)
    assert torch.allclose(fast.log_likelihood_ratio, slow.log_likelihood_ratio, atol=1e-3)
    assert fast.num_passes <= 8 < model.config.image_length


@pytest.mark.parametrize("name", SAMPLING_CONFIGS)
@pytest.mark.parametrize(("window", "decoder"), [(1, {}), (4, {}), (11, {}), (4, WITH_ENCODER)])
def test_images_equal_sequential_generation(
    build_dalle: BuildDalle, name: str, window: int, decoder: dict[str, Any]
) -> None:
    model, sampling_config = build_dalle(**decoder), SAMPLING_CONFIGS[name]
    text, seeds = captions(model, 40), torch.arange(40)
    fast = decode(model, text, seeds, sampling_config, window=window)
    slow = generate_sequentially(model, text, seeds=seeds, sampling_config=sampling_config)
    assert torch.equal(fast.image_token_ids, slow.image_token_ids)
    assert torch.allclose(fast.log_likelihood_ratio, slow.log_likelihood_ratio, atol=1e-3)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2)])
def test_smallest_images(build_dalle: BuildDalle, grid: tuple[int, int]) -> None:
    model = build_dalle(image_grid_size=grid)
    generated = decode(model, captions(model, 3), torch.arange(3), SamplingConfig())
    assert generated.image_token_ids.shape == (3, grid[1])
    assert generated.num_passes == grid[1]


@pytest.mark.parametrize("window", [0, -3])
def test_an_empty_window_is_refused(build_dalle: BuildDalle, window: int) -> None:
    model = build_dalle()
    with pytest.raises(ValueError, match=f"^window: got {window}, expected at least 1 token$"):
        decode(model, captions(model, 1), torch.arange(1), SamplingConfig(), window=window)
