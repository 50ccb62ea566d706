"""Encoder and decoder: shapes, identity at the start, and how far they see."""

import pytest
import torch

from tests.reference.random_weights import randomize
from vqvae.networks import Decoder, Encoder, ResidualBlock


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    randomize(module, scale=0.4)
    return module


def encoder(kernel_size: int, num_blocks: int = 1) -> Encoder:
    sizes = {"patch_size": 2, "latent_dim": 5, "num_blocks": num_blocks}
    return Encoder((6, 8), **sizes, kernel_size=kernel_size)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_residual_block_starts_as_the_identity(kernel_size: int) -> None:
    block, x = ResidualBlock(4, kernel_size=kernel_size), torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    last = block.get_parameter("layers.3.weight")
    assert last.grad is not None
    assert last.grad.abs().max() > 0  # it can leave the identity
    randomized(block)
    assert not torch.equal(block(x), x)


@pytest.mark.parametrize("num_blocks", [0, 2])
def test_shapes(num_blocks: int) -> None:
    latents = encoder(3, num_blocks)(torch.randn(2, 3, 16, 24))
    assert latents.shape == (2, 5, 4, 6)
    decoder = Decoder((6, 8), patch_size=2, code_dim=5, num_blocks=num_blocks)
    assert decoder(latents).shape == (2, 3, 16, 24)


@torch.no_grad()
def test_a_latent_sees_only_its_own_patch_with_kernel_1() -> None:
    """With kernel 3 the same change reaches the neighbors."""
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    reach = {}
    for kernel_size in (1, 3):
        network = randomized(encoder(kernel_size))
        before = network(pixels)
        changed = pixels.clone()
        changed[..., 4:8, 8:12] *= -1  # the patch of latent (1, 2)
        moved = (network(changed) != before).any(dim=1)[0]
        reach[kernel_size] = moved.nonzero().tolist()
    assert reach[1] == [[1, 2]]
    assert len(reach[3]) >= 9


@torch.no_grad()
def test_every_pixel_counts() -> None:
    network = randomized(encoder(1))
    pixels = torch.zeros(1, 3, 4, 4)  # one latent
    before = network(pixels)
    for index in range(48):
        changed = pixels.clone()
        changed.view(-1)[index] = 0.5
        assert (network(changed) - before).abs().max() > 1e-4
