"""Composition on scenes: right about reference images, at chance about shuffled captions."""

from pathlib import Path

from dalle_mini_impl.builtin_datasets.scenes.captions import prepare_scenes
from dalle_mini_impl.evaluation.facts import WHOLE, measure_facts
from dalle_mini_impl.evaluation.report import CEILING, FLOOR
from dalle_mini_impl.evaluation.samples import read_data
from dalle_mini_impl.evaluation.scenes import SCENES
from tests.reference import tiny


def test_section_has_the_tasks_with_ceiling_and_floor(tmp_path: Path) -> None:
    splits = ("test_colors", "test_attribution", "test_position")
    prepare_scenes(tmp_path / "data", counts={"train": 2, **dict.fromkeys(splits, 6)})
    data = read_data(str(tmp_path / "data"), tiny.build_vqvae(image_size=64))
    assert data.kind == "scenes"
    reference = data.held_out_samples
    ways = {"one image": reference.pixels, "best of 4": reference.pixels.flip(0)}
    section = measure_facts(SCENES, reference, ways, reference.pixels, seed=0)
    for split in splits:
        found = section.figures[split]
        assert list(found) == ["one image", "best of 4", CEILING, FLOOR]
        assert found["one image"][WHOLE].value == 1.0
        assert found[CEILING] == found["one image"]
        assert found["best of 4"][WHOLE].value == found[FLOOR][WHOLE].value == 0.0
    stated = {"test_colors": "color", "test_attribution": "object", "test_position": "position"}
    for split, topic in stated.items():
        assert section.figures[split]["one image"][topic].value == 1.0
