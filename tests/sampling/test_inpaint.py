"""Inpainting: kept tokens stay, and new ones depend on all of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.sampling.generate import ROWS_PER_BATCH, generate_image_token_ids
from dalle_mini_impl.sampling.inpaint import (
    inpaint_image_token_ids,
    inpainting_order,
    is_raster_order,
)
from dalle_mini_impl.sampling.sampler import GeneratedTokens, SamplingConfig
from tests.reference.slow_sampling import slow_generate

BuildDalle = Callable[..., Dalle]
HOLE = torch.tensor([0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]).bool()  # in a grid of 3 x 4
SAMPLING_CONFIGS = [
    SamplingConfig(guidance_scale=1.0),
    SamplingConfig(guidance_scale=3.0, guidance_schedule="cosine", temperature=1.3, top_p=0.9),
]


def inpaint(
    model: Dalle, text: Tensor, image: Tensor, holes: Tensor, seeds: Tensor, config: SamplingConfig
) -> GeneratedTokens:
    return inpaint_image_token_ids(model, text, image, holes, seeds=seeds, sampling_config=config)


def rows(model: Dalle, count: int) -> tuple[Tensor, Tensor]:
    """Captions and images."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, model.config.vocab_size, (count, 5), generator=generator)
    return text, torch.randint(0, 12, (count, 12), generator=generator)


@pytest.mark.parametrize("sampling_config", SAMPLING_CONFIGS)
def test_tokens_equal_a_slow_loop_without_cache(
    build_dalle: BuildDalle, sampling_config: SamplingConfig
) -> None:
    model = build_dalle()
    text, image = rows(model, 4)
    holes = torch.stack([HOLE, HOLE.roll(3), HOLE.roll(-5), HOLE.flip(0)])  # one for each row
    seeds = torch.tensor([3, 4, 5, 2**63 - 1])
    generated = inpaint(model, text, image, holes, seeds, sampling_config)
    assert torch.equal(generated.image_token_ids[~holes], image[~holes])
    for row in range(4):
        hole = holes[row].tolist()
        order = [c for c in range(12) if not hole[c]] + [c for c in range(12) if hole[c]]
        known = image[row, order[:10]].tolist()
        tokens, ratio = slow_generate(
            model, text[row], int(seeds[row]), sampling_config, order=order, known=known
        )
        assert generated.image_token_ids[row, order].tolist() == tokens
        if sampling_config.guidance_scale != 1.0:
            assert float(generated.log_likelihood_ratio[row]) == pytest.approx(ratio, abs=1e-3)


@pytest.mark.parametrize("num_kept", [0, 1, 4, 11])
def test_a_seed_continues_its_own_image(build_dalle: BuildDalle, num_kept: int) -> None:
    model, sampling_config = build_dalle(), SamplingConfig(guidance_scale=2.0)
    text, _ = rows(model, 3)
    seeds = torch.arange(3)
    whole = generate_image_token_ids(model, text, seeds=seeds, sampling_config=sampling_config)
    below = (torch.arange(12) >= num_kept).expand(3, -1)
    start = whole.image_token_ids.masked_fill(below, 0)
    again = inpaint(model, text, start, below, seeds, sampling_config)
    assert torch.equal(again.image_token_ids, whole.image_token_ids)


def first_token_frequencies(
    model: Dalle, text: Tensor, image: Tensor, count: int = 200
) -> list[float]:
    """How often each token stands in the first cell of the hole, over many seeds."""
    many = [each.expand(count, -1) for each in (text, image, HOLE)]
    generated = inpaint(model, *many, torch.arange(count), SamplingConfig(guidance_scale=1.0))
    return (generated.image_token_ids[:, 5].bincount(minlength=12) / count).tolist()


def test_a_hole_depends_on_every_side_and_on_the_caption(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    with torch.no_grad():  # as in a trained model, what stands around matters most
        model.image_embedding.rows.mul_(6)
    text, image = rows(model, 1)
    before = first_token_frequencies(model, text, image)
    assert before == first_token_frequencies(model, text, image)  # the same seeds

    def shift(changed: list[float]) -> float:
        return sum(abs(a - b) for a, b in zip(before, changed, strict=True)) / 2

    for cell in (1, 4, 7, 9, 11):  # above, left, right, below, far below
        other = image.clone()
        other[0, cell] = (other[0, cell] + 5) % 12
        assert shift(first_token_frequencies(model, text, other)) > 0.01, cell
    assert shift(first_token_frequencies(model, text.flip(1), image)) > 0.01
    inside = image.clone()
    inside[0, 5:7] = 0  # what stood in the hole is not known
    assert first_token_frequencies(model, text, inside) == before


def test_result_does_not_depend_on_the_batch(build_dalle: BuildDalle) -> None:
    model, sampling_config = build_dalle(), SamplingConfig(guidance_scale=2.0)
    count = ROWS_PER_BATCH + 3
    text, image = rows(model, count)
    holes = torch.stack([HOLE.roll(shift) for shift in range(count)])

    def fill(picks: Tensor) -> Tensor:
        parts = text[picks], image[picks], holes[picks]
        return inpaint(model, *parts, picks, sampling_config).image_token_ids

    together = fill(torch.arange(count))
    assert len(together.unique(dim=0)) == count
    for pick in (0, 5, count - 1):
        assert torch.equal(fill(torch.tensor([pick]))[0], together[pick])
    assert torch.equal(fill(torch.arange(count).flip(0)).flip(0), together)


def test_orders() -> None:
    assert inpainting_order(HOLE[None]).tolist() == [[0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 5, 6]]
    for num_kept, raster in ((0, True), (7, True), (12, True)):
        below = (torch.arange(12) >= num_kept)[None]
        assert is_raster_order(inpainting_order(below)) is raster
    assert not is_raster_order(inpainting_order(torch.stack([HOLE, ~HOLE])))


@pytest.mark.parametrize(
    "holes", [torch.zeros(2, 12).bool(), torch.stack([HOLE, ~HOLE])], ids=["none", "unequal"]
)
def test_bad_masks_are_refused(build_dalle: BuildDalle, holes: Tensor) -> None:
    model = build_dalle()
    text, image = rows(model, 2)
    message = "^is_masked: got .* tokens, expected equally many in each"
    with pytest.raises(ValueError, match=message):
        inpaint(model, text, image, holes, torch.arange(2), SAMPLING_CONFIGS[0])
