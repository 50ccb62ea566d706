"""The caption encoder and picture decoder: against a plain one, causal, cached, in any order."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.models.dalle_config import DalleConfig, DecoderConfig
from dalle_mini_impl.models.dalle_encoder_decoder import DalleEncoderDecoder
from dalle_mini_impl.models.text_to_image import build_text_to_image
from dalle_mini_impl.sampling.generate import draw_rows
from dalle_mini_impl.sampling.token_choice import SamplingConfig
from tests.reference.plain_encoder_decoder import plain_image_logits

Build = Callable[..., DalleEncoderDecoder]
TOLERANCE = 5e-5  # float32 sums in other orders are up to 5e-6 apart; mistakes move by 1e-2
BATCH = 3  # rows of inputs()


@pytest.fixture(scope="module")
def build(build_dalle: Callable[..., Any]) -> Build:
    def build_it(**changes: Any) -> DalleEncoderDecoder:
        encoder = {"architecture": "encoder_decoder", "num_encoder_layers": 2}
        model = build_dalle(**encoder | changes)
        assert isinstance(model, DalleEncoderDecoder)
        return model

    return build_it


def inputs(model: DalleEncoderDecoder, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random captions, one with pads at its end and one of pads alone, and random pictures."""
    generator = torch.Generator().manual_seed(seed)
    sizes = model.config
    text = torch.randint(1, sizes.vocab_size, (BATCH, sizes.text_length), generator=generator)
    text[1, 3:] = 0
    text[2] = 0
    image_shape = (BATCH, sizes.image_length)
    return text, torch.randint(sizes.codebook_size, image_shape, generator=generator)


def random_orders(model: DalleEncoderDecoder, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    cells = model.config.image_length
    return torch.stack([torch.randperm(cells, generator=generator) for _ in range(BATCH)])


def gap(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() - other.detach().double()).abs().max())


@pytest.mark.parametrize("codebook_levels", [(13,), (2, 3, 2)])
@pytest.mark.parametrize("shuffled", [False, True])
@torch.inference_mode()
def test_equals_the_plain_model(
    build: Build, shuffled: bool, codebook_levels: tuple[int, ...]
) -> None:
    model = build(codebook_levels=codebook_levels)
    text, image = inputs(model)
    raster = torch.arange(model.config.image_length).expand(BATCH, -1)
    order = random_orders(model) if shuffled else raster
    logits = model(text, image, image_order=order if shuffled else None)
    assert logits.text is None
    assert logits.image.std() > 0.5
    for row in range(BATCH):
        plain = plain_image_logits(
            model.state_dict(),
            model.config,
            text[row].tolist(),
            image[row].tolist(),
            order[row].tolist(),
        )
        assert gap(logits.image[row], plain) <= TOLERANCE


def test_training_path_gives_the_same_logits(build: Build) -> None:
    model = build(dropout_probability=0.0).train()
    text, image = inputs(model)
    with_gradient = model(text, image).image
    with torch.inference_mode():
        assert gap(with_gradient, model.eval()(text, image).image) <= TOLERANCE


@torch.inference_mode()
def test_cached_logits_equal_uncached(build: Build) -> None:
    model = build()
    text, image = inputs(model)
    raster = torch.arange(model.config.image_length)
    for order in (raster, random_orders(model)[0]):
        expected = model(text, image, image_order=order.expand(BATCH, -1)).image
        cells = order.tolist()
        cache = model.new_cache(BATCH)
        steps = [model.prefill(text, cache, first_cell=cells[0])]
        for step in range(len(cells) - 1):
            steps.append(
                model.decode_one(image[:, step], cache, cell=cells[step], next_cell=cells[step + 1])
            )
        assert gap(torch.stack(steps, dim=1), expected) <= TOLERANCE
        assert cache.length == model.config.sequence_length == cache.keys.shape[3] == len(cells)
        assert len(cache.contexts) == model.config.decoder.num_layers


@pytest.mark.parametrize("shuffled", [False, True])
@torch.inference_mode()
def test_windows_at_a_step_of_each_rows_own_equal_uncached(build: Build, shuffled: bool) -> None:
    model = build()
    text, image = inputs(model)
    order = random_orders(model) if shuffled else None
    expected = model(text, image, image_order=order).image
    last = model.config.image_length - 1
    cache = model.new_cache(BATCH)
    first = model.prefill(text, cache, first_cell=0 if order is None else order[:, 0])
    assert gap(first, expected[:, 0]) <= TOLERANCE
    steps, windows = torch.zeros(BATCH, dtype=torch.long), [3, 1, 2, 3]
    for advance, window in zip([1, 0, 1, 0], windows, strict=True):
        tokens = torch.stack([image[row, step:][:window] for row, step in enumerate(steps)])
        guessed = tokens.clone()
        guessed[:, 1:] = (guessed[:, 1:] + 1) % model.config.codebook_size
        # Wrong guesses leave no trace.
        model.decode_window(guessed, cache, first_steps=steps, image_order=order)
        got = model.decode_window(tokens, cache, first_steps=steps, image_order=order)
        for row, step in enumerate(steps):
            assert gap(got[row], expected[row, step + 1 : step + 1 + window]) <= TOLERANCE
        steps = (steps + advance + torch.arange(BATCH) % 2).clamp_max(last - max(windows))


@torch.inference_mode()
def test_captions_and_null_captions_together_equal_two_passes(build: Build) -> None:
    model = build()
    text, _ = inputs(model)
    settings = SamplingConfig(guidance_scale=2.5, guidance_schedule="constant", temperature=1e-5)
    drawn = draw_rows(model, text, seeds=torch.arange(BATCH), settings=settings).image_token_ids
    given = model(text, drawn).image
    null = model(torch.zeros_like(text), drawn).image
    guided = null + 2.5 * (given - null)
    assert torch.equal(guided.argmax(dim=-1), drawn)
    assert not torch.equal(given.argmax(dim=-1), drawn)
    gain = draw_rows(model, text, seeds=torch.arange(BATCH), settings=settings).caption_gain
    logs = (each.log_softmax(-1).gather(2, drawn.unsqueeze(2)) for each in (given, null))
    difference = next(logs) - next(logs)
    torch.testing.assert_close(gain, difference.sum(dim=(1, 2)), atol=1e-3, rtol=0)


@torch.inference_mode()
def test_all_see_the_whole_caption_and_no_later_image_token(build: Build) -> None:
    model = build()
    sizes = model.config
    text, image = inputs(model)
    before, context = model(text, image).image, model.encode(text)
    for place in range(sizes.text_length):
        other = text.clone()
        other[:, place] = other[:, place] % (sizes.vocab_size - 1) + 1
        assert ((model.encode(other) - context).abs().amax(dim=-1) > 1e-4).all()
        assert ((model(other, image).image - before).abs().amax(dim=-1) > 1e-4).all()
    for place in range(sizes.image_length):
        other = image.clone()
        other[:, place] = (other[:, place] + 1) % sizes.codebook_size
        after = model(text, other).image
        assert torch.equal(after[:, : place + 1], before[:, : place + 1])
        changed = (after - before)[:, place + 1 :].abs().amax(dim=-1)
        assert (changed > 1e-4).all()


@torch.inference_mode()
def test_later_cells_are_not_seen_and_the_next_cell_is(build: Build) -> None:
    model = build()
    text, image = inputs(model)
    order = random_orders(model)
    other = order.clone()
    other[:, 6:] = other[:, 6:].flip(1)
    before = model(text, image, image_order=order).image
    after = model(text, image, image_order=other).image
    assert torch.equal(after[:, :6], before[:, :6])
    assert ((after - before)[:, 6:].abs().amax(dim=-1) > 1e-4).all()
    first = order.clone()
    first[:, [0, 11]] = first[:, [11, 0]]
    moved = model(text, image, image_order=first).image - before
    assert (moved[:, 0].abs().amax(dim=-1) > 1e-4).all()


@torch.inference_mode()
def test_pads_are_one_learned_vector_per_place(build: Build) -> None:
    model = build()
    text, image = inputs(model)
    before = model(text, image).image
    model.text_embedding.weight[0].normal_()  # the pad id's own row is never read
    assert torch.equal(model(text, image).image, before)
    model.text_pads.weight[3].normal_()  # the fourth place: a pad in rows 1 and 2
    moved = (model(text, image).image - before).abs().amax(dim=(1, 2))
    assert moved[0] == 0
    assert (moved[1:] > 1e-3).all()


@torch.inference_mode()
def test_rows_do_not_see_each_other(build: Build) -> None:
    model = build()
    text, image = inputs(model)
    together = model(text, image).image
    for row in range(BATCH):
        alone = model(text[row : row + 1], image[row : row + 1]).image
        assert gap(together[row], alone[0]) <= TOLERANCE


def test_every_weight_gets_a_gradient(build: Build) -> None:
    model = build()
    model(*inputs(model)).image.pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def config_of(**decoder: Any) -> DalleConfig:
    return DalleConfig(
        decoder=DecoderConfig(hidden_size=64, num_heads=4, **decoder),
        vocab_size=50,
        text_length=3,
        codebook_levels=(5, 12),
        image_grid_size=(2, 2),
    )


def test_a_fresh_model_starts_at_the_uniform_distribution() -> None:
    torch.manual_seed(0)
    config = config_of(architecture="encoder_decoder", num_layers=6, num_encoder_layers=4)
    model = build_text_to_image(config)
    text, image = torch.ones(1, 3, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    assert not model(text, image).image.any()
    spreads = {
        "text_embedding.weight": 0.02,
        "encoder_blocks.3.attention.query.weight": 0.02,
        "blocks.3.cross_attention.query.weight": 0.02,
        "blocks.3.cross_attention.output.weight": 0.02 / math.sqrt(18),
        "blocks.3.feed_forward.output.weight": 0.02 / math.sqrt(18),
    }
    for name, spread in spreads.items():
        assert float(model.get_parameter(name).detach().std()) == pytest.approx(spread, rel=0.1)


def test_the_config_decides_the_architecture() -> None:
    assert isinstance(build_text_to_image(config_of()), Dalle)
    with pytest.raises(ValueError, match="architecture: got decoder_only, wanted encoder_decoder"):
        DalleEncoderDecoder(config_of())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_encoder_layers": 0}, "num_encoder_layers: got 0, wanted at least 1 with archi"),
        ({"num_encoder_layers": -1}, "num_encoder_layers: got -1, wanted at least 1 with"),
        (
            {"architecture": "decoder_only"},
            "num_encoder_layers: got 2, wanted 0 with architecture decoder_only",
        ),
        (
            {"architecture": "decoder_only", "num_encoder_layers": -1},
            "num_encoder_layers: got -1, wanted 0",
        ),
        ({"positions": "axial"}, "decoder.positions: got 'axial', wanted 'rotary' with archi"),
    ],
)
def test_what_does_not_go_together_is_refused(
    build: Build, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="architecture: got 'x', wanted one of decoder_only, enc"):
        DecoderConfig(architecture="x")  # type: ignore[arg-type]


def test_names_of_weights_are_the_ones_in_saved_models(build: Build) -> None:
    model = build(num_layers=1, num_encoder_layers=1)
    attention = ("query", "key", "value", "output", "query_norm", "key_norm")
    block = {"attention_norm", "feed_forward_norm", *(f"attention.{name}" for name in attention)}
    block |= {f"feed_forward.{name}" for name in ("gate", "value", "output")}
    cross = {"cross_attention_norm", *(f"cross_attention.{name}" for name in attention)}
    digits = ("rows", "digit_rows.0", "digit_rows.1")
    assert set(model.state_dict()) == {
        "image_start",
        *(f"text_{name}.weight" for name in ("embedding", "positions", "pads")),
        *(f"encoder_blocks.0.{name}.weight" for name in block),
        *(f"blocks.0.{name}.weight" for name in block | cross),
        *(f"{name}.weight" for name in ("encoder_norm", "output_norm", "target_positions")),
        *(f"{table}.{name}" for table in ("image_embedding", "image_head") for name in digits),
    }
