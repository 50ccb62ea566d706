"""The tokenizer's task: batches, schedules of the quantizers, and figures on held-out images."""

import dataclasses
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
from vqvae.losses.causal import NextFeatureVQVAE
from vqvae.losses.reconstruction import reconstruction_loss
from vqvae.quantizers import GumbelQuantizer, VectorQuantizer


def images(count: int) -> Tensor:
    arrays = [np.array(tiny.render_image(number)) for number in range(count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def build_task(vqvae: VQVAE, **changes: float) -> VQVAETask:
    return VQVAETask(
        images(20),
        images(70)[64:],
        VQVAETaskConfig(**changes),  # type: ignore[arg-type]
        sample_weights=None,
        vqvae=vqvae,
    )


def test_batch_is_the_images_in_minus_one_to_one() -> None:
    task = build_task(tiny.build_vqvae())
    ids = torch.tensor([4, 0, 4])
    pixels = task.make_batch(ids, torch.rand(3, task.num_uniforms))["pixels"]
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
    batch = task.make_batch(torch.arange(8), torch.rand(8, task.num_uniforms))
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
    batch = task.make_batch(torch.arange(4), torch.rand(4, task.num_uniforms))
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
    batch = task.make_batch(torch.arange(4), torch.rand(4, task.num_uniforms))
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
    fractions = [ids.count(token) / len(ids) for token in set(ids)]
    perplexity = math.exp(-sum(fraction * math.log(fraction) for fraction in fractions))
    assert figures["validation/codebook_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    usage = len(set(ids)) / vqvae.codebook_size
    assert figures["validation/codebook_usage"] == pytest.approx(usage)
    assert ("validation/hard_soft_gap_db" in figures) == (quantizer == "gumbel")


def test_reconstructions_stand_beside_their_originals() -> None:
    vqvae = tiny.build_vqvae()
    task = build_task(vqvae)
    (grid,) = task.make_image_grids(vqvae)
    assert grid.captions == ["original", "reconstruction"] * len(task.held_out)
    first, last = (np.array(grid.images[index]) for index in (0, -2))
    assert np.array_equal(first, task.held_out[0].permute(1, 2, 0).numpy())
    assert np.array_equal(last, task.held_out[-1].permute(1, 2, 0).numpy())


GAN = DiscriminatorConfig(
    weight=0.8,
    adaptive=True,
    feature_matching_weight=0.5,
    starts_at=0.5,
    channels=4,
    num_layers=2,
)


def adversarial_run(data: Path, out: Path, **training: Any) -> VQVAERunConfig:
    """Six steps, the discriminator from the fourth on, and tokens perturbed from the first."""
    config = tiny.vqvae_run(data, out, ema_decay=0.9, **training)
    task = VQVAETaskConfig(perturbed_image_fraction=0.5)
    return dataclasses.replace(config, discriminator=GAN, task=task)


def weights_at(out: Path, step: int) -> dict[str, Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def files_at(out: Path, step: int) -> dict[str, bytes]:
    folder = out / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_the_discriminators_terms_are_added_when_it_is_time() -> None:
    torch.manual_seed(0)
    vqvae = tiny.build_vqvae().train()
    both = AdversarialVQVAE(vqvae, PatchDiscriminator(channels=4, num_layers=2))
    task = build_task(vqvae)
    task.discriminator = GAN
    batch = task.make_batch(torch.arange(8), torch.rand(8, task.num_uniforms))

    def loss_at(progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        both.zero_grad()
        found = task.loss(both, batch, progress=progress, generator=torch.Generator())
        found[0].backward()
        return found

    loss, early = loss_at(0.49)
    assert torch.equal(loss.detach(), early["reconstruction_loss"])
    assert early["generator_weight"] == early["discriminator_loss"] == 0
    gradients = [weight.grad for weight in both.discriminator.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    loss, late = loss_at(0.5)
    assert late.keys() == early.keys()
    parts = late["reconstruction_loss"] + late["generator_weight"] * late["generator_loss"]
    parts = parts + 0.5 * late["feature_matching_loss"]
    parts = parts + DISCRIMINATOR_SCALE * late["discriminator_loss"]
    torch.testing.assert_close(loss.detach(), parts)
    copies = vqvae(batch["pixels"]).reconstruction
    generator_loss = adversarial_terms(both.discriminator, copies, batch["pixels"]).generator
    weight = 0.8 * adaptive_weight(
        reconstruction_loss(copies, batch["pixels"]), generator_loss, last_layer_of(vqvae)
    )
    assert float(late["generator_weight"]) == pytest.approx(float(weight), rel=1e-4)
    assert float(weight) != pytest.approx(0.8, rel=1e-2)
    learning = {name for name, weight in both.discriminator.named_parameters() if weight.grad.any()}
    everything = dict(both.discriminator.named_parameters()).keys()
    # Within the hinge's margin both halves pull equally at the last bias.
    assert everything - {"last.bias"} <= learning


def test_a_run_with_a_discriminator_goes_on_exactly_and_leaves_it_behind(tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data")
    config = adversarial_run(data, tmp_path / "run")
    folder, _ = tiny.train(config)
    straight = files_at(tmp_path / "run", 6)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    shutil.rmtree(folder)
    tiny.train(config, resume="latest")
    assert files_at(tmp_path / "run", 6) == straight
    first, last = (weights_at(tmp_path / "run", step) for step in (3, 6))
    own = {name for name in last if name.startswith("discriminator.")}
    assert len(own) == len(list(PatchDiscriminator(channels=4, num_layers=2).parameters()))
    unchanged = {name for name in own if torch.equal(first[name], last[name])}
    assert unchanged <= {"discriminator.last.bias"}  # whose gradient is 0 within the hinge's margin
    names = load_file(folder / "model.safetensors").keys()
    assert names == {name.removeprefix("vqvae.") for name in last.keys() - own}
    VQVAE.from_pretrained(folder)

    plain = dataclasses.replace(
        config, discriminator=DiscriminatorConfig(), output_dir=str(tmp_path / "plain")
    )
    tiny.train(plain)
    before = weights_at(tmp_path / "plain", 3)  # the discriminator has not begun
    assert all(torch.equal(value, first[f"vqvae.{name}"]) for name, value in before.items())
    after = weights_at(tmp_path / "plain", 6)
    assert any(not torch.equal(value, last[f"vqvae.{name}"]) for name, value in after.items())


def test_a_run_with_a_next_feature_goes_on_exactly_and_leaves_it_behind(tmp_path: Path) -> None:
    """Alone, and together with a discriminator."""
    data = tiny.write_data(tmp_path / "data")
    task = VQVAETaskConfig(next_feature_weight=0.1)
    sizes = {"vqvae": {"patch_size": 2}, "ema_decay": 0.9}
    alone = tiny.vqvae_run(data, tmp_path / "alone", **sizes)
    alone = dataclasses.replace(alone, task=task)
    both = dataclasses.replace(alone, discriminator=GAN, output_dir=str(tmp_path / "both"))
    for config, around in ((alone, "vqvae."), (both, "vqvae.vqvae.")):
        out = Path(config.output_dir)
        folder, _ = tiny.train(config)
        straight = files_at(out, 6)
        shutil.rmtree(out / "checkpoints" / "step-00000006")
        shutil.rmtree(folder)
        tiny.train(config, resume="latest")
        assert files_at(out, 6) == straight
        first, last = (weights_at(out, step) for step in (3, 6))
        helpers = {name for name in last if not name.startswith(around)}
        assert {"predictor." in name or "discriminator." in name for name in helpers} == {True}
        assert sum("predictor." in name for name in helpers) > 20
        unchanged = {name for name in helpers if torch.equal(first[name], last[name])}
        assert unchanged <= {"discriminator.last.bias"}
        names = load_file(folder / "model.safetensors").keys()
        assert names == {name.removeprefix(around) for name in last.keys() - helpers}
        VQVAE.from_pretrained(folder)


def test_a_next_feature_that_is_off_leaves_a_run_as_it_is(tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data")
    off = tiny.vqvae_run(data, tmp_path / "off", vqvae={"patch_size": 2})
    on = dataclasses.replace(
        off, output_dir=str(tmp_path / "on"), task=VQVAETaskConfig(next_feature_weight=1e-30)
    )
    for config in (off, on):
        tiny.train(config)
    rows = [tiny.read_metrics(tmp_path / name) for name in ("off", "on")]
    assert not any("next_feature" in key for row in rows[0] for key in row)
    assert any("train/next_feature_loss" in row for row in rows[1])
    plain, with_it = (weights_at(tmp_path / name, 6) for name in ("off", "on"))
    assert plain.keys() == tiny.build_vqvae(patch_size=2).state_dict().keys()
    # So light a weight vanishes in every sum: the tokenizer's numbers are those without it.
    assert all(torch.equal(value, with_it[f"vqvae.{name}"]) for name, value in plain.items())


def test_the_next_features_loss_is_added() -> None:
    vqvae = tiny.build_vqvae(patch_size=2).train()
    model = NextFeatureVQVAE(vqvae).train()
    plain, task = build_task(vqvae), build_task(vqvae, next_feature_weight=0.5)
    batch = plain.make_batch(torch.arange(4), torch.rand(4, plain.num_uniforms))
    without, _ = plain.loss(vqvae, batch, progress=0.0, generator=torch.Generator())
    loss, metrics = task.loss(model, batch, progress=0.0, generator=torch.Generator())
    torch.testing.assert_close(loss, without + 0.5 * model(batch["pixels"]).next_feature_loss)
    assert not metrics["next_feature_loss"].requires_grad
    assert metrics["next_feature_loss"] > 0


def test_disabled_options_use_no_random_numbers() -> None:
    vqvae = tiny.build_vqvae(quantizer="gumbel").train()
    task = build_task(vqvae)
    batch = task.make_batch(torch.arange(4), torch.rand(4, task.num_uniforms))
    used, expected = (torch.Generator().manual_seed(3) for _ in range(2))
    loss, metrics = task.loss(vqvae, batch, progress=0.5, generator=used)
    plain = vqvae(batch["pixels"], generator=expected)
    assert torch.equal(used.get_state(), expected.get_state())
    assert torch.equal(loss, metrics["reconstruction_loss"] + plain.quantizer_loss)
    assert task.perceptual is None


def test_the_perceptual_distance_is_added() -> None:
    vqvae = tiny.build_vqvae().train()
    plain, task = build_task(vqvae), build_task(vqvae, perceptual_weight=0.5)
    batch = plain.make_batch(torch.arange(4), torch.rand(4, plain.num_uniforms))
    without, _ = plain.loss(vqvae, batch, progress=0.0, generator=torch.Generator())
    loss, metrics = task.loss(vqvae, batch, progress=0.0, generator=torch.Generator())
    assert task.perceptual is not None
    copies = vqvae(batch["pixels"]).reconstruction
    distance = task.perceptual(copies, batch["pixels"])
    torch.testing.assert_close(loss, without + 0.5 * distance)
    torch.testing.assert_close(metrics["perceptual_distance"], distance.detach())


def test_options_that_fit_nothing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("perturbed_image_fraction", 1.5), ("perturbed_token_fraction", 2.0)):
        with pytest.raises(ValueError, match=f"^task.{name}: got {value}, expected at most 1$"):
            VQVAETaskConfig(**{name: value})
    with pytest.raises(
        ValueError, match=r"^task.perturbed_neighbours: got 0, expected at least 1$"
    ):
        VQVAETaskConfig(perturbed_neighbours=0)
    config = tiny.vqvae_run(tmp_path, tmp_path / "run")
    large = dataclasses.replace(GAN, num_layers=3)
    with pytest.raises(ValueError, match=r"^vqvae.image_size: got 16, expected at least 24"):
        dataclasses.replace(config, discriminator=large)
    compiled = dataclasses.replace(config.training, compile=True)
    with pytest.raises(ValueError, match=r"^discriminator.adaptive: got true, expected false with"):
        dataclasses.replace(config, discriminator=GAN, training=compiled)
    one_token = dataclasses.replace(config.vqvae, channels=(4, 4, 4))
    with pytest.raises(ValueError, match=r"^task.next_feature_weight: got 0.1, expected 0 for"):
        dataclasses.replace(config, vqvae=one_token, task=VQVAETaskConfig(next_feature_weight=0.1))
    monkeypatch.setattr(perceptual, "PACKAGE", "no_such_package")
    task = VQVAETaskConfig(perceptual_weight=1.0)
    config = tiny.vqvae_run(tiny.write_data(tmp_path / "data"), tmp_path / "out")
    with pytest.raises(UserError, match=r"^task.perceptual_weight: .* not installed"):
        tiny.train(dataclasses.replace(config, task=task))


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
    batch = task.make_batch(torch.arange(3), torch.rand(3, task.num_uniforms))
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
    with pytest.raises(ValueError, match=f"task.{name}: got {value}, expected above 0 and up to 1"):
        VQVAETaskConfig(**{name: value})


def dalle_vqvae_run(data: Path, out: Path, **training: object) -> VQVAERunConfig:
    sizes = dataclasses.replace(
        tiny.VQVAE_SIZES,
        **{**DALLE_SIZES, "channels": (16, 16, 16), "vq_codebook_size": 32, "vq_code_dim": 16},
    )  # type: ignore[arg-type]
    changes = {"schedule": "cosine", "cosine_ends_at": 0.5, "cosine_floor": 0.0125,
                "learning_rate": 0.01, "ema_decay": 0.9, "warmup_steps": 0,
                "betas": (0.9, 0.999)}  # fmt: skip
    base = tiny.vqvae_run(data, out, **(changes | training))
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
    """On fields of eight colors, one per token. Flat white images are hard for a likelihood."""
    data = tiny.write_data(tmp_path / "data")
    random = np.random.default_rng(1)
    colors = np.array(
        [(r, g, b) for r in (40, 215) for g in (40, 215) for b in (40, 215)], np.uint8
    )
    for path in sorted(data.glob("*.png")):
        fields = colors[random.integers(8, size=(4, 4))]
        Image.fromarray(fields.repeat(4, axis=0).repeat(4, axis=1)).save(path)
    steps = {name: 30 for name in ("evaluate_every_steps", "sample_every_steps")}
    changes = {"max_steps": 120, "checkpoint_every_steps": 120, "cosine_ends_at": 1.0, **steps}
    run = dalle_vqvae_run(data, tmp_path / "out", global_batch_size=16, **changes)
    tiny.train(run)
    measured = [row for row in tiny.read_metrics(tmp_path / "out") if "validation/psnr_db" in row]
    found = [round(row["validation/psnr_db"], 1) for row in measured]
    # No image of one color is nearer than that: the rest of the way is what the tokens say.
    one_color = 10 * math.log10(4 / float((colors / 127.5).var(axis=0).mean()))
    assert found[-1] > max(found[0], one_color) + 1, found
    assert abs(measured[-1]["validation/hard_soft_gap_db"]) < 2
