"""The cost of int8 for the shipped model, on held-out images."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle_mini_impl.native import build
from dalle_mini_impl.native.decoder import NativeDecoder
from dalle_mini_impl.pipeline import TextToImagePipeline
from tests.reference.slow_sampling import stepwise_logits

FOLDER = Path(__file__).parents[2] / "checkpoints" / "emoji-64"
NUM_IMAGES = 40


@pytest.mark.slow  # writes the emoji data set
@pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="no C++ compiler")
@torch.inference_mode()
def test_int8_keeps_the_likelihood_of_held_out_images(tmp_path: Path) -> None:
    from dalle_mini_impl.builtin_datasets.emoji.prepare import prepare_emoji

    prepare_emoji(tmp_path, size=64, styles=["twemoji"], npm_dir=None)
    records = [json.loads(line) for line in (tmp_path / "metadata.jsonl").open(encoding="utf-8")]
    held_out = [record for record in records if record["split"] == "test_compose"][::5]
    held_out = held_out[:NUM_IMAGES]
    pipeline = TextToImagePipeline.from_pretrained(FOLDER)
    model, native = pipeline.dalle.eval(), NativeDecoder(pipeline.dalle, "int8")
    images = pipeline.encode([Image.open(tmp_path / record["file_name"]) for record in held_out])
    text = pipeline.text_tokenizer.encode([record["text"] for record in held_out])
    losses = []
    for start in range(0, NUM_IMAGES, 10):
        image, captions = images[start : start + 10], text[start : start + 10]
        losses.append(
            [
                -each.log_softmax(-1).gather(2, image.unsqueeze(2)).mean()
                for each in (
                    model(captions, image).image,
                    stepwise_logits(native, captions, image, window=15),
                )
            ]
        )
    plain, int8 = torch.tensor(losses).mean(dim=0).tolist()
    assert 0.5 < plain < 1  # nats per token: it knows these images
    assert abs(int8 / plain - 1) < 0.005
