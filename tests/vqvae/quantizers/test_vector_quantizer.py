"""Vector quantization: codes, gradients, moving averages, k-means start and restarts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import quantizers as reference
from tests.reference.random_weights import noise
from vqvae.quantizers import VectorQuantizer, kmeans
from vqvae.quantizers.distributed import MAX_GATHERED_ROWS
from vqvae.quantizers.kmeans import sample_by_error, spherical_kmeans


def latents(seed: int = 0) -> Tensor:
    return noise(4, 3, 4, 4, seed=seed)


def build(codebook_size: int, code_dim: int = 3, ema_decay: float = 0.99) -> VectorQuantizer:
    quantizer = VectorQuantizer(codebook_size=codebook_size, code_dim=code_dim)
    quantizer.ema_decay = ema_decay
    return quantizer


def assert_codes_have_length_1(quantizer: VectorQuantizer) -> None:
    lengths = quantizer.codebook.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def started(codebook_size: int = 12, code_dim: int = 3, ema_decay: float = 0.99) -> VectorQuantizer:
    """A quantizer with a random codebook that counts as started, and without restarts."""
    torch.manual_seed(1)
    quantizer = build(codebook_size, code_dim, ema_decay)
    quantizer.ema_counts.fill_(1.0)
    quantizer.ema_sums.copy_(quantizer.codebook)
    quantizer.is_initialized.fill_(True)
    quantizer.freeze_restarts = True
    return quantizer


def rows(grid: Tensor) -> Tensor:
    return grid.movedim(1, -1).flatten(0, 2)


def test_codes_and_moving_averages_agree_with_the_reference() -> None:
    quantizer = started(ema_decay=0.9)
    codebook, counts = quantizer.codebook.clone(), quantizer.ema_counts.clone()
    sums = quantizer.ema_sums.clone()
    for step in range(3):
        encoder_latents = latents(seed=step)
        vectors = rows(encoder_latents)
        expected_ids = [reference.nearest_code(vector, codebook) for vector in vectors]
        output = quantizer(encoder_latents)
        assert output.token_ids.flatten().tolist() == expected_ids
        torch.testing.assert_close(rows(output.quantized_latents), codebook[expected_ids])
        codebook, counts, sums = reference.moving_average_update(
            codebook, counts, sums, vectors, decay=0.9
        )
        torch.testing.assert_close(quantizer.codebook, codebook)
        torch.testing.assert_close(quantizer.ema_counts, counts)
        torch.testing.assert_close(quantizer.ema_sums, sums)
    assert_codes_have_length_1(quantizer)


def test_codes_are_the_same_from_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = started().eval()
    at_once = quantizer.encode(latents())
    for most in (5 * 12 + 1, 1):  # 64 rows, 5 or 1 a block
        monkeypatch.setattr(kmeans, "MAX_SIMILARITIES", most)
        assert torch.equal(quantizer.encode(latents()), at_once)


def test_gradient_passes_straight_through_the_code() -> None:
    quantizer = started().eval()
    encoder_latents = latents().requires_grad_()
    upstream = latents(seed=5)
    output = quantizer(encoder_latents)
    (gradient,) = torch.autograd.grad((output.quantized_latents * upstream).sum(), encoder_latents)
    unit = F.normalize(encoder_latents, dim=1)
    (expected,) = torch.autograd.grad((unit * upstream).sum(), encoder_latents)
    torch.testing.assert_close(gradient, expected)


def test_commitment_pulls_the_encoder_and_not_the_codebook() -> None:
    gradients = {}
    for weight in (0.25, 1.0):
        quantizer = started()
        quantizer.commitment_weight = weight
        encoder_latents = latents().requires_grad_()
        codes = quantizer.decode(quantizer.encode(encoder_latents))
        output = quantizer(encoder_latents)
        unit = F.normalize(encoder_latents, dim=1)
        expected_loss = (unit - codes).square().mean()
        torch.testing.assert_close(output.loss, weight * expected_loss)
        torch.testing.assert_close(output.metrics["commitment_loss"], expected_loss.detach())
        assert not output.metrics["commitment_loss"].requires_grad
        (gradients[weight],) = torch.autograd.grad(output.loss, encoder_latents)
        assert not quantizer.codebook.requires_grad
        assert not list(quantizer.parameters())
    torch.testing.assert_close(gradients[0.25] * 4, gradients[1.0])
    assert gradients[1.0].abs().sum() > 0


def test_only_training_forwards_move_the_codebook() -> None:
    quantizer = started()
    before = quantizer.codebook.clone()
    encoder_latents = latents()
    untouched = encoder_latents.clone()
    quantizer.encode(encoder_latents)
    quantizer.eval()(encoder_latents)
    assert torch.equal(quantizer.codebook, before)
    output = quantizer.train()(encoder_latents)
    assert not torch.equal(quantizer.codebook, before)
    assert torch.equal(encoder_latents, untouched)
    assert 0 <= output.token_ids.min() <= output.token_ids.max() < quantizer.codebook_size


def test_encode_decode_and_forward_agree() -> None:
    quantizer = started().eval()
    output = quantizer(latents())
    assert torch.equal(quantizer.encode(latents()), output.token_ids)
    torch.testing.assert_close(quantizer.decode(output.token_ids), output.quantized_latents)
    ids = torch.arange(quantizer.codebook_size)[:, None, None]
    assert torch.equal(quantizer.encode(quantizer.decode(ids)), ids)
    assert torch.equal(quantizer.encode(7 * quantizer.decode(ids)), ids)  # length does not count


def test_kmeans_finds_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.cat([torch.eye(8), -torch.eye(8)])
    errors = 0.05 * torch.randn(16, 20, 8, generator=generator)
    vectors = F.normalize(centers[:, None] + errors, dim=2).flatten(0, 1)
    codebook, counts = spherical_kmeans(vectors, 16, generator=generator)
    assert (centers @ codebook.T).max(dim=1).values.min() > 0.99
    assert counts.tolist() == [20.0] * 16


def test_starts_with_kmeans_once() -> None:
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(8, 3), dim=1)
    batch = directions[torch.arange(64) % 8].view(4, 4, 4, 3).movedim(-1, 1)
    quantizer = build(8)
    assert quantizer.eval()(batch).metrics["commitment_loss"] > 0.01
    output = quantizer.train()(batch, generator=torch.Generator().manual_seed(0))
    assert output.metrics["commitment_loss"] < 1e-6
    torch.testing.assert_close(quantizer.ema_counts, torch.full((8,), 8.0))

    copy = build(8)
    copy.load_state_dict(quantizer.state_dict())
    copy.freeze_restarts = True
    copy(latents())  # a second k-means would not come near the loaded codes
    assert (copy.codebook * quantizer.codebook).sum(dim=1).min() > 0.99


def test_start_from_a_sample_of_many_vectors_counts_them_all() -> None:
    torch.manual_seed(0)
    quantizer = build(4, code_dim=2, ema_decay=0.999)
    quantizer(torch.randn(2, 2, 100, 100))
    assert MAX_GATHERED_ROWS < 20_000
    torch.testing.assert_close(quantizer.ema_counts.sum(), torch.tensor(20_000.0))


def test_more_codes_than_vectors() -> None:
    quantizer = build(200)
    output = quantizer(latents())
    assert output.metrics["commitment_loss"] < 1e-3
    assert_codes_have_length_1(quantizer)


def test_the_same_generator_gives_the_same_codebook() -> None:
    codebooks: list[Tensor] = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        quantizer = build(32, ema_decay=0.5)
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(len(codebooks))  # the global generator must not matter
        for step in range(3):
            quantizer(latents(seed=step), generator=generator)
        codebooks.append(quantizer.codebook)
    assert torch.equal(codebooks[0], codebooks[1])
    assert not torch.equal(codebooks[0], codebooks[2])


def collapsed() -> VectorQuantizer:
    """All codes but the first point away from every vector of `one_sided`."""
    quantizer = started(codebook_size=16)
    quantizer.codebook.copy_(torch.tensor([-1.0, 0.0, 0.0]).expand(16, 3))
    quantizer.codebook[0] = torch.tensor([1.0, 0.0, 0.0])
    quantizer.ema_counts.zero_()
    quantizer.ema_counts[0] = 64.0
    quantizer.ema_sums.copy_(quantizer.codebook * quantizer.ema_counts[:, None])
    return quantizer


def one_sided(seed: int) -> Tensor:
    encoder_latents = latents(seed)
    encoder_latents[:, 0] = encoder_latents[:, 0].abs() + 0.5
    return encoder_latents


def test_dead_codes_restart_at_vectors_of_the_batch() -> None:
    quantizer = collapsed()
    quantizer.freeze_restarts = False
    batch = one_sided(0)
    output = quantizer(batch, generator=torch.Generator().manual_seed(0))
    assert output.metrics["dead_codes"] == 0
    vectors = F.normalize(rows(batch), dim=1)
    nearest = (quantizer.codebook[1:] @ vectors.T).max(dim=1).values
    torch.testing.assert_close(nearest, torch.ones(15))
    assert len(quantizer.encode(one_sided(1)).unique()) > 8


def test_frozen_restarts_keep_the_codes_of_unused_ids() -> None:
    quantizer = collapsed()
    before = quantizer.codebook.clone()
    for step in range(3):
        output = quantizer(one_sided(step))
    assert torch.equal(quantizer.codebook[1:], before[1:])
    assert not torch.equal(quantizer.codebook[0], before[0])
    assert output.metrics["dead_codes"] == 15


def test_small_batches_do_not_restart_codes_in_use() -> None:
    quantizer = started(codebook_size=64, code_dim=8)
    quantizer.freeze_restarts = False
    quantizer.ema_counts.fill_(0.5)  # below the threshold of 1, but so is every other code
    before = quantizer.codebook.clone()
    ids = torch.arange(32).view(2, 4, 4)
    output = quantizer(quantizer.decode(ids))
    assert output.metrics["dead_codes"] == 0
    torch.testing.assert_close(quantizer.codebook, before)


def test_restarts_prefer_vectors_far_from_their_code() -> None:
    vectors = F.normalize(noise(100, 4), dim=1)
    codes = vectors.clone()
    codes[70:] = -vectors[70:]
    samples = sample_by_error(vectors, codes, 200, generator=torch.Generator().manual_seed(0))
    chosen = (samples @ vectors.T).argmax(dim=1)
    assert chosen.min() >= 70
    assert len(chosen.unique()) > 25


def test_nonfinite_batches_do_not_spoil_the_codebook() -> None:
    torch.manual_seed(0)
    quantizer = build(16, ema_decay=0.5)
    quantizer(torch.full((1, 3, 4, 4), torch.nan))
    assert not quantizer.is_initialized
    quantizer(latents())
    broken = latents(seed=1)
    broken[0] = torch.nan
    broken[1, 0] = torch.inf
    for batch in (broken, torch.full_like(broken, torch.nan), latents(seed=2)):
        quantizer.ema_counts[0] = 0.0  # a dead code
        quantizer(batch)
        assert_codes_have_length_1(quantizer)
    assert quantizer.ema_counts.isfinite().all()
    assert quantizer.ema_sums.isfinite().all()


def test_unused_codes_survive_underflow_of_their_averages() -> None:
    quantizer = started(ema_decay=0.01)
    one_direction = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    for _ in range(40):  # 0.01 ** 40 is 0 in float32
        quantizer(one_direction)
    assert_codes_have_length_1(quantizer)


def test_autocast_changes_nothing() -> None:
    plain, cast = started(), started()
    expected = plain(latents())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = cast(latents())
        ids = cast.encode(latents(seed=1))
    assert torch.equal(output.token_ids, expected.token_ids)
    assert torch.equal(cast.codebook, plain.codebook)
    assert cast.codebook.dtype == torch.float32
    assert torch.equal(ids, plain.encode(latents(seed=1)))
