"""The decoder with the masks, blocks and embeddings of DALL-E, and what it refuses."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.generate import generate_sequentially
from dalle_mini_impl.sampling.inpaint import inpaint_image_token_ids
from dalle_mini_impl.sampling.jacobi import jacobi_decode
from dalle_mini_impl.sampling.sampler import SamplingConfig
from tests.models.test_text_to_image import (
    BATCH,
    TOLERANCE,
    assert_plain,
    config_of,
    gap,
    image_orders,
    inputs,
)
from tests.reference import tiny
from tests.reference.plain_decoder import is_seen
from tests.reference.slow_sampling import stepwise_logits

BuildDalle = Callable[..., Dalle]
# Three layers: row, column, convolution. A grid 4 wide and a kernel of 3, so that masks hide much.
MASKED: dict[str, Any] = {"attention": "dalle", "kernel_size": 3, "num_layers": 3}
PUBLISHED = MASKED | {"block": "gelu", "has_target_positions": False, "positions": "axial"}


@pytest.mark.parametrize(
    "options",
    [
        PUBLISHED,
        MASKED,
        {"block": "gelu"},
        {"has_target_positions": False},
        MASKED | {"image_grid_size": (5, 3)},
    ],
    ids=["published", "masks", "gelu", "no target", "high grid"],
)
def test_logits_equal_plain_decoder(build_dalle: BuildDalle, options: dict[str, Any]) -> None:
    model = build_dalle(**options, dropout_probability=0.0)
    text, image = inputs(model)
    with torch.inference_mode():
        logits = model(text, image)
    assert_plain(model, text, image, image_orders(model, is_shuffled=False), logits)
    with_gradient = model.train()(text, image)  # another path through attention
    assert gap(with_gradient.image, logits.image) <= TOLERANCE


@pytest.mark.parametrize("num_layers", [1, 2, 3])  # the first layer is of another kind in each
@torch.inference_mode()
def test_cached_logits_equal_uncached(build_dalle: BuildDalle, num_layers: int) -> None:
    model = build_dalle(**PUBLISHED | {"num_layers": num_layers})
    text, image = inputs(model)
    expected = model(text, image).image
    assert gap(stepwise_logits(model, text, image), expected) <= TOLERANCE
    cache = model.new_cache(BATCH)
    model.prefill(text, cache)
    first = torch.zeros(BATCH, dtype=torch.long)
    model.decode_window(image[:, :5], cache, first_steps=first)
    rows = torch.stack([image[row, 2 + row : 8 + row] for row in range(BATCH)])
    got = model.decode_window(rows, cache, first_steps=2 + torch.arange(BATCH))
    for row in range(BATCH):
        assert gap(got[row], expected[row, 3 + row : 9 + row]) <= TOLERANCE


@torch.inference_mode()
def test_all_samplers_generate_the_same(build_dalle: BuildDalle) -> None:
    model = build_dalle(**PUBLISHED)
    text, _ = inputs(model)
    sampling_config = SamplingConfig(guidance_scale=2.0, temperature=1.0)
    seeds = torch.arange(BATCH)
    generated = generate_sequentially(model, text, seeds=seeds, sampling_config=sampling_config)
    jacobi = jacobi_decode(model, text, seeds=seeds, sampling_config=sampling_config, window=4)
    assert torch.equal(jacobi.image_token_ids, generated.image_token_ids)
    is_masked = (torch.arange(12) >= 5).expand(BATCH, -1)
    inpainted = inpaint_image_token_ids(
        model,
        text,
        generated.image_token_ids,
        is_masked,
        seeds=seeds,
        sampling_config=sampling_config,
    )
    assert torch.equal(inpainted.image_token_ids, generated.image_token_ids)  # the same noise


@pytest.mark.parametrize("layer", [0, 1, 2])
@torch.inference_mode()
def test_one_layer_sees_what_its_mask_allows(build_dalle: BuildDalle, layer: int) -> None:
    model = build_dalle(**PUBLISHED)
    config = model.config
    model.blocks = model.blocks[layer : layer + 1]
    model.mask_of_layer = model.mask_of_layer[layer : layer + 1]
    text, image = inputs(model)
    before = model(text, image).image
    num_hidden = 0
    for cell in range(config.image_length - 1):
        other = image.clone()
        other[:, cell] = (other[:, cell] + 1) % config.codebook_size
        moved = (model(text, other).image - before).abs().amax(dim=(0, 2))
        for query in range(config.image_length - 1):  # it predicts the cell after its own
            is_moved = query >= cell and is_seen(query, cell, layer, config)
            assert (moved[query + 1] > 1e-4) == is_moved, (query, cell)
            assert is_moved or moved[query + 1] == 0
            num_hidden += query >= cell and not is_moved
    assert num_hidden > 10
    other_text = text.clone()
    other_text[:, 0] = other_text[:, 0] % (config.vocab_size - 1) + 1
    moved = (model(other_text, image).image - before).abs().amax(dim=-1)
    assert (moved > 1e-5).all(), "every image token sees all text"


def test_names_in_saved_models(build_dalle: BuildDalle) -> None:
    names = set(build_dalle(**PUBLISHED).state_dict())
    assert not any(name.startswith(("target_positions", "image_masks")) for name in names)
    assert not any("query_norm" in name or "gate" in name for name in names)
    assert {
        "image_positions.rows.weight",
        "image_positions.columns.weight",
        "blocks.0.attention.query.bias",
        "blocks.0.attention_norm.bias",
        "blocks.0.feed_forward.input.weight",
        "blocks.0.feed_forward.output.bias",
        "output_norm.bias",
    } <= names
    assert set(build_dalle(**MASKED).state_dict()) == set(build_dalle(num_layers=3).state_dict())


def test_a_fresh_decoder_has_biases_of_zero() -> None:
    config = config_of(hidden_size=32, num_layers=2, num_heads=2, block="gelu")
    assert config.decoder.intermediate_size == 128
    model = Dalle(config)
    biases = {name: weight for name, weight in model.named_parameters() if name.endswith("bias")}
    assert len(biases) == 2 * (4 + 2 + 2) + 1
    assert not any(bias.any() for bias in biases.values())


def test_too_long_sequences_are_refused(build_dalle: BuildDalle) -> None:
    with pytest.raises(ValueError, match=r"image_grid_size: .* expected at most 8192"):
        build_dalle(**PUBLISHED, image_grid_size=(100, 100))


def test_a_model_folder_cannot_claim_other_orders() -> None:
    parts = tiny.build_pipeline()
    decoder = dataclasses.replace(parts.dalle.config.decoder, attention="dalle")
    dalle = Dalle(dataclasses.replace(parts.dalle.config, decoder=decoder))
    with pytest.raises(
        ValueError, match="generates_any_order: got true, but the decoder generates in raster"
    ):
        TextToImagePipeline(
            dalle=dalle,
            vqvae=parts.vqvae,
            text_tokenizer=parts.text_tokenizer,
            generates_any_order=True,
        )
