"""A decoder trained on another library's tokenizer: the road from its folder to an image."""

import dataclasses
from pathlib import Path

import pytest

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.training.estimate import tokenizer_of
from tests.reference import tiny
from tests.reference.other_tokenizers import SIZE, source_folder


@pytest.mark.parametrize("kind", ["openai", "emu3"])
def test_trained_folder_generates_standalone(kind: str, tmp_path: Path) -> None:
    source = source_folder(kind, tmp_path / kind)
    config = dataclasses.replace(
        tiny.dalle_run(tiny.write_data(tmp_path / "data"), source, tmp_path / "out", max_steps=2),
        vqvae_image_size=SIZE,
    )
    expected = tokenizer_of(config, None)
    assert expected is not None
    folder, _ = tiny.train(config)
    source.rename(tmp_path / "gone")  # the model folder must hold all that it needs
    pipeline = TextToImagePipeline.from_pretrained(folder)
    assert pipeline.vqvae.fingerprint() == expected.fingerprint()
    assert pipeline.vqvae.config == expected.config
    first, second = pipeline(["a red disc"], num_images=2, seed=0).images
    assert first.size == (SIZE, SIZE)
    assert first.tobytes() != second.tobytes()
    image_token_ids = pipeline.encode([first])
    assert pipeline.decode(image_token_ids)[0].size == (SIZE, SIZE)


def test_a_missing_or_wrong_size_is_told_before_any_work(tmp_path: Path) -> None:
    source = source_folder("openai", tmp_path / "openai")
    config = tiny.dalle_run(tiny.write_data(tmp_path / "data"), source, tmp_path / "out")
    with pytest.raises(UserError, match="vqvae_dir: image_size: got none"):
        tiny.train(config)
    with pytest.raises(ValueError, match="vqvae_image_size: got 0, expected at least 1"):
        dataclasses.replace(config, vqvae_image_size=0)
