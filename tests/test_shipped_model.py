"""The shipped model: small, complete, and right about colors."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.data.images import image_to_pixels
from dalle_mini_impl.pipeline import TextToImagePipeline

FOLDER = Path(__file__).parents[1] / "checkpoints" / "emoji-64"


@pytest.fixture(scope="module")
def shipped() -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(FOLDER)


def test_size() -> None:
    files = list(FOLDER.rglob("*.safetensors"))
    assert len(files) == 2
    assert sum(file.stat().st_size for file in files) <= 30e6


def test_colors_in_both_languages(shipped: TextToImagePipeline) -> None:
    prompts = ["red heart", "빨간색 하트", "blue heart", "파란색 하트, 노토 스타일"]
    for prompt, image in zip(prompts, shipped(prompts, seed=0).images, strict=True):
        red, _, blue = image_to_pixels(image)[:, 24:40, 24:40].mean(dim=(1, 2)).tolist()
        is_red = prompt in prompts[:2]
        assert (red - blue > 0.5) if is_red else (blue - red > 0.5), prompt


def test_image_does_not_depend_on_its_batch(shipped: TextToImagePipeline) -> None:
    prompts = ["rocket, 3D fluent style", "pizza", "dog face, noto style"]
    together = shipped(prompts, seed=7).images
    for prompt, image in zip(prompts, together, strict=True):
        assert shipped(prompt, seed=7).images[0].tobytes() == image.tobytes()


def test_prompt_lists() -> None:
    for name in ("prompts.txt", "prompts_ko.txt"):
        prompts = (FOLDER / name).read_text(encoding="utf-8").splitlines()
        assert len(prompts) == len(set(prompts)) == 32


def test_weights_are_bf16() -> None:
    from safetensors.torch import load_file

    kinds = {value.dtype for value in load_file(FOLDER / "dalle" / "model.safetensors").values()}
    assert kinds == {torch.bfloat16}


def test_configs_are_complete(shipped: TextToImagePipeline) -> None:
    """What a present save would write."""
    dalle = json.loads((FOLDER / "dalle" / "config.json").read_text())
    vqvae = json.loads((FOLDER / "vqvae" / "config.json").read_text())
    index = json.loads((FOLDER / "model_index.json").read_text())
    for stored, config in (
        (dalle["decoder"], shipped.dalle.config.decoder),
        (dalle, shipped.dalle.config),
        (vqvae, shipped.vqvae.config),
        (index["sampling"], shipped.sampling_config),
    ):
        assert {field.name for field in dataclasses.fields(config)} <= stored.keys()
