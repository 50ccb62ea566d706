"""The tokenizer's task: batches, schedules of the quantizers, and figures on held-out images."""

import dataclasses
import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.vqvae import (
    DISCRIMINATOR_SCALE,
    VQVAERunConfig,
    VQVAETask,
    VQVAETaskConfig,
)
from tests.reference import dvae_loss, tiny
from tests.reference.quantizers import uniform_noise
from tests.reference.runs import checkpoint_dir, read_files
from vqvae import VQVAE
from vqvae.losses import perceptual
from vqvae.losses.adversarial import (
    AdversarialVQVAE,
    DiscriminatorConfig,
    PatchDiscriminator,
    adaptive_weight,
    adversarial_terms,
    last_layer_of,
)
from vqvae.losses.reconstruction import reconstruction_loss
from vqvae.quantizers import GumbelQuantizer, VectorQuantizer

Loss = tuple[Tensor, dict[str, Tensor]]


def images(count: int) -> Tensor:
    arrays = [np.array(tiny.render_image(number)) for number in range(count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def build_task(vqvae: VQVAE, *, discriminator: Any = None, **changes: Any) -> VQVAETask:
    config, models = VQVAETaskConfig(**changes), {"vqvae": vqvae, "discriminator": discriminator}
    return VQVAETask(images(20), images(70)[64:], config, sample_weights=None, **models)


def make_batch(task: VQVAETask, count: int) -> dict[str, Tensor]:
    return task.make_batch(torch.arange(count), torch.rand(count, task.num_uniforms))


def loss_of(task: VQVAETask, batch: dict[str, Tensor], progress: float = 0.0) -> Loss:
    return task.loss(task.model, batch, progress=progress, generator=torch.Generator())


def test_pixels_lie_in_minus_one_to_one() -> None:
    task = build_task(tiny.build_vqvae())
    ids = torch.tensor([4, 0, 4])
    pixels = task.make_batch(ids, torch.rand(3, task.num_uniforms))["pixels"]
    torch.testing.assert_close((pixels + 1) * 127.5, task.train[ids].float(), atol=1e-4, rtol=0)
    assert pixels.min() == -1
    assert pixels.max() == 1


def test_shifts_reach_both_ends() -> None:
    task = build_task(tiny.build_vqvae(), max_shift=2)
    ids = torch.zeros(2, dtype=torch.long)
    ends = torch.tensor([[0.0, 0.5], [0.9999, 0.5]])  # two up; two down; not sideways
    up, down = task.make_batch(ids, ends)["pixels"]
    true = task.train[0].float() / 127.5 - 1
    torch.testing.assert_close(up[:, :-2], true[:, 2:])
    torch.testing.assert_close(down[:, 2:], true[:, :-2])


def test_loss_is_reconstruction_plus_quantizer_loss() -> None:
    vqvae = tiny.build_vqvae(quantizer="vq").train()
    task = build_task(vqvae, wavelet_weight=0.0)
    loss, metrics = loss_of(task, make_batch(task, 8))
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
    batch = make_batch(task, 4)
    temperatures, weights = [], []
    for progress in (0.0, 0.4, 0.8, 1.0):
        loss_of(task, batch, progress)
        temperatures.append(float(vqvae.quantizer.temperature))
        weights.append(vqvae.quantizer.kl_weight)
    middle = (1 + 1 / 16) / 2
    assert temperatures == pytest.approx([1.0, middle, 1 / 16, 1 / 16])
    assert weights == pytest.approx([0.0, 0.5 * 0.5 * (1 - math.cos(0.8 * math.pi)), 0.5, 0.5])


def test_codes_are_not_restarted_at_the_end() -> None:
    vqvae = tiny.build_vqvae(quantizer="vq").train()
    assert isinstance(vqvae.quantizer, VectorQuantizer)
    task = build_task(vqvae)
    batch = make_batch(task, 4)
    found = []
    for progress in (0.0, 0.79, 0.8, 1.0):
        loss_of(task, batch, progress)
        found.append(vqvae.quantizer.freeze_restarts)
    assert found == [False, False, True, True]


@pytest.mark.parametrize("quantizer", ["fsq", "vq", "gumbel"])
def test_evaluation_agrees_with_a_plain_computation(quantizer: str) -> None:
    vqvae = tiny.build_vqvae(quantizer=quantizer)
    task = build_task(vqvae)
    figures = task.evaluate()
    ids, errors = [], []
    for image in task.held_out:
        pixels = image[None].float() / 127.5 - 1
        tokens = vqvae.encode_to_token_ids(pixels)
        ids += tokens.flatten().tolist()
        error = (vqvae.decode_from_token_ids(tokens) - pixels).square().mean()
        errors.append(10 * math.log10(4 / float(error)))
    assert figures["validation/psnr_db"] == pytest.approx(sum(errors) / len(errors), abs=1e-3)
    fractions = [ids.count(token) / len(ids) for token in set(ids)]
    perplexity = math.exp(-sum(fraction * math.log(fraction) for fraction in fractions))
    assert figures["validation/codebook_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    usage = len(set(ids)) / vqvae.codebook_size
    assert figures["validation/codebook_usage"] == pytest.approx(usage)
    assert ("validation/hard_soft_gap_db" in figures) == (quantizer == "gumbel")


def test_grid_shows_reconstructions_beside_originals() -> None:
    vqvae = tiny.build_vqvae()
    task = build_task(vqvae)
    (grid,) = task.make_image_grids()
    assert grid.captions == ["original", "reconstruction"] * len(task.held_out)
    first, last = (np.array(grid.images[index]) for index in (0, -2))
    assert np.array_equal(first, task.held_out[0].permute(1, 2, 0).numpy())
    assert np.array_equal(last, task.held_out[-1].permute(1, 2, 0).numpy())


GAN = DiscriminatorConfig(
    weight=0.8, adaptive=True, feature_matching_weight=0.5, starts_at=0.5, channels=4, num_layers=2
)


def weights_at(out: Path, step: int) -> dict[str, Tensor]:
    return load_file(checkpoint_dir(out, step) / "model.safetensors")


def test_discriminator_joins_in_time() -> None:
    torch.manual_seed(0)
    vqvae = tiny.build_vqvae().train()
    task = build_task(vqvae, discriminator=GAN)
    assert isinstance(task.model, AdversarialVQVAE)
    discriminator = task.model.discriminator
    batch = make_batch(task, 8)

    def loss_at(progress: float) -> Loss:
        task.model.zero_grad()
        found = loss_of(task, batch, progress)
        found[0].backward()
        return found

    loss, early = loss_at(0.49)
    assert torch.equal(loss.detach(), early["reconstruction_loss"])
    assert early["generator_weight"] == early["discriminator_loss"] == 0
    gradients = [weight.grad for weight in discriminator.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    loss, late = loss_at(0.5)
    assert late.keys() == early.keys()
    parts = late["reconstruction_loss"] + late["generator_weight"] * late["generator_loss"]
    parts = parts + 0.5 * late["feature_matching_loss"]
    parts = parts + DISCRIMINATOR_SCALE * late["discriminator_loss"]
    torch.testing.assert_close(loss.detach(), parts)
    reconstruction = vqvae(batch["pixels"]).reconstruction
    terms = adversarial_terms(discriminator, reconstruction, batch["pixels"])
    own_loss = reconstruction_loss(reconstruction, batch["pixels"])
    weight = 0.8 * adaptive_weight(own_loss, terms.generator, last_layer_of(vqvae))
    assert float(late["generator_weight"]) == pytest.approx(float(weight), rel=1e-4)
    assert float(weight) != pytest.approx(0.8, rel=1e-2)
    learning = {name for name, weight in discriminator.named_parameters() if weight.grad.any()}
    # Within the hinge's margin both halves pull equally at the last bias.
    assert dict(discriminator.named_parameters()).keys() - {"last.bias"} <= learning


@pytest.mark.parametrize(
    ("discriminator", "next_feature_weight", "prefix"),
    [(GAN, 0.0, "vqvae."), (DiscriminatorConfig(), 0.1, "vqvae."), (GAN, 0.1, "vqvae.vqvae.")],
    ids=["discriminator", "next feature", "both"],
)
def test_helpers_resume_exactly_and_are_left_behind(
    data: Path,
    tmp_path: Path,
    discriminator: DiscriminatorConfig,
    next_feature_weight: float,
    prefix: str,
) -> None:
    """A discriminator and a predictor are in checkpoints, and not in the model folder."""
    out = tmp_path / "run"
    config = tiny.vqvae_run(data, out, vqvae={"patch_size": 2}, ema_decay=0.9)
    task = VQVAETaskConfig(next_feature_weight=next_feature_weight, perturbed_image_fraction=0.5)
    config = dataclasses.replace(config, task=task, discriminator=discriminator)
    folder, _ = tiny.train(config)
    straight = read_files(checkpoint_dir(out, 6))
    shutil.rmtree(checkpoint_dir(out, 6))
    shutil.rmtree(folder)
    tiny.train(config, resume="latest")
    assert read_files(checkpoint_dir(out, 6)) == straight
    first, last = weights_at(out, 3), weights_at(out, 6)
    helpers = {name for name in last if not name.startswith(prefix)}
    num_critic = len(list(PatchDiscriminator(channels=4, num_layers=2).parameters()))
    expected = num_critic if discriminator.is_on else 0
    assert sum("discriminator." in name for name in helpers) == expected
    assert (sum("predictor." in name for name in helpers) > 20) == (next_feature_weight > 0)
    unchanged = {name for name in helpers if torch.equal(first[name], last[name])}
    assert unchanged <= {"discriminator.last.bias"}  # whose gradient is 0 within the hinge's margin
    names = load_file(folder / "model.safetensors").keys()
    assert names == {name.removeprefix(prefix) for name in last.keys() - helpers}
    VQVAE.from_pretrained(folder)


def test_a_late_discriminator_changes_nothing_before(data: Path, tmp_path: Path) -> None:
    plain = tiny.vqvae_run(data, tmp_path / "plain")
    with_it = dataclasses.replace(plain, discriminator=GAN, output_dir=str(tmp_path / "with"))
    for config in (plain, with_it):
        tiny.train(config)
    for step, is_equal in ((3, True), (6, False)):  # it begins with the fourth
        before, after = weights_at(tmp_path / "plain", step), weights_at(tmp_path / "with", step)
        same = [torch.equal(value, after[f"vqvae.{name}"]) for name, value in before.items()]
        assert all(same) == is_equal


def test_next_feature_off_changes_nothing(data: Path, tmp_path: Path) -> None:
    off = tiny.vqvae_run(data, tmp_path / "off", vqvae={"patch_size": 2})
    task = VQVAETaskConfig(next_feature_weight=1e-30)
    on = dataclasses.replace(off, output_dir=str(tmp_path / "on"), task=task)
    for config in (off, on):
        tiny.train(config)
    rows = [tiny.read_metrics(tmp_path / name) for name in ("off", "on")]
    assert not any("next_feature" in key for row in rows[0] for key in row)
    assert any("train/next_feature_loss" in row for row in rows[1])
    plain, with_it = (weights_at(tmp_path / name, 6) for name in ("off", "on"))
    assert plain.keys() == tiny.build_vqvae(patch_size=2).state_dict().keys()
    # So light a weight vanishes in every sum: the tokenizer's numbers are those without it.
    assert all(torch.equal(value, with_it[f"vqvae.{name}"]) for name, value in plain.items())


@pytest.mark.parametrize("name", ["next_feature", "perceptual"])
def test_an_optional_loss_is_added(name: str) -> None:
    vqvae = tiny.build_vqvae(patch_size=2).train()
    plain, task = build_task(vqvae), build_task(vqvae, **{f"{name}_weight": 0.5})
    batch = make_batch(plain, 4)
    without, _ = loss_of(plain, batch)
    loss, metrics = loss_of(task, batch)
    output = task.model(batch["pixels"])
    if name == "next_feature":
        expected, metric = output.next_feature_loss, metrics["next_feature_loss"]
    else:
        assert task.perceptual is not None
        expected = task.perceptual(output.reconstruction, batch["pixels"])
        metric = metrics["perceptual_distance"]
    torch.testing.assert_close(loss, without + 0.5 * expected)
    torch.testing.assert_close(metric, expected.detach())
    assert not metric.requires_grad
    assert metric > 0


def test_disabled_options_use_no_random_numbers() -> None:
    vqvae = tiny.build_vqvae(quantizer="gumbel").train()
    task = build_task(vqvae)
    batch = make_batch(task, 4)
    used, expected = (torch.Generator().manual_seed(3) for _ in range(2))
    loss, metrics = task.loss(vqvae, batch, progress=0.5, generator=used)
    plain = vqvae(batch["pixels"], generator=expected)
    assert torch.equal(used.get_state(), expected.get_state())
    assert torch.equal(loss, metrics["reconstruction_loss"] + plain.quantizer_loss)
    assert task.perceptual is None


def test_options_do_not_fit(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.vqvae_run(data, tmp_path / "run")
    large = dataclasses.replace(GAN, num_layers=3)
    with pytest.raises(ValueError, match=r"^vqvae.image_size: got 16, expected at least 24"):
        dataclasses.replace(config, discriminator=large)
    wide = dataclasses.replace(config.vqvae, image_size=(24, 16))
    with pytest.raises(
        ValueError, match=r"^vqvae.image_size: got \(24, 16\), expected at least 24"
    ):
        dataclasses.replace(config, vqvae=wide, discriminator=large)
    for image_size in ((12, 16), (16, 12)):
        sizes = dataclasses.replace(config.vqvae, image_size=image_size, channels=(8,))
        with pytest.raises(
            ValueError, match=r"^vqvae.image_size: got \(.* a multiple of 8 for the"
        ):
            dataclasses.replace(config, vqvae=sizes)
    plain = VQVAETaskConfig(wavelet_weight=0.0, ms_ssim_weight=0.1)
    for image_size in ((4, 16), (16, 4)):
        sizes = dataclasses.replace(config.vqvae, image_size=image_size, channels=(8,))
        with pytest.raises(
            ValueError, match=r"^vqvae.image_size: got \(.*, expected at least 7 for"
        ):
            dataclasses.replace(config, vqvae=sizes, task=plain)
    compiled = dataclasses.replace(config.training, compile=True)
    with pytest.raises(ValueError, match=r"^discriminator.adaptive: got true, expected false with"):
        dataclasses.replace(config, discriminator=GAN, training=compiled)
    one_token = dataclasses.replace(config.vqvae, channels=(4, 4, 4))
    with pytest.raises(ValueError, match=r"^task.next_feature_weight: got 0.1, expected 0 for"):
        dataclasses.replace(config, vqvae=one_token, task=VQVAETaskConfig(next_feature_weight=0.1))
    monkeypatch.setattr(perceptual, "PACKAGE", "no_such_package")
    task = VQVAETaskConfig(perceptual_weight=1.0)
    with pytest.raises(UserError, match=r"^task.perceptual_weight: .* not installed"):
        tiny.train(dataclasses.replace(config, task=task))


DALLE_SIZES: dict[str, Any] = {"architecture": "dalle", "decoder_output": "logit_laplace"}
DALLE_SIZES |= {"patch_size": 1, "channels": (8, 8, 8), "quantizer": "gumbel"}


@pytest.mark.parametrize("progress", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_dalles_loss_equals_a_plain_float64_reading(progress: float) -> None:
    beta, downsampling = 6.6, 4
    vqvae = tiny.build_vqvae(**DALLE_SIZES).train()
    schedule = {"gumbel_kl_ends_at": 0.05, "gumbel_temperature_ends_at": 0.2}
    task = build_task(vqvae, gumbel_kl_weight=beta / (3 * downsampling**2), **schedule)
    batch = make_batch(task, 3)
    pixels = batch["pixels"]
    noise = torch.Generator().manual_seed(5)
    loss, metrics = task.loss(vqvae, batch, progress=progress, generator=noise)
    now = dvae_loss.cosine(progress / 0.05, 0.0, beta)
    temperature = dvae_loss.cosine(progress / 0.2, 1.0, 1 / 16)

    with torch.no_grad():
        logits = vqvae.encoder(pixels)
        rows = logits.movedim(1, -1).flatten(0, 2).double()
        uniform = uniform_noise(5, *rows.shape).double()
        weights = ((rows - (-uniform.log()).log()) / temperature).softmax(dim=1)
        codes = weights @ vqvae.quantizer.codebook.double()  # type: ignore[operator]
        maps = vqvae.decoder(codes.float().unflatten(0, (3, 4, 4)).movedim(-1, 1))
    arrays = (each.double().numpy() for each in (maps, logits, pixels))
    reconstruction, kl, total = dvae_loss.loss(*arrays, beta=now)
    # Networks, likelihood and KL are computed in float32.
    assert float(metrics["reconstruction_loss"]) == pytest.approx(reconstruction, rel=1e-4)
    assert float(metrics["kl"]) == pytest.approx(kl / (3 * 16), rel=1e-4)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-4)
    loss.backward()
    assert all(parameter.grad is not None for parameter in vqvae.parameters())


def dalle_vqvae_run(data: Path, out: Path, **training: Any) -> VQVAERunConfig:
    sizes = {"channels": (16, 16, 16), "vq_codebook_size": 32, "vq_code_dim": 16}
    changes = {"schedule": "cosine", "cosine_ends_at": 0.5, "cosine_floor": 0.0125}
    changes |= {"learning_rate": 0.01, "ema_decay": 0.9, "warmup_steps": 0, "betas": (0.9, 0.999)}
    base = tiny.vqvae_run(data, out, vqvae=DALLE_SIZES | sizes, **(changes | training))
    task = VQVAETaskConfig(gumbel_kl_weight=1 / 48, gumbel_kl_ends_at=0.02)
    return dataclasses.replace(base, task=task)


def test_dalles_tokenizer_follows_its_schedule(data: Path, tmp_path: Path) -> None:
    whole, _ = tiny.train(dalle_vqvae_run(data, tmp_path / "whole"))
    rows = tiny.read_metrics(tmp_path / "whole")
    rates = [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]
    assert rates == pytest.approx([dvae_loss.cosine(step / 3, 1e-2, 1.25e-4) for step in range(6)])
    name = "checkpoints/step-00000003"
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "part" / name)
    part, _ = tiny.train(dalle_vqvae_run(data, tmp_path / "part"), resume="latest")
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_dalles_tokenizer_learns(tmp_path: Path) -> None:
    """On fields of eight colors, one per token. Flat white images are hard for a likelihood."""
    data = tiny.write_data(tmp_path / "data")
    random = np.random.default_rng(1)
    colors = np.array(list(itertools.product((40, 215), repeat=3)), np.uint8)
    for path in sorted(data.glob("*.png")):
        fields = colors[random.integers(8, size=(4, 4))]
        Image.fromarray(fields.repeat(4, axis=0).repeat(4, axis=1)).save(path)
    changes = {"max_steps": 120, "every": 30, "cosine_ends_at": 1.0}
    run = dalle_vqvae_run(data, tmp_path / "out", global_batch_size=16, **changes)
    tiny.train(run)
    measured = [row for row in tiny.read_metrics(tmp_path / "out") if "validation/psnr_db" in row]
    found = [round(row["validation/psnr_db"], 1) for row in measured]
    # No image of one color is nearer than that: the rest of the way is what the tokens say.
    one_color = 10 * math.log10(4 / float((colors / 127.5).var(axis=0).mean()))
    # This start ends at 11.1 or 11.2, by the rounding; of five starts two pass 10.3.
    assert found[-1] > max(found[0], one_color) + 1, found
    assert abs(measured[-1]["validation/hard_soft_gap_db"]) < 2
