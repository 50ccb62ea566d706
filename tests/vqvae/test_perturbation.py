"""Latent perturbation: how many tokens, which ones, and unchanged gradients."""

from collections.abc import Callable

import pytest
import torch

from vqvae import VQVAE
from vqvae.perturbation import Perturbation, perturb_latents
from vqvae.quantizers import QuantizerOutput


def quantized(codebook: torch.Tensor, *, batch: int, side: int = 4) -> QuantizerOutput:
    ids = torch.randint(len(codebook), (batch, side, side))
    latents = codebook[ids].permute(0, 3, 1, 2).clone().requires_grad_()
    return QuantizerOutput(latents, ids, torch.zeros(()), {})


def test_tokens_become_one_of_the_nearest_others() -> None:
    torch.manual_seed(0)
    codebook = torch.randn(9, 3)
    output = quantized(codebook, batch=40)
    found = perturb_latents(output, codebook, Perturbation(1.0, 1.0, num_neighbors=2))
    ranks = []
    vectors = found.permute(0, 2, 3, 1).reshape(-1, 3)
    for old, vector in zip(output.token_ids.flatten().tolist(), vectors, strict=True):
        new = int((codebook - vector).norm(dim=1).argmin())
        ranks.append((codebook - codebook[old]).norm(dim=1).argsort().tolist().index(new))
    assert set(ranks) == {0, 1, 2}
    # The fraction of each image is uniform, so half of all; 640 tokens in 40 images.
    assert 0.35 < 1 - ranks.count(0) / 640 < 0.65


def test_perturbation_hits_the_given_fraction() -> None:
    torch.manual_seed(0)
    codebook = torch.randn(9, 3)
    output = quantized(codebook, batch=400)
    few = Perturbation(image_fraction=0.25, token_fraction=0.5, num_neighbors=100)
    found = perturb_latents(output, codebook, few, generator=torch.Generator().manual_seed(1))
    changed = (found != output.quantized_latents).any(dim=1).flatten(1).float().mean(dim=1)
    # 16 tokens an image: a quarter of the images, less those whose own fraction is near 0.
    assert 0.15 < (changed > 0).float().mean() < 0.27
    assert changed.max() < 0.8
    again = perturb_latents(output, codebook, few, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found, again)


def test_gradients_are_those_without_perturbation() -> None:
    codebook = torch.randn(9, 3)
    output = quantized(codebook, batch=4)
    found = perturb_latents(output, codebook, Perturbation(1.0, 1.0, 3))
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    torch.testing.assert_close(output.quantized_latents.grad, weights)


@pytest.mark.parametrize("quantizer", ["fsq", "vq", "gumbel"])
def test_every_quantizer_can_be_perturbed(
    quantizer: str, build_vqvae: Callable[..., VQVAE]
) -> None:
    vqvae = build_vqvae(quantizer=quantizer)
    codebook = vqvae.codebook()
    assert codebook.shape == (vqvae.codebook_size, vqvae.quantizer.code_dim)
    ids = torch.arange(vqvae.codebook_size)[None, None]
    torch.testing.assert_close(vqvae.quantizer.decode(ids)[0, :, 0].T, codebook)
    pixels = torch.rand(4, 3, 16, 16)
    plain = vqvae(pixels)
    none = vqvae(pixels, perturbation=Perturbation(0.0, 0.3, 8))
    some = vqvae(pixels, perturbation=Perturbation(1.0, 1.0, 8))
    assert torch.equal(plain.reconstruction, none.reconstruction)
    assert not torch.equal(plain.reconstruction, some.reconstruction)
    assert torch.equal(plain.token_ids, some.token_ids)
