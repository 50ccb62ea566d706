"""The grid's judge: right about the true pictures, at chance about shuffled ones."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from dalle_mini_impl.data.emoji import grid_roles
from dalle_mini_impl.data.images import image_to_pixels, pixels_to_images
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.demo import held_out_sheet
from dalle_mini_impl.evaluation.emoji import evaluate_emoji
from dalle_mini_impl.evaluation.emoji_grid import Cell, evaluate_grid, judge_drawings
from tests.reference import tiny

GENDERS = ("person", "man", "woman")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
CELLS = [(gender, tone) for gender in GENDERS for tone in TONES]


def true_pictures(num_roles: int) -> dict[str, dict[Cell, Image.Image]]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for role in range(num_roles):
        noise = torch.rand(15, 3, tiny.SIZE, tiny.SIZE, generator=generator) * 2 - 1
        found[f"role {role}"] = dict(zip(CELLS, pixels_to_images(noise), strict=True))
    return found


def test_the_true_pictures_are_right_even_with_noise_on_them() -> None:
    truth = true_pictures(4)
    places = [(role, cell) for role in truth for cell in CELLS]
    drawn = [truth[role][cell] for role, cell in places]
    assert judge_drawings(drawn, places, truth) == (1.0, 1.0, 1.0)
    dimmed = [image.point(lambda value: 0.8 * value + 30) for image in drawn]
    assert judge_drawings(dimmed, places, truth) == (1.0, 1.0, 1.0)


def test_the_right_gender_in_the_wrong_tone_counts_as_that() -> None:
    truth = true_pictures(2)
    places = [(role, cell) for role in truth for cell in CELLS]
    wrong_tone = [
        truth[role][gender, TONES[(TONES.index(tone) + 1) % 5]] for role, (gender, tone) in places
    ]
    assert judge_drawings(wrong_tone, places, truth) == (0.0, 1.0, 0.0)
    wrong_gender = [
        truth[role][GENDERS[(GENDERS.index(gender) + 1) % 3], tone]
        for role, (gender, tone) in places
    ]
    assert judge_drawings(wrong_gender, places, truth) == (0.0, 0.0, 1.0)


def test_shuffled_pictures_are_at_chance() -> None:
    truth = true_pictures(24)
    places = [(role, cell) for role in truth for cell in CELLS]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0)).tolist()
    # Pictures of other roles: their nearest cell among the role's own fifteen is anyone's guess.
    drawn = [truth[places[index][0]][places[index][1]] for index in order]
    cell, gender, tone = judge_drawings(drawn, places, truth)
    assert cell == pytest.approx(1 / 15, abs=0.045)
    assert gender == pytest.approx(1 / 3, abs=0.08)
    assert tone == pytest.approx(1 / 5, abs=0.07)


def write_grid_data(folder: Path, *, held_out: bool) -> Path:
    """Two roles of 15 cells in the format of prepare_emoji; the last cell of each held out."""
    folder.mkdir()
    rows = []
    for role, cells in true_pictures(2).items():
        for number, (cell, image) in enumerate(cells.items()):
            name = f"{role}-{number}.png"
            image.save(folder / name)
            gender, tone = cell
            caption = f"{tone} {gender} {role}"
            row = {
                "file_name": name,
                "text": caption,
                "text_ko": f"{caption} 이모지",
                "split": "test_compose" if held_out and number >= 13 else "train",
                "style": "twemoji",
                "role": role,
                "gender": gender,
                "skin_tones": [tone],
                "hexcode": name,
            }
            rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_a_model_is_judged_on_the_held_out_cells_alone(tmp_path: Path) -> None:
    data = write_grid_data(tmp_path / "data", held_out=True)
    lines = (data / "metadata.jsonl").read_text().splitlines()
    assert len(grid_roles([json.loads(line) for line in lines])) == 2
    pipeline = tiny.build_pipeline()
    report = evaluate_grid(pipeline, data, seed=3, guidance_scale=1.0)
    assert report.num_cells == len(report.drawn) == len(report.true) == 4
    assert report.captions[0] == "medium-dark woman role 0"
    truth = true_pictures(2)
    assert report.true[0].tobytes() == truth["role 0"]["woman", "medium-dark"].tobytes()
    again = pipeline(report.captions, seed=3, guidance_scale=1.0).images
    assert [image.tobytes() for image in again] == [image.tobytes() for image in report.drawn]
    places = [(role, cell) for role in truth for cell in CELLS[13:]]
    expected = judge_drawings(report.drawn, places, truth)
    shares = (report.grid_accuracy, report.gender_accuracy, report.tone_accuracy)
    assert shares == expected
    assert held_out_sheet(report).width > 4 * tiny.SIZE
    korean = evaluate_grid(pipeline, data, language="ko")
    assert korean.captions[0].endswith("이모지")


def test_a_drawing_is_judged_by_its_style_too(tmp_path: Path) -> None:
    data = write_grid_data(tmp_path / "data", held_out=True)
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for row in list(rows):
        with Image.open(data / row["file_name"]) as image:
            ImageOps.invert(image.convert("RGB")).save(data / f"noto-{row['file_name']}")
        other = {"file_name": f"noto-{row['file_name']}", "style": "noto"}
        rows.append({**row, **other, "text": f"{row['text']}, noto style"})
    (data / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pipeline = tiny.build_pipeline()
    shares = []
    for style, prefix in (("twemoji", ""), ("noto", "noto-")):
        report = evaluate_grid(pipeline, data, seed=1, style=style)
        assert all(text.endswith(", noto style") == bool(prefix) for text in report.captions)
        right = 0
        for drawn, true in zip(report.drawn, report.true, strict=True):
            wanted, other = image_to_pixels(true), -image_to_pixels(true)  # inverted
            pixels = image_to_pixels(drawn)
            right += bool((wanted - pixels).norm() < (other - pixels).norm())
        assert report.style_accuracy == right / 4
        shares.append(report.style_accuracy)
    assert shares != [1, 1]


@pytest.mark.parametrize("language", ["en", "ko"])
def test_all_figures_of_a_model(tmp_path: Path, language: str) -> None:
    data = write_grid_data(tmp_path / "data", held_out=True)
    pipeline = tiny.build_pipeline()
    figures, grid = evaluate_emoji(pipeline, data, language=language, num_candidates=2)
    assert figures["num_cells"] == grid.num_cells == 4
    assert figures["grid_accuracy"] == grid.grid_accuracy
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for name, split in (("held_out", "test_compose"), ("train", "train")):
        nats = []
        for row in rows:
            if row["split"] != split:
                continue
            with Image.open(data / row["file_name"]) as image:
                pixels = image_to_pixels(image.convert("RGB"))
            with torch.no_grad():
                image_ids = pipeline.vqvae.encode_to_token_ids(pixels[None]).flatten(1)
                logits = pipeline.dalle(pipeline.captions.encode([row["text"]]), image_ids).image
            nats.append(torch.nn.functional.cross_entropy(logits[0], image_ids[0]))
        expected = float(torch.stack(nats).mean())
        assert figures[f"{name}_image_nats_per_token"] == pytest.approx(expected, rel=1e-5)


def test_a_folder_without_a_grid_is_named(tmp_path: Path) -> None:
    pipeline = tiny.build_pipeline()
    with pytest.raises(UserError, match=r"data: no .*metadata.jsonl; wanted the folder"):
        evaluate_grid(pipeline, tmp_path)
    data = write_grid_data(tmp_path / "data", held_out=False)
    with pytest.raises(UserError, match="no held-out grid cells"):
        evaluate_grid(pipeline, data)
    for line in ("{", '{"style": "twemoji", "role": "cook", "gender": "man"}'):
        (data / "metadata.jsonl").write_text(line)
        with pytest.raises(UserError, match=r"data: .*; wanted the folder that prepare_emoji.py"):
            evaluate_grid(pipeline, data)
