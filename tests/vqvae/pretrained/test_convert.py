"""LlamaGen's tokenizers from what is published: the same tokens and pixels, and what is refused."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.hostile import PICKLES, Bomb
from tests.reference import llamagen
from tests.reference.commands import run_here
from tests.reference.other_tokenizers import SIZE
from vqvae.pretrained.convert import convert_tokenizer, read_pickle
from vqvae.pretrained.load import load_tokenizer

CODES = "quantize.embedding.weight"
LAYER = "decoder.conv_blocks.1.res.0.conv1.weight"


def written(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def images() -> torch.Tensor:
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("multipliers", "num_blocks"), [((1, 2, 2), 2), ((1, 1, 2, 2), 1)])
def test_tokens_and_pixels_equal_the_reference(
    multipliers: tuple[int, ...], num_blocks: int, tmp_path: Path
) -> None:
    weights = llamagen.random_weights(multipliers, num_blocks=num_blocks)
    source = written(tmp_path / "vq.pt", {"model": weights})
    convert_tokenizer(source, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out", image_size=SIZE)
    side = SIZE // 2 ** (len(multipliers) - 1)
    assert tokenizer.image_grid_size == (side, side)
    pixels = images()
    token_ids = tokenizer.encode_to_token_ids(pixels)
    assert len(token_ids.unique()) > 5
    assert torch.equal(token_ids, llamagen.encode(weights, pixels))
    every_id = torch.arange(3 * side * side).reshape(3, side, side) % tokenizer.codebook_size
    expected = llamagen.decode(weights, every_id).clamp(-1, 1)
    assert expected.std() > 0.1
    # Convolutions and attention add up in another order.
    torch.testing.assert_close(
        tokenizer.decode_from_token_ids(every_id), expected, rtol=0, atol=1e-4
    )


def test_every_place_of_a_state_dict_gives_the_same_tokenizer(tmp_path: Path) -> None:
    weights, other = llamagen.random_weights(), llamagen.random_weights(seed=1)
    counted = weights.pop("quantize.codebook_used")
    compiled = {f"_orig_mod.{name}": value for name, value in weights.items()}
    parameters = {name: torch.nn.Parameter(value) for name, value in weights.items()}
    sources = {
        "bare.ckpt": weights,
        "counted.pt": weights | {"quantize.codebook_used": counted},
        "model.pt": {"model": weights, "optimizer": {"state": {0: {"step": 3}}}, "steps": 7},
        "state_dict.pth": {"state_dict": parameters},
        "averaged.pt": {"model": other, "ema": weights},
        # GEAR's: `ema` is of its decoder.
        "gear.pt": {"ema": {"tok_embeddings.weight": counted}, "vq": other, "vq_ema": compiled},
    }
    fingerprints = set()
    for name, content in sources.items():
        tokenizer = convert_tokenizer(written(tmp_path / name, content), tmp_path / f"{name}.out")
        fingerprints.add(tokenizer.fingerprint())
    save_file(weights, tmp_path / "a.safetensors")
    safe = convert_tokenizer(tmp_path / "a.safetensors", tmp_path / "safe")
    assert fingerprints == {safe.fingerprint()}
    assert safe.config.image_size == 256
    written(tmp_path / "other.pt", other)
    changed = convert_tokenizer(tmp_path / "other.pt", tmp_path / "changed")
    assert changed.fingerprint() != safe.fingerprint()


def test_published_safetensors_load_without_conversion(tmp_path: Path) -> None:
    weights = llamagen.random_weights()
    source, folder = written(tmp_path / "vq.pt", weights), tmp_path / "published"
    expected = convert_tokenizer(source, tmp_path / "out")
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    for config in (None, {"codebook_size": 24, "z_channels": 6}):
        if config:
            (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"image_size: got none.*LlamaGen"):
            load_tokenizer(folder)
        loaded = load_tokenizer(folder, image_size=256)
        assert loaded.config == expected.config
        assert loaded.fingerprint() == expected.fingerprint()
    loaded.save_pretrained(tmp_path / "own")
    assert load_tokenizer(tmp_path / "own").fingerprint() == expected.fingerprint()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.pop(LAYER), rf"tensor {LAYER}: got none, expected \(64, 64, 3, 3\)"),
        (lambda w: w.pop(CODES), f"no tensor: '{CODES}'"),
        (lambda w: w.pop("encoder.conv_out.weight"), "no tensor: 'encoder.conv_out.weight'"),
        (lambda w: w.update(extra=torch.zeros(2)), r"tensor extra: got \(2,\), expected none"),
        (lambda w: w.update({LAYER: w[LAYER][:1]}), rf"tensor {LAYER}: got \(1, 64, 3, 3\)"),
        (lambda w: w.update({LAYER: w[LAYER].long()}), f"tensor {LAYER}: got torch.int64"),
        (lambda w: w.update({LAYER: w[LAYER] / 0}), f"tensor {LAYER}: holds numbers that are not"),
        (lambda w: w.update({LAYER: w[LAYER].to_sparse()}), f"tensor {LAYER}: got torch.sparse"),
        (lambda w: w.update({LAYER: [1.0]}), f"tensor {LAYER}: got list, expected a tensor"),
        (lambda w: w.update({CODES: torch.zeros(())}), "tensors of odd shapes"),
        (lambda w: w.update({CODES: torch.zeros(1).expand(10**12, 4)}), "the file does not hold"),
        (lambda w: w.update({"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)}), "base_channels"),
    ],
)
def test_a_state_dict_of_another_shape_is_refused_by_name(
    change: Callable[[dict[str, Any]], Any], reason: str, tmp_path: Path
) -> None:
    weights: dict[str, Any] = llamagen.random_weights()
    change(weights)
    with pytest.raises(ValueError, match=reason) as caught:
        convert_tokenizer(written(tmp_path / "vq.pt", {"model": weights}), tmp_path / "out")
    assert str(caught.value).startswith("source: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [*PICKLES, "beside weights", "args", "no pickle", "empty"])
def test_what_is_no_state_dict_is_refused_and_its_code_not_run(kind: str, tmp_path: Path) -> None:
    source, sentinel = tmp_path / "vq.pt", tmp_path / "ran"
    weights = llamagen.random_weights()
    if kind in PICKLES:
        source.write_bytes(PICKLES[kind](sentinel))
    elif kind == "beside weights":
        torch.save({"model": weights, "extra": Bomb(sentinel)}, source)
    elif kind == "args":  # harmless, but no tensor
        torch.save({"model": weights, "args": argparse.Namespace(epochs=1)}, source)
    else:
        source.write_bytes(b"no pickle" if kind == "no pickle" else b"")
    with pytest.raises(ValueError, match=r"expected a file of torch\.save with") as caught:
        convert_tokenizer(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "safe_globals" not in str(caught.value)  # torch's advice, which would run it
    assert ("argparse.Namespace" in str(caught.value)) == (kind == "args")
    assert not sentinel.exists()
    assert not (tmp_path / "out").exists()
    if kind == "beside weights":  # the test's bomb is one
        torch.load(source, weights_only=False)
        assert sentinel.exists()


def test_a_few_names_cannot_ask_for_millions_of_layers(tmp_path: Path) -> None:
    weights, one = llamagen.random_weights(), torch.zeros(1)
    stages = {f"encoder.conv_blocks.{number}.res.0.conv1.weight": one for number in range(2000)}
    blocks = {f"encoder.conv_blocks.0.res.{number}.conv1.weight": one for number in range(2000)}
    written(tmp_path / "vq.pt", stages | blocks | weights)
    with pytest.raises(ValueError, match="tensors, expected more for 2000 stages of 2000 blocks"):
        convert_tokenizer(tmp_path / "vq.pt", tmp_path / "out")


def test_other_pickles_are_told_apart(tmp_path: Path) -> None:
    for content, got in (({"weight": torch.zeros(1)}, "weight"), ([1, 2], "<class 'list'>")):
        with pytest.raises(ValueError, match=f"got {got}, expected the state dict of LlamaGen"):
            read_pickle(written(tmp_path / "vq.pt", content))


def test_a_published_pickle_is_refused_with_its_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "llamagen"
    folder.mkdir()
    file = written(folder / "vq_ds16_t2i.pt", {"model": llamagen.random_weights()})
    for place in (folder, file):
        with pytest.raises(ValueError, match="a pickle, expected safetensors; convert") as caught:
            load_tokenizer(place, image_size=SIZE)
        remedy = f"python scripts/convert_tokenizer.py {file} --out FOLDER"
        assert str(caught.value).endswith(remedy)
    convert_tokenizer(file, folder)  # beside the pickle
    assert load_tokenizer(folder, image_size=SIZE).codebook_size == 24


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "vq_ds16_t2i.pt", {"model": llamagen.random_weights()})
    assert run_here("convert_tokenizer", source, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "24 codes; 64 x 64 tokens at 256 pixels" in shown
    assert f"fingerprint: {load_tokenizer(tmp_path / 'out').fingerprint()}" in shown
    codes = load_file(tmp_path / "out" / "model.safetensors")[CODES]
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(24))
    for arguments, reason in (
        ((source, "--out", tmp_path / "out"), "out: got "),
        ((source, "--out", source), "out: "),
        ((tmp_path / "none.pt", "--out", tmp_path / "new"), "source: "),
        ((source,), "--out"),
    ):
        assert run_here("convert_tokenizer", *arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("error: ")
        assert reason in error
