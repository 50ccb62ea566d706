"""The compiled pass against torch: the same logits and images, in any batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.native import build
from dalle_mini_impl.native.decoder import NativeDecoder, NativeWeights
from dalle_mini_impl.sampling.generate import generate_image_token_ids, generate_sequentially
from dalle_mini_impl.sampling.inpaint import inpaint_image_token_ids
from dalle_mini_impl.sampling.jacobi import jacobi_decode
from dalle_mini_impl.sampling.logits import gumbel_noise
from dalle_mini_impl.sampling.sampler import SamplingConfig
from tests.reference.slow_sampling import stepwise_logits

BuildDalle = Callable[..., Dalle]
BOTH: tuple[NativeWeights, ...] = ("float32", "int8")
pytestmark = pytest.mark.usefixtures("compiler")


def pairs(model: Dalle, count: int) -> tuple[Tensor, Tensor]:
    """Captions, the last two of them null, and images."""
    config, generator = model.config, torch.Generator().manual_seed(count)
    text = torch.randint(0, config.vocab_size, (count, config.text_length), generator=generator)
    text[-2:] = 0
    shape = (count, config.image_length)
    return text, torch.randint(0, config.codebook_size, shape, generator=generator)


@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal", "axial"])
@pytest.mark.parametrize(("batch", "window"), [(1, 1), (2, 5), (7, 2)])
@torch.inference_mode()
def test_float32_logits_are_those_of_torch(
    build_dalle: BuildDalle, positions: str, batch: int, window: int
) -> None:
    model = build_dalle(positions=positions)
    text, image = pairs(model, batch)
    expected = model(text, image).image
    logits = stepwise_logits(NativeDecoder(model, "float32"), text, image, window=window)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-5)  # float32 sums, other order


@torch.inference_mode()
def test_wide_heads_long_captions_and_odd_sizes(build_dalle: BuildDalle) -> None:
    # heads of 80: a whole panel of 64 and a rest; 70 positions: more than one panel of keys
    changes = {"hidden_size": 160, "codebook_levels": (5, 5, 3), "text_length": 70}
    model = build_dalle(image_grid_size=(3, 3), **changes)
    text, image = pairs(model, 3)
    logits = stepwise_logits(NativeDecoder(model, "float32"), text, image, window=3)
    plain, exact = model(text, image).image, model.double()(text, image).image
    # Wild weights of this width amplify rounding, torch's own as well.
    errors = [float((each - exact).abs().max()) for each in (logits, plain)]
    assert errors[0] <= max(1e-5, 2 * errors[1]), errors


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_float32_generates_the_images_of_torch(
    build_dalle: BuildDalle, guidance_scale: float
) -> None:
    model = build_dalle()
    text, _ = pairs(model, 5)
    for choice in ({}, {"top_k": 3, "temperature": 0.7}, {"top_p": 0.6}):
        sampling_config = SamplingConfig(guidance_scale=guidance_scale, **choice)
        expected = generate_sequentially(
            model, text, seeds=torch.arange(5), sampling_config=sampling_config
        )
        generated = generate_image_token_ids(
            NativeDecoder(model, "float32"),
            text,
            seeds=torch.arange(5),
            sampling_config=sampling_config,
        )
        assert torch.equal(generated.image_token_ids, expected.image_token_ids)
        torch.testing.assert_close(
            generated.log_likelihood_ratio, expected.log_likelihood_ratio, atol=1e-4, rtol=1e-4
        )


def test_float32_inpaints_as_torch_does(build_dalle: BuildDalle) -> None:
    model = build_dalle()
    text, image = pairs(model, 4)
    is_masked = torch.zeros_like(image, dtype=torch.bool)
    is_masked[0, ::2] = is_masked[1, 1::2] = is_masked[2, 3:9] = is_masked[3, :6] = True
    is_masked &= is_masked.cumsum(dim=1) <= is_masked.sum(dim=1).min()
    expected, generated = (
        inpaint_image_token_ids(
            one, text, image, is_masked, seeds=torch.arange(4), sampling_config=SamplingConfig()
        )
        for one in (model, NativeDecoder(model, "float32"))
    )
    assert torch.equal(generated.image_token_ids, expected.image_token_ids)


@pytest.mark.parametrize("vocab_size", [1, 37, 1000])
def test_the_noise_is_that_of_torch(build_dalle: BuildDalle, vocab_size: int) -> None:
    seeds = torch.tensor([0, 1, 2, 77, 2**62 + 5, 2**63 - 1])
    steps = torch.tensor([0, 255, 3, 3, 1023, 2**31 - 1]).unsqueeze(1)
    made = NativeDecoder(build_dalle(), "int8").gumbel_noise(
        seeds, steps=steps, vocab_size=vocab_size
    )
    assert torch.equal(made, gumbel_noise(seeds, steps=steps, vocab_size=vocab_size))


def rounded_to_8_bits(rows: Tensor) -> Tensor:
    scales = rows.abs().amax(dim=-1, keepdim=True) / 127
    return (rows / scales).round() * scales


@torch.no_grad()
def test_int8_costs_what_rounding_costs_in_torch(build_dalle: BuildDalle) -> None:
    model = build_dalle(hidden_size=64, num_layers=4)
    text, image = pairs(model, 6)
    expected, native = model(text, image).image, NativeDecoder(model, "int8")
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(rounded_to_8_bits(layer.weight))
            layer.register_forward_pre_hook(lambda _, rows: rounded_to_8_bits(rows[0]))
    unavoidable = (model(text, image).image - expected).std()
    error = (stepwise_logits(native, text, image) - expected).std()
    assert 0.01 < unavoidable / expected.std() < 0.1
    assert error < 1.2 * unavoidable  # the head and the cache are rounded too


@pytest.mark.parametrize("weights", BOTH)
@torch.inference_mode()
def test_logits_do_not_depend_on_the_batch(build_dalle: BuildDalle, weights: NativeWeights) -> None:
    native = NativeDecoder(build_dalle(hidden_size=160), weights)
    text, image = pairs(build_dalle(hidden_size=160), 9)
    together = stepwise_logits(native, text, image)
    for row in range(9):
        alone = stepwise_logits(native, text[row : row + 1], image[row : row + 1])
        assert torch.equal(alone[0], together[row])
    for window in (2, 3, 8):
        assert torch.equal(stepwise_logits(native, text, image, window=window), together)


@pytest.mark.parametrize("weights", BOTH)
def test_images_do_not_depend_on_window_and_threads(
    build_dalle: BuildDalle, weights: NativeWeights
) -> None:
    model = build_dalle()
    native, (text, _) = NativeDecoder(model, weights), pairs(model, 5)
    sampling_config = SamplingConfig(guidance_scale=2.0)

    def generate(rows: slice, window: int) -> Tensor:
        return jacobi_decode(
            native,
            text[rows],
            seeds=torch.arange(5)[rows],
            sampling_config=sampling_config,
            window=window,
        ).image_token_ids

    one_by_one = generate(slice(None), 1)
    assert torch.equal(generate(slice(None), 7), one_by_one)
    assert torch.equal(generate(slice(3, 4), 4)[0], one_by_one[3])
    torch.set_num_threads(3)
    try:
        assert torch.equal(generate(slice(None), 5), one_by_one)
    finally:
        torch.set_num_threads(1)


def test_other_models_are_refused_by_name(build_dalle: BuildDalle) -> None:
    with pytest.raises(build.UnavailableError, match="heads of 8"):
        NativeDecoder(build_dalle(hidden_size=16), "float32")
    with pytest.raises(build.UnavailableError, match="bfloat16"):
        NativeDecoder(build_dalle().to(torch.bfloat16), "float32")
    for name, value in (("attention", "dalle"), ("block", "gelu"), ("has_target_positions", False)):
        with pytest.raises(build.UnavailableError, match=f"decoder with {name} {value!r}"):
            NativeDecoder(build_dalle(**{name: value}), "float32")
    model = build_dalle()
    model.blocks[0].is_pre_norm = False
    with pytest.raises(build.UnavailableError, match="blocks"):
        NativeDecoder(model, "float32")
    other = build_dalle(architecture="encoder_decoder", num_encoder_layers=1)
    with pytest.raises(build.UnavailableError, match="DalleEncoderDecoder"):
        NativeDecoder(other, "float32")
