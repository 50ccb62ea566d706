"""Images without captions: the image tokenizer trains on them, the decoder and the check say no."""

from pathlib import Path

import pytest

from dalle_mini_impl.errors import UserError
from tests.reference import tiny
from tests.reference.commands import run_here, write_presets


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        tiny.render_image(number).save(folder / f"{number}.png")
    (folder / "0.txt").write_text("only one has a caption")
    return folder


def test_the_image_tokenizer_needs_no_captions(images: Path, tmp_path: Path) -> None:
    model, lines = tiny.train(tiny.vqvae_run(images, tmp_path / "run", max_steps=4))
    assert (model / "config.json").is_file()
    assert len(tiny.losses(tmp_path / "run")) == 4
    assert f"train: 18 images from {images}, 0 skipped" in lines
    _, lines = tiny.train(tiny.vqvae_run(images, tmp_path / "run", max_steps=6), resume="latest")
    assert len(tiny.losses(tmp_path / "run")) == 6
    with pytest.raises(UserError, match=r"19 of 20 records cannot be used.*1\.txt beside it"):
        tiny.train(tiny.dalle_run(images, model, tmp_path / "dalle"))


def test_check_data_says_of_each_what_its_training_says(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.build_vqvae().save_pretrained(tmp_path / "presets" / "vqvae" / "model")
    vqvae, dalle = write_presets(images, tmp_path / "presets")

    def check(*arguments: str | Path) -> tuple[int, str]:
        code = run_here("check_data", *arguments)
        shown = capsys.readouterr()
        return code, shown.out if code < 2 else shown.err

    code, shown = check("--config", vqvae)
    assert code < 2
    assert "20 of 20 records can be used" in shown
    code, shown = check("--config", dalle)
    assert code == 2
    assert "19 of 20 records cannot be used" in shown
    (images / "0.txt").unlink()
    code, shown = check("--source", images)
    assert code == 2
    assert "20 images have no caption: data.captions_from" in shown
    assert check("--config", vqvae)[0] < 2
    code, shown = check("--source", images, "--captions-from", "text:a colored shape")
    assert code < 2
    assert "20 of 20 records can be used" in shown
    code, shown = check("--source", images, "--captions-from", "names")
    assert code == 2
    assert shown.startswith("error: data.captions_from: got names, expected file_name, folder_name")
