"""Composition on emoji: right about the reference images, at chance about shuffled ones."""

import re
from collections.abc import Hashable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.cli.demo import held_out_sheet
from dalle_mini_impl.data.images import bytes_to_pixels, image_to_pixels
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.emoji import (
    HeldOutPrompt,
    clock_prompts,
    evaluate_grid,
    grid_prompts,
    held_out_prompts,
    measure_emoji,
)
from dalle_mini_impl.evaluation.report import CEILING, FLOOR
from dalle_mini_impl.evaluation.samples import list_data, read_data
from tests.reference import tiny
from tests.reference.grid_data import CELLS, GENDERS, TONES, reference_images, write_grid_data

STYLES = ("twemoji", "noto")


def prompts_of(num_roles: int) -> list[HeldOutPrompt]:
    """A prompt for every cell of every role."""
    prompts = []
    for grid in reference_images(num_roles).values():
        cells: dict[Hashable, Tensor] = {c: image_to_pixels(image) for c, image in grid.items()}
        prompts += [HeldOutPrompt({}, {"cell": cells}, {"cell": cell}) for cell in CELLS]
    return prompts


def fractions(prompts: list[HeldOutPrompt], generated: list[Tensor]) -> list[float]:
    """Accuracy of cell, gender and tone."""
    checks = [prompt.check(image) for prompt, image in zip(prompts, generated, strict=True)]
    return [
        sum(check[what] for check in checks) / len(checks) for what in ("cell", "gender", "tone")
    ]


def test_reference_images_pass_even_dimmed() -> None:
    prompts = prompts_of(4)
    assert fractions(prompts, [prompt.reference for prompt in prompts]) == [1.0, 1.0, 1.0]
    assert fractions(prompts, [0.8 * each.reference + 0.2 for each in prompts]) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("wrong", ["tone", "gender"])
def test_a_wrong_attribute_leaves_the_other_right(wrong: str) -> None:
    prompts, generated = prompts_of(2), []
    for prompt, (gender, tone) in zip(prompts, CELLS * 2, strict=True):
        if wrong == "tone":
            cell = gender, TONES[(TONES.index(tone) + 1) % 5]
        else:
            cell = GENDERS[(GENDERS.index(gender) + 1) % 3], tone
        generated.append(prompt.choices["cell"][cell])
    assert fractions(prompts, generated) == ([0, 1, 0] if wrong == "tone" else [0, 0, 1])


def test_shuffled_images_are_at_chance() -> None:
    prompts = prompts_of(24)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    # Images of other roles: any of the role's own fifteen cells may be the nearest.
    cell, gender, tone = fractions(prompts, [prompts[index].reference for index in order])
    assert cell == pytest.approx(1 / 15, abs=0.045)
    assert gender == pytest.approx(1 / 3, abs=0.08)
    assert tone == pytest.approx(1 / 5, abs=0.07)


def test_prompts_are_held_out_cells_and_clocks_of_one_style(tmp_path: Path) -> None:
    data = write_grid_data(tmp_path / "data", styles=STYLES, num_clocks=4)
    rows = [pair.attributes for pair in list_data(str(data)).pairs]
    order = [(row["hexcode"], row["style"]) for row in rows]

    def read(row: object) -> Tensor:
        return torch.full((3, 2, 2), float(order.index((row["hexcode"], row["style"]))))  # type: ignore[index]

    cells = grid_prompts(rows, style="noto", read=read)
    hexcodes = ["role 0-13", "role 0-14", "role 1-13", "role 1-14"]
    assert [prompt.row["hexcode"] for prompt in cells] == hexcodes
    for prompt in cells:
        assert prompt.row["style"] == "noto"
        assert set(prompt.choices["style"]) == set(STYLES)
        right = {"cell": True, "gender": True, "tone": True, "style": True}
        assert prompt.check(prompt.reference) == right
        assert prompt.check(prompt.choices["style"]["twemoji"])["style"] is False
    (clock,) = clock_prompts(rows, style="noto", read=read)
    assert clock.row["hexcode"] == "clock-3"
    assert len(clock.choices["clock"]) == 4
    assert clock.check(clock.reference) == {"clock": True}
    assert clock.check(clock.choices["clock"]["clock-2"]) == {"clock": False}


def test_section_has_full_marks_for_reference_images(tmp_path: Path) -> None:
    folder = write_grid_data(tmp_path / "data", styles=STYLES, num_roles=20, num_clocks=4)
    data = read_data(str(folder), tiny.build_vqvae())
    assert data.kind == "emoji"
    prompts, reference = held_out_prompts(data, (), max_samples=512)
    assert len(prompts) == len(reference) == 2 * (40 + 1)
    for prompt, image in zip(prompts, bytes_to_pixels(reference.pixels), strict=True):
        assert torch.equal(prompt.reference, image)
    black = torch.zeros_like(reference.pixels)
    generated = {"one image": reference.pixels, "best of 2": black}
    section = measure_emoji(prompts, reference.captions, generated, reference.pixels, seed=0)
    for way in ("one image", CEILING):
        for style in (*STYLES, "all styles"):
            found = section.figures[way][style]
            assert set(found) == {"cell", "gender", "tone", "style", "clock"}
            assert all(estimate.value == 1.0 for estimate in found.values())
    floor = section.figures[FLOOR]["all styles"]
    assert floor["cell"].low <= 1 / 15 <= floor["cell"].high
    assert floor["clock"].value < 1.0
    assert section.figures["best of 2"]["twemoji"]["cell"].value < 0.5
    cells, clocks = section.tables
    assert (len(cells.rows), len(clocks.rows)) == (12, 12)
    assert cells.rows[0][:3] == ("one image, twemoji", "40", "100.0 % (100.0 to 100.0)")
    assert clocks.rows[2][:2] == ("one image, all styles", "2")
    assert set(section.images) == {"held_out_cells", "held_out_clocks", "wrong"}


def test_some_cells_of_one_style_in_korean(tmp_path: Path) -> None:
    folder = write_grid_data(tmp_path / "data", styles=STYLES, num_clocks=3)
    data = read_data(str(folder), tiny.build_vqvae(), language="ko")
    prompts, reference = held_out_prompts(data, ("noto",), max_samples=2)
    assert {prompt.row["style"] for prompt in prompts} == {"noto"}
    assert len(prompts) == 2 + 1
    assert reference.captions[0].endswith("이모지")
    with pytest.raises(UserError, match="style: got 'apple', expected one of twemoji, noto"):
        read_data(str(folder), tiny.build_vqvae(), styles=("apple",))


def test_evaluate_grid_generates_held_out_cells(tmp_path: Path) -> None:
    data = write_grid_data(tmp_path / "data")
    pipeline = tiny.build_pipeline()
    report = evaluate_grid(pipeline, data, seed=3, guidance_scale=1.0)
    assert report.num_cells == len(report.generated) == len(report.reference) == 4
    assert report.captions[0] == "medium-dark woman role 0"
    truth = reference_images(2)
    assert report.reference[0].tobytes() == truth["role 0"]["woman", "medium-dark"].tobytes()
    again = pipeline(report.captions, seed=3, guidance_scale=1.0).images
    assert [image.tobytes() for image in again] == [image.tobytes() for image in report.generated]
    prompts = [prompt for prompt in prompts_of(2) if prompt.labels["cell"] in CELLS[13:]]
    expected = fractions(prompts, [image_to_pixels(image) for image in report.generated])
    assert [report.grid_accuracy, report.gender_accuracy, report.tone_accuracy] == expected
    assert held_out_sheet(report).width > 4 * tiny.SIZE


def test_data_without_held_out_cells_are_refused(tmp_path: Path) -> None:
    pipeline = tiny.build_pipeline()
    no_cells = write_grid_data(tmp_path / "no_cells", held_out=False, num_clocks=3)
    read = read_data(str(no_cells), pipeline.vqvae)
    with pytest.raises(UserError, match="no held-out grid cells"):
        held_out_prompts(read, (), max_samples=2)
    with pytest.raises(UserError, match="no held-out grid cells"):
        evaluate_grid(pipeline, no_cells)
    data = tiny.write_data(tmp_path / "data")
    with pytest.raises(
        UserError, match=re.escape(f"data: {data}: expected the folder that prepare")
    ):
        evaluate_grid(pipeline, data)
    with pytest.raises(UserError, match="data: no folder"):
        evaluate_grid(pipeline, tmp_path / "none")
    (data / "metadata.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"data: .*metadata\.jsonl, line 1"):
        evaluate_grid(pipeline, data)
    damaged = write_grid_data(tmp_path / "damaged")
    (damaged / "twemoji-role 0-0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"data: twemoji-role 0-0\.png: not an image"):
        evaluate_grid(pipeline, damaged)
