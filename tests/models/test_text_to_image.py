"""Both architectures: equal to plain re-implementations, causal, cached, in any order."""

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
from dalle_mini_impl.sampling.generate import generate_sequentially
from dalle_mini_impl.sampling.sampler import SamplingConfig
from tests.reference.plain_decoder import plain_logits
from tests.reference.plain_seq2seq import plain_image_logits
from tests.reference.slow_sampling import stepwise_logits

Build = Callable[..., Any]
TOLERANCE = 5e-5  # float32 sums in other orders are up to 5e-6 apart; mistakes move by 1e-2
BATCH = 3  # rows of inputs()
WITH_ENCODER: dict[str, Any] = {"architecture": "encoder_decoder", "num_encoder_layers": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "learned": {"positions": "learned"},
    "sinusoidal": {"positions": "sinusoidal"},
    "axial": {"positions": "axial"},
    "encoder": WITH_ENCODER,
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_architecture = pytest.mark.parametrize("variant", ["rotary", "encoder"])


@pytest.fixture
def model(build_dalle: Build, variant: str) -> Any:
    return build_dalle(**VARIANTS[variant])


def inputs(model: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random captions, one with pads at its end and one of pads alone, and random images."""
    generator = torch.Generator().manual_seed(seed)
    sizes = model.config
    text = torch.randint(1, sizes.vocab_size, (BATCH, sizes.text_length), generator=generator)
    text[1, 3:] = 0
    text[2] = 0
    image_shape = (BATCH, sizes.image_length)
    return text, torch.randint(sizes.codebook_size, image_shape, generator=generator)


def image_orders(model: Any, *, is_shuffled: bool = True) -> Tensor:
    """Raster order, or another one for each row."""
    generator = torch.Generator().manual_seed(5)
    cells = model.config.image_length
    if not is_shuffled:
        return torch.arange(cells).expand(BATCH, -1)
    return torch.stack([torch.randperm(cells, generator=generator) for _ in range(BATCH)])


def gap(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() - other.detach().double()).abs().max())


def assert_plain(model: Any, text: Tensor, image: Tensor, order: Tensor, logits: Any) -> None:
    """Compare logits with those of the plain re-implementation."""
    assert logits.image.std() > 0.5
    weights, config = model.state_dict(), model.config
    for row in range(BATCH):
        inputs = (text[row].tolist(), image[row].tolist(), order[row].tolist())
        if config.decoder.has_encoder:
            plain_image = plain_image_logits(weights, config, *inputs)
        else:
            plain_text, plain_image = plain_logits(weights, config, *inputs)
            assert gap(logits.text[row], plain_text) <= TOLERANCE
        assert gap(logits.image[row], plain_image) <= TOLERANCE


@each_variant
@pytest.mark.parametrize("codebook_levels", [(13,), (2, 3, 2)])
@pytest.mark.parametrize("is_shuffled", [False, True])
@torch.inference_mode()
def test_logits_equal_plain_model(
    build_dalle: Build, variant: str, is_shuffled: bool, codebook_levels: tuple[int, ...]
) -> None:
    model = build_dalle(**VARIANTS[variant], codebook_levels=codebook_levels)
    text, image = inputs(model)
    order = image_orders(model, is_shuffled=is_shuffled)
    logits = model(text, image, image_order=order if is_shuffled else None)
    assert (logits.text is None) == (variant == "encoder")
    assert_plain(model, text, image, order, logits)


@each_variant
def test_training_path_gives_the_same_logits(build_dalle: Build, variant: str) -> None:
    model = build_dalle(**VARIANTS[variant], dropout_probability=0.0).train()
    text, image = inputs(model)
    with_gradient = model(text, image)
    with torch.inference_mode():
        without = model.eval()(text, image)
    for one, other in zip(with_gradient, without, strict=True):
        assert one is other is None or gap(one, other) <= TOLERANCE


@each_variant
@pytest.mark.parametrize("is_shuffled", [False, True])
@torch.inference_mode()
def test_cached_logits_equal_uncached(model: Any, is_shuffled: bool) -> None:
    text, image = inputs(model)
    order = image_orders(model, is_shuffled=is_shuffled)
    expected = model(text, image, image_order=order).image
    logits = stepwise_logits(model, text, image, image_order=order if is_shuffled else None)
    assert gap(logits, expected) <= TOLERANCE
    assert model.new_cache(BATCH).keys.shape[3] == model.config.sequence_length


@each_variant
@pytest.mark.parametrize("is_shuffled", [False, True])
@torch.inference_mode()
def test_windows_at_different_steps_equal_uncached(model: Any, is_shuffled: bool) -> None:
    """Each row reads at its own step, and rejected drafts leave no trace."""
    text, image = inputs(model)
    order = image_orders(model) if is_shuffled else None
    expected = model(text, image, image_order=order).image
    last = model.config.image_length - 1
    cache = model.new_cache(BATCH)
    model.prefill(text, cache, image_order=order)
    steps, seen = torch.zeros(BATCH, dtype=torch.long), []
    windows = [3, 1, 2, 3]
    for advance, window in zip([1, 0, 1, 0], windows, strict=True):
        tokens = torch.stack([image[row, step:][:window] for row, step in enumerate(steps)])
        draft = tokens.clone()
        draft[:, 1:] = (draft[:, 1:] + 1) % model.config.codebook_size
        model.decode_window(draft, cache, first_steps=steps, image_order=order)
        got = model.decode_window(tokens, cache, first_steps=steps, image_order=order)
        for row, step in enumerate(steps):
            assert gap(got[row], expected[row, step + 1 : step + 1 + window]) <= TOLERANCE
        seen.append(steps.clone())
        steps = (steps + advance + torch.arange(BATCH) % 2).clamp_max(last - max(windows))
    assert (torch.stack(seen)[1:, 0] != torch.stack(seen)[1:, 1]).any()


@each_variant
@torch.inference_mode()
def test_default_order_is_raster(model: Any) -> None:
    text, image = inputs(model)
    default = model(text, image).image
    raster = image_orders(model, is_shuffled=False)
    assert torch.equal(model(text, image, image_order=raster).image, default)
    assert gap(model(text, image, image_order=image_orders(model)).image, default) > 0.01


@each_variant
@torch.inference_mode()
def test_no_logit_sees_its_own_image_token_or_a_later_one(model: Any) -> None:
    text, image = inputs(model)
    before = model(text, image)
    for place in range(model.config.image_length):
        other = image.clone()
        other[:, place] = (other[:, place] + 1) % model.config.codebook_size
        after = model(text, other)
        assert after.text is None or torch.equal(after.text, before.text)
        assert torch.equal(after.image[:, : place + 1], before.image[:, : place + 1])
        changed = (after.image - before.image)[:, place + 1 :].abs().amax(dim=-1)
        assert (changed > 1e-4).all()


@each_variant
@torch.inference_mode()
def test_what_sees_a_caption_token(model: Any) -> None:
    """All of the image does; of the caption only later tokens, or all of it with an encoder."""
    text, image = inputs(model)
    before = model(text, image)
    for place in range(model.config.text_length):
        other = text.clone()
        other[:, place] = other[:, place] % (model.config.vocab_size - 1) + 1
        after = model(other, image)
        assert ((after.image - before.image).abs().amax(dim=-1) > 1e-4).all()
        if after.text is None:
            moved = (model.encode(other) - model.encode(text)).abs().amax(dim=-1)
        else:
            assert torch.equal(after.text[:, : place + 1], before.text[:, : place + 1])
            moved = (after.text - before.text)[:, place + 1 :].abs().amax(dim=-1)
        assert (moved > 1e-4).all()


@each_architecture
@torch.inference_mode()
def test_later_cells_are_not_seen_and_the_next_cell_is(model: Any) -> None:
    text, image = inputs(model)
    order = image_orders(model)
    other = order.clone()
    other[:, 6:] = other[:, 6:].flip(1)
    before = model(text, image, image_order=order)
    after = model(text, image, image_order=other)
    assert after.text is None or torch.equal(after.text, before.text)
    assert torch.equal(after.image[:, :6], before.image[:, :6])
    assert ((after.image - before.image)[:, 6:].abs().amax(dim=-1) > 1e-4).all()
    first = order.clone()
    first[:, [0, 11]] = first[:, [11, 0]]
    moved = model(text, image, image_order=first).image - before.image
    assert (moved[:, 0].abs().amax(dim=-1) > 1e-4).all()


@each_architecture
@torch.inference_mode()
def test_pads_are_one_learned_vector_per_place(model: Any) -> None:
    text, image = inputs(model)
    before = model(text, image).image
    model.text_embedding.weight[0].normal_()  # the pad id's own row is never read
    assert torch.equal(model(text, image).image, before)
    model.text_pads.weight[3].normal_()  # the fourth place: a pad in rows 1 and 2
    moved = (model(text, image).image - before).abs().amax(dim=(1, 2))
    assert moved[0] == 0
    assert (moved[1:] > 1e-3).all()


@each_architecture
@torch.inference_mode()
def test_rows_do_not_see_each_other(model: Any) -> None:
    text, image = inputs(model)
    together = model(text, image)
    for row in range(BATCH):
        alone = model(text[row : row + 1], image[row : row + 1])
        assert gap(together.image[row], alone.image[0]) <= TOLERANCE
        assert alone.text is None or gap(together.text[row], alone.text[0]) <= TOLERANCE


@each_architecture
@torch.inference_mode()
def test_guidance_rows_equal_two_passes(model: Any) -> None:
    """Captions and null captions in one batch give the logits of two passes."""
    text, _ = inputs(model)
    config = SamplingConfig(guidance_scale=2.5, guidance_schedule="constant", temperature=1e-5)
    tokens, log_likelihood_ratio, _ = generate_sequentially(
        model, text, seeds=torch.arange(BATCH), sampling_config=config
    )
    given, null = model(text, tokens).image, model(torch.zeros_like(text), tokens).image
    assert torch.equal((null + 2.5 * (given - null)).argmax(dim=-1), tokens)
    assert not torch.equal(given.argmax(dim=-1), tokens)
    ratios = (given.log_softmax(-1) - null.log_softmax(-1)).gather(2, tokens.unsqueeze(2))
    torch.testing.assert_close(log_likelihood_ratio, ratios.sum(dim=(1, 2)), atol=1e-3, rtol=0)


@each_architecture
def test_dropout_is_for_training_only(build_dalle: Build, variant: str) -> None:
    model = build_dalle(**VARIANTS[variant], dropout_probability=0.5)
    text, image = inputs(model)
    assert torch.equal(model(text, image).image, model(text, image).image)
    model.train()
    assert not torch.equal(model(text, image).image, model(text, image).image)


@each_variant
def test_every_weight_gets_a_gradient(model: Any) -> None:
    logits = model(*inputs(model))
    loss = logits.image.pow(2).sum()
    if logits.text is not None:
        loss = loss + logits.text.pow(2).sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def config_of(*, codebook_levels: tuple[int, ...] = (5, 12), **decoder: Any) -> DalleConfig:
    return DalleConfig(
        decoder=DecoderConfig(**{"hidden_size": 64, "num_heads": 4} | decoder),
        vocab_size=50,
        text_length=3,
        codebook_levels=codebook_levels,
        image_grid_size=(2, 2),
    )


@pytest.mark.parametrize("architecture", [{}, WITH_ENCODER])
def test_fresh_model_starts_at_the_uniform_distribution(architecture: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = build_text_to_image(config_of(num_layers=6, **architecture))
    logits = model(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))
    assert not logits.image.any()
    assert logits.text is None or not logits.text.any()
    num_branches = 6 * (3 if architecture else 2)
    spreads = {
        "text_embedding.weight": 0.02,
        "blocks.3.attention.query.weight": 0.02,
        "blocks.3.attention.output.weight": 0.02 / math.sqrt(num_branches),
        "blocks.3.feed_forward.output.weight": 0.02 / math.sqrt(num_branches),
    }
    if architecture:
        spreads["encoder_blocks.1.attention.query.weight"] = 0.02
        spreads["blocks.3.cross_attention.output.weight"] = 0.02 / math.sqrt(num_branches)
    for name, spread in spreads.items():
        assert float(model.get_parameter(name).detach().std()) == pytest.approx(spread, rel=0.1)
    assert torch.equal(model.get_parameter("blocks.3.attention_norm.weight"), torch.ones(64))


@each_variant
def test_names_in_saved_models(build_dalle: Build, variant: str) -> None:
    """Renaming a weight would make every saved model unreadable."""
    names = {"text_embedding", "text_positions", "text_pads", "target_positions", "output_norm"}
    attention = ("query", "key", "value", "output", "query_norm", "key_norm")
    block = {"attention_norm", "feed_forward_norm", *(f"attention.{name}" for name in attention)}
    block |= {f"feed_forward.{name}" for name in ("gate", "value", "output")}
    names |= {f"blocks.0.{name}" for name in block}
    start = "text_start"
    if variant == "encoder":
        start = "image_start"
        cross = {"cross_attention_norm", *(f"cross_attention.{name}" for name in attention)}
        names |= {f"blocks.0.{name}" for name in cross} | {"encoder_norm"}
        names |= {f"encoder_blocks.{index}.{name}" for index in range(2) for name in block}
    else:
        names |= {"text_head"}
    positions = {"learned": ("cells",), "axial": ("rows", "columns")}.get(variant, ())
    names |= {f"image_positions.{name}" for name in positions}
    tables = {
        f"{table}.{part}"
        for table in ("image_embedding", "image_head")
        for part in ("rows", "digit_rows.0", "digit_rows.1")
    }
    expected = {start, *(f"{name}.weight" for name in names), *tables}
    assert set(build_dalle(**VARIANTS[variant], num_layers=1).state_dict()) == expected
    plain = build_dalle(**VARIANTS[variant], num_layers=1, codebook_levels=(13,)).state_dict()
    assert set(plain) == {name for name in expected if "digit_rows" not in name}


def test_config_decides_the_architecture() -> None:
    assert isinstance(build_text_to_image(config_of()), Dalle)
    with pytest.raises(ValueError, match="architecture: got decoder_only, expected encoder_dec"):
        DalleEncoderDecoder(config_of())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: got 0, expected at least 1"),
        ({"num_layers": 0}, "num_layers: got 0"),
        ({"num_heads": -1}, "num_heads: got -1"),
        ({"hidden_size": 20, "num_heads": 2}, "hidden_size: got 20, expected a multiple of .* 8"),
        ({"dropout_probability": 1.0}, r"dropout_probability: got 1\.0, expected 0 to below 1"),
        ({"dropout_probability": math.nan}, "dropout_probability: got nan"),
        ({"vocab_size": 0}, "vocab_size: got 0"),
        ({"text_length": 0}, "text_length: got 0"),
        ({"codebook_levels": ()}, r"codebook_levels: got \(\)"),
        ({"codebook_levels": (4, 0)}, r"codebook_levels: got \(4, 0\)"),
        ({"image_grid_size": (0, 3)}, r"image_grid_size: got \(0, 3\)"),
        ({"num_encoder_layers": 2}, "num_encoder_layers: got 2, expected 0 with .* decoder_only"),
        ({"num_encoder_layers": -1}, "num_encoder_layers: got -1, expected 0"),
        (WITH_ENCODER | {"num_encoder_layers": 0}, "got 0, expected at least 1 with archi"),
        (WITH_ENCODER | {"num_encoder_layers": -1}, "got -1, expected at least 1 with"),
        (WITH_ENCODER | {"positions": "axial"}, "positions: got 'axial', expected 'rotary' with"),
    ],
)
def test_bad_configs_are_refused(build_dalle: Build, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_dalle(**changes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "none"}, "decoder.positions: got 'none', expected one of rotary, learned"),
        ({"architecture": "x"}, "architecture: got 'x', expected one of decoder_only, enc"),
        ({"attention": "sparse"}, "decoder.attention: got 'sparse', expected one of dense, dalle"),
        ({"block": "relu"}, "decoder.block: got 'relu', expected one of swiglu, gelu"),
        ({"kernel_size": 4}, "decoder.kernel_size: got 4, expected an odd number from 1 on"),
        ({"kernel_size": -1}, "decoder.kernel_size: got -1"),
    ],
)
def test_bad_words_and_kernels_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**changes)


def test_derived_sizes() -> None:
    decoder = DecoderConfig(hidden_size=256, num_layers=1, num_heads=4)
    assert (decoder.head_dim, decoder.intermediate_size) == (64, 704)
    config = config_of(codebook_levels=(8, 5, 5))
    assert (config.codebook_size, config.image_length, config.sequence_length) == (200, 4, 7)
