"""The image tokenizer as a whole; `pretrained/test_load.py` tests the contract of every kind."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from tests.reference.random_weights import random_pixels
from vqvae import VQVAE, VQVAEConfig

BuildVQVAE = Callable[..., VQVAE]
QUANTIZERS = ["fsq", "vq", "gumbel"]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_encode_and_decode_give_the_reconstruction(build_vqvae: BuildVQVAE, quantizer: str) -> None:
    model = build_vqvae(quantizer=quantizer)
    output = model(random_pixels())
    token_ids = model.encode_to_token_ids(random_pixels())
    assert torch.equal(output.token_ids, token_ids)
    pixels = model.decode_from_token_ids(token_ids)
    torch.testing.assert_close(pixels, output.reconstruction.clamp(-1, 1), rtol=0, atol=1e-4)
    assert output.quantizer_loss.shape == ()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_all_weights_learn(build_vqvae: BuildVQVAE, quantizer: str, kernel_size: int) -> None:
    model = build_vqvae(quantizer=quantizer, encoder_kernel_size=kernel_size).train()
    generator = torch.Generator().manual_seed(0)
    model(random_pixels(), generator=generator).reconstruction.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_one_patch_changes_one_token(build_vqvae: BuildVQVAE, quantizer: str) -> None:
    model = build_vqvae(quantizer=quantizer)
    pixels = random_pixels(1)
    before = model.encode_to_token_ids(pixels)[0]
    num_changed = 0
    for row, column in itertools.product(range(4), range(4)):
        changed = pixels.clone()
        changed[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] *= -1
        moved = (model.encode_to_token_ids(changed)[0] != before).nonzero().tolist()
        assert moved in ([], [[row, column]])
        num_changed += len(moved)
    assert num_changed > 8


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_save_and_load(build_vqvae: BuildVQVAE, quantizer: str, tmp_path: Path) -> None:
    model = build_vqvae(quantizer=quantizer).train()
    model(
        random_pixels(), generator=torch.Generator().manual_seed(0)
    )  # gives VQ its moving averages
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = VQVAE.from_pretrained(tmp_path / "new" / "folder")
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_fingerprint_covers_what_decides_tokens_and_pixels(
    build_vqvae: BuildVQVAE, quantizer: str
) -> None:
    model = build_vqvae(quantizer=quantizer)
    seen = {model.fingerprint()}
    with torch.no_grad():
        for name, weight in model.state_dict(keep_vars=True).items():
            of_training_only = name.startswith("quantizer.") and name != "quantizer.codebook"
            before = weight.clone()
            flat = weight.view(-1)
            flat[0] = ~flat[0] if weight.dtype == torch.bool else flat[0] + 1e-3
            changed = model.fingerprint()
            assert (changed in seen) == of_training_only, name
            seen.add(changed)
            weight.copy_(before)
    assert model.fingerprint() in seen
    other_config = build_vqvae(quantizer=quantizer, image_size=24)
    assert other_config.fingerprint() not in seen
    assert copy.deepcopy(model).train().fingerprint() == model.fingerprint()


def test_known_fingerprint() -> None:
    """Saved models name their tokenizer's fingerprint: another way to hash would orphan them."""
    no_blocks = {"num_encoder_blocks": 0, "num_decoder_blocks": 0}
    model = VQVAE(VQVAEConfig(image_size=4, patch_size=4, channels=(2,), **no_blocks))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    assert model.fingerprint() == "d7b2ed58a59afaf7"


@pytest.mark.parametrize("image_size", [16, (8, 12)])
def test_the_size_of_images_is_saved_as_it_was_given(
    build_vqvae: BuildVQVAE, image_size: int | tuple[int, int], tmp_path: Path
) -> None:
    model = build_vqvae(image_size=image_size)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["image_size"]
    assert stored == (image_size if isinstance(image_size, int) else list(image_size))
    loaded = VQVAE.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.fingerprint() == model.fingerprint()


def test_an_image_that_is_not_square(build_vqvae: BuildVQVAE) -> None:
    """Of networks that see a patch alone, a wide image's tokens are those of its two halves."""
    wide, half = build_vqvae(image_size=(8, 16), encoder_kernel_size=1), build_vqvae(image_size=8)
    pixels = torch.rand(3, 3, 8, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    token_ids = wide.encode_to_token_ids(pixels)
    halves = [half.encode_to_token_ids(each) for each in pixels.split(8, dim=3)]
    assert torch.equal(token_ids, torch.cat(halves, dim=2))  # (3, 2, 4)
    assert wide.decode_from_token_ids(token_ids).shape == pixels.shape
    with pytest.raises(ValueError, match=r"pixels: got \(16, 8\), expected 8 x 16"):
        wide.encode_to_token_ids(pixels.transpose(2, 3))


def damage_config(folder: Path, **changes: object) -> None:
    """Change fields; None removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


WRONG_CONFIGS = [
    ({"format_version": 2}, "format_version: got 2, expected 1"),
    ({"format_version": None}, "format_version: got None, expected 1"),
    ({"color": "red"}, "unknown or missing fields: color"),
    ({"patch_size": None}, "unknown or missing fields: patch_size"),
    ({"architecture": None}, "unknown or missing fields: architecture"),  # no default either
    ({"image_size": 17}, "image_size: got 17"),
    ({"image_size": "16"}, "image_size: got '16', expected a whole number or 2 whole numbers"),
    ({"image_size": [16, 16, 16]}, r"image_size: got \[16, 16, 16\], expected a whole number or 2"),
    ({"image_size": [True, 16]}, r"image_size: got \[True, 16\], expected a whole number or 2"),
    ({"image_size": [16, 18]}, r"image_size: got \(16, 18\), expected a multiple of 4"),
    ({"quantizer": "lfq"}, "quantizer: got 'lfq'"),
    ({"channels": 8}, ".+"),
]
TOO_LARGE = [
    ({"num_encoder_blocks": 10**7}, "num_encoder_blocks: got 10000000, the file holds"),
    ({"num_decoder_blocks": 10**7}, "num_decoder_blocks: got 10000000, the file holds"),
    ({"channels": [8, 10**7]}, "channels: got 10000000, the file's tensors end at"),
    ({"channels": [8, 10**30]}, "channels: got 1000000000000"),
    ({"channels": [8, 9]}, "tensor decoder.layers.0.bias: got .12,. of float32, expected .9,"),
    ({"quantizer": "vq", "vq_codebook_size": 10**9}, "the config asks for 40.*, the file"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [(changes, rf"config\.json: .*{reason}") for changes, reason in WRONG_CONFIGS]
    + [(changes, rf"model\.safetensors: not loaded: {reason}") for changes, reason in TOO_LARGE],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_config_is_refused(
    build_vqvae: BuildVQVAE, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    """Sizes beyond the weights are refused before the model is built."""
    build_vqvae().save_pretrained(tmp_path)
    damage_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        VQVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe\x00"])
def test_config_that_is_no_object_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    message = r"config\.json: (not JSON|got (list|int), expected an ob)"
    with pytest.raises(ValueError, match=message):
        VQVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(build_vqvae: BuildVQVAE, name: str, tmp_path: Path) -> None:
    build_vqvae().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: No such file"):
        VQVAE.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no-such-folder/config\.json: No such file"):
        VQVAE.from_pretrained(tmp_path / "no-such-folder")


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "truncated", "empty", "text"])
def test_damaged_weights_are_refused(build_vqvae: BuildVQVAE, damage: str, tmp_path: Path) -> None:
    build_vqvae(quantizer="gumbel").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content, weights = path.read_bytes(), load_file(path)
    codebook = {"quantizer.codebook": weights.pop("quantizer.codebook")}
    contents = {
        "missing": save(weights),
        "unknown": save(weights | codebook | {"extra": torch.zeros(1)}),
        "shape": save(weights | {"quantizer.codebook": torch.zeros(20, 5)}),
        "truncated": content[:-10],
        "empty": b"",
        "text": b"version https://git-lfs",
    }
    path.write_bytes(contents[damage])
    with pytest.raises(ValueError, match=r"model\.safetensors: not loaded") as caught:
        VQVAE.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
