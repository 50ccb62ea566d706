"""Images as people have them: what popular tools write is read, or refused with its remedy."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dalle_mini_impl.data.check import check_data
from dalle_mini_impl.data.pairs import ReadOptions, open_all_splits, open_pairs
from dalle_mini_impl.errors import UserError
from tests.data.test_pairs import image_row, reasons, write_metadata, write_parquet, write_tar
from tests.faults.hostile import png_bytes


def write_files(folder: Path, files: dict[str, str | None]) -> None:
    """Write texts, and an image for each name without one."""
    for shade, (name, text) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(shade) if text is None else text.encode())


def captions_of(source: Path, **options: Any) -> dict[str, tuple[str, ...]]:
    pairs = open_pairs(str(source), options=ReadOptions(**options))
    return {pair.path: pair.captions for pair in pairs}


# Captions


@pytest.mark.parametrize("word", ["nan", "None", "null", " NaN\n", "NULL"])
def test_a_word_for_nothing_is_no_caption(tmp_path: Path, word: str) -> None:
    write_files(tmp_path / "beside", {"a.png": None, "a.txt": word, "b.png": None, "b.txt": "x"})
    rows = [{"file_name": "a.png", "text": word}, {"file_name": "b.png", "text": [word, "x"]}]
    (tmp_path / "rows").mkdir()
    write_metadata(tmp_path / "rows", rows)
    write_tar(tmp_path / "x.tar", {f"{n}.png": png_bytes() for n in "ab"} | {"b.txt": b"x"})
    for name, key in (("beside", "a.png"), ("rows", "a.png"), ("x.tar", "x.tar!a.png")):
        source = tmp_path / name
        assert [*captions_of(source).values()] == [("x",)]
        [reason] = reasons(open_pairs(str(source))).values()
        report = check_data(str(source), pixel_size=(4, 4), text_length=8, vocab_size=300)
        [finding] = [each for each in report.findings if "caption is missing" in each.what]
        assert finding.is_problem
        assert finding.paths == (f"{key}: {reason}",)
    assert reasons(open_pairs(str(tmp_path / "rows")))["a.png"] == (
        f"no caption: text is {word.strip()!r}"
    )


def test_a_longer_caption_may_hold_such_a_word(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": None, "a.txt": "none of the cats\nnan bread"})
    assert captions_of(tmp_path) == {"a.png": ("none of the cats", "nan bread")}


def test_other_names_of_caption_files(tmp_path: Path) -> None:
    write_files(tmp_path, {"cat.png": None, "cat.caption": "a cat", "dog.png": None})
    write_files(tmp_path, {"dog.png.txt": "a dog", "cow.png": None, "cow.txt": "cow, brown"})
    write_files(tmp_path, {"cow.caption": "a brown cow", "owl.PNG": None, "owl.PNG.Caption": "owl"})
    pairs = open_pairs(str(tmp_path))
    assert captions_of(tmp_path) == {
        "cat.png": ("a cat",),
        "cow.png": ("cow, brown", "a brown cow"),
        "dog.png": ("a dog",),
        "owl.PNG": ("owl",),
    }
    assert pairs.skipped == pairs.notes == []


def test_texts_without_an_image_are_a_note(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": None, "a.txt": "x", "README.txt": "My data", "b.gif": "GIF89a"})
    write_files(tmp_path, {"sub/classes.txt": "cat\ndog", "LICENSE.txt": "MIT"})
    pairs = open_pairs(str(tmp_path))
    assert pairs.skipped == []
    assert pairs.num_records == 1
    report = check_data(str(tmp_path), pixel_size=(4, 4), text_length=8, vocab_size=300)
    texts, other = [each for each in report.findings if not each.is_problem]
    assert texts.what == "text files without an image of the same name beside them, left out"
    assert texts.paths == ("LICENSE.txt", "README.txt", "sub/classes.txt")
    assert other.paths == ("b.gif",)
    assert report.num_bad == 0


# Captions from names


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("red cup 03.jpg", "red cup"),
        ("red_cup-03.jpg", "red cup"),
        ("red-cup (2).jpg", "red cup"),
        ("blue t-shirt.jpg", "blue t-shirt"),
        ("sub/빨간 컵1.jpg", "빨간 컵"),
        ("x.tar!a.b/red cup.jpg", "red cup"),
    ],
)
def test_captions_from_file_names(name: str, caption: str) -> None:
    from dalle_mini_impl.data.readers.captions import caption_of_path

    assert caption_of_path(name, "file_name") == caption


def test_captions_are_taken_from_names_where_asked(tmp_path: Path) -> None:
    write_files(tmp_path, {"red cup/001.png": None, "red cup/001.txt": "other", "7.png": None})
    write_files(tmp_path, {"10_blue_cup/blue cup 2.png": None})
    blue, red = "10_blue_cup/blue cup 2.png", "red cup/001.png"
    assert captions_of(tmp_path) == {red: ("other",)}
    assert captions_of(tmp_path, captions_from="file_name") == {blue: ("blue cup",)}
    folders = ReadOptions(captions_from="folder_name")
    pairs = open_pairs(str(tmp_path), options=folders)
    assert {pair.path: pair.captions for pair in pairs} == {blue: ("blue cup",), red: ("red cup",)}
    assert reasons(pairs) == {"7.png": "no caption: its folder name holds no words"}
    write_files(tmp_path / "by split", {"Train/a.png": None, "Train/red cup/b.png": None})
    by_split = captions_of(tmp_path / "by split", captions_from="folder_name")
    assert by_split == {"Train/red cup/b.png": ("red cup",)}
    (tmp_path / "by split").rename(tmp_path / ".hidden")
    text = captions_of(tmp_path, captions_from="text: my  dog")
    assert text == dict.fromkeys(["7.png", blue, red], ("my dog",))


def test_where_no_captions_are_the_remedy_is_named(tmp_path: Path) -> None:
    write_files(tmp_path, {"red cup 1.png": None, "red cup 2.png": None})
    expected = (
        r"2 images have no caption: data\.captions_from .*\(file_name\).*train_vqvae\.py needs"
    )
    with pytest.raises(UserError, match=expected):
        open_pairs(str(tmp_path))
    assert captions_of(tmp_path, needs_captions=False) == {"red cup 1.png": (), "red cup 2.png": ()}


@pytest.mark.usefixtures("datasets_cache")
def test_rows_of_a_table_have_no_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", [{"image": png_bytes()}])
    with pytest.raises(UserError, match=r"data\.captions_from: got file_name, expected null or te"):
        captions_of(tmp_path, captions_from="file_name")
    assert captions_of(tmp_path, captions_from="text:x") == {"row 0": ("x",)}
    assert captions_of(tmp_path / "x.parquet", needs_captions=False) == {"row 0": ()}


@pytest.mark.usefixtures("datasets_cache")
def test_images_alone_beside_a_table_of_facts(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": None})
    write_parquet(tmp_path / "facts.parquet", [{"n": 1}])
    assert captions_of(tmp_path, needs_captions=False) == {"a.png": ()}
    with pytest.raises(UserError, match=r"no column 'image' for images, but \['n'\]"):
        open_pairs(str(tmp_path))


def test_tars_below_images_with_captions_are_a_note(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": None, "a.txt": "x", "old/README.txt": "backup"})
    write_tar(tmp_path / "old" / "0.tar", {"b.png": png_bytes(), "b.txt": b"x"})
    pairs = open_pairs(str(tmp_path))
    assert [pair.path for pair in pairs] == ["a.png"]
    assert "old/0.tar" in {note.path for note in pairs.notes}


# Metadata


def test_metadata_in_each_split_folder(tmp_path: Path) -> None:
    for folder, name in (("train", "24.png"), ("Test", "24.png")):
        (tmp_path / folder).mkdir()
        write_metadata(tmp_path / folder, [{"file_name": name, "text": f"from {folder}", "n": 1}])
    write_files(tmp_path, {"val/a.png": None, "val/a.txt": "beside", "train/README.txt": "x"})
    write_files(tmp_path, {"train/sub/x.png": None, "train/sub/x.txt": "not in the metadata"})
    pairs, splits = open_all_splits(str(tmp_path))
    assert {
        pair.path: (pair.captions, split) for pair, split in zip(pairs, splits, strict=True)
    } == {
        "Test/24.png": (("from Test",), "test"),
        "train/24.png": (("from train",), "train"),
        "val/a.png": (("beside",), "validation"),
    }
    assert pairs[1].attributes == {"n": 1}
    assert pairs.skipped == []
    assert pairs.read_image(0) == (tmp_path / "Test" / "24.png").read_bytes()


def test_images_that_metadata_does_not_name_are_a_note(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": "a"}, {"file_name": "gone.png", "text": "b"}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "more").mkdir()
    for name in ("a.png", "b.png", "more/c.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(png_bytes())
    pairs = open_pairs(str(tmp_path))
    assert [pair.path for pair in pairs] == ["a.png"]
    reason = "images that metadata.jsonl does not name"
    assert [(note.path, note.reason) for note in pairs.notes] == [
        ("b.png", reason),
        ("more/c.jpg", reason),
    ]


def test_metadata_below_does_not_lead_to_its_neighbors(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": None, "sub/x.png": None})
    (tmp_path / "sub" / "metadata.jsonl").write_text('{"file_name": "../a.png", "text": "x"}')
    with pytest.raises(UserError, match=r"sub/metadata\.jsonl, line 1: .* leads out of the folder"):
        open_pairs(str(tmp_path))


def test_metadata_as_csv(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": None, "sub/b.png": None, "c.png": None})
    rows = ["\ufefffile_name,text,split,n", 'a.png,"a cup, red",train,1']
    rows += ['sub/b.png,"two\nlines",val,', "c.png,nan"]
    (tmp_path / "metadata.csv").write_bytes("\r\n".join(rows).encode())
    pairs, splits = open_all_splits(str(tmp_path))
    assert [(pair.path, pair.captions) for pair in pairs] == [
        ("a.png", ("a cup, red",)),
        ("sub/b.png", ("two lines",)),
    ]
    assert splits == ["train", "val"]
    assert pairs[0].attributes == {"split": "train", "n": "1"}
    assert reasons(pairs) == {"c.png": "no caption: text is 'nan'"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name;text\na.png;x\n",
            r"line 2: file_name is None, expected .*; it has 'name;text'; data",
        ),
        ("file_name,text\na.png,a cup, red\n", "line 2: got 1 cells too many, expected those of"),
        ('file_name,text\na.png,"x\n', r"not a CSV file in UTF-8 \(unexpected end of data\)"),
        ("file_name,text\n../a.png,x\n", "line 2: file_name '../a.png' leads out of the folder"),
        (
            f"file_name,text\na.png,{'x' * 2**20}\n",
            r"not a CSV file in UTF-8 \(a line longer",
        ),
    ],
)
def test_csv_that_is_none_is_named(tmp_path: Path, text: str, message: str) -> None:
    write_files(tmp_path, {"a.png": None, "metadata.csv": text})
    with pytest.raises(UserError, match=rf"metadata\.csv(, |: ){message}"):
        open_pairs(str(tmp_path))


def test_metadata_as_parquet(tmp_path: Path) -> None:
    write_files(tmp_path, {"train/a.png": None, "val/b.png": None})
    rows = [{"file_name": f"{split}.png", "text": f"a {split}"} for split in ("train/a", "val/b")]
    write_parquet(tmp_path / "metadata.parquet", [row | {"blob": b"x"} for row in rows])
    pairs, splits = open_all_splits(str(tmp_path))
    assert [(pair.path, pair.captions, pair.attributes) for pair in pairs] == [
        ("train/a.png", ("a train/a",), {}),
        ("val/b.png", ("a val/b",), {}),
    ]
    assert splits == ["train", "validation"]
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 none")
    with pytest.raises(UserError, match=r"cannot read .*metadata\.parquet as parquet"):
        open_pairs(str(tmp_path))


def test_the_key_image_names_the_file(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": None, "b.png": None})
    row = '{"image": "a.png", "text": "x", "other": "b.png"}'
    (tmp_path / "metadata.jsonl").write_text(row)
    [pair] = open_pairs(str(tmp_path))
    assert (pair.path, pair.captions, pair.attributes) == ("a.png", ("x",), {"other": "b.png"})
    assert captions_of(tmp_path, image_column="other") == {"b.png": ("x",)}


def test_two_ways_to_write_a_name_are_one_image(tmp_path: Path) -> None:
    rows = [{"file_name": name, "text": name} for name in ("sub/a.png", "./sub/a.png")]
    rows += [{"file_name": "sub//./a.png", "text": "z"}]
    write_metadata(tmp_path, rows)
    assert captions_of(tmp_path) == {"sub/a.png": ("sub/a.png", "./sub/a.png", "z")}
    write_metadata(tmp_path, [{**rows[0], "split": "train"}, {**rows[1], "split": "val"}])
    with pytest.raises(UserError, match=r"sub/a\.png is in split 'val', but in 'train' above"):
        open_pairs(str(tmp_path))


def test_backslashes_of_windows_are_folders(tmp_path: Path) -> None:
    write_files(tmp_path, {"sub/a.png": None})
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "sub\\a.png", "text": "x"}))
    assert captions_of(tmp_path) == {"sub/a.png": ("x",)}


# What is named with its remedy


def array(length: int) -> str:
    return json.dumps([{"file_name": "a.png", "text": "x"}] * length)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metadata.jsonl",
            array(2),
            "line 1: a JSON array, expected an object .* on each line; ren",
        ),
        ("metadata.jsonl", array(40_000), "line 1: a JSON array, expected an object"),
        ("metadata.jsonl", "[\n{}\n]", "line 1: a JSON array, expected an object"),
        ("metadata1000.jsonl", "{}", r"metadata1000\.jsonl: .* rename it to metadata\.jsonl"),
        ("captions.json", array(2), r"captions\.json: .* write one object per line: python -c"),
        ("captions.csv", "a,b", r"captions\.csv: .* rename it to metadata\.csv"),
        ("data-0.arrow", "", r"data-0\.arrow: write parquet: python -c 'import datasets"),
        ("images.tar.gz", "", r"images\.tar\.gz: unpack it first"),
    ],
)
def test_what_is_close_to_a_form_is_named(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    write_files(tmp_path, {"a.png": None, name: text})
    with pytest.raises(UserError, match=message) as caught:
        open_pairs(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_remedy_for_an_array_works(tmp_path: Path) -> None:
    import re
    import subprocess
    import sys

    write_files(tmp_path, {"a.png": None, "metadata.jsonl": array(2)})
    with pytest.raises(UserError) as caught:
        open_pairs(str(tmp_path))
    [command] = re.findall(r"python (-c .*)", str(caught.value))
    (tmp_path / "metadata.jsonl").rename(tmp_path / "old.json")
    subprocess.run(f"{sys.executable} {command}", shell=True, cwd=tmp_path, check=True)
    assert captions_of(tmp_path) == {"a.png": ("x",)}


def test_images_in_a_zip_are_named(tmp_path: Path) -> None:
    write_files(tmp_path, {"metadata.jsonl": '{"file_name": "a.png", "text": "x"}'})
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.png", png_bytes())
    expected = r"a\.png: the image file is missing.*images\.zip: unpack it first: python -m zipfile"
    with pytest.raises(UserError, match=expected):
        open_pairs(str(tmp_path))
    with pytest.raises(UserError, match=r"images\.zip is no folder, .*: unpack it first"):
        open_pairs(str(tmp_path / "images.zip"))
    with pytest.raises(UserError, match=r"is no folder, .*; give the folder that it lies in"):
        open_pairs(str(tmp_path / "metadata.jsonl"))


# WebDataset


def test_names_with_dots_are_one_sample(tmp_path: Path) -> None:
    members = {"s.input.png": png_bytes(1), "s.outputs.txt": b"a cup", "s.json": b'{"n": 1}'}
    members |= {"d/v1.png": png_bytes(2), "d/v1.png.txt": b"a dog", "c.jpg": png_bytes(3)}
    write_tar(tmp_path / "x.tar", members | {"c.caption": b"a cat"})
    pairs = open_pairs(str(tmp_path / "x.tar"))
    assert {pair.path: pair.captions for pair in pairs} == {
        "x.tar!s.input.png": ("a cup",),
        "x.tar!d/v1.png": ("a dog",),
        "x.tar!c.jpg": ("a cat",),
    }
    assert pairs[0].attributes == {"n": 1}
    assert pairs.read_image(0) == png_bytes(1)
    assert pairs.skipped == []


def test_dotted_names_of_several_images_stay_apart(tmp_path: Path) -> None:
    members = {f"photo.{n}.{end}": data for n in (1, 2) for end, data in (("png", png_bytes(n)),)}
    texts = {"photo.1.txt": b"one", "photo.2.txt": b"two", "photo.3.txt": b"three"}
    write_tar(tmp_path / "x.tar", members | texts)
    assert captions_of(tmp_path) == {"x.tar!photo.1.png": ("one",), "x.tar!photo.2.png": ("two",)}
    [reason] = reasons(open_pairs(str(tmp_path))).values()
    assert reason.startswith("no image for this key (the name up to its last dot, or to its first;")


def test_a_text_too_many_is_not_given_to_another_image(tmp_path: Path) -> None:
    members = {"photo.1.png": png_bytes(), "photo.1.txt": b"one", "photo.2.txt": b"two"}
    write_tar(tmp_path / "x.tar", members)
    assert captions_of(tmp_path) == {"x.tar!photo.1.png": ("one",)}
    assert list(reasons(open_pairs(str(tmp_path)))) == ["x.tar!photo.2"]


def test_of_several_images_and_texts_the_options_choose(tmp_path: Path) -> None:
    images = {f"s.{name}.png": png_bytes(n) for n, name in enumerate(("input", "target"))}
    texts = {"s.prompt.txt": b"a cup", "s.negative.txt": b"blurred"}
    write_tar(tmp_path / "x.tar", images | texts)
    with pytest.raises(UserError, match=r"data\.image_column and data\.caption_columns choose"):
        open_pairs(str(tmp_path))
    options = {"image_column": "target.png", "caption_columns": ("prompt",)}
    assert captions_of(tmp_path, **options) == {"x.tar!s.target.png": ("a cup",)}


# Tables


@pytest.mark.usefixtures("datasets_cache")
def test_parquet_of_img2dataset(tmp_path: Path) -> None:
    facts = {"url": "http://x", "status": "success", "error_message": None, "width": 6}
    rows = [{"key": f"{n:09d}", "jpg": png_bytes(n), "caption": f"image {n}"} for n in range(2)]
    failed = {
        "key": "2",
        "jpg": None,
        "caption": "image 2",
        **facts,
        "status": "failed_to_download",
    }
    write_parquet(tmp_path / "00000.parquet", [*(row | facts for row in rows), failed])
    pairs = open_pairs(str(tmp_path))
    assert [pair.captions for pair in pairs] == [("image 0",), ("image 1",)]
    assert [pairs.read_image(n) for n in range(2)] == [png_bytes(0), png_bytes(1)]
    assert pairs[0].attributes == {"key": "000000000", **facts}
    assert reasons(pairs) == {"row 2": "no image in column jpg (status failed_to_download)"}


@pytest.mark.usefixtures("datasets_cache")
def test_columns_of_other_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", [{"img": png_bytes(1), "prompt": "a cup"}])
    with pytest.raises(UserError, match=r"no column 'image' .*; data\.image_column names another"):
        open_pairs(str(tmp_path))
    with pytest.raises(
        UserError, match=r"none of the columns .*; data\.caption_columns names othe"
    ):
        open_pairs(str(tmp_path), options=ReadOptions(image_column="img"))
    options = ReadOptions(image_column="img", caption_columns=("prompt",))
    pairs = open_pairs(str(tmp_path), options=options)
    assert (pairs[0].captions, pairs[0].attributes) == (("a cup",), {})
    assert pairs.read_image(0) == png_bytes(1)


@pytest.mark.usefixtures("datasets_cache")
def test_addresses_of_images_are_sent_to_img2dataset(tmp_path: Path) -> None:
    write_parquet(tmp_path / "laion.parquet", [{"URL": "http://x/a.jpg", "TEXT": "a cup"}])
    expected = (
        r"URL holds addresses, expected images; .*: img2dataset --url_list .*laion\.parquet "
        "--input_format parquet --url_col URL --caption_col TEXT --output_format webdataset"
    )
    with pytest.raises(UserError, match=expected):
        open_pairs(str(tmp_path))


@pytest.mark.usefixtures("datasets_cache")
def test_suffixes_in_any_case(tmp_path: Path) -> None:
    write_parquet(tmp_path / "p" / "a.PARQUET", [image_row(1, "x")])
    (tmp_path / "t").mkdir()
    write_tar(tmp_path / "t" / "a.TAR", {"a.PNG": png_bytes(2), "a.TXT": b"y"})
    for source in ("p", "p/a.PARQUET"):
        assert captions_of(tmp_path / source) == {"row 0": ("x",)}
    for source in ("t", "t/a.TAR"):
        assert captions_of(tmp_path / source) == {"a.TAR!a.PNG": ("y",)}
