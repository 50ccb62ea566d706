"""Image files: names that are never paths, and metadata that comes back."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from dalle_mini_impl.cli.image_files import image_name, save_image
from tests.faults.test_prompts import HOSTILE


def check_name(name: str) -> None:
    assert Path(name).name == name
    assert not set(name) & set('/\\:*?"<>|%~`$;&\x00\x7f\r\n\t\x1b\u202e ')
    assert all(character.isalnum() or character in "-_." for character in name)
    assert len(name.encode()) <= 255
    assert name.startswith("00")
    assert name.count(".") == 1
    assert name.endswith(".png")


@pytest.mark.parametrize("prompt", [*HOSTILE.values(), "\ud800 half a pair", "", "   "])
def test_hostile_prompt_gives_a_plain_name(prompt: str, tmp_path: Path) -> None:
    name = image_name(3, prompt, 2**63 - 1)
    check_name(name)
    (tmp_path / name).write_bytes(b"")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@hypothesis_settings(max_examples=100)
@given(prompt=st.text(max_size=90), number=st.integers(0, 99), seed=st.integers(0, 2**63 - 1))
def test_any_prompt_gives_a_plain_name(prompt: str, number: int, seed: int) -> None:
    name = image_name(number, prompt, seed)
    check_name(name)
    assert name.startswith(f"{number:04d}-")
    assert name.endswith(f"_{seed}.png")


def test_names_are_readable() -> None:
    assert image_name(7, "A red heart, on Snow!", 5) == "0007-a-red-heart-on-snow_5.png"
    assert image_name(0, "빨간 하트", 1) == "0000-빨간-하트_1.png"
    assert image_name(0, "🙂", 1) == "0000-image_1.png"
    assert image_name(12345, "cat", 0) == "12345-cat_0.png"
    assert image_name(0, "가" * 300, 1) == f"0000-{'가' * 60}_1.png"


@pytest.mark.parametrize("prompt", HOSTILE.values())
def test_metadata_comes_back(prompt: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 3), (200, 30, 90))
    metadata = {"guidance_scale": 3.5, "model": "emoji64", "top_k": 0, "note": "가, b: c"}
    path = tmp_path / "image.png"
    save_image(image, path, prompt=prompt, seed=2**63 - 1, metadata=metadata)
    with Image.open(path) as opened:
        opened.load()
        assert opened.tobytes() == image.tobytes()
        texts = opened.text
    assert json.loads(texts["dalle_mini_impl"]) == {"prompt": prompt, "seed": 2**63 - 1, **metadata}
    assert texts["parameters"].startswith(f"{prompt}\nseed: {2**63 - 1}, guidance_scale: 3.5")


def test_interrupted_write_leaves_no_half_of_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.png"
    save_image(Image.new("RGB", (4, 3), "red"), path, prompt="red", seed=0, metadata={})
    before = path.read_bytes()

    def stop(*paths: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_image(Image.new("RGB", (4, 3), "blue"), path, prompt="blue", seed=0, metadata={})
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
