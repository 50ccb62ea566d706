"""Captions by a captioner: a tiny one of the real class, with random weights."""

from pathlib import Path

import pytest
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

from dalle_mini_impl.data.pairs import open_pairs
from tests.reference import tiny
from tests.reference.commands import run_here

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "cup", "red", "dog")


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioner")
    (folder / "words.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizerFast(str(folder / "words.txt"), bos_token="[DEC]")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2, "projection_dim": 16}
    ids = {"bos_token_id": 5, "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 3}
    config = BlipConfig(
        text_config={**size, **ids, "vocab_size": len(WORDS), "encoder_hidden_size": 16},
        vision_config={**size, "image_size": 32, "patch_size": 16},
    )
    model = BlipForConditionalGeneration(config)
    # It ends no caption and knows words alone: random weights could be silent.
    bias = model.text_decoder.cls.predictions.bias.data
    bias[:7] = -100
    model.save_pretrained(folder)
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def write_images(folder: Path, count: int) -> None:
    (folder / "more").mkdir(parents=True)
    for number in range(count):
        tiny.render_image(number).save(folder / ("more" if number % 2 else "") / f"{number}.png")


def test_captions_are_written_beside_their_images_and_never_over_a_file(
    captioner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    write_images(folder, 7)
    (folder / "0.txt").write_text("my own words")
    (folder / "more" / "1.txt").write_text("")  # begun, or meant
    (folder / "2.png").write_bytes(b"no image")
    command = ("write_captions", folder, "--captioner", captioner, "--batch_size", "2")
    assert run_here(*command, "--max_tokens", "3") == 0
    shown = capsys.readouterr().out
    assert "4 captions written" in shown
    assert "2.png" in shown
    assert (folder / "0.txt").read_text() == "my own words"
    assert (folder / "more" / "1.txt").read_text() == ""
    for name in ("more/3", "4", "more/5", "6"):
        words = (folder / f"{name}.txt").read_text().split()
        assert 0 < len(words) <= 3
        assert set(words) <= set(WORDS[7:])
    assert len(open_pairs(str(folder))) == 5
    before = (folder / "4.txt").stat().st_mtime_ns
    assert run_here(*command) == 0
    assert (folder / "4.txt").stat().st_mtime_ns == before


def test_nothing_to_do(captioner: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("write_captions", data, "--captioner", "none such") == 0
    assert "each of 30 images has a caption" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--captioner", "/nowhere"), "captioner: /nowhere: "),
        (("--captioner", "/nowhere", "--max_tokens", "0"), "max_tokens: got 0"),
        ((), "--captioner"),
    ],
)
def test_what_is_refused(
    options: tuple[str, ...], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", 1)
    assert run_here("write_captions", tmp_path / "images", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert reason in error
    assert run_here("write_captions", tmp_path / "none", "--captioner", "x") == 2
    assert "expected a folder of images" in capsys.readouterr().err
