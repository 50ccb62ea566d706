"""Drawing tokens: against a slow loop without cache, and alone or beside others."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.sampling.generate import (
    DrawnTokens,
    draw_rows,
    generate_image_token_ids,
)
from dalle_mini_impl.sampling.logits import gumbel_noise
from dalle_mini_impl.sampling.token_choice import SamplingConfig
from tests.reference.slow_sampling import slow_allowed, slow_scale

BuildDalle = Callable[..., Dalle]


def captions(model: Dalle, count: int) -> Tensor:
    """Captions of one token or more, padded."""
    generator = torch.Generator().manual_seed(3)
    shape = (count, model.config.text_length)
    text = torch.randint(1, model.config.vocab_size, shape, generator=generator)
    lengths = torch.randint(1, shape[1] + 1, (count, 1), generator=generator)
    return text.masked_fill(torch.arange(shape[1]) >= lengths, 0)


@torch.inference_mode()
def slow_draw(
    model: Dalle, text: Tensor, seed: int, settings: SamplingConfig
) -> tuple[list[int], Tensor, Tensor, float]:
    """Draw one picture by whole passes over all that is known.

    Returns the tokens, the logits given the caption and given nothing, and the caption's gain.
    """
    num_steps, vocab_size = model.config.image_length, model.config.codebook_size
    image = torch.zeros(1, num_steps, dtype=torch.long)
    given, free, gain = [], [], 0.0
    for step in range(num_steps):
        conditional = model(text[None], image).image[0, step].double()
        null = model(torch.zeros_like(text)[None], image).image[0, step].double()
        scale = slow_scale(settings, step, num_steps)
        guided = (scale * conditional + (1 - scale) * null) / settings.temperature
        noise = gumbel_noise(torch.tensor([seed]), steps=step, vocab_size=vocab_size)[0].double()
        token = max(slow_allowed(guided, settings), key=lambda k: float(guided[k] + noise[k]))
        image[0, step] = token
        given.append(conditional)
        free.append(null)
        gain += float(conditional.log_softmax(-1)[token] - null.log_softmax(-1)[token])
    return image[0].tolist(), torch.stack(given), torch.stack(free), gain


def record_logits(model: Dalle, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Keep what every prefill and decode_one of this model returns."""
    seen: list[Tensor] = []

    def recording(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            seen.append(method(*args, **kwargs))
            return seen[-1]

        return call

    for name in ("prefill", "decode_one"):
        monkeypatch.setattr(model, name, recording(getattr(model, name)))
    return seen


SETTINGS = [
    SamplingConfig(guidance_scale=1.0),
    SamplingConfig(guidance_scale=0.0, guidance_schedule="constant"),
    SamplingConfig(guidance_scale=3.0, guidance_schedule="constant", temperature=0.7),
    SamplingConfig(guidance_scale=4.0, guidance_schedule="cosine", top_k=5),
    SamplingConfig(guidance_scale=2.0, guidance_schedule="cosine", temperature=2.0, top_p=0.8),
    SamplingConfig(guidance_scale=2.5, top_k=7, top_p=0.6, temperature=1.5),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_tokens_and_logits_equal_a_slow_loop_without_cache(
    build_dalle: BuildDalle, settings: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_dalle()
    text, seeds = captions(model, 3), torch.tensor([11, 12, 13])
    seen = record_logits(model, monkeypatch)
    drawn = draw_rows(model, text, seeds=seeds, settings=settings)
    logits = torch.stack(seen, dim=1)  # (rows, steps, codebook)
    is_guided = settings.guidance_scale != 1.0
    assert len(logits) == 3 * (2 if is_guided else 1)
    for row in range(3):
        tokens, given, free, gain = slow_draw(model, text[row], int(seeds[row]), settings)
        assert drawn.image_token_ids[row].tolist() == tokens
        # Sums of float32 in another order.
        assert (logits[row] - given).abs().max() <= 5e-5
        if is_guided:
            assert (logits[3 + row] - free).abs().max() <= 5e-5
            assert float(drawn.caption_gain[row]) == pytest.approx(gain, abs=1e-3)
        else:
            assert drawn.caption_gain[row] == 0


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_batch_of_n_is_n_batches_of_one(build_dalle: BuildDalle, guidance_scale: float) -> None:
    # Wide enough that matrix products of other row counts do round differently.
    model = build_dalle(hidden_size=192, num_heads=3, codebook_levels=(8, 5, 5))
    settings = SamplingConfig(guidance_scale=guidance_scale)

    def draw(text: Tensor, seeds: Tensor) -> DrawnTokens:
        return generate_image_token_ids(model, text, seeds=seeds, settings=settings)

    text, seeds = captions(model, 20), torch.arange(100, 120)
    alone = [draw(text[i : i + 1], seeds[i : i + 1]) for i in range(20)]
    tokens, gains = (torch.cat(parts) for parts in zip(*alone, strict=True))
    assert len(tokens.unique(dim=0)) == 20
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for picks in (
        torch.arange(1),
        torch.arange(3),
        torch.arange(3).flip(0),
        torch.arange(16),
        torch.arange(20),
        shuffled,
        torch.tensor([7] * 18),
    ):
        together = draw(text[picks], seeds[picks])
        assert torch.equal(together.image_token_ids, tokens[picks])
        # Sums of float32 in another order; the gains are tens of nats.
        torch.testing.assert_close(together.caption_gain, gains[picks], atol=1e-3, rtol=0)


def test_the_plain_way_draws_the_same(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    text, seeds = captions(model, 20), torch.arange(20)
    for settings in SETTINGS:
        plain = draw_rows(model, text, seeds=seeds, settings=settings)
        drawn = generate_image_token_ids(model, text, seeds=seeds, settings=settings)
        assert torch.equal(drawn.image_token_ids, plain.image_token_ids)
        torch.testing.assert_close(drawn.caption_gain, plain.caption_gain, atol=1e-3, rtol=0)


def test_an_empty_batch_is_empty(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    drawn = generate_image_token_ids(
        model, captions(model, 0), seeds=torch.arange(0), settings=SamplingConfig()
    )
    assert drawn.image_token_ids.shape == (0, model.config.image_length)
    assert drawn.caption_gain.shape == (0,)


def test_the_seed_decides_and_nothing_else(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    text = captions(model, 1).expand(4, -1)
    seeds = torch.tensor([5, 6, 5, 2**63 - 1])
    torch.manual_seed(0)
    first = generate_image_token_ids(model, text, seeds=seeds, settings=SamplingConfig())
    torch.manual_seed(1)
    again = generate_image_token_ids(model, text, seeds=seeds, settings=SamplingConfig())
    assert torch.equal(first.image_token_ids, again.image_token_ids)
    assert torch.equal(first.image_token_ids[0], first.image_token_ids[2])
    assert len(first.image_token_ids.unique(dim=0)) == 3


def test_low_temperature_takes_the_likeliest_token(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    text = captions(model, 6)
    cold, greedy = (
        generate_image_token_ids(
            model, text, seeds=torch.arange(6), settings=SamplingConfig(guidance_scale=2.0, **more)
        )
        for more in ({"temperature": 1e-4}, {"top_k": 1})
    )
    assert torch.equal(cold.image_token_ids, greedy.image_token_ids)
    other_seeds = generate_image_token_ids(
        model,
        text,
        seeds=torch.arange(6) + 50,
        settings=SamplingConfig(guidance_scale=2.0, top_p=1e-9),
    )
    assert torch.equal(other_seeds.image_token_ids, greedy.image_token_ids)


@pytest.mark.usefixtures("unchecked")
def test_one_seed_per_caption(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    with pytest.raises(ValueError, match="seeds: got 2, wanted one per caption, 3"):
        generate_image_token_ids(
            model, captions(model, 3), seeds=torch.arange(2), settings=SamplingConfig()
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guidance_scale", -1.0),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
    ],
)
def test_values_that_define_no_distribution_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}: got {value}"):
        SamplingConfig(**{field: value})


@pytest.mark.usefixtures("unchecked")
def test_unknown_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="guidance_schedule: got 'linear', wanted one of constant"):
        SamplingConfig(guidance_schedule="linear")  # type: ignore[arg-type]
