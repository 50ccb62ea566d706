"""Image tokenizers of every kind: one contract for all, and what is refused."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.faults.hostile import change_json
from tests.reference import openai_dvae
from tests.reference.other_tokenizers import FOREIGN, SIZE, library_model, scatter, source_folder
from vqvae import VQVAE
from vqvae.image_tokenizer import ImageTokenizer, require_working
from vqvae.pretrained.load import PretrainedTokenizer, load_tokenizer

KINDS = ("ours", "vq", "dalle", "openai", *FOREIGN)
Load = Callable[[str], ImageTokenizer]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folders: dict[str, Path] = {}

    def load_kind(kind: str) -> ImageTokenizer:
        if kind not in folders:
            folders[kind] = source_folder(kind, tmp_path_factory.mktemp("tokenizers") / kind)
        return load_tokenizer(folders[kind], image_size=SIZE)

    return load_kind


def images(count: int = 5, size: int = SIZE, width: int | None = None) -> Tensor:
    """Four fields each, in fully saturated colors."""
    fields = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    columns = (width or size) // 2
    return fields.repeat_interleave(size // 2, dim=2).repeat_interleave(columns, dim=3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tokenizer_keeps_the_contract(kind: str, load: Load, tmp_path: Path) -> None:
    tokenizer = load(kind)
    assert isinstance(tokenizer, ImageTokenizer)
    assert tokenizer.config.pixel_size == (SIZE, SIZE)
    grid, codes = tokenizer.image_grid_size, tokenizer.codebook_size
    assert torch.tensor(tokenizer.codebook_levels).prod() == codes

    pixels = images()
    token_ids = tokenizer.encode_to_token_ids(pixels)
    assert token_ids.shape == (5, *grid)
    assert token_ids.dtype == torch.int64
    assert 0 <= token_ids.min() <= token_ids.max() < codes
    assert len(token_ids.unique()) > 2
    alone = torch.cat([tokenizer.encode_to_token_ids(one[None]) for one in pixels])
    assert torch.equal(alone, token_ids)

    every_id = torch.arange(4 * grid[0] * grid[1]).reshape(4, *grid) % codes
    decoded = tokenizer.decode_from_token_ids(every_id)
    assert decoded.shape == (4, 3, SIZE, SIZE)
    assert decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1
    assert decoded.std() > 0.01
    assert not decoded.requires_grad
    for row, one in enumerate(every_id):
        single = tokenizer.decode_from_token_ids(one[None])
        # Sums over a batch of another size may be added up in another order, and wild weights
        # amplify that; a byte of an image is 8e-3 wide.
        torch.testing.assert_close(single[0], decoded[row], rtol=0, atol=1e-3)
    assert tokenizer.decode_from_token_ids(every_id[:0]).shape == (0, 3, SIZE, SIZE)

    with pytest.raises(ValueError, match=r"pixels: got \(16, 20\), expected 16 x 16"):
        tokenizer.encode_to_token_ids(torch.zeros(1, 3, SIZE, SIZE + 4))
    for bad in (-1, codes):
        with pytest.raises(ValueError, match=f"token_ids: got .*expected 0 to {codes - 1}"):
            tokenizer.decode_from_token_ids(torch.full((1, *grid), bad))

    before = tokenizer.fingerprint()
    tokenizer.save_pretrained(tmp_path / "own")
    again = load_tokenizer(tmp_path / "own")
    assert type(again) is type(tokenizer)
    assert again.config == tokenizer.config
    assert again.fingerprint() == before
    assert torch.equal(again.encode_to_token_ids(pixels), token_ids)
    assert torch.equal(again.decode_from_token_ids(every_id), decoded)
    for weight in again.parameters():
        with torch.no_grad():
            weight.view(-1)[0] += 1e-3
        assert again.fingerprint() != before
        before = again.fingerprint()


@pytest.mark.parametrize("kind", FOREIGN)
def test_tokens_and_pixels_are_the_librarys_own(kind: str, load: Load) -> None:
    tokenizer, theirs, pixels = load(kind), library_model(kind).eval(), images()
    scatter(theirs)
    token_ids = tokenizer.encode_to_token_ids(pixels)
    with torch.no_grad():
        if kind == "janus":
            expected_ids = theirs.encode(pixels).image_tokens.reshape(token_ids.shape)
            expected = theirs(pixels)[0]
        elif kind == "emu3":
            expected_ids = torch.stack(theirs.encode(pixels, [(SIZE, SIZE)] * 5).image_tokens)
            expected = theirs.decode(expected_ids)
        else:
            latents = theirs.encode(pixels).latents
            expected_ids = theirs.quantize(latents)[2][2].reshape(token_ids.shape)
            expected = theirs(pixels).sample
    assert torch.equal(token_ids, expected_ids)
    torch.testing.assert_close(
        tokenizer.decode_from_token_ids(token_ids), expected.clamp(-1, 1), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("num_blocks", "size"), [(1, SIZE), (2, 32)])
def test_openai_weights_equal_the_reference(num_blocks: int, size: int, tmp_path: Path) -> None:
    encoder, decoder = openai_dvae.random_weights(
        width=8, num_blocks=num_blocks, codebook_size=24, code_dim=5
    )
    save_file(encoder, tmp_path / "encoder.safetensors")
    save_file(decoder, tmp_path / "decoder.safetensors")
    tokenizer, pixels = load_tokenizer(tmp_path, image_size=size), images(size=size)
    assert isinstance(tokenizer, VQVAE)
    assert tokenizer.config.channels == (8, 16, 32, 64)
    token_ids = tokenizer.encode_to_token_ids(pixels)
    assert torch.equal(token_ids, openai_dvae.encode(encoder, pixels))
    expected = openai_dvae.decode(decoder, token_ids)
    torch.testing.assert_close(tokenizer.decode_from_token_ids(token_ids), expected)


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "infinite", "other names"])
def test_damaged_openai_weights_are_refused(damage: str, tmp_path: Path) -> None:
    folder = source_folder("openai", tmp_path / "openai")
    path = folder / "decoder.safetensors"
    weights, name = load_file(path), "blocks.group_2.block_1.res_path.conv_3.w"
    tensor = weights.pop(name)
    damaged = {
        "missing": weights,
        "unknown": weights | {name: tensor, "blocks.group_5.block_1.conv_1.w": torch.zeros(1)},
        "shape": weights | {name: tensor[:1].clone()},
        "infinite": weights | {name: torch.full_like(tensor, torch.inf)},
        "other names": {"weight": torch.zeros(3)},
    }
    save_file(damaged[damage], path)
    with pytest.raises(ValueError, match="openai") as caught:
        load_tokenizer(folder, image_size=SIZE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("janus", {"num_res_blocks": 10**7}, "num_res_blocks: got 10000000, the file holds"),
        ("janus", {"num_embeddings": 10**9}, "num_embeddings: got 1000000000, the file's tensors"),
        ("janus", {"base_channels": "32"}, "base_channels: got '32', expected a whole number"),
        ("janus", {"base_channels": 0}, "base_channels: got 0, expected at least 1"),
        ("janus", {"out_channels": 1}, "out_channels: got 1, expected 3"),
        ("janus", {"latent_channels": 5}, "tensor decoder.conv_in.weight: got"),
        ("janus", {"base_channels": 10**7}, "channel_multiplier: got 10000000, the file's tensors"),
        ("emu3", {"temporal_downsample_factor": 2**60}, "temporal_downsample_factor: got 1152"),
        ("emu3", {"temporal_downsample_factor": 4}, "tensor decoder.time_conv.1"),
        ("emu3", {"hidden_size": 10**9}, "hidden_size: got 1000000000, the file's tensors"),
        ("emu3", {"num_attention_heads": 5}, "not loaded"),
        ("diffusers", {"down_block_types": ["DownBlock2D"] * 3}, "down_block_types: got"),
        ("diffusers", {"act_fn": "eval"}, "act_fn: got eval"),
        ("diffusers", {"norm_num_groups": 3}, "not loaded"),
        ("diffusers", {"layers_per_block": 10**7}, "layers_per_block: got 10000000"),
    ],
)
def test_config_that_does_not_fit_its_weights_is_refused(
    kind: str, changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    folder = source_folder(kind, tmp_path / kind)
    change_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=reason) as caught:
        load_tokenizer(folder, image_size=SIZE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", FOREIGN)
def test_code_named_by_a_config_is_not_run(kind: str, tmp_path: Path) -> None:
    folder = source_folder(kind, tmp_path / kind)
    expected = load_tokenizer(folder, image_size=SIZE).fingerprint()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    kernels = dict.fromkeys(("attn_implementation", "_attn_implementation"), "someone/kernel")
    change_json(folder / "config.json", auto_map={"AutoModel": "evil.Model"}, **kernels)
    assert load_tokenizer(folder, image_size=SIZE).fingerprint() == expected
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = source_folder("janus", tmp_path / "janus")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.safetensors: No such file"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["openai", "emu3", "diffusers"])
def test_image_size_is_required(kind: str, tmp_path: Path) -> None:
    folder = source_folder(kind, tmp_path / kind)
    for size, reason in ((None, "none, expected pixels"), (18, "18, expected a multiple of")):
        with pytest.raises(ValueError, match=f"image_size: got {reason}"):
            load_tokenizer(folder, image_size=size)


def test_janus_and_our_folders_know_their_size(tmp_path: Path) -> None:
    janus = load_tokenizer(source_folder("janus", tmp_path / "janus"))
    assert janus.config.pixel_size == (SIZE, SIZE)
    larger = load_tokenizer(tmp_path / "janus", image_size=24)
    assert larger.encode_to_token_ids(torch.zeros(1, 3, 24, 24)).shape == (1, 6, 6)
    janus.save_pretrained(tmp_path / "own")
    for folder in (source_folder("ours", tmp_path / "ours"), tmp_path / "own"):
        with pytest.raises(ValueError, match="image_size: got 32, this tokenizer's is 16"):
            load_tokenizer(folder, image_size=32)


@pytest.mark.parametrize("kind", ["openai", *FOREIGN])
def test_images_need_not_be_square(kind: str, tmp_path: Path) -> None:
    """Tokens of an image beside itself are its own twice, but for what crosses the border."""
    folder = source_folder(kind, tmp_path / kind)
    wide = load_tokenizer(folder, image_size=(SIZE, 2 * SIZE))
    rows, columns = wide.image_grid_size
    assert (wide.config.pixel_size, columns) == ((SIZE, 2 * SIZE), 2 * rows)
    require_working(wide)
    pixels = images(width=2 * SIZE)
    token_ids = wide.encode_to_token_ids(pixels)
    assert token_ids.shape == (5, rows, columns)
    decoded = wide.decode_from_token_ids(token_ids)
    assert decoded.shape == pixels.shape
    assert not torch.equal(decoded[:, :, :, :SIZE], decoded[:, :, :, SIZE:])
    wide.save_pretrained(tmp_path / "own")
    again = load_tokenizer(tmp_path / "own")
    assert again.config == wide.config
    assert torch.equal(again.decode_from_token_ids(token_ids), decoded)
    with pytest.raises(ValueError, match=f"image_size: got {SIZE}, this tokenizer's is {SIZE} x "):
        load_tokenizer(tmp_path / "own", image_size=SIZE)
    with pytest.raises(ValueError, match=r"image_size: got \(16, 18\), expected a multiple of"):
        load_tokenizer(folder, image_size=(16, 18))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "llama"}, "kind: got llama, expected one of janus, emu3, diffusers"),
        ({"kind": ["janus"]}, "kind: got"),
        ({"kind": None}, "kind: got None"),
        ({"format_version": 7}, "format_version: got 7"),
        ({"image_size": "16"}, "image_size: got '16', expected a whole number or 2 whole"),
        ({"color": 1}, "unknown fields: color"),
        ({"sizes": {}}, "JanusSizes: unknown or missing fields"),
    ],
)
def test_a_stored_config_is_read_strictly(
    changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    load_tokenizer(source_folder("janus", tmp_path / "janus")).save_pretrained(tmp_path / "own")
    change_json(tmp_path / "own" / "config.json", **changes)
    with pytest.raises(ValueError, match=f"config.json: {reason}"):
        load_tokenizer(tmp_path / "own")


def test_half_precision_on_disk_is_read_as_float32(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(source_folder("emu3", tmp_path / "emu3"), image_size=SIZE)
    tokenizer.save_pretrained(tmp_path / "own", dtype=torch.bfloat16)
    again = load_tokenizer(tmp_path / "own")
    assert isinstance(again, PretrainedTokenizer)
    assert all(weight.dtype == torch.float32 for weight in again.parameters())
    assert not again.training


def test_a_config_decides_over_openai_files(tmp_path: Path) -> None:
    folder = source_folder("ours", tmp_path / "ours")
    before = load_tokenizer(folder).fingerprint()
    for name in ("encoder.safetensors", "decoder.safetensors"):
        (folder / name).write_text("not to be read")
    assert load_tokenizer(folder).fingerprint() == before


def test_tokenizer_that_takes_no_image_is_refused(load: Load) -> None:
    broken = copy.deepcopy(load("janus"))
    require_working(broken)
    broken.model.quant_conv = torch.nn.Conv2d(1, 4, 1)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"loads but takes no image: .*channels"):
        require_working(broken)
