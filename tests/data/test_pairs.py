"""Captioned images from folders, tars and tables: the same pairs from each kind of source.

What hostile or damaged sources give is in ``tests/faults/test_data_*.py``.
"""

import datetime
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle_mini_impl.data.images import BadImageError, decode_image, image_to_pixels
from dalle_mini_impl.data.loading import decode_to_fit, load_all_pixels
from dalle_mini_impl.data.pairs import Pairs, ReadOptions, open_all_splits, open_pairs
from dalle_mini_impl.data.splits import held_out_indices
from dalle_mini_impl.errors import UserError
from tests.faults.hostile import add_member, encoded, png_bytes


def write_metadata(folder: Path, rows: list[Any]) -> None:
    """Write metadata.jsonl, and an image for every row that names one that may exist."""
    lines = []
    for index, row in enumerate(rows):
        lines.append(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False))
        name = row.get("file_name") if isinstance(row, dict) else None
        if isinstance(name, str) and "missing" not in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(png_bytes(index))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_images(folder: Path, count: int) -> None:
    write_metadata(folder, [{"file_name": f"{i}.png", "text": "x"} for i in range(count)])


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            add_member(archive, name, data)


def jpeg_bytes(shade: int) -> bytes:
    return encoded(Image.new("RGB", (6, 4), (shade, 10, 20)), "JPEG")


def keys(pairs: Pairs) -> list[str]:
    return [pair.path for pair in pairs]


def reasons(pairs: Pairs) -> dict[str, str]:
    return {record.path: record.reason for record in pairs.skipped}


def read_pixels(pairs: Pairs, index: int, size: int) -> torch.Tensor:
    return image_to_pixels(decode_to_fit(pairs.read_image(index), pairs[index].path, (size, size)))


# Image folders with metadata.jsonl


def test_metadata_folder_gathers_all_captions_and_attributes(tmp_path: Path) -> None:
    write_metadata(
        tmp_path,
        [
            {
                "file_name": "sub/a.png",
                "text": " a  red\nsquare ",
                "texts": ["a red square", "red box", None, ""],
                "text_ko": "빨간 사각형",
                "group": "shape",
                "tones": [1, 2],
                "score": None,
            },
            "",
            {"file_name": "b.png", "caption": "plain"},
        ],
    )
    pairs = open_pairs(str(tmp_path))
    assert keys(pairs) == ["sub/a.png", "b.png"]
    assert pairs[0].captions == ("a red square", "빨간 사각형", "red box")
    assert pairs[0].attributes == {"group": "shape", "tones": [1, 2], "score": None}
    assert pairs[1].captions == ("plain",)
    assert pairs.read_image(0) == png_bytes(0)
    assert pairs.read_image(-1) == png_bytes(2)
    assert pairs.skipped == []
    with pytest.raises(IndexError):
        pairs[2]


def test_lines_of_one_image_are_merged(tmp_path: Path) -> None:
    row = {"file_name": "a.png", "text": "one", "n": 1}
    write_metadata(tmp_path, [row, {"file_name": "a.png", "text": "two", "n": 2, "m": 3}])
    [pair] = open_pairs(str(tmp_path))
    assert pair.captions == ("one", "two")
    assert pair.attributes == {"n": 1, "m": 3}


def test_linked_source_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_images(tmp_path / "folder", 1)
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    assert keys(open_pairs(str(tmp_path / "link"))) == ["0.png"]


FIELDS = st.sampled_from(["file_name", "text", "texts", "split", "x"])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner),
            max_leaves=8,
        ),
        max_size=3,
    )
)
def test_any_json_is_read_or_a_user_error(tmp_path: Path, rows: list[Any]) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes())
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "metadata.jsonl").write_text(text)
    try:
        pairs = open_pairs(str(tmp_path))
    except UserError:
        return
    assert all(pair.captions and all(pair.captions) for pair in pairs)


# Folders with a text file beside each image


def test_sidecar_folder_keeps_equal_names_apart(tmp_path: Path) -> None:
    for folder, shade in [("cats", 1), ("dogs", 2)]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "01.png").write_bytes(png_bytes(shade))
        (tmp_path / folder / "01.txt").write_text(f"one of the {folder}\n\n  a   pet\r\n", "utf-8")
    pairs = open_pairs(str(tmp_path))
    assert keys(pairs) == ["cats/01.png", "dogs/01.png"]
    assert pairs[0].captions == ("one of the cats", "a pet")
    assert pairs[1].captions == ("one of the dogs", "a pet")
    assert pairs.read_image(1) == png_bytes(2)


def test_path_that_is_not_unicode(tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(odd)
    for folder in (odd, str(tmp_path)):
        Path(folder, "a.png").write_bytes(png_bytes())
        Path(folder, "a.txt").write_text("an image")
    pairs = open_pairs(str(tmp_path))
    assert keys(pairs) == ["a.png"]
    assert list(reasons(pairs).values()) == ["its path is not valid Unicode"]


def test_a_system_without_utf8_is_told_the_remedy(tmp_path: Path) -> None:
    for name in ("beside", "metadata"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "그림.png").write_bytes(png_bytes())
    (tmp_path / "beside" / "그림.txt").write_text("x")
    write_metadata(tmp_path / "metadata", [{"file_name": "그림.png", "text": "x"}])
    write_tar(tmp_path / "x.tar", {"그림.png": png_bytes(), "그림.txt": b"x"})
    code = (
        "import sys\n"
        "from dalle_mini_impl.data.pairs import open_pairs\n"
        "for source in sys.argv[1:]:\n"
        "    try:\n"
        "        print(ascii([pair.path for pair in open_pairs(source)]))\n"
        "    except ValueError as error:\n"
        "        print(ascii(str(error)))\n"
        "print('datasets' in sys.modules)\n"
    )
    names = ("beside", "metadata", "x.tar")
    result = subprocess.run(
        [sys.executable, "-c", code, *(str(tmp_path / name) for name in names)],
        env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    beside, metadata, tar, needs_datasets = result.stdout.splitlines()
    assert "not valid Unicode in this system's encoding, ascii; set PYTHONUTF8=1" in beside
    assert beside.index("PYTHONUTF8=1") < beside.index("expected one of")
    assert "metadata.jsonl, line 1: no file is named" in metadata
    assert "set PYTHONUTF8=1" in metadata
    assert tar == ascii(["x.tar!그림.png"])
    assert needs_datasets == "False"  # folders and tars need no Arrow table


def test_sidecar_folder_skips_what_is_incomplete(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    for name in ("good.PNG", "bare.png", "._mac.png"):
        (root / name).write_bytes(png_bytes())
    (root / "good.TXT").write_text("\ufeff한국어", "utf-8")
    (root / "._mac.txt").write_text("x")
    (root / "readme.txt").write_text("no image")
    (root / "x.gif").write_bytes(encoded(Image.new("P", (6, 4)), "GIF"))
    (root / "x.txt").write_text("moves")
    (root / "out.png").symlink_to(tmp_path / "secret.txt")
    (root / "out.txt").write_text("x")
    pairs = open_pairs(str(root))
    assert [(pair.path, pair.captions) for pair in pairs] == [("good.PNG", ("한국어",))]
    assert reasons(pairs) == {
        "bare.png": "no file bare.txt beside it",
        "out.png": "out.png is a link that leads out of the folder",
        "x.txt": "x.gif is there, but its format is not one of .jpg, .jpeg, .png, .webp, .bmp",
    }


# WebDataset tars


def shard(first: int) -> dict[str, bytes]:
    """Three samples as img2dataset writes them."""
    members = {}
    for index in range(first, first + 3):
        caption = f"image\nnumber {index}"
        facts = {"caption": caption, "url": "u", "key": f"{index:09d}", "width": 6}
        members[f"{index:09d}.jpg"] = jpeg_bytes(index)
        members[f"{index:09d}.txt"] = caption.encode()
        members[f"{index:09d}.json"] = json.dumps(facts).encode()
    return members


def test_a_folder_of_tars_gives_random_access(tmp_path: Path) -> None:
    write_tar(tmp_path / "00001.tar", shard(3))
    write_tar(tmp_path / "00000.tar", shard(0))
    (tmp_path / "00000.parquet").write_bytes(b"statistics, not images")
    pairs = open_pairs(str(tmp_path))
    assert keys(pairs) == [f"0000{i // 3}.tar!{i:09d}.jpg" for i in range(6)]
    assert [pair.captions for pair in pairs] == [(f"image number {i}",) for i in range(6)]
    assert pairs[4].attributes == {"url": "u", "key": "000000004", "width": 6}
    for index in (5, 0, 3, 1):
        assert pairs.read_image(index) == jpeg_bytes(index)


def test_a_single_tar_with_text_only_members(tmp_path: Path) -> None:
    members = {"./sub/a.b.png": png_bytes(1), "sub/a.b.txt": b"one\ntwo", "c.txt": b"no image"}
    members |= {"d.png": png_bytes(2), "d.json": b'{"text_ko": "k"}'}
    members |= {"e.gif": b"GIF89a", "e.txt": b"moves"}
    write_tar(tmp_path / "x.tar", members)
    pairs = open_pairs(str(tmp_path / "x.tar"))
    assert [(pair.path, pair.captions) for pair in pairs] == [
        ("x.tar!sub/a.b.png", ("one", "two")),
        ("x.tar!d.png", ("k",)),
    ]
    said = reasons(pairs)
    assert said.pop("x.tar!c").startswith("no image for this key (the name up to its last dot, or")
    assert said == {
        "x.tar!e": "e.gif is there, but its format is not one of .jpg, .jpeg, .png, .webp, .bmp",
    }


@pytest.mark.timeout(20)
def test_a_header_that_points_backwards_does_not_loop(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.png": png_bytes(), "a.txt": b"a", "b.png": png_bytes()})
    data = bytearray((tmp_path / "x.tar").read_bytes())
    header = data[512 * 4 : 512 * 5]
    header[124:136] = (-512 * 3).to_bytes(12, "big", signed=True)  # the next one would be a.txt
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[512 * 4 : 512 * 5] = header
    (tmp_path / "x.tar").write_bytes(data)
    pairs = open_pairs(str(tmp_path))
    assert keys(pairs) == ["x.tar!a.png"]
    assert "x.tar" in reasons(pairs)


# Parquet


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def image_row(shade: int, text: Any, **fields: Any) -> dict[str, Any]:
    return {"image": {"bytes": png_bytes(shade), "path": "/orig.png"}, "text": text} | fields


@pytest.mark.usefixtures("datasets_cache")
def test_parquet_rows_stay_encoded_until_read(tmp_path: Path) -> None:
    rows = [
        image_row(0, "zero", n=1, when=datetime.date(2024, 1, 2)),
        image_row(1, None),
        image_row(2, "two", n=3),
        {"image": {"bytes": None, "path": "own.png"}, "text": "file"},
    ]
    write_parquet(tmp_path / "x.parquet", rows)
    (tmp_path / "own.png").write_bytes(png_bytes(7))
    pairs = open_pairs(str(tmp_path / "x.parquet"))
    assert keys(pairs) == ["row 0", "row 2", "row 3"]
    assert pairs[1].captions == ("two",)
    assert pairs[0].attributes == {"n": 1, "when": "2024-01-02"}
    assert [pairs.read_image(i) for i in range(3)] == [png_bytes(0), png_bytes(2), png_bytes(7)]
    assert set(reasons(pairs)) == {"row 1"}


@pytest.mark.usefixtures("datasets_cache")
def test_parquet_with_plain_bytes_and_other_captions(tmp_path: Path) -> None:
    rows = [{"image": png_bytes(3), "alt": ["a", "b"], "blob": b"\x00"}]
    write_parquet(tmp_path / "x.parquet", rows)
    options = ReadOptions(caption_columns=("alt",))
    pairs, splits = open_all_splits(str(tmp_path), options=options)
    assert keys(open_pairs(str(tmp_path), split="train", options=options)) == ["row 0"]
    assert pairs[0].captions == ("a", "b")
    assert pairs[0].attributes == {}
    assert pairs.read_image(0) == png_bytes(3)
    assert splits == ["train"]


@pytest.mark.usefixtures("datasets_cache")
def test_parquet_with_large_lists_in_a_folder_with_brackets(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "pics [2024] *"
    folder.mkdir()
    texts = pa.array([["a", "b"]], pa.large_list(pa.string()))
    pq.write_table(pa.table({"image": [png_bytes(3)], "texts": texts}), folder / "x.parquet")
    pairs = open_pairs(str(folder))
    assert pairs[0].captions == ("a", "b")
    assert pairs.read_image(0) == png_bytes(3)


@pytest.mark.usefixtures("datasets_cache")
def test_parquet_file_names_tell_the_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [image_row(0, "a"), image_row(1, "b")])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [image_row(2, "c")])
    write_parquet(tmp_path / "validation" / "0000.parquet", [image_row(3, "d")])
    train, val = open_pairs(str(tmp_path), split="train"), open_pairs(str(tmp_path), split="val")
    assert keys(train) == ["train row 0", "train row 1", "train row 2"]
    assert keys(val) == ["validation row 0"]
    assert train.read_image(2) == png_bytes(2)
    assert val.read_image(0) == png_bytes(3)


@pytest.mark.usefixtures("datasets_cache")
def test_parquet_that_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, [image_row(0, "old")])
    assert open_pairs(str(path))[0].captions == ("old",)
    write_parquet(path, [image_row(1, "new")])
    os.utime(path, (1, 1))
    pairs = open_pairs(str(path))
    assert pairs[0].captions == ("new",)
    assert pairs.read_image(0) == png_bytes(1)


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    write_parquet(tmp_path / "x.parquet", [image_row(0, "a")])
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    with pytest.raises(UserError, match=r"its cache is .*file/datasets, HF_HOME names another"):
        open_pairs(str(tmp_path / "x.parquet"))


# What is not there


def test_sources_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^no folder or file {tmp_path}/none$"):
        open_pairs(f"{tmp_path}/none")
    with pytest.raises(UserError, match=r"no captioned images found in .*, expected one of: "):
        open_pairs(str(tmp_path))
    (tmp_path / "a.png").write_bytes(png_bytes())
    with pytest.raises(UserError, match=r"\(a\.png: no file a\.txt beside it"):
        open_pairs(str(tmp_path))
    with pytest.raises(UserError, match=r"a\.png is no folder, \.tar or \.parquet file"):
        open_pairs(str(tmp_path / "a.png"))


def test_a_relative_path_is_not_taken_for_a_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("data/none", "dada/none.tar"):
        with pytest.raises(UserError, match=f"^no folder or file {name}$"):
            open_pairs(name)


@pytest.mark.parametrize(
    ("is_offline", "message"),
    [
        (True, "^no folder or file my/photos here; .*which the Hub did not give: "),
        (False, "^no folder or file my/photos here; taken as the name of .*cannot be reached"),
    ],
)
def test_an_unreachable_hub_name_fails_at_once(
    monkeypatch: pytest.MonkeyPatch, is_offline: bool, message: str
) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", is_offline)
    with pytest.raises(UserError, match=message):
        open_pairs("my/photos")


# Splits


def test_named_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i}.png", "text": "x", "split": s} for i, s in enumerate("aab")]
    write_metadata(tmp_path, [*rows, {"file_name": "3.png", "text": "x"}])
    assert keys(open_pairs(str(tmp_path), split="a")) == ["0.png", "1.png"]
    assert keys(open_pairs(str(tmp_path), split="train")) == ["3.png"]
    assert len(open_pairs(str(tmp_path))) == 4
    with pytest.raises(UserError, match="no split 'val', it has a, b, train"):
        open_pairs(str(tmp_path), split="val")


def test_sources_without_splits_hold_out_the_same_pairs(tmp_path: Path) -> None:
    write_images(tmp_path, 40)
    train = set(keys(open_pairs(str(tmp_path), split="train")))
    val = set(keys(open_pairs(str(tmp_path), split="validation")))
    assert val
    assert train | val == {f"{i}.png" for i in range(40)}
    assert not train & val
    assert set(keys(open_pairs(str(tmp_path), split="val"))) == val
    with pytest.raises(UserError, match="names no splits, so expected split 'train' or 'val'"):
        open_pairs(str(tmp_path), split="test")


def test_small_sets_hold_nothing_out(tmp_path: Path) -> None:
    write_images(tmp_path, 9)
    assert len(open_pairs(str(tmp_path), split="train")) == 9
    with pytest.raises(UserError, match="has 9 pairs; expected at least 10 to hold some"):
        open_pairs(str(tmp_path), split="val")


@given(num=st.integers(0, 200), extra=st.integers(0, 200))
def test_held_out_pairs_stay_when_the_set_grows(num: int, extra: int) -> None:
    paths = [f"{i}.png" for i in range(num + extra)]
    held_out = held_out_indices(paths[:num])
    assert held_out <= set(range(num))
    assert len(held_out) >= (2 if num >= 10 else 0)
    assert bool(held_out) == (num >= 10)
    if len(held_out) > 2:  # all of them fell below the fraction
        assert held_out <= held_out_indices(paths)


def test_held_out_fraction() -> None:
    held_out = held_out_indices([f"{i}.png" for i in range(10_000)])
    assert 430 < len(held_out) < 570
    assert held_out_indices([f"{i}.png" for i in range(12)]) == {11, 6}


# Pixels


@pytest.fixture
def mixed(tmp_path: Path) -> Pairs:
    """Ten images, of which number 3 is cut off and number 7 is a web page."""
    write_images(tmp_path, 10)
    (tmp_path / "3.png").write_bytes(png_bytes()[:48])
    (tmp_path / "7.png").write_bytes(b"<html>")
    return open_pairs(str(tmp_path))


def test_read_pixels_is_decode_resize_and_scale(tmp_path: Path) -> None:
    write_metadata(tmp_path, [{"file_name": "a.png", "text": "x"}])
    pixels = read_pixels(open_pairs(str(tmp_path)), 0, 4)
    assert torch.equal(pixels, image_to_pixels(Image.new("RGB", (4, 4), (0, 10, 20))))


def test_load_all_pixels_leaves_bad_images_out(mixed: Pairs) -> None:
    calls: list[tuple[int, int]] = []
    options = {"pixel_size": (4, 4), "progress": lambda done, total: calls.append((done, total))}
    pixels, kept, bad = load_all_pixels(mixed, max_bad_fraction=0.2, **options)
    assert kept == [0, 1, 2, 4, 5, 6, 8, 9]
    assert pixels.shape == (8, 3, 4, 4)
    assert pixels.dtype == torch.uint8
    assert pixels[:, 0, 0, 0].tolist() == kept  # the shade written into each image
    assert [record.path for record in bad] == ["3.png", "7.png"]
    assert "not an image" in bad[1].reason
    assert calls == [(i, 10) for i in range(1, 11)]


def test_too_many_bad_images_stop_the_load(mixed: Pairs) -> None:
    with pytest.raises(UserError, match=r"2 of the first 8 images \(of 10\).*3\.png: .*7\.png: "):
        load_all_pixels(mixed, pixel_size=(4, 4), max_bad_fraction=0.1)


def test_nothing_but_bad_images_stops_the_load(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="empty file"):
        load_all_pixels(open_pairs(str(tmp_path)), pixel_size=(4, 4), max_bad_fraction=1.0)


def test_image_that_vanishes_or_shrinks_is_bad(tmp_path: Path) -> None:
    folder, tar = tmp_path / "folder", tmp_path / "x.tar"
    folder.mkdir()
    write_metadata(folder, [{"file_name": "a.png", "text": "x"}])
    pairs = open_pairs(str(folder))
    (folder / "a.png").unlink()
    with pytest.raises(BadImageError, match=r"a\.png: cannot be read \(No such file"):
        read_pixels(pairs, 0, 4)
    write_tar(tar, {"a.txt": b"a", "a.png": png_bytes()})
    pairs = open_pairs(str(tar))
    os.truncate(tar, 512 * 3 + 10)
    with pytest.raises(BadImageError, match=r"x\.tar!a\.png: 10 bytes left, expected "):
        read_pixels(pairs, 0, 4)


def test_big_jpegs_keep_their_orientation_and_look(tmp_path: Path) -> None:
    image = Image.linear_gradient("L").resize((640, 480)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("gradient")
    data = (tmp_path / "a.jpg").read_bytes()
    whole = decode_image(data, source="a").resize((16, 16), Image.Resampling.LANCZOS)
    pixels = read_pixels(open_pairs(str(tmp_path)), 0, 16)
    assert pixels[0, 0, 0] > pixels[0, 0, -1]
    assert (pixels - image_to_pixels(whole)).abs().max() < 0.3
