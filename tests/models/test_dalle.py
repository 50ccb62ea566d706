"""The decoder: against a plain re-implementation, causal, cached, and free to draw in any order."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.models.dalle_config import DalleConfig, DecoderConfig
from tests.reference.plain_decoder import plain_logits

BuildDalle = Callable[..., Dalle]
POSITIONS = ["rotary", "learned", "sinusoidal", "axial"]
TOLERANCE = 5e-5  # float32 sums in other orders are up to 5e-6 apart; mistakes move by 1e-2
BATCH = 3  # rows of inputs()


def inputs(model: Dalle, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random captions, one with pads at its end and one of pads alone, and random pictures."""
    generator = torch.Generator().manual_seed(seed)
    sizes = model.config
    text = torch.randint(1, sizes.vocab_size, (BATCH, sizes.text_length), generator=generator)
    text[1, 3:] = 0
    text[2] = 0
    image_shape = (BATCH, sizes.image_length)
    return text, torch.randint(sizes.codebook_size, image_shape, generator=generator)


def random_orders(model: Dalle, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    cells = model.config.image_length
    return torch.stack([torch.randperm(cells, generator=generator) for _ in range(BATCH)])


def gap(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() - other.detach().double()).abs().max())


@pytest.mark.parametrize("codebook_levels", [(13,), (2, 3, 2)])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
@torch.inference_mode()
def test_equals_the_plain_decoder(
    build_dalle: BuildDalle, positions: str, shuffled: bool, codebook_levels: tuple[int, ...]
) -> None:
    model = build_dalle(positions=positions, codebook_levels=codebook_levels)
    text, image = inputs(model)
    order = random_orders(model) if shuffled else None
    logits = model(text, image, image_order=order)
    assert logits.image.std() > 0.5
    raster = list(range(model.config.image_length))
    for index in range(BATCH):
        plain_text, plain_image = plain_logits(
            model.state_dict(),
            model.config,
            text[index].tolist(),
            image[index].tolist(),
            raster if order is None else order[index].tolist(),
        )
        assert gap(logits.text[index], plain_text) <= TOLERANCE
        assert gap(logits.image[index], plain_image) <= TOLERANCE


@pytest.mark.parametrize("positions", POSITIONS)
def test_training_path_gives_the_same_logits(build_dalle: BuildDalle, positions: str) -> None:
    model = build_dalle(positions=positions, dropout_probability=0.0).train()
    text, image = inputs(model)
    with_gradient = model(text, image)
    with torch.inference_mode():
        without = model.eval()(text, image)
    assert gap(with_gradient.text, without.text) <= TOLERANCE
    assert gap(with_gradient.image, without.image) <= TOLERANCE


@pytest.mark.parametrize("positions", POSITIONS)
@torch.inference_mode()
def test_cached_logits_equal_uncached(build_dalle: BuildDalle, positions: str) -> None:
    model = build_dalle(positions=positions)
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
        assert cache.length == model.config.sequence_length == cache.keys.shape[3]


@pytest.mark.parametrize("positions", POSITIONS)
@torch.inference_mode()
def test_windows_at_a_step_of_each_rows_own_equal_uncached(
    build_dalle: BuildDalle, positions: str
) -> None:
    model = build_dalle(positions=positions)
    text, image = inputs(model)
    expected = model(text, image).image
    last = model.config.image_length - 1
    cache = model.new_cache(BATCH)
    model.prefill(text, cache)
    steps, seen = torch.zeros(BATCH, dtype=torch.long), []
    windows = [3, 1, 2, 3]
    for advance, window in zip([1, 0, 1, 0], windows, strict=True):
        tokens = torch.stack([image[row, step:][:window] for row, step in enumerate(steps)])
        guessed = tokens.clone()
        guessed[:, 1:] = (guessed[:, 1:] + 1) % model.config.codebook_size
        model.decode_window(guessed, cache, first_steps=steps)  # wrong guesses leave no trace
        got = model.decode_window(tokens, cache, first_steps=steps)
        for row, step in enumerate(steps):
            assert gap(got[row], expected[row, step + 1 : step + 1 + window]) <= TOLERANCE
        seen.append(steps.clone())
        steps = (steps + advance + torch.arange(BATCH) % 2).clamp_max(last - max(windows))
    assert (torch.stack(seen)[1:, 0] != torch.stack(seen)[1:, 1]).any()


@pytest.mark.parametrize("positions", POSITIONS)
@torch.inference_mode()
def test_the_identity_order_is_raster(build_dalle: BuildDalle, positions: str) -> None:
    model = build_dalle(positions=positions)
    text, image = inputs(model)
    raster = torch.arange(model.config.image_length).expand(BATCH, -1)
    for got, expected in zip(
        model(text, image, image_order=raster), model(text, image), strict=True
    ):
        assert torch.equal(got, expected)
    shuffled = model(text, image, image_order=random_orders(model))
    assert gap(shuffled.image, model(text, image).image) > 0.01


@pytest.mark.parametrize("positions", POSITIONS)
@torch.inference_mode()
def test_no_logit_sees_its_own_token_or_a_later_one(
    build_dalle: BuildDalle, positions: str
) -> None:
    model = build_dalle(positions=positions)
    sizes = model.config
    text, image = inputs(model)
    before = torch.cat([padded(part, 12) for part in model(text, image)], dim=1)
    for place in range(sizes.text_length + sizes.image_length):
        other_text, other_image = text.clone(), image.clone()
        if place < sizes.text_length:
            other_text[:, place] = other_text[:, place] % (sizes.vocab_size - 1) + 1
        else:
            column = place - sizes.text_length
            other_image[:, column] = (other_image[:, column] + 1) % sizes.codebook_size
        logits = model(other_text, other_image)
        after = torch.cat([padded(part, 12) for part in logits], dim=1)
        assert torch.equal(after[:, : place + 1], before[:, : place + 1])
        changed = (after - before)[:, place + 1 :].abs().amax(dim=-1)
        assert (changed > 1e-4).all()


def padded(logits: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(logits, (0, width - logits.shape[-1]))


@torch.inference_mode()
def test_later_cells_are_not_seen_and_the_next_cell_is(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    text, image = inputs(model)
    order = random_orders(model)
    other = order.clone()
    other[:, 6:] = other[:, 6:].flip(1)
    before = model(text, image, image_order=order)
    after = model(text, image, image_order=other)
    assert torch.equal(after.text, before.text)
    assert torch.equal(after.image[:, :6], before.image[:, :6])
    assert ((after.image - before.image)[:, 6:].abs().amax(dim=-1) > 1e-4).all()


@torch.inference_mode()
def test_pads_are_one_learned_vector_per_place(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    text, image = inputs(model)
    before = model(text, image).image
    model.text_embedding.weight[0].normal_()  # the pad id's own row is never read
    assert torch.equal(model(text, image).image, before)
    model.text_pads.weight[3].normal_()  # the fourth place: a pad in rows 1 and 2
    moved = (model(text, image).image - before).abs().amax(dim=(1, 2))
    assert moved[0] == 0
    assert (moved[1:] > 1e-3).all()


@torch.inference_mode()
def test_rows_do_not_see_each_other(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    text, image = inputs(model)
    together = model(text, image)
    for index in range(BATCH):
        alone = model(text[index : index + 1], image[index : index + 1])
        assert gap(together.image[index], alone.image[0]) <= TOLERANCE
        assert gap(together.text[index], alone.text[0]) <= TOLERANCE


def test_dropout_is_for_training_only(build_dalle: BuildDalle) -> None:
    model = build_dalle(dropout_probability=0.5)
    text, image = inputs(model)
    assert torch.equal(model(text, image).image, model(text, image).image)
    model.train()
    assert not torch.equal(model(text, image).image, model(text, image).image)


def test_every_weight_gets_a_gradient(build_dalle: BuildDalle) -> None:
    for positions in POSITIONS:
        model = build_dalle(positions=positions)
        logits = model(*inputs(model))
        (logits.text.pow(2).sum() + logits.image.pow(2).sum()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_a_fresh_decoder_starts_at_the_uniform_distribution() -> None:
    torch.manual_seed(0)
    decoder = DecoderConfig(hidden_size=64, num_layers=8, num_heads=4)
    model = Dalle(
        DalleConfig(
            decoder=decoder,
            vocab_size=50,
            text_length=3,
            codebook_levels=(5, 12),
            image_grid_size=(2, 2),
        )
    )
    logits = model(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))
    assert not logits.text.any()
    assert not logits.image.any()
    spreads = {
        "text_embedding.weight": 0.02,
        "blocks.3.attention.query.weight": 0.02,
        "blocks.3.attention.output.weight": 0.02 / math.sqrt(16),
        "blocks.3.feed_forward.output.weight": 0.02 / math.sqrt(16),
    }
    for name, spread in spreads.items():
        weight = model.get_parameter(name).detach()
        assert float(weight.std()) == pytest.approx(spread, rel=0.1)
    assert torch.equal(model.get_parameter("blocks.3.attention_norm.weight"), torch.ones(64))


def test_names_of_weights_are_the_ones_in_saved_models(build_dalle: BuildDalle) -> None:
    names = {
        "text_start",
        "text_embedding.weight",
        "text_positions.weight",
        "text_pads.weight",
        "image_embedding.rows",
        "image_embedding.digit_rows.0",
        "image_embedding.digit_rows.1",
        "target_positions.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention.query.weight",
        "blocks.0.attention.key.weight",
        "blocks.0.attention.value.weight",
        "blocks.0.attention.output.weight",
        "blocks.0.attention.query_norm.weight",
        "blocks.0.attention.key_norm.weight",
        "blocks.0.feed_forward_norm.weight",
        "blocks.0.feed_forward.gate.weight",
        "blocks.0.feed_forward.value.weight",
        "blocks.0.feed_forward.output.weight",
        "output_norm.weight",
        "text_head.weight",
        "image_head.rows",
        "image_head.digit_rows.0",
        "image_head.digit_rows.1",
    }
    extra = {
        "rotary": set(),
        "sinusoidal": set(),
        "learned": {"image_positions.weight"},
        "axial": {"row_positions.weight", "column_positions.weight"},
    }
    for positions, more in extra.items():
        model = build_dalle(positions=positions, num_layers=1)
        assert set(model.state_dict()) == names | more
    without_digits = {name for name in names if "digit_rows" not in name}
    assert set(build_dalle(codebook_levels=(13,), num_layers=1).state_dict()) == without_digits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: got 0, wanted at least 1"),
        ({"num_layers": 0}, "num_layers: got 0"),
        ({"num_heads": -1}, "num_heads: got -1"),
        ({"hidden_size": 20, "num_heads": 2}, "hidden_size: got 20, wanted a multiple of .* 8"),
        ({"dropout_probability": 1.0}, r"dropout_probability: got 1\.0, wanted 0 to below 1"),
        ({"dropout_probability": math.nan}, "dropout_probability: got nan"),
        ({"vocab_size": 0}, "vocab_size: got 0"),
        ({"text_length": 0}, "text_length: got 0"),
        ({"codebook_levels": ()}, r"codebook_levels: got \(\)"),
        ({"codebook_levels": (4, 0)}, r"codebook_levels: got \(4, 0\)"),
        ({"image_grid_size": (0, 3)}, r"image_grid_size: got \(0, 3\)"),
    ],
)
def test_bad_sizes_are_refused(
    build_dalle: BuildDalle, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_dalle(**changes)


@pytest.mark.usefixtures("unchecked")
def test_unknown_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="positions: got 'none', wanted one of rotary, learned"):
        DecoderConfig(positions="none")  # type: ignore[arg-type]


def test_derived_sizes() -> None:
    decoder = DecoderConfig(hidden_size=256, num_layers=1, num_heads=4)
    assert (decoder.head_dim, decoder.intermediate_size) == (64, 704)
    config = DalleConfig(
        decoder=decoder,
        vocab_size=5,
        text_length=7,
        codebook_levels=(8, 5, 5),
        image_grid_size=(3, 4),
    )
    assert (config.codebook_size, config.image_length, config.sequence_length) == (200, 12, 19)
