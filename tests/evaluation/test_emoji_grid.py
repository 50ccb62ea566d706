"""The grid's judge: right about the true images, at chance about shuffled ones."""

import json
from collections.abc import Hashable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.cli.demo import held_out_sheet
from dalle_mini_impl.data.images import image_to_pixels
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.emoji import (
    HeldOutPrompt,
    clock_prompts,
    evaluate_grid,
    grid_prompts,
)
from tests.reference import tiny
from tests.reference.grid_data import CELLS, GENDERS, TONES, reference_images, write_grid_data


def prompts_of(num_roles: int) -> list[HeldOutPrompt]:
    """Every cell of every role as a question."""
    found = []
    for grid in reference_images(num_roles).values():
        truth: dict[Hashable, Tensor] = {c: image_to_pixels(image) for c, image in grid.items()}
        found += [HeldOutPrompt({}, {"cell": truth}, {"cell": cell}) for cell in CELLS]
    return found


def fractions(prompts: list[HeldOutPrompt], generated: list[Tensor]) -> tuple[float, float, float]:
    checks = [q.check(image) for q, image in zip(prompts, generated, strict=True)]
    cell, gender, tone = (
        sum(a[what] for a in checks) / len(checks) for what in ("cell", "gender", "tone")
    )
    return cell, gender, tone


def test_noisy_reference_images_pass() -> None:
    prompts = prompts_of(4)
    assert fractions(prompts, [prompt.reference for prompt in prompts]) == (1.0, 1.0, 1.0)
    dimmed = [0.8 * prompt.reference + 0.2 for prompt in prompts]
    assert fractions(prompts, dimmed) == (1.0, 1.0, 1.0)


def test_the_right_gender_in_the_wrong_tone_counts_as_that() -> None:
    prompts = prompts_of(2)
    cells = CELLS * 2
    wrong_tone = [
        prompt.choices["cell"][gender, TONES[(TONES.index(tone) + 1) % 5]]
        for prompt, (gender, tone) in zip(prompts, cells, strict=True)
    ]
    assert fractions(prompts, wrong_tone) == (0.0, 1.0, 0.0)
    wrong_gender = [
        prompt.choices["cell"][GENDERS[(GENDERS.index(gender) + 1) % 3], tone]
        for prompt, (gender, tone) in zip(prompts, cells, strict=True)
    ]
    assert fractions(prompts, wrong_gender) == (0.0, 0.0, 1.0)


def test_shuffled_images_are_at_chance() -> None:
    prompts = prompts_of(24)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    # Images of other roles: their nearest cell among the role's own fifteen is anyone's guess.
    cell, gender, tone = fractions(prompts, [prompts[index].reference for index in order])
    assert cell == pytest.approx(1 / 15, abs=0.045)
    assert gender == pytest.approx(1 / 3, abs=0.08)
    assert tone == pytest.approx(1 / 5, abs=0.07)


def test_questions_are_the_held_out_cells_and_clocks_of_one_style(tmp_path: Path) -> None:
    data = write_grid_data(tmp_path / "data", styles=("twemoji", "noto"), num_clocks=4)
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    asked = dict.fromkeys(row["file_name"] for row in rows)

    def read(row: object) -> Tensor:
        return torch.full((3, 2, 2), float(list(asked).index(row["file_name"])))  # type: ignore[index]

    cells = grid_prompts(rows, style="noto", read=read)
    assert [prompt.row["hexcode"] for prompt in cells] == [
        "role 0-13", "role 0-14", "role 1-13", "role 1-14",
    ]  # fmt: skip
    for prompt in cells:
        assert prompt.row["style"] == "noto"
        assert set(prompt.choices["style"]) == {"twemoji", "noto"}
        assert prompt.check(prompt.reference) == {
            "cell": True, "gender": True, "tone": True, "style": True,
        }  # fmt: skip
        other = prompt.choices["style"]["twemoji"]
        assert prompt.check(other)["style"] is False
    (clock,) = clock_prompts(rows, style="noto", read=read)
    assert clock.row["hexcode"] == "clock-3"
    assert len(clock.choices["clock"]) == 4
    assert clock.check(clock.reference) == {"clock": True}
    assert clock.check(clock.choices["clock"]["clock-2"]) == {"clock": False}


def test_a_model_is_judged_on_the_held_out_cells_alone(tmp_path: Path) -> None:
    data = write_grid_data(tmp_path / "data")
    pipeline = tiny.build_pipeline()
    report = evaluate_grid(pipeline, data, seed=3, guidance_scale=1.0)
    assert report.num_cells == len(report.generated) == len(report.reference) == 4
    assert report.captions[0] == "medium-dark woman role 0"
    truth = reference_images(2)
    assert report.reference[0].tobytes() == truth["role 0"]["woman", "medium-dark"].tobytes()
    again = pipeline(report.captions, seed=3, guidance_scale=1.0).images
    assert [image.tobytes() for image in again] == [image.tobytes() for image in report.generated]
    prompts = [q for q in prompts_of(2) if q.right["cell"] in CELLS[13:]]
    expected = fractions(prompts, [image_to_pixels(image) for image in report.generated])
    assert (report.grid_accuracy, report.gender_accuracy, report.tone_accuracy) == expected
    assert held_out_sheet(report).width > 4 * tiny.SIZE


def test_a_folder_without_a_grid_is_named(tmp_path: Path) -> None:
    pipeline = tiny.build_pipeline()
    with pytest.raises(UserError, match=r"data: no .*metadata.jsonl; expected the folder"):
        evaluate_grid(pipeline, tmp_path)
    data = write_grid_data(tmp_path / "data", held_out=False)
    with pytest.raises(UserError, match="no held-out grid cells"):
        evaluate_grid(pipeline, data)
    for line in ("{", '{"style": "twemoji", "role": "cook", "gender": "man"}'):
        (data / "metadata.jsonl").write_text(line)
        with pytest.raises(UserError, match=r"data: .*; expected the folder that prepare_emoji.py"):
            evaluate_grid(pipeline, data)
