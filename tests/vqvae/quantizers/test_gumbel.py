"""The Gumbel-softmax quantizer: mixtures, single codes, KL term and temperature."""

import math

import pytest
import torch
from torch import Tensor

from tests.reference import quantizers as reference
from tests.reference.random_weights import noise
from vqvae.quantizers import GumbelQuantizer

CODEBOOK_SIZE, CODE_DIM = 6, 3


def quantizer(kl_weight: float = 0.1) -> GumbelQuantizer:
    torch.manual_seed(0)
    return GumbelQuantizer(codebook_size=CODEBOOK_SIZE, code_dim=CODE_DIM, kl_weight=kl_weight)


def logits() -> Tensor:
    return noise(2, CODEBOOK_SIZE, 3, 4)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_mixtures_equal_the_reference(temperature: float) -> None:
    model = quantizer()
    model.temperature.fill_(temperature)
    output = model(logits(), generator=seeded(7))
    uniform = reference.uniform_noise(7, 24, CODEBOOK_SIZE)
    expected = reference.gumbel_mixture(logits(), model.codebook.detach(), uniform, temperature)
    torch.testing.assert_close(output.quantized_latents, expected)
    assert torch.equal(output.token_ids, logits().argmax(dim=1))


def test_noise_samples_codes_with_their_probability() -> None:
    model = quantizer()
    model.temperature.fill_(1e-5)  # mixtures of a single code
    row = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 0.0])
    grid = row.view(1, -1, 1, 1).expand(1, -1, 100, 200)
    mixed = model(grid, generator=seeded(0)).quantized_latents
    codes = mixed.detach().movedim(1, -1).flatten(0, 2)
    chosen = torch.cdist(codes, model.codebook).argmin(dim=1)
    assert (codes - model.codebook[chosen]).abs().amax(dim=1).median() < 1e-6
    fractions = torch.bincount(chosen, minlength=CODEBOOK_SIZE) / len(chosen)
    torch.testing.assert_close(fractions, row.softmax(dim=0), atol=0.015, rtol=0)


def test_evaluation_takes_the_most_likely_code() -> None:
    model = quantizer().eval()
    output = model(logits())
    assert torch.equal(output.token_ids, model.encode(logits()))
    assert torch.equal(output.quantized_latents, model.decode(output.token_ids))
    ids = output.token_ids
    torch.testing.assert_close(output.quantized_latents[1, :, 2, 3], model.codebook[ids[1, 2, 3]])


def test_soft_latents_approach_codes_when_cold() -> None:
    model = quantizer()
    soft = model.soft_latents(logits(), generator=seeded(3))
    trained = model(logits(), generator=seeded(3)).quantized_latents
    assert torch.equal(soft, trained)
    model.temperature.fill_(1 / 16)
    ids = logits().argmax(dim=1)
    certain = 100 * torch.nn.functional.one_hot(ids).movedim(-1, 1).float()
    torch.testing.assert_close(model.soft_latents(certain), model.decode(ids))


def test_kl_is_zero_for_uniform_and_maximal_for_one_hot() -> None:
    model = quantizer(kl_weight=0.5)
    uniform = torch.full((1, CODEBOOK_SIZE, 2, 2), 3.0)
    assert model(uniform).metrics["kl"].abs() < 1e-6
    certain = torch.zeros(1, CODEBOOK_SIZE, 2, 2)
    certain[:, 2] = 1000.0
    output = model(certain)
    torch.testing.assert_close(output.metrics["kl"], torch.tensor(math.log(CODEBOOK_SIZE)))
    torch.testing.assert_close(output.loss, 0.5 * output.metrics["kl"])
    probabilities = logits().softmax(dim=1)
    by_hand = (probabilities * (probabilities * CODEBOOK_SIZE).log()).sum(dim=1).mean()
    output = model(logits())
    torch.testing.assert_close(output.metrics["kl"], by_hand)
    assert not output.metrics["kl"].requires_grad


def test_gradients_reach_encoder_and_codebook() -> None:
    model = quantizer()
    encoder_latents = logits().requires_grad_()
    output = model(encoder_latents)
    output.quantized_latents.square().sum().backward()
    for tensor in (encoder_latents, model.codebook):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_gumbel_noise_uses_the_generator() -> None:
    model, encoder_latents = quantizer(), logits()
    outputs = [model(encoder_latents, generator=seeded(seed)) for seed in (1, 1, 2)]
    first, second, other = (output.quantized_latents for output in outputs)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(encoder_latents, logits())


def test_temperature_is_saved_and_precision_kept() -> None:
    model = quantizer()
    model.temperature.fill_(0.3)
    copy = quantizer()
    copy.load_state_dict(model.state_dict())
    assert copy.temperature == model.temperature
    for mode in (model.train(), model.eval()):
        assert mode(logits().bfloat16()).quantized_latents.dtype == torch.bfloat16


def test_refuses_a_negative_weight() -> None:
    with pytest.raises(ValueError, match="kl_weight: got -1"):
        quantizer(kl_weight=-1.0)
