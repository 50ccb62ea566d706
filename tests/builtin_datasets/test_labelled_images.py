"""Images with classes: read, and held out by families."""

import json
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.builtin_datasets.labelled_images import load_digits, load_labelled_images
from dalle_mini_impl.errors import UserError
from tests.reference import tiny


def test_digits_are_scikit_learns_and_split_once() -> None:
    from sklearn.datasets import load_digits as load

    splits = load_digits(held_out_percent=20)
    assert splits.class_names == tuple("0123456789")
    assert len(splits.train.labels) + len(splits.held_out.labels) == 1797
    assert 280 < len(splits.held_out.labels) < 440
    assert len(splits.held_out.labels.unique()) == 10
    true = load()
    for part in (splits.train, splits.held_out):
        for index in range(0, len(part.labels), 97):
            number = int(part.families[index])
            assert int(part.labels[index]) == true.target[number]
            back = torch.from_numpy(true.images[number]) * (255 / 16)
            assert (part.pixels[index, 0].double() - back).abs().max() <= 0.5
    again = load_digits(held_out_percent=20)
    assert again.held_out.families == splits.held_out.families


def test_families_stay_on_one_side(tmp_path: Path) -> None:
    folder = tiny.write_data(tmp_path / "data")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["role"] = f"role {number // 3}" if number % 2 else None
        row["base"] = f"base {number // 4}"
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    options = {"families": ("role", "base"), "image_size": 16, "held_out_percent": 30}
    splits = load_labelled_images(str(folder), label="color", **options)
    assert splits.class_names == tuple(sorted(tiny.COLORS))
    assert set(splits.train.families).isdisjoint(splits.held_out.families)
    assert len(splits.train.labels) + len(splits.held_out.labels) == 30  # of all splits
    assert {name.split()[0] for name in splits.train.families} == {"role", "base"}
    for name, color in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items():
        chosen = splits.train.pixels[splits.train.labels == splits.class_names.index(name)]
        assert len(chosen)
        assert tuple(chosen[0, :, 6, 6].tolist()) == color


def test_a_source_without_the_attribute_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_data(tmp_path / "data")
    message = "data.label: no image has the attribute 'group'; expected"
    options = {"families": (), "image_size": 16, "held_out_percent": 30}
    with pytest.raises(UserError, match=message):
        load_labelled_images(str(folder), label="group", **options)
