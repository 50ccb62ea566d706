"""What ``check_data`` finds in each kind of source, and how its script ends."""

import dataclasses
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from dalle_mini_impl.data.check import DataReport, check_data, report_lines, require_usable
from dalle_mini_impl.errors import UserError
from tests.faults.hostile import add_member, encoded
from tests.reference import tiny
from tests.reference.commands import run_apart, write_presets


def check(
    source: Path, *, pixel_size: tuple[int, int] = (16, 16), text_length: int = 8
) -> DataReport:
    return check_data(str(source), pixel_size=pixel_size, text_length=text_length, vocab_size=300)


def one(report: DataReport, part: str) -> tuple[str, ...]:
    """The paths of the only finding with these words."""
    [paths] = [finding.paths for finding in report.findings if part in finding.what]
    return paths


def distinct(folder: Path) -> Path:
    """Data in which no two images are the same."""
    data = tiny.write_data(folder)
    for number in range(30):
        Image.new("RGB", (16, 16), (number * 8, number, 7)).save(data / f"{number}.png")
    return data


def test_good_data_have_no_problems(tmp_path: Path) -> None:
    report = check(distinct(tmp_path / "data"), text_length=32)
    assert report.split_sizes == {"train": 25, "val": 5}
    assert report.num_captions == {"train": 50, "val": 10}
    assert report.kinds == {"PNG RGB": 30}
    assert len(report.caption_lengths) == 60
    assert not report.has_problems
    assert report.findings == ()
    lines = report_lines(report)
    assert lines[0].endswith("30 of 30 records can be used")
    assert lines[2] == "  val: 5 images, 10 captions"
    report = dataclasses.replace(report, split_sizes={"val": 1}, num_captions={"val": 1})
    assert report_lines(report)[1] == "  val: 1 image, 1 caption"
    counted = [int(line.split()[1]) for line in lines if line.strip().split("-")[0].isdigit()]
    assert sum(counted) == 60


def test_what_training_would_refuse_is_refused(tmp_path: Path) -> None:
    data = distinct(tmp_path / "data")
    for number in range(3):
        (data / f"{number}.png").write_bytes(b"")
    report = check(data)
    require_usable(report, max_bad_fraction=0.1)  # 3 of 30
    (data / "3.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"4 of 30 .* more than data.max_bad_fraction = 0.1"):
        require_usable(check(data), max_bad_fraction=0.1)


def test_everything_that_is_wrong_is_named(tmp_path: Path) -> None:
    data = distinct(tmp_path / "data")
    (data / "1.png").write_bytes((data / "0.png").read_bytes())  # both train
    (data / "11.png").write_bytes((data / "10.png").read_bytes())  # 11 is held out
    (data / "2.png").write_bytes(b"<html>")
    (data / "3.png").unlink()
    Image.new("RGB", (8, 8), "red").save(data / "4.png")
    Image.new("RGB", (90, 20), "blue").save(data / "6.png")
    Image.new("1", (4000, 3000)).save(data / "7.png")
    (data / "8.png").write_bytes(encoded(Image.new("CMYK", (16, 16), (9, 99, 0, 0)), "JPEG"))
    lines = (data / "metadata.jsonl").read_text().splitlines()
    lines[9] = json.dumps({"file_name": "9.png", "text": ""})
    lines[12] = json.dumps({"file_name": "12.png", "text": "many " * 40})
    (data / "metadata.jsonl").write_text("\n".join(lines))
    report = check(data)
    assert report.has_problems
    assert report.num_bad == 3
    assert [path.split(":")[0] for path in one(report, "cannot be read")] == ["2.png"]
    assert [path.split(":")[0] for path in one(report, "is missing")] == ["3.png", "9.png"]
    assert one(report, "within a split") == ("0.png = 1.png",)
    assert one(report, "different splits") == ("10.png (train) = 11.png (val)",)
    assert one(report, "tiny") == ("4.png (PNG RGB, 8x8)",)
    assert one(report, "too long") == ("6.png (PNG RGB, 90x20)",)
    assert one(report, "huge") == ("7.png (PNG 1, 4000x3000)",)
    cmyk = "8.png (JPEG CMYK, 16x16)"
    assert set(one(report, "odd format")) == {"7.png (PNG 1, 4000x3000)", cmyk}
    assert one(report, "named as another") == (cmyk,)
    [long] = one(report, "over 8 tokens")
    assert "many many" in long
    text = "\n".join(report_lines(report))
    assert "PROBLEM: 2 not usable, as image or caption is missing" in text
    assert "over 8" in text


def test_cuts_are_those_of_the_models_proportions(tmp_path: Path) -> None:
    sizes = [(48, 32), (32, 48), (32, 32), (200, 32), (45, 32)]
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (number * 40, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a color")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (32, 48), "blue").save(tmp_path / "turned.jpg", exif=turned)  # 48 x 32
    (tmp_path / "turned.txt").write_text("a color")
    for pixel_size, num_cut in (
        ((32, 32), 5),  # all but one
        ((32, 48), 3),  # the high, the square and the long one
        ((48, 32), 5),  # all but the high one
    ):
        report = check(tmp_path, pixel_size=pixel_size)
        assert report.num_cut == num_cut, pixel_size
        assert one(report, "too long") == ("3.png (PNG RGB, 200x32)",)
    assert len(one(check(tmp_path, pixel_size=(120, 32)), "too long")) == 5  # all but the high one
    assert len(one(check(tmp_path, pixel_size=(33, 32)), "tiny: smaller than 33 x 32")) == 5
    assert len(one(check(tmp_path, pixel_size=(32, 46)), "tiny: smaller than 32 x 46")) == 3


@pytest.mark.usefixtures("datasets_cache")
def test_tars_text_files_and_tables_are_checked_too(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [encoded(Image.new("RGB", (16, 16), (20 * n, 9, 9)), "PNG") for n in range(11)]
    pq.write_table(pa.table({"image": files, "text": ["an image"] * 11}), tmp_path / "x.parquet")
    (tmp_path / "beside").mkdir()
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number, file in enumerate(files):
            for name, content in ((f"{number}.png", file), (f"{number}.txt", b"an image")):
                add_member(archive, name, content)
                (tmp_path / "beside" / name).write_bytes(content)
    for name in ("x.tar", "x.parquet", "beside"):
        report = check(tmp_path / name)
        assert sum(report.split_sizes.values()) == 11
        assert report.findings == ()
    assert set(report.split_sizes) == {"train", "val"}  # set apart, as training does


def test_nothing_usable_is_reported_and_no_source_refused(tmp_path: Path) -> None:
    data = distinct(tmp_path / "data")
    for image in data.glob("*.png"):
        image.write_bytes(b"")
    report = check(data)
    assert report.split_sizes == {}
    assert report.num_bad == 30
    with pytest.raises(UserError, match="no folder or file"):
        check(tmp_path / "none")


@pytest.mark.slow
def test_the_exit_code_of_the_script_tells(tmp_path: Path) -> None:
    data = distinct(tmp_path / "data")
    good = run_apart("check_data", "--source", data, "--image-size", "16")
    assert (good.returncode, good.stderr) == (0, "")
    assert "30 of 30 records can be used" in good.stdout
    (data / "1.png").write_bytes(b"")
    problem = "PROBLEM: 1 not usable, as the image cannot be read\n  1.png: empty file (0 bytes)"
    for preset in write_presets(data, tmp_path / "presets"):
        bad = run_apart("check_data", "--config", preset)
        assert (bad.returncode, bad.stderr) == (1, "")
        assert problem in bad.stdout
        assert "pixels in memory: 0.0 MiB (29 of 16 x 16)" in bad.stdout
        assert "3 steps take about" in bad.stdout
        assert ("token table" in bad.stdout) == (preset.stem == "dalle")
    for image in data.glob("*.png"):
        image.write_bytes(b"")
    for arguments in (["--source", data], ["--source", tmp_path / "none"], []):
        error = run_apart("check_data", *arguments)
        assert error.returncode == 2
        assert error.stderr.startswith("error: ")
        assert len(error.stderr.splitlines()) == 1


def test_the_report_is_plain_text(tmp_path: Path) -> None:
    data = distinct(tmp_path / "data")
    image = encoded(Image.new("RGB", (16, 16), "red"), "PNG")
    row = {"file_name": "\x1b[2J.png", "text": "\x1b[31m " * 40, "split": "train"}
    (data / "\x1b[2J.png").write_bytes(image[:40])
    (data / "0.png").write_bytes(image)
    with (data / "metadata.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.write(json.dumps(row | {"file_name": "0.png", "split": "train"}) + "\n")
    assert all(line.isprintable() for line in report_lines(check(data)))
