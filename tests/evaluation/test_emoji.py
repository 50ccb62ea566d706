"""The emoji's section: full marks for the true images, chance for shuffled ones."""

from pathlib import Path

import pytest
import torch

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.emoji import held_out_prompts, measure_emoji
from dalle_mini_impl.evaluation.report import CEILING, FLOOR
from dalle_mini_impl.evaluation.samples import read_data, to_floats
from tests.reference import tiny
from tests.reference.grid_data import write_grid_data


def test_reference_images_score_full_and_shuffled_do_not(tmp_path: Path) -> None:
    folder = write_grid_data(
        tmp_path / "data", styles=("twemoji", "noto"), num_roles=20, num_clocks=4
    )
    data = read_data(str(folder), tiny.build_vqvae())
    assert data.kind == "emoji"
    prompts, expected = held_out_prompts(data, (), max_samples=512)
    assert len(prompts) == len(expected) == 2 * (40 + 1)
    for prompt, image in zip(prompts, to_floats(expected.pixels), strict=True):
        assert torch.equal(prompt.reference, image)
    black = torch.zeros_like(expected.pixels)
    generated = {"one image": expected.pixels, "best of 2": black}
    section = measure_emoji(prompts, expected.captions, generated, expected.pixels, seed=0)
    for way in ("one image", CEILING):
        for style in ("twemoji", "noto", "all styles"):
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
    folder = write_grid_data(tmp_path / "data", styles=("twemoji", "noto"), num_clocks=3)
    data = read_data(str(folder), tiny.build_vqvae(), language="ko")
    prompts, expected = held_out_prompts(data, ("noto",), max_samples=2)
    assert {prompt.row["style"] for prompt in prompts} == {"noto"}
    assert len(prompts) == 2 + 1
    assert expected.captions[0].endswith("이모지")
    with pytest.raises(UserError, match="style: got 'apple', expected one of twemoji, noto"):
        read_data(str(folder), tiny.build_vqvae(), styles=("apple",))


def test_emoji_of_which_no_cell_was_held_out_are_refused(tmp_path: Path) -> None:
    folder = write_grid_data(tmp_path / "data", held_out=False, num_clocks=3)
    data = read_data(str(folder), tiny.build_vqvae())
    with pytest.raises(UserError, match="no held-out grid cells"):
        held_out_prompts(data, (), max_samples=2)
