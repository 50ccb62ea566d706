"""Images by command: files, metadata, grids, inpainting, batches."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dalle_mini_impl.cli.generate import InpaintingFiles, generate_to_folder
from dalle_mini_impl.cli.image_files import model_name
from dalle_mini_impl.cli.pipelines import open_pipeline
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.hardware import find_device
from tests.reference import tiny
from tests.reference.commands import run_here
from tests.reference.log_lines import log_lines


def facts_of(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        return json.loads(image.text["dalle_mini_impl"])  # type: ignore[attr-defined,no-any-return]


def pixels_of(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_metadata_and_grid(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc\n\n  a blue box  \na red disc\n", encoding="utf-8")
    common = ["--model", model_dir, "--out", out]
    assert run_here("generate", *common, "--prompt", "an old one", "--num-images", "3") == 0
    options = ["--num-images", "12", "--seed", "5", "--guidance-scale", "1.5", "--top-k", "9"]
    assert run_here("generate", *common, "--prompts-file", prompts, *options) == 0
    assert len(list(out.glob("0000-an-old-one_*.png"))) == 3
    assert len(list(out.glob("0001-a-red-disc_*.png"))) == 12
    assert len(list(out.glob("0002-a-blue-box_*.png"))) == 12
    facts = facts_of(out / "0002-a-blue-box_16.png")
    assert (facts["prompt"], facts["seed"]) == ("a blue box", 16)
    assert (facts["guidance_scale"], facts["top_k"], facts["temperature"]) == (1.5, 9, 1.0)
    # What the file says makes the same image again.
    again = ["--model", model_dir, "--out", tmp_path / "again", "--prompt", facts["prompt"]]
    options = ["--seed", "16", "--num-images", "1", "--top-k", "9", "--guidance-scale", "1.5"]
    assert run_here("generate", *again, *options) == 0
    image = tmp_path / "again" / "0000-a-blue-box_16.png"
    assert pixels_of(image) == pixels_of(out / "0002-a-blue-box_16.png")
    # Two rows of twelve, of which the eleventh is seed 15: not in the order of the file names.
    assert {path.name for path in out.glob("grid*")} == {"grid-0000.png", "grid-0001.png"}
    with Image.open(out / "grid-0001.png") as grid:
        assert grid.width // (grid.height // 2) >= 8
        step = (grid.width - 2) // 12
        cell = grid.crop((2 + 10 * step, 2, 2 + 11 * step - 2, step))
    with Image.open(out / "0001-a-red-disc_15.png") as image_15:
        expected = image_15.resize((step - 2, step - 2), Image.Resampling.NEAREST)
    assert cell.tobytes() == expected.tobytes()


def test_progress_and_square_grid(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One image for each of many prompts is no endless column."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"disc {number}" for number in range(70)))
    arguments = ["--model", model_dir, "--prompts-file", tmp_path / "prompts.txt"]
    arguments += ["--num-images", "1", "--out", tmp_path / "images"]
    assert run_here("generate", *arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == ["generating 70 images", "64 of 70 generated", "70 of 70 generated"]
    with Image.open(tmp_path / "images" / "grid-0000.png") as grid:
        assert (grid.width - 2) % math.ceil(math.sqrt(70)) == 0
        assert 0.5 < grid.width / grid.height < 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image, and a mask of its lower half beside it."""
    folder = tmp_path_factory.mktemp("source")
    tiny.render_image(3).save(folder / "box.png")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 8, 16, 16))
    mask.save(folder / "mask.png")
    return folder / "box.png"


def test_inpainting(
    model_dir: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = source.with_name("mask.png")
    shared = ["--model", model_dir, "--prompt", "a red disc", "--num-images", "2"]
    out, rows = tmp_path / "out", tmp_path / "rows"
    assert run_here("generate", *shared, "--image", source, "--mask", mask, "--out", out) == 0
    assert run_here("generate", *shared, "--image", source, "--keep-rows", "1", "--out", rows) == 0
    top = (0, 0, 16, 8)
    for seed in range(2):
        path = out / f"0000-a-red-disc_{seed}.png"
        assert pixels_of(path) == pixels_of(rows / path.name)
        with Image.open(path) as image:
            assert image.crop(top).tobytes() == tiny.render_image(3).crop(top).tobytes()
    facts = facts_of(out / "0000-a-red-disc_0.png")
    assert (facts["image"], facts["mask"], facts["seed"]) == ("box.png", "mask.png", 0)
    assert facts["model"] == model_dir.parent.name
    assert facts_of(rows / "0000-a-red-disc_0.png")["keep_rows"] == 1
    assert (out / "grid-0000.png").is_file()
    capsys.readouterr()
    image = ["--image", source]
    unread, out = ["--model", tmp_path / "never read"], tmp_path / "never made"
    for options, message in (
        ([*unread, "--mask", mask], "image: none given; expected --image with"),
        ([*unread, *image], "inpainting: got none, expected exactly one of mask, "),
        ([*unread, *image, "--mask", mask, "--keep-rows", "1"], "inpainting: got mask and keep_ro"),
        ([*unread, *image, "--mask", tmp_path / "no.png"], "mask: .*No such file"),
        ([*unread, *image, "--keep-rows", "0"], "keep_rows: got 0, expected at least 1"),
        ([*unread, "--image", tmp_path / "no.png", "--keep-rows", "1"], "image: .*No such file"),
        ([*unread, *image, "--rank", "none"], "rank: got none with --image, expected likelihood"),
        ([*image, "--keep-rows", "99"], "keep_rows: got 99, expected 1 to"),
        ([*image, "--keep-fraction", "0.75"], "keep_fraction: something stays after"),
        ([*image, "--keep-rows", "1", "--num-images", "999999999"], "num_images: got 999999999 of"),
    ):
        assert run_here("generate", *shared, *options, "--out", out) == 2
        assert re.match(f"error: {message}", capsys.readouterr().err)
        assert not out.exists()


ONE_PROMPT: Any = {"prompts": ["a red disc"], "num_candidates": 1, "seed": 0, "overrides": {}}


@pytest.mark.parametrize("inpaints", [False, True])
def test_images_are_written_batch_by_batch(
    inpaints: bool, model_dir: Path, source: Path, tmp_path: Path
) -> None:
    counts = {}

    def count(line: str) -> None:
        counts[line] = len(list(tmp_path.glob("0*.png")))

    inpainting = InpaintingFiles(source, keep_rows=1) if inpaints else None
    with log_lines(count):
        generate_to_folder(
            str(model_dir), out=tmp_path, num_images=70, inpainting=inpainting, **ONE_PROMPT
        )
    batches = {"64 of 70 generated": 64, "70 of 70 generated": 70}
    assert counts == {"generating 70 images": 0} | batches


@pytest.mark.parametrize("name", ["num_images", "num_candidates"])
def test_too_many_images_are_refused_at_once(name: str, tmp_path: Path) -> None:
    options = ONE_PROMPT | {"num_images": 1, name: 999_999_999}
    with pytest.raises(UserError, match=f"{name}: got 999999999 (of|for each of) 1 "):
        generate_to_folder(str(tmp_path / "never read"), out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_model_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_name(f"{tmp_path}/boxes/model") == model_name(f"{tmp_path}/boxes/") == "boxes"
    (tmp_path / "boxes").mkdir()
    monkeypatch.chdir(tmp_path / "boxes")
    assert model_name(".") == "boxes"


def test_pipeline_opens_on_the_gpu(model_dir: Path) -> None:
    """Of the machines that have one; elsewhere on the CPU."""
    pipeline = open_pipeline(str(model_dir))
    devices = {weight.device.type for weight in pipeline.vqvae.parameters()}
    assert devices == {pipeline.device.type} == {find_device().type}
    assert len(pipeline("a red disc").images) == 1
