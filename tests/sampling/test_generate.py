"""Generated tokens: against a slow loop without cache, alone and in batches."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.sampling.generate import generate_image_token_ids, generate_sequentially
from dalle_mini_impl.sampling.sampler import GeneratedTokens, SamplingConfig
from tests.reference.slow_sampling import captions, slow_generate

BuildDalle = Callable[..., Dalle]


def generate(model: Dalle, text: Tensor, seeds: Tensor, **config: Any) -> GeneratedTokens:
    sampling_config = SamplingConfig(**config)
    return generate_image_token_ids(model, text, seeds=seeds, sampling_config=sampling_config)


SAMPLING_CONFIGS = [
    SamplingConfig(guidance_scale=1.0),
    SamplingConfig(guidance_scale=0.0, guidance_schedule="constant"),
    SamplingConfig(guidance_scale=3.0, guidance_schedule="constant", temperature=0.7),
    SamplingConfig(guidance_scale=4.0, guidance_schedule="cosine", top_k=5),
    SamplingConfig(guidance_scale=2.0, guidance_schedule="cosine", temperature=2.0, top_p=0.8),
    SamplingConfig(guidance_scale=2.5, top_k=7, top_p=0.6, temperature=1.5),
]


@pytest.mark.parametrize("function", [generate_image_token_ids, generate_sequentially])
@pytest.mark.parametrize("sampling_config", SAMPLING_CONFIGS)
def test_tokens_equal_a_slow_loop_without_cache(
    build_dalle: BuildDalle, sampling_config: SamplingConfig, function: Callable[..., Any]
) -> None:
    model = build_dalle()
    text, seeds = captions(model, 3), torch.tensor([11, 12, 13])
    generated = function(model, text, seeds=seeds, sampling_config=sampling_config)
    assert generated.num_passes <= model.config.image_length
    for row in range(3):
        tokens, ratio = slow_generate(model, text[row], int(seeds[row]), sampling_config)
        assert generated.image_token_ids[row].tolist() == tokens
        if sampling_config.guidance_scale == 1.0:
            assert generated.log_likelihood_ratio[row] == 0
        else:
            assert float(generated.log_likelihood_ratio[row]) == pytest.approx(ratio, abs=1e-3)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_batch_of_n_is_n_batches_of_one(build_dalle: BuildDalle, guidance_scale: float) -> None:
    # Wide enough that matrix products of other row counts do round differently.
    model = build_dalle(hidden_size=192, num_heads=3, codebook_levels=(8, 5, 5))
    text, seeds = captions(model, 20), torch.arange(100, 120)

    def generate_rows(rows: Tensor) -> GeneratedTokens:
        return generate(model, text[rows], seeds[rows], guidance_scale=guidance_scale)

    alone = [generate_rows(torch.tensor([row])) for row in range(20)]
    tokens = torch.cat([each.image_token_ids for each in alone])
    ratios = torch.cat([each.log_likelihood_ratio for each in alone])
    assert len(tokens.unique(dim=0)) == 20
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    in_order = [torch.arange(count) for count in (1, 3, 16, 20)]
    for rows in (*in_order, torch.arange(3).flip(0), shuffled, torch.tensor([7] * 18)):
        together = generate_rows(rows)
        assert torch.equal(together.image_token_ids, tokens[rows])
        # Sums of float32 in another order; the ratios are tens of nats.
        torch.testing.assert_close(together.log_likelihood_ratio, ratios[rows], atol=1e-3, rtol=0)


def test_an_empty_batch_is_empty(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    generated = generate(model, captions(model, 0), torch.arange(0))
    assert generated.image_token_ids.shape == (0, model.config.image_length)
    assert generated.log_likelihood_ratio.shape == (0,)


def test_the_seed_decides_and_nothing_else(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    text = captions(model, 1).expand(4, -1)
    seeds = torch.tensor([5, 6, 5, 2**63 - 1])
    torch.manual_seed(0)
    first = generate(model, text, seeds)
    torch.manual_seed(1)
    again = generate(model, text, seeds)
    assert torch.equal(first.image_token_ids, again.image_token_ids)
    assert torch.equal(first.image_token_ids[0], first.image_token_ids[2])
    assert len(first.image_token_ids.unique(dim=0)) == 3


def test_low_temperature_takes_the_likeliest_token(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    text, seeds = captions(model, 6), torch.arange(6)
    likeliest = generate(model, text, seeds, guidance_scale=2.0, top_k=1)
    cold = generate(model, text, seeds, guidance_scale=2.0, temperature=1e-4)
    narrow = generate(model, text, seeds + 50, guidance_scale=2.0, top_p=1e-9)
    for other in (cold, narrow):
        assert torch.equal(other.image_token_ids, likeliest.image_token_ids)


@pytest.mark.usefixtures("unchecked")
def test_one_seed_per_caption(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    with pytest.raises(ValueError, match="seeds: got 2, expected one per caption, 3"):
        generate(model, captions(model, 3), torch.arange(2))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("guidance_scale", (-1.0, math.nan, math.inf)),
        ("temperature", (0.0, -1.0, math.nan, math.inf)),
        ("top_k", (-1,)),
        ("top_p", (0.0, 1.5, math.nan)),
        ("guidance_schedule", ("linear",)),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_values_are_refused(field: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{field}: got {value!r}, expected"):
            SamplingConfig(**{field: value})


def test_overrides_replace_fields() -> None:
    config = SamplingConfig(guidance_scale=2.0)
    assert config.override({}) == config
    assert config.override({"top_k": 3}) == SamplingConfig(guidance_scale=2.0, top_k=3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"top_q": 1, "top_k": 3}, "^top_q: unknown setting, expected one of guidance_scale, "),
        ({"temperature": "1"}, "^temperature: got '1', expected a number$"),
        ({"top_k": 1.5}, r"^top_k: got 1\.5, expected a whole number$"),
        ({"top_p": 2.0}, "^top_p: got 2.0, expected above 0"),
    ],
)
def test_bad_overrides_are_user_errors(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig().override(overrides)
