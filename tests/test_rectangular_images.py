"""Images that are not square: from two small runs to every command that follows."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_mini_impl.cli.app import PageBackend
from dalle_mini_impl.cli.evaluation import EvaluationConfig, evaluate
from dalle_mini_impl.data.images import image_to_pixels
from dalle_mini_impl.evaluation.samples import read_data
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.generate import generate_sequentially
from dalle_mini_impl.training.run import save_config
from tests.reference import tiny
from tests.reference.commands import run_here

PIXEL_SIZE, GRID = (16, 24), (2, 3)
SIZE = (24, 16)  # as Pillow has it: width, height
WIDE: dict[str, Any] = {"image_size": PIXEL_SIZE}


def wide_image(number: int) -> Image.Image:
    """An image of the tiny data at the left, one of another color at the right."""
    image = Image.new("RGB", SIZE, "white")
    image.paste(tiny.render_image(number), (0, 0))
    image.paste(tiny.COLORS[number % 5], (17, 2, 23, 14))
    return image


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_data(tmp_path_factory.mktemp("wide") / "images")
    for number in range(30):
        wide_image(number).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a decoder, each trained for six steps."""
    out = tmp_path_factory.mktemp("runs")
    tokenizer = tiny.vqvae_run(data, out / "vqvae", vqvae=WIDE)
    task = dataclasses.replace(tokenizer.task, max_shift=2, ms_ssim_weight=0.1)
    folder, _ = tiny.train(dataclasses.replace(tokenizer, task=task))
    options: dict[str, Any] = {"random_order_probability": 0.5, "augmentation_ends_at": 1.0}
    options["shifted_view_probability"] = 0.5
    run = tiny.dalle_run(data, folder, out / "dalle", task=options)
    tiny.train(dataclasses.replace(run, max_zoom=1.2))
    return out


@pytest.fixture(scope="module")
def pipeline(out: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(out / "dalle" / "model")


def test_runs_leave_models_and_samples_of_that_size(out: Path) -> None:
    folder = out / "dalle" / "model"
    stored = json.loads((folder / "vqvae" / "config.json").read_text())
    assert stored["image_size"] == [16, 24]
    assert json.loads((folder / "dalle" / "config.json").read_text())["image_grid_size"] == [2, 3]
    card = (folder / "README.md").read_text()
    assert "Generates images of 16 x 24 pixels." in card
    assert "2 x 3 tokens" in " ".join(card.split())
    for run in ("vqvae", "dalle"):
        [*_, sheet] = sorted((out / run / "samples").rglob("*.png"))
        with Image.open(sheet) as image:
            assert image.width > image.height / 2


def test_generated_images_survive_saving(pipeline: TextToImagePipeline, tmp_path: Path) -> None:
    generated = pipeline(["a red disc", "a blue box"], num_images=3)
    assert {image.size for image in generated.images} == {SIZE}
    assert len({image.tobytes() for image in generated.images}) > 1
    pipeline.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)(
        ["a red disc", "a blue box"], num_images=3
    )
    assert [each.tobytes() for each in again.images] == [
        each.tobytes() for each in generated.images
    ]


def test_the_tokenizer_sees_the_whole_image_and_nothing_is_turned() -> None:
    """The left image's tokens come first in each row of the grid, and are those of its square."""
    pipeline = tiny.build_pipeline(vqvae=WIDE | {"encoder_kernel_size": 1})
    square = tiny.build_pipeline(vqvae={"encoder_kernel_size": 1})
    image = Image.effect_noise(SIZE, 90).convert("RGB")
    token_ids = pipeline.encode([image]).reshape(GRID)
    assert len(token_ids.unique()) > 4
    assert torch.equal(
        token_ids, pipeline.vqvae.encode_to_token_ids(image_to_pixels(image)[None])[0]
    )
    left = square.encode([image.crop((0, 0, 16, 16))]).reshape(2, 2)
    assert torch.equal(token_ids[:, :2], left)
    [decoded] = pipeline.decode(token_ids.reshape(1, -1))
    assert decoded.size == SIZE
    # Of a higher photo the middle is seen.
    padded = Image.new("RGB", (48, 96), "black")
    image = wide_image(3)  # without the noise, which is lost when it is scaled down again
    padded.paste(image.resize((48, 32), Image.Resampling.NEAREST), (0, 32))
    assert torch.equal(pipeline.encode([padded]), pipeline.encode([image]))


@pytest.fixture(scope="module")
def random_pipeline() -> TextToImagePipeline:
    """Random weights of which every one matters, unlike those after six steps."""
    pipeline = tiny.build_pipeline(vqvae=WIDE, hidden_size=32)
    pipeline.generates_any_order = True
    return pipeline


def test_images_equal_sequential_and_compiled_ones(
    random_pipeline: TextToImagePipeline, compiler: None
) -> None:
    pipeline, seeds = random_pipeline, torch.arange(6)
    text = pipeline.text_tokenizer.encode(["a red disc"] * 6)
    slow = generate_sequentially(
        pipeline.dalle, text, seeds=seeds, sampling_config=pipeline.sampling_config
    )
    expected = [image.tobytes() for image in pipeline.decode(slow.image_token_ids)]
    assert len(set(expected)) == 6
    fast = pipeline("a red disc", num_images=6).images
    assert [image.tobytes() for image in fast] == expected
    assert pipeline.use_native("float32")
    try:
        native = pipeline("a red disc", num_images=6).images
    finally:
        pipeline.native = None
    assert [image.tobytes() for image in native] == expected


def test_inpainting_keeps_pixels(random_pipeline: TextToImagePipeline) -> None:
    pipeline, image = random_pipeline, wide_image(3)
    hole = Image.new("L", SIZE, 0)
    hole.paste(255, (17, 9, 23, 15))  # of the last of six tokens
    generated = pipeline.inpaint("a blue box", image, mask=hole, num_images=6)
    for each in generated.images:
        assert Image.composite(image, each, hole).tobytes() == image.tobytes()
    assert len({each.tobytes() for each in generated.images}) > 1
    rows = pipeline.inpaint("a blue box", image, keep_rows=1, num_images=6)
    for each in rows.images:
        assert each.size == SIZE
        assert each.crop((0, 0, 24, 8)).tobytes() == image.crop((0, 0, 24, 8)).tobytes()
    assert len({each.crop((0, 8, 24, 16)).tobytes() for each in rows.images}) > 1
    fraction = pipeline.inpaint("a blue box", image, keep_fraction=0.5, num_images=6)
    assert {each.size for each in fraction.images} == {SIZE}


def test_commands(
    data: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = out / "dalle" / "model"
    shared = ("--model", model, "--prompt", "a red disc", "--num-images", "2")
    assert run_here("generate", *shared, "--out", tmp_path / "new") == 0
    image = ("--image", data / "3.png", "--keep-rows", "1")
    assert run_here("generate", *shared, *image, "--out", tmp_path / "rows") == 0
    for path in (*(tmp_path / "new").glob("0000*"), *(tmp_path / "rows").glob("0000*")):
        with Image.open(path) as written:
            assert written.size == SIZE
    capsys.readouterr()
    asked = ("--images", data / "3.png", "--caption", "a box", "--caption", "a disc")
    assert run_here("caption", "--model", model, *asked) == 0
    captions = json.loads(capsys.readouterr().out)["captions"]
    assert sum(entry["probability"] for entry in captions) == pytest.approx(1, abs=1e-3)
    (tmp_path / "page").mkdir()
    backend = PageBackend(TextToImagePipeline.from_pretrained(model), tmp_path / "page", model="x")
    [(shown, _)] = backend.generate("a red disc", 1, 0, 2.0, 1.0)
    with Image.open(shown) as written:
        assert written.size == SIZE


def test_data_are_checked_and_evaluated_at_that_size(
    data: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.dalle_run(data, out / "vqvae" / "model", tmp_path / "dalle")
    save_config(config, tmp_path / "dalle.yaml")
    assert run_here("check_data", "--config", tmp_path / "dalle.yaml") in (0, 1)
    shown = capsys.readouterr().out
    assert "(30 of 16 x 24)" in shown
    assert "(6 tokens an image)" in shown
    assert "tiny" not in shown
    options = ("--source", data, "--image-size")
    assert run_here("check_data", *options, "17", "24") in (0, 1)
    assert "30 tiny: smaller than 17 x 24 pixels" in capsys.readouterr().out
    assert run_here("check_data", *options, "16", "16", "16") == 2
    assert "image_size: got [16, 16, 16], expected a side, or" in capsys.readouterr().err

    model = out / "dalle" / "model"
    pipeline = TextToImagePipeline.from_pretrained(model)
    evaluated = read_data(str(data), pipeline.vqvae)
    assert evaluated.train.pixels.shape == (25, 3, *PIXEL_SIZE)
    first = np.array(wide_image(0)).transpose(2, 0, 1)
    assert (evaluated.train.pixels[0].numpy() == first).all()
    report = evaluate(EvaluationConfig(model=str(model), data=str(data), out=tmp_path / "report"))
    figures = json.loads(report.with_name("report.json").read_text(encoding="utf-8"))
    cells = figures["tokenizer"]["position_entropy_bits"]["by_cell"]
    assert (len(cells), len(cells[0])) == GRID


def test_a_square_ranker_chooses_among_them(random_pipeline: TextToImagePipeline) -> None:
    every = random_pipeline("a red disc", num_images=4).images
    ranker = tiny.build_ranker()
    scores = ranker.score(every, ["a red disc"] * 4)
    [kept] = random_pipeline("a red disc", num_candidates=4, rank=ranker).images
    assert kept.tobytes() == every[int(scores.argmax())].tobytes()
