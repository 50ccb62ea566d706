"""Model folders from a stranger, or from a bad disk: refused fast, in one line, without running.

Faults 20 and 21 of the table in `README.md` beside this file. A hostile folder's hashes fit its
files: hashes find damage, they do not stop anyone.
"""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dalle_mini_impl.data.text_tokenizer import TextTokenizer, train_text_tokenizer
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.model_folder import INDEX_NAME
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.training.checkpoint import CheckpointCorruptError, load_checkpoint
from tests.faults import hostile
from tests.faults.hostile import damaging, entry
from tests.reference import tiny

DALLE, VQVAE = "dalle/model.safetensors", "vqvae/model.safetensors"
CONFIG, VQVAE_CONFIG = "dalle/config.json", "vqvae/config.json"
TOKENIZER = "text_tokenizer/tokenizer.json"
TOKENIZER_CONFIG = "text_tokenizer/tokenizer_config.json"
MAX_SECONDS = 3.0

Damage = Callable[[Path], Any]


@pytest.fixture
def folder(model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_dir, tmp_path / "model")


def assert_refused(folder: Path, reason: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match=f"^model: .*{reason}") as caught:
        TextToImagePipeline.from_pretrained(folder)
    assert time.process_time() - start < MAX_SECONDS
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 1000


@damaging
def decoder(folder: Path, **changes: Any) -> None:
    """Change values of the decoder in `dalle/config.json`."""
    values = json.loads((folder / CONFIG).read_text())["decoder"]
    hostile.change_json(folder / CONFIG, decoder=values | changes)


@damaging
def changed(folder: Path, name: str, **changes: Any) -> None:
    hostile.change_json(folder / name, **changes)


@damaging
def without(folder: Path, name: str, *keys: str) -> None:
    """Leave out one value, by its keys."""
    values = section = json.loads((folder / name).read_text())
    for key in keys[:-1]:
        section = section[key]
    del section[keys[-1]]
    (folder / name).write_text(json.dumps(values))


@damaging
def flipped(folder: Path, name: str) -> None:
    """Flip the bits of the last byte; hashes stay."""
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 255
    (folder / name).write_bytes(data)


@damaging
def edited(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    if name in (DALLE, TOKENIZER):
        hostile.rehash(folder)


def written(name: str, content: bytes) -> Damage:
    return edited(name, lambda _: content)


@damaging
def replaced(folder: Path, name: str, old: bytes, new: bytes) -> None:
    assert old in (folder / name).read_bytes()
    edited(name, lambda before: before.replace(old, new, 1))(folder)


def header(*values: Any, **size: int) -> Damage:
    """Weights with any header."""
    return written(DALLE, hostile.with_header(*values, **size))


def regex(pattern: bytes) -> Damage:
    return replaced(TOKENIZER, rb'"\\s+"', pattern)


@damaging
def sampling(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / INDEX_NAME).read_text())["sampling"]
    hostile.change_json(folder / INDEX_NAME, sampling=values | changes)


@damaging
def tokenizer(folder: Path, **changes: Any) -> None:
    hostile.change_json(folder / TOKENIZER, **changes)
    hostile.rehash(folder)


@damaging
def bpe(folder: Path, **changes: Any) -> None:
    model = json.loads((folder / TOKENIZER).read_text())["model"]
    tokenizer(model=model | changes)(folder)


@damaging
def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    values = hostile.tensors(folder)
    change(values)
    hostile.write_tensors(folder, values)


def one(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Change one matrix of the decoder."""
    name = "text_head.weight"
    return weights(lambda values: values.update({name: change(values[name]).contiguous()}))


def with_nan(value: torch.Tensor) -> torch.Tensor:
    return value.index_fill(0, torch.tensor([3]), torch.nan)


def extra(name: str) -> Damage:
    return weights(lambda values: values.update({name: torch.zeros(3)}))


def other_vocabulary(folder: Path) -> None:
    text_tokenizer = TextTokenizer(train_text_tokenizer(["a"], vocab_size=257), 8)
    text_tokenizer.save_pretrained(folder / "text_tokenizer")
    hostile.rehash(folder)


def vocabulary_with_a_gap(folder: Path) -> None:
    model = json.loads((folder / TOKENIZER).read_text())["model"]
    last = max(model["vocab"], key=model["vocab"].__getitem__)
    bpe(vocab=model["vocab"] | {last: 10**9})(folder)


def other_weights(folder: Path) -> None:
    written(DALLE, (folder / VQVAE).read_bytes())(folder)


@damaging
def sparse(folder: Path, name: str) -> None:
    """A file that claims a tensor of 100 GB and takes no space on the disk."""
    header = hostile.with_header({"a": hostile.entry([25 * 10**9], 0, 10**11)})
    (folder / name).write_bytes(header)
    os.truncate(folder / name, len(header) + 10**11)


@damaging
def linked(folder: Path, name: str, target: str | None = None) -> None:
    """Put a file outside of the folder, or a device, in place of one inside."""
    outside = folder.parent / "outside"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(target or outside)


@damaging
def missing(folder: Path, name: str, make: Callable[[Path], object] | None = None) -> None:
    """Delete a file; `make` may put something else in its place."""
    (folder / name).unlink()
    if make:
        make(folder / name)


LAYERS = {"num_encoder_layers": 10**9}
STAGES = {"channels": [1] * 5000, "image_size": 2**5001, "patch_size": 4}
PATCHES = {"patch_size": 10**9, "image_size": 2 * 10**9}
CODES = {"quantizer": "vq", "vq_codebook_size": 10**9}
PADDING = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
TOKEN = {"id": 10**9, "content": "<pad>", "special": True}
WORDS = {"type": "WordLevel", "vocab": {"<pad>": 0}, "unk_token": "<pad>"}
SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
HUGE = {
    f"{name}: {value}": (decoder(**{name: value}), f"{name}: got {value}")
    for name in ("hidden_size", "num_layers", "num_heads")
    for value in (10**9, -1, 0)
    if (name, value) != ("num_heads", 10**9)
}
CONFIGS: dict[str, tuple[Damage, str]] = {
    **HUGE,
    "num_heads 10^9": (decoder(num_heads=10**9), "hidden_size: .* num_heads = 4000000000"),
    "vocab_size 10^12": (changed(CONFIG, vocab_size=10**12), "vocab_size: got 1000000000000"),
    "vocab_size negative": (changed(CONFIG, vocab_size=-5), "vocab_size: got -5"),
    "text_length 10^9": (changed(CONFIG, text_length=10**9), "text_length: got 1000000000"),
    "grid 10^9": (changed(CONFIG, image_grid_size=[10**9] * 2), "image_grid_size: got 10000"),
    "grid of three": (changed(CONFIG, image_grid_size=[2, 2, 2]), "expected 2 whole numbers"),
    "one level 10^9": (changed(CONFIG, codebook_levels=[10**9]), "asks for 16.* numbers, the file"),
    "levels beyond 64 bits": (changed(CONFIG, codebook_levels=[2**62] * 3), "asks for 1"),
    "20,000 levels": (changed(CONFIG, codebook_levels=[1] * 20_000), "codebook_levels: got 20000"),
    "no levels": (changed(CONFIG, codebook_levels=[]), "codebook_levels: got "),
    "a number of 400 digits": (changed(CONFIG, vocab_size=10**400), "vocab_size: got 1000"),
    "a number of 5,000 digits": (replaced(CONFIG, b": 8,", b": %s," % (b"9" * 5000)), "not JSON: "),
    "NaN": (replaced(CONFIG, b'_probability": 0.1', b'_probability": NaN'), "number NaN"),
    "infinity": (replaced(CONFIG, b'_probability": 0.1', b'_probability": -Infinity'), "-Infin"),
    "1e999": (replaced(CONFIG, b'_probability": 0.1', b'_probability": 1e999'), "number 1e999"),
    "dropout of 2": (decoder(dropout_probability=2), "dropout_probability: got 2"),
    "unknown key": (changed(CONFIG, tint=1), "unknown or missing fields: tint"),
    "unknown inner key": (decoder(__class__="os"), "DecoderConfig: .*fields: __class__"),
    "10,000 unknown keys": (changed(CONFIG, **{f"k{n}": n for n in range(10**4)}), "k1, k10"),
    "a word for a number": (changed(CONFIG, vocab_size="280"), "got '280', expected a whole num"),
    "a float for a count": (decoder(num_layers=2.0), "num_layers: got 2.0, expected a whole"),
    "true for a count": (decoder(num_layers=True), "num_layers: got True, expected a whole number"),
    "null for a count": (changed(CONFIG, text_length=None), "text_length: got None"),
    "an object for a count": (changed(CONFIG, text_length={"a": 1}), "text_length: got .'a'"),
    "a list for a decoder": (changed(CONFIG, decoder=[1]), "DecoderConfig: got .1., expected an"),
    "odd positions": (decoder(positions="__import__"), "positions: got '__import__'"),
    "positions in a list": (decoder(positions=["rotary"]), "positions: got .'rotary'"),
    "odd architecture": (decoder(architecture="gan"), "architecture: got 'gan', expected one of"),
    "a missing encoder": (decoder(**tiny.WITH_ENCODER), "tensor .*: got none, expected"),
    "10^9 encoders": (decoder(**tiny.WITH_ENCODER | LAYERS), "encoder_layers: got 1000000000, the"),
    "an encoder by half": (decoder(num_encoder_layers=1), "got 1, expected 0 with architecture d"),
    "nested 100,000 deep": (written(CONFIG, b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "2 MB of spaces": (written(CONFIG, b"{" + b" " * 2_000_000 + b"}"), "larger than 1048576 by"),
    "a key twice": (replaced(CONFIG, b"{", b'{"vocab_size": 7,'), "'vocab_size' is there twice"),
    "UTF-16": (written(CONFIG, '{"a": 1}'.encode("utf-16")), "not JSON"),
    "NUL bytes": (written(CONFIG, bytes(100)), "not JSON"),
    "empty config": (written(CONFIG, b""), "not JSON"),
    "HTML": (written(CONFIG, b"<!DOCTYPE html><html>404</html>"), "not JSON"),
    "a Git LFS pointer": (written(DALLE, b"version https://git-lfs.github.com/spec/v1"), "header"),
    "index version 1": (changed(INDEX_NAME, format_version=1), "format_version: got 1, expected 2"),
    "index version 3": (changed(INDEX_NAME, format_version=3), "format_version: got 3, expected 2"),
    "index version '2'": (changed(INDEX_NAME, format_version=[2]), "format_version: got .2., exp"),
    "index that is no JSON": (written(INDEX_NAME, b"{"), "not JSON"),
    "index in a list": (written(INDEX_NAME, b"[]"), "expected an object"),
    "any order as 1": (changed(INDEX_NAME, generates_any_order=1), "got 1, expected true or fal"),
    **{
        f"no {name} in the index": (without(INDEX_NAME, name), f"missing fields: {name}")
        for name in ("pipeline", "sampling", "generates_any_order", "vqvae_fingerprint", "sha256")
    },
    "a missing key": (without(CONFIG, "decoder", "positions"), "missing fields: positions"),
    "unknown key in the index": (changed(INDEX_NAME, auto_map={"a": "b.py"}), "fields: auto_map"),
    "paths in sha256": (changed(INDEX_NAME, sha256={"../../etc/passwd": "0"}), "sha256: got "),
    "a number as digest": (changed(INDEX_NAME, sha256={DALLE: 1, TOKENIZER: 2}), "not what was"),
    "a missing digest": (without(INDEX_NAME, "sha256", DALLE), "sha256: got {"),
    "null for digests": (changed(INDEX_NAME, sha256=None), "sha256: got None"),
    "index nested": (written(INDEX_NAME, b'{"a":' * 100_000), "nested too deeply"),
    "index of 2 MB": (written(INDEX_NAME, b" " * 2_000_000), "larger than"),
    "sampling NaN": (replaced(INDEX_NAME, b'"top_p": 1.0', b'"top_p": NaN'), "number NaN"),
    "sampling of null": (changed(INDEX_NAME, sampling=None), "SamplingConfig: got None"),
    "sampling without top_k": (without(INDEX_NAME, "sampling", "top_k"), "missing fields: top_k"),
    "sampling of a word": (sampling(temperature="hot"), "temperature: got 'hot', expected a num"),
    "sampling of another field": (sampling(top_q=1), "fields: top_q"),
    "sampling negative": (sampling(temperature=-1.0), "temperature: got -1.0"),
    "sampling of true": (sampling(top_k=True), "top_k: got True, expected a whole number"),
    "vqvae blocks 10^9": (changed(VQVAE_CONFIG, num_decoder_blocks=10**9), "blocks: got 10000000"),
    "vqvae blocks negative": (changed(VQVAE_CONFIG, num_encoder_blocks=-1), "blocks: got -1"),
    "vqvae channels 10^9": (changed(VQVAE_CONFIG, channels=[10**9]), "channels: got 10000000"),
    "vqvae 5,000 stages": (changed(VQVAE_CONFIG, **STAGES), "channels: got 5000"),
    "vqvae patch 10^9": (changed(VQVAE_CONFIG, **PATCHES), "patch_size: got 1000000000"),
    "vqvae image 10^9": (changed(VQVAE_CONFIG, image_size=8 * 10**9), "not the image tokenizer"),
    "vqvae 10^9 codes": (changed(VQVAE_CONFIG, **CODES), "asks for 4.* numbers, the file holds"),
    "vqvae levels 10^9": (changed(VQVAE_CONFIG, fsq_levels=[10**9] * 3), "not "),
    "vqvae 20,000 levels": (changed(VQVAE_CONFIG, fsq_levels=[2] * 20_000), "fsq_levels: got 20"),
    "vqvae version 2": (changed(VQVAE_CONFIG, format_version=2), "version: got 2, expected 1"),
    "vqvae unknown key": (changed(VQVAE_CONFIG, pickle="x"), "fields: pickle"),
    "vqvae kernel true": (changed(VQVAE_CONFIG, encoder_kernel_size=True), "got True, expect"),
}
WEIGHTS: dict[str, tuple[Damage, str]] = {
    "empty": (written(DALLE, b""), "not loaded"),
    "seven bytes": (written(DALLE, b"1234567"), "not loaded"),
    "header of 2^63 bytes": (header({}, size=2**63), "header: got 92"),
    "header of 90 MB": (header({}, size=9 * 10**7), "header: got 9"),
    "header longer than the file": (header({}, size=999), "not load"),
    "200k tensors": (header({f"t{n}": entry([0], 0, 0) for n in range(200_000)}), "header: got 1"),
    "header that is no JSON": (header(b"[" * 100), "not loaded"),
    "no tensors": (header({}), "not loaded"),
    "overlap": (header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "not loaded"),
    "shape beyond 64 bits": (header({"a": entry([2**40] * 3, 0, 4)}, bytes(4)), "not loaded"),
    "negative shape": (header({"a": entry([-1], 0, 4)}, bytes(4)), "not loaded"),
    "offsets beyond the file": (header({"a": entry([9], 0, 36)}, bytes(4)), "not loaded"),
    "100 GB that are not there": (sparse(DALLE), "not loaded"),
    "100 GB in the tokenizer": (sparse(VQVAE), "not loaded"),
    "cut in the middle": (edited(DALLE, lambda old: old[:-1000]), "not loaded"),
    "something appended": (edited(DALLE, lambda old: old + b"PK\3\4"), "not loaded"),
    "a zip before it": (edited(DALLE, lambda old: b"PK\3\4" + old), "header: got"),
    "one flipped byte": (flipped(DALLE), "dalle/model.safetensors: not what was written"),
    "one flipped byte in the tokenizer": (flipped(VQVAE), "vqvae: not the image tokenizer"),
    "lost tensor": (weights(lambda w: w.pop("output_norm.weight")), "tensor output_norm.weight: g"),
    "an extra tensor": (extra("zz"), "tensor zz: got .3,. of float32, expected none"),
    "a name of 5,000 letters": (extra("a" * 5000), "tensor aaaa"),
    "float64": (one(torch.Tensor.double), "text_head.weight: got .* of another type"),
    "int64": (one(torch.Tensor.long), "text_head.weight: got .* of int64, expected .* of float32"),
    "bool": (one(torch.Tensor.bool), "text_head.weight: got .* of bool"),
    "float8": (one(lambda value: value.to(torch.float8_e4m3fn)), "got .* of another type"),
    "complex": (one(lambda value: value.to(torch.complex64)), "got .* of another type"),
    "transposed": (one(torch.Tensor.t), "tensor text_head.weight: got .16, "),
    "one row short": (one(lambda value: value[:-1]), "tensor text_head.weight: got "),
    "one more axis": (one(lambda value: value[None]), "tensor text_head.weight: got .1, "),
    "NaN in one place": (one(with_nan), "tensor text_head.weight: holds numbers that are not fin"),
    "infinity": (one(lambda value: value / 0), "holds numbers that are not finite"),
    "the image tokenizer's": (other_weights, "vocab_size: got .*, the file's tensors end at"),
}
TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "garbage": (written(TOKENIZER, bytes(range(256)) * 4), "cannot read the text tokenizer"),
    "cut": (edited(TOKENIZER, lambda old: old[:900]), "cannot read"),
    "another vocabulary": (other_vocabulary, "vocab_size is 257, the decoder exp"),
    "one flipped byte": (flipped(TOKENIZER), "text_tokenizer/tokenizer.json: not what"),
    "a gap in the ids": (vocabulary_with_a_gap, "token ids are not 0, 1, 2"),
    "a regex bomb that splits": (tokenizer(pre_tokenizer=SPLIT), "by other patterns"),
    "a regex bomb in place of spaces": (regex(rb'"(\\s+)+$"'), "by other patterns"),
    "a regex of a billion states": (regex(b'"(((a{999}){999}){999}){999}"'), "by other patterns"),
    "a regex that is a list": (regex(b"[1]"), "by other patterns"),
    "padding to 10^12": (tokenizer(padding=PADDING), "by other rules"),
    "special token 10^9": (tokenizer(added_tokens=[TOKEN]), "special tokens are not <pad> alone"),
    "no settings of special tokens": (tokenizer(added_tokens=None), "cannot read"),
    "another normal form": (tokenizer(normalizer=None), "by other rules"),
    "another model": (tokenizer(model=WORDS), "by other rules"),
    "tokens left out at random": (bpe(dropout=0.5), "by other rules"),
    "merges of unknown tokens": (bpe(merges=[["zz", "yy"]]), "cannot read"),
    "20 MB": (written(TOKENIZER, b" " * 20_000_000), "larger than 16777216 bytes"),
    "nested": (written(TOKENIZER, b'{"normalizer":' * 100_000), "cannot read"),
    "a length of 10^9": (changed(TOKENIZER_CONFIG, model_max_length=10**9), "is 1000000000, e"),
    "a length of -1": (changed(TOKENIZER_CONFIG, model_max_length=-1), "text_length is -1"),
    "a length in words": (changed(TOKENIZER_CONFIG, model_max_length="8"), "is '8', expected"),
    "a length of true": (changed(TOKENIZER_CONFIG, model_max_length=True), "is True, expected"),
    "another length": (changed(TOKENIZER_CONFIG, model_max_length=9), "text_length is 9, the dec"),
    "settings in a list": (written(TOKENIZER_CONFIG, b"[]"), "cannot read"),
    "settings of 2 MB": (written(TOKENIZER_CONFIG, b" " * 2_000_000), "larger than 1048576"),
}
PLACES: dict[str, tuple[Damage, str]] = {
    **{
        f"link out: {name}": (linked(name), "a link that leads out of the folder")
        for name in (INDEX_NAME, CONFIG, DALLE, VQVAE_CONFIG, VQVAE, TOKENIZER, TOKENIZER_CONFIG)
    },
    "link out: dalle": (linked("dalle"), "a link that leads out of the folder"),
    **{
        f"no {name}": (missing(name), f"{name}: No such file|no {name}")
        for name in (CONFIG, VQVAE, TOKENIZER)
    },
    "no index": (missing(INDEX_NAME), "is no model folder"),
    "link to /dev/zero": (linked(CONFIG, "/dev/zero"), "No such file; expected a regular file"),
    "link to itself": (linked(DALLE, "model.safetensors"), "No such file|levels of symbolic links"),
    "a pipe for weights": (missing(DALLE, os.mkfifo), "No such file; expected a regular file"),
    "a pipe for a config": (missing(VQVAE_CONFIG, os.mkfifo), "file; expected a regular file"),
    "a folder for a file": (missing(DALLE, Path.mkdir), "No such file"),
}
SECTIONS = {"config": CONFIGS, "weights": WEIGHTS, "tokenizer": TOKENIZERS, "place": PLACES}
CASES = {
    f"{part}: {name}": each for part, cases in SECTIONS.items() for name, each in cases.items()
}


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_folder_is_refused(case: str, folder: Path) -> None:
    damage, reason = CASES[case]
    damage(folder)
    assert_refused(folder, reason)


@pytest.mark.parametrize("kind", hostile.PICKLES)
@pytest.mark.parametrize("name", [INDEX_NAME, CONFIG, DALLE, VQVAE_CONFIG, VQVAE, TOKENIZER])
def test_no_pickle_for_a_file_is_loaded(kind: str, name: str, folder: Path, tmp_path: Path) -> None:
    written(name, hostile.PICKLES[kind](tmp_path / "sentinel"))(folder)
    assert_refused(folder, "does not load")
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("kind", hostile.PICKLES)
def test_no_pickle_for_a_model_is_loaded(kind: str, tmp_path: Path) -> None:
    for name in ("model.pt", "folder/pytorch_model.bin", "folder/model.pkl", "folder/data.pkl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(hostile.PICKLES[kind](tmp_path / "sentinel"))
    for model in (tmp_path / "model.pt", tmp_path / "folder"):
        assert_refused(model, "is no model folder")
    assert not (tmp_path / "sentinel").exists()


def test_what_lies_beside_the_weights_is_never_opened(folder: Path, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    code = f"import pathlib\npathlib.Path({str(sentinel)!r}).touch()\n"
    for part in ("", "dalle", "vqvae", "text_tokenizer"):
        for name in ("pytorch_model.bin", "training_args.bin", "custom_checkpoint_0.pkl", "x.pt"):
            (folder / part / name).write_bytes(hostile.pickled(sentinel))
        for name in ("__init__.py", "tokenizer.py", "modeling.py", "sitecustomize.py"):
            (folder / part / name).write_text(code)
        (folder / part / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    auto_map = {"AutoTokenizer": ["tokenizer.Tokenizer", "tokenizer.Tokenizer"]}
    changed(TOKENIZER_CONFIG, auto_map=auto_map, tokenizer_class="Tokenizer")(folder)
    loaded = TextToImagePipeline.from_pretrained(folder)
    assert len(loaded("a red disc").images) == 1
    assert not sentinel.exists()


def test_the_bombs_would_go_off(tmp_path: Path) -> None:
    """Else the tests above would prove nothing."""
    for kind, make in hostile.PICKLES.items():
        (tmp_path / "file").write_bytes(make(tmp_path / kind))
        if kind == "pickle":
            pickle.loads((tmp_path / "file").read_bytes())
        elif kind == "numpy objects":
            np.load(tmp_path / "file", allow_pickle=True)
        else:
            torch.load(tmp_path / "file", weights_only=False)
        assert (tmp_path / kind).exists(), kind


@pytest.mark.parametrize("kind", hostile.PICKLES)
def test_no_pickle_for_a_checkpoint_is_loaded(kind: str, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    content = hostile.PICKLES[kind](sentinel)
    (tmp_path / "checkpoint.pt").write_bytes(content)
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    files = {"state.json": b'{"step": 1, "state": {}}'}
    files |= dict.fromkeys(("weights.safetensors", "custom_checkpoint_0.pkl"), content)
    manifest = {}
    for name, data in files.items():
        (folder / name).write_bytes(data)
        manifest[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"format_version": 1, "files": manifest}))
    for path in (folder, tmp_path / "checkpoint.pt"):
        with pytest.raises(CheckpointCorruptError):
            load_checkpoint(path)
    assert not sentinel.exists()


def test_links_of_the_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--user--name" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--user--name" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.rglob("*.*"))):
        place = snapshot / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        place.symlink_to(os.path.relpath(blobs / str(number), place.parent))
    loaded = TextToImagePipeline.from_pretrained(snapshot)
    assert len(loaded("a red disc").images) == 1
    (tmp_path / "linked").symlink_to(folder)  # and a link to the whole folder
    TextToImagePipeline.from_pretrained(tmp_path / "linked")


@pytest.mark.slow
def test_every_single_flipped_bit_is_noticed(folder: Path) -> None:
    """Of a dozen places in every file; what loads generates the same image."""
    whole = TextToImagePipeline.from_pretrained(folder)
    before = whole("a red disc").images[0].tobytes()
    refused = 0
    for path in sorted(folder.rglob("*.*")):
        if path.suffix == ".md" or path.is_dir():
            continue
        content = path.read_bytes()
        for place in range(0, len(content), max(len(content) // 12, 1)):
            flipped = bytearray(content)
            flipped[place] ^= 1 << (place % 8)
            path.write_bytes(flipped)
            try:
                loaded = TextToImagePipeline.from_pretrained(folder)
            except UserError:
                refused += 1
            else:  # a changed space, or a default that a user may change too; nothing else
                sampling_config = dataclasses.asdict(whole.sampling_config)
                image = loaded("a red disc", **sampling_config).images[0]
                assert image.tobytes() == before, (path, place)
        path.write_bytes(content)
    assert refused > 60
