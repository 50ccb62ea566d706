"""Speculative Jacobi decoding: every sequence of a tiny model as often as it should be."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.sampling.generate import draw_rows
from dalle_mini_impl.sampling.jacobi import draw_by_jacobi
from dalle_mini_impl.sampling.token_choice import SamplingConfig
from tests.reference.slow_sampling import slow_allowed, slow_scale

BuildDalle = Callable[..., Dalle]
WITH_ENCODER = {"architecture": "encoder_decoder", "num_encoder_layers": 1}
NUM_PICTURES = 8_000
CAPTION = torch.tensor([[3, 7, 2, 0, 0]])


@pytest.fixture(scope="module")
def tiny(build_dalle: BuildDalle) -> Dalle:
    return build_tiny(build_dalle)


def build_tiny(build_dalle: BuildDalle, **decoder: Any) -> Dalle:
    """Three codes on six cells: 729 pictures, each token leaning on all the ones before it."""
    model = build_dalle(codebook_levels=(3,), image_grid_size=(2, 3), hidden_size=16, **decoder)
    with torch.no_grad():
        model.image_head.rows.mul_(3)
        model.image_embedding.rows.mul_(6)
    return model


def all_pictures(model: Any) -> Tensor:
    codes = range(model.config.codebook_size)
    return torch.tensor(list(itertools.product(codes, repeat=model.config.image_length)))


def slow_filter(logits: Tensor, settings: SamplingConfig) -> Tensor:
    """The distribution of one token, its likeliest ones taken one by one from the top."""
    allowed = slow_allowed(logits, settings)
    kept = torch.full_like(logits, -math.inf)
    kept[allowed] = logits[allowed]
    return kept.softmax(-1)


@torch.inference_mode()
def exact_probabilities(model: Any, pictures: Tensor, settings: SamplingConfig) -> Tensor:
    """How often sequential sampling draws each picture, by whole passes without a cache."""
    num_steps = model.config.image_length
    given = model(CAPTION.expand(len(pictures), -1), pictures).image.double()
    null = model(torch.zeros_like(CAPTION).expand(len(pictures), -1), pictures).image.double()
    share = torch.ones(len(pictures), dtype=torch.float64)
    for step in range(num_steps):
        scale = slow_scale(settings, step, num_steps)
        guided = (scale * given[:, step] + (1 - scale) * null[:, step]) / settings.temperature
        rows = torch.stack([slow_filter(row, settings) for row in guided])
        share *= rows.gather(1, pictures[:, step : step + 1]).squeeze(1)
    return share


def surprise(counts: Tensor, shares: Tensor) -> float:
    """The chi-square statistic as a number of standard deviations (Wilson and Hilferty 1931).

    Cells that expect fewer than five are thrown together.
    """
    expected = shares / shares.sum() * counts.sum()
    is_rare = expected < 5
    counts = torch.cat([counts[~is_rare], counts[is_rare].sum(0, keepdim=True)])
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum(0, keepdim=True)])
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert len(counts) > 20
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


SETTINGS = {
    "plain": SamplingConfig(guidance_scale=1.0),
    "temperature": SamplingConfig(guidance_scale=1.0, temperature=0.7),
    "top_k": SamplingConfig(guidance_scale=1.0, top_k=2, temperature=1.5),
    "top_p": SamplingConfig(guidance_scale=1.0, top_p=0.8, temperature=2.0),
    "constant": SamplingConfig(guidance_scale=2.0, guidance_schedule="constant"),
    "cosine": SamplingConfig(guidance_scale=3.0, guidance_schedule="cosine", temperature=1.5),
    "all": SamplingConfig(guidance_scale=2.0, temperature=2.0, top_k=2, top_p=0.9),
}


@pytest.mark.parametrize(("name", "window"), [*((name, 3) for name in SETTINGS), ("all", 5)])
def test_every_picture_is_as_likely_as_one_token_at_a_time(
    tiny: Dalle, name: str, window: int
) -> None:
    check_distribution(tiny, name, window)


def test_every_picture_is_as_likely_with_an_encoder(build_dalle: BuildDalle) -> None:
    check_distribution(build_tiny(build_dalle, **WITH_ENCODER), "all", 3)


def check_distribution(tiny: Any, name: str, window: int) -> None:
    pictures = all_pictures(tiny)
    shares = exact_probabilities(tiny, pictures, SETTINGS[name])
    drawn = draw_by_jacobi(
        tiny,
        CAPTION.expand(NUM_PICTURES, -1),
        seeds=torch.arange(NUM_PICTURES),
        settings=SETTINGS[name],
        window=window,
    )
    places = tiny.config.codebook_size ** torch.arange(tiny.config.image_length).flip(0)
    counts = (drawn.image_token_ids * places).sum(1).bincount(minlength=len(pictures)).double()
    assert shares.sum() == pytest.approx(1, abs=1e-5)
    assert counts[shares == 0].sum() == 0
    assert surprise(counts, shares) < 3.5  # one in 4,000 of correct samplers


def test_the_chi_square_test_sees_a_slightly_wrong_distribution(tiny: Dalle) -> None:
    pictures = all_pictures(tiny)
    right = exact_probabilities(tiny, pictures, SETTINGS["plain"])
    wrong = exact_probabilities(tiny, pictures, SamplingConfig(guidance_scale=1.0, temperature=0.9))
    generator = torch.Generator().manual_seed(0)
    for source, low, high in ((right, -3.5, 3.5), (wrong, 5.0, math.inf)):
        drawn = source.multinomial(NUM_PICTURES, replacement=True, generator=generator)
        counts = drawn.bincount(minlength=len(pictures)).double()
        assert low < surprise(counts, right) < high


def captions(model: Dalle, count: int) -> Tensor:
    shape = (count, model.config.text_length)
    return torch.randint(
        1, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(3)
    )


@pytest.mark.parametrize("window", [2, 4, 100])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_batch_of_n_is_n_batches_of_one(
    build_dalle: BuildDalle, guidance_scale: float, window: int
) -> None:
    model, settings = build_dalle(), SamplingConfig(guidance_scale=guidance_scale)
    text, seeds = captions(model, 9), torch.arange(100, 109)
    together = draw_by_jacobi(model, text, seeds=seeds, settings=settings, window=window)
    assert len(together.image_token_ids.unique(dim=0)) == 9
    for row in range(9):
        alone = draw_by_jacobi(
            model, text[row : row + 1], seeds=seeds[row : row + 1], settings=settings, window=window
        )
        assert torch.equal(alone.image_token_ids[0], together.image_token_ids[row])
        assert alone.num_passes <= together.num_passes
        assert float(alone.caption_gain[0]) == pytest.approx(
            float(together.caption_gain[row]), abs=1e-3
        )


@pytest.mark.parametrize("window", [1, 3, 11])
def test_the_gain_is_that_of_the_final_tokens(build_dalle: BuildDalle, window: int) -> None:
    model, settings = build_dalle(), SamplingConfig(guidance_scale=2.0)
    text = captions(model, 8)
    drawn = draw_by_jacobi(model, text, seeds=torch.arange(8), settings=settings, window=window)
    with torch.inference_mode():
        log_shares = [
            model(some_text, drawn.image_token_ids).image.log_softmax(-1)
            for some_text in (text, torch.zeros_like(text))
        ]
    chosen = drawn.image_token_ids.unsqueeze(-1)
    expected = (log_shares[0] - log_shares[1]).gather(-1, chosen).sum((1, 2))
    assert torch.allclose(drawn.caption_gain, expected, atol=1e-4)
    unguided = draw_by_jacobi(
        model, text, seeds=torch.arange(8), settings=SamplingConfig(guidance_scale=1.0)
    )
    assert torch.equal(unguided.caption_gain, torch.zeros(8))


def count_passes(model: Dalle, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note every prefill and decode_window of this model."""
    seen: list[str] = []

    def noting(name: str, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            seen.append(name)
            return method(*args, **kwargs)

        return call

    for name in ("prefill", "decode_window"):
        monkeypatch.setattr(model, name, noting(name, getattr(model, name)))
    return seen


@pytest.mark.parametrize("window", [1, 2, 4, 11, 50])
def test_passes_are_counted_and_never_more_than_tokens(
    build_dalle: BuildDalle, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_dalle()
    seen = count_passes(model, monkeypatch)
    drawn = draw_by_jacobi(
        model,
        captions(model, 16),
        seeds=torch.arange(16),
        settings=SamplingConfig(temperature=2.0),
        window=window,
    )
    length = model.config.image_length
    assert drawn.num_passes == len(seen)
    assert seen.count("prefill") == 1
    assert 1 + math.ceil((length - 1) / window) <= drawn.num_passes <= length
    if window == 1:
        assert drawn.num_passes == length


def test_a_predictable_picture_takes_few_passes(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    text, seeds = captions(model, 4), torch.arange(4)
    with torch.no_grad():
        for table in (model.image_embedding, model.target_positions):
            for parameter in table.parameters():
                parameter.zero_()
    cold = SamplingConfig(guidance_scale=2.0, temperature=1e-4, guidance_schedule="constant")
    fast = draw_by_jacobi(model, text, seeds=seeds, settings=cold, window=4)
    slow = draw_rows(model, text, seeds=seeds, settings=cold)
    assert torch.equal(fast.image_token_ids, slow.image_token_ids)
    assert torch.allclose(fast.caption_gain, slow.caption_gain, atol=1e-3)
    assert fast.num_passes <= 8 < model.config.image_length


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("window", "decoder"), [(1, {}), (4, {}), (11, {}), (4, WITH_ENCODER)])
def test_equal_seeds_make_the_picture_of_one_token_at_a_time(
    build_dalle: BuildDalle, name: str, window: int, decoder: dict[str, Any]
) -> None:
    model, settings = build_dalle(**decoder), SETTINGS[name]
    text, seeds = captions(model, 40), torch.arange(40)
    fast = draw_by_jacobi(model, text, seeds=seeds, settings=settings, window=window)
    slow = draw_rows(model, text, seeds=seeds, settings=settings)
    assert torch.equal(fast.image_token_ids, slow.image_token_ids)
    assert torch.allclose(fast.caption_gain, slow.caption_gain, atol=1e-3)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2)])
def test_the_smallest_pictures(build_dalle: BuildDalle, grid: tuple[int, int]) -> None:
    model = build_dalle(image_grid_size=grid)
    drawn = draw_by_jacobi(
        model, captions(model, 3), seeds=torch.arange(3), settings=SamplingConfig()
    )
    assert drawn.image_token_ids.shape == (3, grid[1])
    assert drawn.num_passes == grid[1]


def test_an_empty_batch_is_empty(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    drawn = draw_by_jacobi(
        model, captions(model, 0), seeds=torch.arange(0), settings=SamplingConfig()
    )
    assert drawn.image_token_ids.shape == (0, model.config.image_length)
    assert drawn.caption_gain.shape == (0,)


def test_the_seed_decides_and_nothing_else(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    text, seeds = captions(model, 1).expand(4, -1), torch.tensor([5, 6, 5, 2**63 - 1])
    torch.manual_seed(0)
    first = draw_by_jacobi(model, text, seeds=seeds, settings=SamplingConfig())
    torch.manual_seed(1)
    again = draw_by_jacobi(model, text, seeds=seeds, settings=SamplingConfig())
    assert torch.equal(first.image_token_ids, again.image_token_ids)
    assert torch.equal(first.image_token_ids[0], first.image_token_ids[2])
    assert len(first.image_token_ids.unique(dim=0)) == 3


@pytest.mark.parametrize("window", [0, -3])
def test_an_empty_window_is_refused(build_dalle: BuildDalle, window: int) -> None:
    model = build_dalle()
    with pytest.raises(ValueError, match=f"^window: got {window}, wanted at least 1 token$"):
        draw_by_jacobi(
            model,
            captions(model, 1),
            seeds=torch.arange(1),
            settings=SamplingConfig(),
            window=window,
        )
