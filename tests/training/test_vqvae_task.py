"""The tokenizer's task: batches, schedules of the quantizers, and figures on held-out pictures."""

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle_mini_impl.training.vqvae_run import VQVAERunConfig
from dalle_mini_impl.training.vqvae_task import VQVAETask, VQVAETaskConfig
from tests.reference import dvae_loss, tiny
from vqvae import VQVAE
from vqvae.quantizers import GumbelQuantizer, VectorQuantizer


def pictures(count: int) -> Tensor:
    arrays = [np.array(tiny.draw_picture(number)) for number in range(count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def build_task(vqvae: VQVAE, **settings: float) -> VQVAETask:
    return VQVAETask(
        pictures(20),
        pictures(70)[64:],
        VQVAETaskConfig(**settings),  # type: ignore[arg-type]
        sample_weights=None,
        vqvae=vqvae,
    )


def test_a_batch_is_the_pictures_in_minus_one_to_one() -> None:
    task = build_task(tiny.build_vqvae())
    ids = torch.tensor([4, 0, 4])
    pixels = task.make_batch(ids, torch.rand(3, task.num_draws))["pixels"]
    torch.testing.assert_close((pixels + 1) * 127.5, task.train[ids].float(), atol=1e-4, rtol=0)
    assert pixels.min() == -1
    assert pixels.max() == 1


def test_shifts_reach_both_ends_and_no_further() -> None:
    task = build_task(tiny.build_vqvae(), max_shift=2)
    ids = torch.zeros(2, dtype=torch.long)
    ends = torch.tensor([[0.0, 0.5], [0.9999, 0.5]])  # two up; two down; not sideways
    up, down = task.make_batch(ids, ends)["pixels"]
    true = task.train[0].float() / 127.5 - 1
    torch.testing.assert_close(up[:, :-2], true[:, 2:])
    torch.testing.assert_close(down[:, 2:], true[:, :-2])


def test_the_loss_is_reconstruction_plus_the_quantizers_own() -> None:
    vqvae = tiny.build_vqvae(quantizer="vq").train()
    task = build_task(vqvae, wavelet_weight=0.0)
    batch = task.make_batch(torch.arange(8), torch.rand(8, task.num_draws))
    generator = torch.Generator().manual_seed(0)
    loss, metrics = task.loss(vqvae, batch, progress=0.0, generator=generator)
    expected = metrics["reconstruction_loss"] + 0.25 * metrics["commitment_loss"]
    torch.testing.assert_close(loss.detach(), expected)
    assert {"psnr_db", "batch_codebook_perplexity", "dead_codes"} <= metrics.keys()
    assert all(not value.requires_grad for value in metrics.values())
    loss.backward()
    assert all(parameter.grad is not None for parameter in vqvae.parameters())


def test_gumbel_cools_down_and_its_kl_rises() -> None:
    vqvae = tiny.build_vqvae(quantizer="gumbel").train()
    assert isinstance(vqvae.quantizer, GumbelQuantizer)
    task = build_task(vqvae, gumbel_kl_weight=0.5)
    batch = task.make_batch(torch.arange(4), torch.rand(4, task.num_draws))
    found = []
    for progress in (0.0, 0.4, 0.8, 1.0):
        task.loss(vqvae, batch, progress=progress, generator=torch.Generator())
        found.append((float(vqvae.quantizer.temperature), vqvae.quantizer.kl_weight))
    temperatures, weights = zip(*found, strict=True)
    middle = (1 + 1 / 16) / 2
    assert temperatures == pytest.approx((1.0, middle, 1 / 16, 1 / 16))
    assert weights == pytest.approx((0.0, 0.5 * 0.5 * (1 - math.cos(0.8 * math.pi)), 0.5, 0.5))


def test_codes_are_not_restarted_at_the_end() -> None:
    vqvae = tiny.build_vqvae(quantizer="vq").train()
    assert isinstance(vqvae.quantizer, VectorQuantizer)
    task = build_task(vqvae)
    batch = task.make_batch(torch.arange(4), torch.rand(4, task.num_draws))
    found = []
    for progress in (0.0, 0.79, 0.8, 1.0):
        task.loss(vqvae, batch, progress=progress, generator=torch.Generator())
        found.append(vqvae.quantizer.freeze_restarts)
    assert found == [False, False, True, True]


@pytest.mark.parametrize("quantizer", ["fsq", "vq", "gumbel"])
def test_held_out_figures_agree_with_a_plain_computation(quantizer: str) -> None:
    vqvae = tiny.build_vqvae(quantizer=quantizer)
    task = build_task(vqvae)
    figures = task.evaluate(vqvae)
    ids, errors = [], []
    for image in task.held_out:
        pixels = image[None].float() / 127.5 - 1
        tokens = vqvae.encode_to_token_ids(pixels)
        ids += tokens.flatten().tolist()
        error = (vqvae.decode_from_token_ids(tokens) - pixels).square().mean()
        errors.append(10 * math.log10(4 / float(error)))
    assert figures["validation/psnr_db"] == pytest.approx(sum(errors) / len(errors), abs=1e-3)
    shares = [ids.count(token) / len(ids) for token in set(ids)]
    perplexity = math.exp(-sum(share * math.log(share) for share in shares))
    assert figures["validation/codebook_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    usage = len(set(ids)) / vqvae.codebook_size
    assert figures["validation/codebook_usage"] == pytest.approx(usage)
    assert ("validation/hard_soft_gap_db" in figures) == (quantizer == "gumbel")


def test_reconstructions_stand_beside_their_originals() -> None:
    vqvae = tiny.build_vqvae()
    task = build_task(vqvae)
    (grid,) = task.draw_pictures(vqvae)
    assert grid.captions == ["original", "reconstruction"] * len(task.held_out)
    first, last = (np.array(grid.images[index]) for index in (0, -2))
    assert np.array_equal(first, task.held_out[0].permute(1, 2, 0).numpy())
    assert np.array_equal(last, task.held_out[-1].permute(1, 2, 0).numpy())


DALLE_SIZES: dict[str, object] = {
    "architecture": "dalle", "decoder_output": "logit_laplace", "patch_size": 1,
    "channels": (8, 8, 8), "quantizer": "gumbel",
}  # fmt: skip


@pytest.mark.parametrize("progress", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_dalles_loss_and_schedules_equal_a_plain_float64_reading(progress: float) -> None:
    beta, downsampling = 6.6, 4
    vqvae = tiny.build_vqvae(**DALLE_SIZES).train()
    task = build_task(
        vqvae,
        gumbel_kl_weight=beta / (3 * downsampling**2),
        gumbel_kl_ends_at=0.05,
        gumbel_temperature_ends_at=0.2,
    )
    batch = task.make_batch(torch.arange(3), torch.rand(3, task.num_draws))
    pixels = batch["pixels"]
    noise = torch.Generator().manual_seed(5)
    loss, metrics = task.loss(vqvae, batch, progress=progress, generator=noise)
    now = dvae_loss.cosine(progress / 0.05, 0.0, beta)
    temperature = dvae_loss.cosine(progress / 0.2, 1.0, 1 / 16)

    with torch.no_grad():
        logits = vqvae.encoder(pixels)
        rows = logits.movedim(1, -1).flatten(0, 2).double()
        uniform = torch.rand(rows.shape, generator=torch.Generator().manual_seed(5)).double()
        weights = ((rows - (-uniform.log()).log()) / temperature).softmax(dim=1)
        codes = weights @ vqvae.quantizer.codebook.double()  # type: ignore[operator]
        maps = vqvae.decoder(codes.float().unflatten(0, (3, 4, 4)).movedim(-1, 1))
    reconstruction, kl, total = dvae_loss.loss(
        *(each.double().numpy() for each in (maps, logits, pixels)), beta=now
    )
    # Networks, likelihood and KL are computed in float32.
    assert float(metrics["reconstruction_loss"]) == pytest.approx(reconstruction, rel=1e-4)
    assert float(metrics["kl"]) == pytest.approx(kl / (3 * 16), rel=1e-4)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-4)
    loss.backward()
    assert all(parameter.grad is not None for parameter in vqvae.parameters())


@pytest.mark.parametrize("name", ["gumbel_kl_ends_at", "gumbel_temperature_ends_at"])
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_schedules_end_within_the_run(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"task.{name}: got {value}, wanted above 0 and up to 1"):
        VQVAETaskConfig(**{name: value})


def dalle_vqvae_run(data: Path, out: Path, **training: object) -> VQVAERunConfig:
    sizes = dataclasses.replace(
        tiny.VQVAE_SIZES,
        **{**DALLE_SIZES, "channels": (16, 16, 16), "vq_codebook_size": 32, "vq_code_dim": 16},
    )  # type: ignore[arg-type]
    settings = {"schedule": "cosine", "cosine_ends_at": 0.5, "cosine_floor": 0.0125,
                "learning_rate": 0.01, "ema_decay": 0.9, "warmup_steps": 0,
                "betas": (0.9, 0.999)}  # fmt: skip
    base = tiny.vqvae_run(data, out, **(settings | training))
    task = VQVAETaskConfig(gumbel_kl_weight=1 / 48, gumbel_kl_ends_at=0.02)
    return dataclasses.replace(base, vqvae=sizes, task=task)


def test_dalles_tokenizer_follows_its_schedule_and_resumes_exactly(tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data")
    whole, _ = tiny.train(dalle_vqvae_run(data, tmp_path / "whole"))
    rows = tiny.read_metrics(tmp_path / "whole")
    rates = [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]
    assert rates == pytest.approx([dvae_loss.cosine(step / 3, 1e-2, 1.25e-4) for step in range(6)])
    name = "checkpoints/step-00000003"
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "part" / name)
    part, _ = tiny.train(dalle_vqvae_run(data, tmp_path / "part"), resume="latest")
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_dalles_tokenizer_learns_and_reports_its_gap(tmp_path: Path) -> None:
    """On fields of eight colours, one per token. Flat white pictures are hard for a likelihood."""
    data = tiny.write_data(tmp_path / "data")
    random = np.random.default_rng(1)
    colors = np.array(
        [(r, g, b) for r in (40, 215) for g in (40, 215) for b in (40, 215)], np.uint8
    )
    for path in sorted(data.glob("*.png")):
        fields = colors[random.integers(8, size=(4, 4))]
        Image.fromarray(fields.repeat(4, axis=0).repeat(4, axis=1)).save(path)
    steps = {name: 30 for name in ("evaluate_every_steps", "sample_every_steps")}
    settings = {"max_steps": 120, "checkpoint_every_steps": 120, "cosine_ends_at": 1.0, **steps}
    run = dalle_vqvae_run(data, tmp_path / "out", global_batch_size=16, **settings)
    tiny.train(run)
    measured = [row for row in tiny.read_metrics(tmp_path / "out") if "validation/psnr_db" in row]
    found = [round(row["validation/psnr_db"], 1) for row in measured]
    # No picture of one colour is nearer than that: the rest of the way is what the tokens say.
    one_color = 10 * math.log10(4 / float((colors / 127.5).var(axis=0).mean()))
    assert found[-1] > max(found[0], one_color) + 1, found
    assert abs(measured[-1]["validation/hard_soft_gap_db"]) < 2
