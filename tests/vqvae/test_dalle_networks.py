"""DALL-E's own networks: sizes, initial weights, precision."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from tests.reference.random_weights import random_pixels
from vqvae import VQVAE, VQVAEConfig
from vqvae.dalle_networks import BottleneckBlock

PUBLISHED = VQVAEConfig(
    architecture="dalle",
    decoder_output="logit_laplace",
    image_size=256,
    patch_size=1,
    channels=(256, 512, 1024, 2048),
    quantizer="gumbel",
    vq_codebook_size=8192,
    vq_code_dim=128,
)
SMALL = dataclasses.replace(
    PUBLISHED, image_size=16, channels=(8, 12, 16), vq_codebook_size=32, vq_code_dim=5
)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def published_counts() -> tuple[int, int]:
    """Weights and biases of `dall_e.Encoder()` and `dall_e.Decoder()`, by hand."""

    def convolution(n_in: int, n_out: int, side: int) -> int:
        return n_in * n_out * side * side + n_out

    def block(n_in: int, n_out: int, sides: tuple[int, ...]) -> int:
        hidden = n_out // 4
        first, *middle, last = sides
        total = convolution(n_in, hidden, first) + convolution(hidden, n_out, last)
        total += sum(convolution(hidden, hidden, side) for side in middle)
        return total + (convolution(n_in, n_out, 1) if n_in != n_out else 0)

    encoder, before = convolution(3, 256, 7) + convolution(2048, 8192, 1), 256
    for width in (256, 512, 1024, 2048):
        encoder += block(before, width, (3, 3, 3, 1)) + block(width, width, (3, 3, 3, 1))
        before = width
    decoder, before = convolution(8192, 128, 1) + convolution(256, 6, 1), 128
    for width in (2048, 1024, 512, 256):
        decoder += block(before, width, (1, 3, 3, 3)) + block(width, width, (1, 3, 3, 3))
        before = width
    return encoder, decoder


def test_number_of_weights_is_the_published_one() -> None:
    with torch.device("meta"):
        model = VQVAE(PUBLISHED)
    encoder, decoder = published_counts()
    assert (round(encoder / 1e6, 1), round(decoder / 1e6, 1)) == (53.8, 43.8)
    assert num_parameters(model.encoder) == encoder
    # The bias of their first convolution is part of every code here: 128 numbers fewer.
    assert num_parameters(model.decoder) + num_parameters(model.quantizer) == decoder - 128
    assert model.image_grid_size == (32, 32)
    assert model.codebook_size == 8192


def test_shapes() -> None:
    model = VQVAE(SMALL)
    output = model(random_pixels(2))
    assert output.token_ids.shape == (2, 4, 4)
    assert output.reconstruction.shape == (2, 3, 16, 16)
    assert output.logit_laplace is not None
    assert output.logit_laplace.shape == (2, 6, 16, 16)
    assert output.reconstruction.abs().max() <= 1
    plain = VQVAE(dataclasses.replace(SMALL, decoder_output="pixels", quantizer="fsq"))
    output = plain(torch.zeros(1, 3, 16, 16))
    assert output.logit_laplace is None
    assert output.reconstruction.shape == (1, 3, 16, 16)


def test_patches_with_logit_laplace_output() -> None:
    model = VQVAE(VQVAEConfig(image_size=16, channels=(8,), decoder_output="logit_laplace"))
    output = model(torch.zeros(1, 3, 16, 16))
    assert output.logit_laplace is not None
    assert output.logit_laplace.shape == (1, 6, 16, 16)
    ids = model.encode_to_token_ids(torch.zeros(1, 3, 16, 16))
    mean = output.logit_laplace[:, :3].detach()
    expected = ((mean.sigmoid() - 0.1) / 0.8).clamp(0, 1) * 2 - 1
    torch.testing.assert_close(model.decode_from_token_ids(ids), expected)


def test_initial_weights_have_the_published_spread() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, channels=(64, 64), vq_codebook_size=512, vq_code_dim=64)
    model = VQVAE(config)
    convolutions = [each for each in model.modules() if isinstance(each, nn.Conv2d)]
    assert len(convolutions) == 2 + 8 * 4 + 1
    for layer in convolutions:
        expected = (layer.in_channels * layer.kernel_size[0] ** 2) ** -0.5
        num_weights = layer.weight.numel()
        # Five standard errors of a mean and of a standard deviation of that many numbers.
        assert abs(layer.weight.mean()) < 5 * expected / num_weights**0.5
        error = 5 / (2 * num_weights) ** 0.5
        assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=error)
        assert layer.bias is not None
        assert not layer.bias.any()
    codebook: Tensor = model.quantizer.codebook  # type: ignore[assignment]
    assert float(codebook.detach().std()) == pytest.approx(512**-0.5, rel=0.03)


def test_residual_branches_are_scaled_by_the_number_of_blocks() -> None:
    model = VQVAE(SMALL)
    blocks = [each for each in model.modules() if isinstance(each, BottleneckBlock)]
    assert {block.gain for block in blocks} == {1 / 36}
    block = blocks[0]
    features = torch.randn(1, 8, 4, 4)
    branch = features
    for layer in block.residual:
        branch = layer(branch)
    torch.testing.assert_close(block(features), features + branch / 36)


def test_logits_are_float32_under_autocast() -> None:
    model = VQVAE(SMALL)
    pixels = torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.encoder(pixels).dtype == torch.float32
        output = model(pixels)
    assert output.logit_laplace is not None
    assert output.logit_laplace.dtype == torch.bfloat16
    assert output.quantizer_loss.dtype == torch.float32
