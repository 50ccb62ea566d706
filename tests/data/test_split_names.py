"""Splits by the names of folders, tars and parquet files: the words of ``datasets`` alone."""

from pathlib import Path
from typing import Any

import pytest

from dalle_mini_impl.data.pairs import Pairs, ReadOptions, open_all_splits, open_pairs
from dalle_mini_impl.data.readers.split_names import split_in_name
from dalle_mini_impl.errors import UserError
from tests.data.test_pairs import image_row, keys, reasons, write_parquet, write_tar
from tests.faults.hostile import png_bytes

VALIDATION, TEST = "validation", "test"


def write_images(folder: Path, names: list[str]) -> None:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png_bytes(shade))
        (folder / name).with_suffix(".txt").write_text(f"image {name}")


def splits_of(source: Path, **options: Any) -> dict[str, str]:
    pairs, splits = open_all_splits(str(source), options=ReadOptions(**options))
    return dict(zip(keys(pairs), splits, strict=True))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((word, "train") for word in ("train", "Training", "TRAIN", "train2017", "my-train_01")),
        *(
            (word, VALIDATION)
            for word in ("validation", "valid", "Val", "dev", "coco_val", "val.2")
        ),
        *((word, TEST) for word in ("test", "Testing", "eval", "EVALUATION", "1-test", "test (2)")),
        *(
            (word, None)
            for word in ("trains", "trainval", "contest", "latest", "train_val", "0000")
        ),
        ("train사진", None),
    ],
)
def test_a_split_is_a_word_of_its_own(name: str, split: str | None) -> None:
    assert split_in_name(name) == split


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("train", "val", "test"), ("Training", "dev", "EVAL"), ("coco_train", "coco_val", "Test2")],
)
@pytest.mark.parametrize("above", ["", "images/"])
def test_split_folders(tmp_path: Path, train: str, val: str, test: str, above: str) -> None:
    names = {f"{above}{train}/photo of a test.png": "train", f"{above}{train}/b.png": "train"}
    names |= {f"{above}{val}/sub/a.png": VALIDATION, f"{above}{test}/train.png": TEST}
    write_images(tmp_path, list(names))
    assert splits_of(tmp_path) == names
    for split in ("val", "validation"):
        assert keys(open_pairs(str(tmp_path), split=split)) == [f"{above}{val}/sub/a.png"]
    with pytest.raises(UserError, match=r"no split 'test_compose', it has test, train, validation"):
        open_pairs(str(tmp_path), split="test_compose")


def test_file_names_of_images_are_no_splits(tmp_path: Path) -> None:
    write_images(tmp_path, ["photo of a train.png", "test.png", "trains/val.png", "x/train/y.png"])
    assert set(splits_of(tmp_path).values()) == {"train"}


def test_one_split_alone_says_nothing(tmp_path: Path) -> None:
    names = [f"train/{thing}/{n}.png" for n in range(6) for thing in ("test tube", "cat")]
    write_images(tmp_path, names)
    assert set(splits_of(tmp_path).values()) == {"train", "val"}  # set apart by a hash


def test_images_outside_of_the_split_folders_are_left_out(tmp_path: Path) -> None:
    write_images(tmp_path, ["train/a.png", "test/b.png", "preview.png", "extra/c.png"])
    assert splits_of(tmp_path) == {"test/b.png": TEST, "train/a.png": "train"}
    outside = "outside of the folders of splits (test, train)"
    said = reasons(open_pairs(str(tmp_path)))
    assert said == {"preview.png": outside, "extra/c.png": outside}


def test_a_split_among_folders_of_things_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, ["bus/a.png", "car/a.png", "crash test/a.png"])
    expected = r"folder names: crash test names a split, but bus, car do not; expected .*; rename"
    with pytest.raises(UserError, match=expected):
        open_pairs(str(tmp_path))
    # Where the folders are the captions, no more than a whole name is a split.
    options = ReadOptions(captions_from="folder_name")
    assert [pair.captions for pair in open_pairs(str(tmp_path), options=options)] == [
        ("bus",),
        ("car",),
        ("crash test",),
    ]


def test_a_field_counts_more_than_a_folder(tmp_path: Path) -> None:
    write_images(tmp_path, ["train/a.png", "test/b.png"])
    rows = '{"file_name": "train/a.png", "text": "x"}\n{"file_name": "test/b.png", "text": "y"'
    (tmp_path / "metadata.jsonl").write_text(rows + "}\n")
    assert splits_of(tmp_path) == {"train/a.png": "train", "test/b.png": TEST}
    (tmp_path / "metadata.jsonl").write_text(rows + ', "split": "Dev"}\n')
    assert splits_of(tmp_path) == {"train/a.png": "train", "test/b.png": "Dev"}
    assert keys(open_pairs(str(tmp_path), split="val")) == ["test/b.png"]


def tar_of(name: str, split: str = "") -> dict[str, bytes]:
    json = b'{"split": "%s"}' % split.encode() if split else b"{}"
    return {f"{name}.png": png_bytes(), f"{name}.txt": name.encode(), f"{name}.json": json}


@pytest.mark.parametrize("form", ["{}-0000.tar", "{}/0000.tar", "data/{}/0000.TAR", "my_{}.tar"])
def test_tars_by_name_and_in_sub_folders(tmp_path: Path, form: str) -> None:
    for split in ("train", "val", "Test"):
        path = tmp_path / form.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tar(path, tar_of(split[0]))
    expected = {"train": "train", "val": VALIDATION, "Test": TEST}
    assert splits_of(tmp_path) == {
        f"{form.format(split)}!{split[0]}.png": name
        for split, name in sorted(expected.items(), key=lambda item: form.format(item[0]))
    }
    assert open_pairs(str(tmp_path), split="val").read_image(0) == png_bytes()


def test_tars_without_words_in_sub_folders_are_found(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0000.tar", tar_of(name))
    assert keys(open_pairs(str(tmp_path))) == ["a/0000.tar!a.png", "b/0000.tar!b.png"]


def test_a_record_says_more_than_the_name_of_its_tar(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", tar_of("a") | tar_of("b", split="extra"))
    write_tar(tmp_path / "val-0.tar", tar_of("c"))
    assert list(splits_of(tmp_path).values()) == ["train", "extra", VALIDATION]


def test_shards_of_which_some_name_a_split_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0000.tar", tar_of("a"))
    write_tar(tmp_path / "val-0000.tar", tar_of("b"))
    expected = r"file names: val-0000\.tar names a split, but 0000\.tar does not; expected .*rename"
    with pytest.raises(UserError, match=expected):
        open_pairs(str(tmp_path))


def read_rows(pairs: Pairs) -> list[bytes]:
    return [pairs.read_image(index) for index in range(len(pairs))]


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize(
    ("other", "split"),
    [("valid", VALIDATION), ("eval", TEST), ("Test", TEST), ("coco_val", VALIDATION)],
)
def test_parquet_by_name(tmp_path: Path, other: str, split: str) -> None:
    write_parquet(tmp_path / "train.parquet", [image_row(0, "a"), image_row(1, "b")])
    write_parquet(tmp_path / f"{other}.PARQUET", [image_row(2, "c")])
    expected = {"train row 0": "train", "train row 1": "train", f"{split} row 0": split}
    assert splits_of(tmp_path) == expected
    assert read_rows(open_pairs(str(tmp_path), split=split)) == [png_bytes(2)]
    write_parquet(tmp_path / "images.parquet", [image_row(3, "d")])
    with pytest.raises(UserError, match=r"names a split, but images\.parquet does not"):
        open_pairs(str(tmp_path))
