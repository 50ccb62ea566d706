"""Fault tests 12 and 13: disks that are full, folders that cannot be written to."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.checkpoint import load_checkpoint, save_checkpoint
from dalle_mini_impl.training.run import save_config
from tests.reference import tiny
from tests.reference.log_lines import log_lines
from tests.reference.processes import Script, run_script
from tests.reference.runs import newest, read_files

PAGE = 4096
NOBODY = 65534


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory, of a chosen size or read-only."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("no right to mount; tests/training/test_checkpoint.py limits the file size")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, *, leave: int = 0) -> None:
    """Write a file until so many bytes are left."""
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(PAGE))
    size = (disk / "filler").stat().st_size // PAGE * PAGE
    os.truncate(disk / "filler", max(0, size - leave))


def save_step(root: Path, step: int) -> None:
    """Save a checkpoint of about 30 pages in several files."""
    weights = {"weight": torch.full((5000,), float(step))}
    tensors = dict.fromkeys(("model", "average", "opt"), weights)
    save_checkpoint(root, step, tensors=tensors, state={"long": [step] * 9000})


def test_a_disk_that_is_full_at_any_write(tmp_path: Path) -> None:
    failed = succeeded = 0
    with mounted(tmp_path / "disk", "size=640k") as disk:
        root = disk / "checkpoints"
        for step in (1, 2):
            save_step(root, step)
        for pages in range(60):
            fill(disk, leave=pages * PAGE)
            try:
                save_step(root, 3)
            except UserError as error:
                failed += 1
                message = str(error)
                assert "cannot write the checkpoint of step 3" in message
                assert "No space left on device" in message
                assert str(root) in message
                names = sorted(path.name for path in root.iterdir())
                assert names == ["step-00000001", "step-00000002"]
                for name in names:
                    load_checkpoint(root / name)
            else:
                succeeded += 1
                assert newest(disk).step == 3
                shutil.rmtree(root)
                (disk / "filler").unlink()
                for step in (1, 2):
                    save_step(root, step)
            (disk / "filler").unlink(missing_ok=True)
    assert failed > 20
    assert succeeded > 3


@pytest.mark.slow
def test_a_run_resumes_when_a_full_disk_has_room(data: Path, tmp_path: Path) -> None:
    tiny.train(tiny.vqvae_run(data, tmp_path / "straight"))
    with mounted(tmp_path / "disk", "size=8m") as disk:
        config = tiny.vqvae_run(data, disk / "run", evaluate_every_steps=1, sample_every_steps=1)

        def show(line: str) -> None:
            if "step 4 " in line:
                fill(disk)

        expected = "cannot write the checkpoint of step 6"
        with log_lines(show), pytest.raises(UserError, match=expected):
            tiny.train(config)
        assert newest(disk / "run").step == 3
        assert not (disk / "run" / "model").exists()
        (disk / "filler").unlink()
        tiny.train(config, resume="latest")
        assert read_files(tmp_path / "straight" / "model") == read_files(disk / "run" / "model")


@pytest.mark.slow
def test_a_model_folder_that_does_not_fit_is_one_line(data: Path, tmp_path: Path) -> None:
    """The last checkpoint is written, then the disk is full."""
    with mounted(tmp_path / "disk", "size=8m") as disk:
        config = tiny.vqvae_run(data, disk / "run", checkpoint_every_steps=6)
        save_config(config, tmp_path / "config.yaml")
        (disk / "run").mkdir()
        (disk / "run" / "model").write_text("a file where a folder should be")
        command = ("scripts/train_vqvae.py", "--config", tmp_path / "config.yaml")
        script = Script(*command)
        code, _ = script.finish()
        assert code == 2
        assert len(script.err) == 1
        assert "output_dir: cannot write" in script.err[0]
        assert "the last checkpoint is whole" in script.err[0]
        (disk / "run" / "model").unlink()
        run_script(*command, "--resume", "latest")
        assert (disk / "run" / "model" / "config.json").is_file()


@contextmanager
def without_rights() -> Iterator[Path]:
    """A folder that everybody can read and only root, who we are not for a while, can write to."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        folder.chmod(0o755)
        if os.geteuid() == 0:
            os.seteuid(NOBODY)
        else:
            folder.chmod(0o555)
        yield folder
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_read_only_folder_is_refused_before_reading(tmp_path: Path) -> None:
    with without_rights() as folder:
        for out in (folder, folder / "new", folder / "new" / "run"):
            config = tiny.vqvae_run(Path("no data"), out)
            with pytest.raises(UserError, match=r"output_dir: .*Permission denied; expected"):
                tiny.train(config)


@pytest.mark.parametrize("obstacle", ["checkpoints", ".run.lock", "config.yaml"])
def test_an_obstacle_is_named_before_the_first_step(
    data: Path, tmp_path: Path, obstacle: str
) -> None:
    """A file where a folder should be, and folders where files should be."""
    out = tmp_path / "run"
    out.mkdir()
    (Path.touch if obstacle == "checkpoints" else Path.mkdir)(out / obstacle)
    with log_lines() as shown, pytest.raises(UserError, match="output_dir: ") as caught:
        tiny.train(tiny.vqvae_run(data, out))
    assert "\n" not in str(caught.value)
    assert not any("  step " in line for line in shown)


def test_data_that_may_not_be_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with without_rights() as folder:
        config = tiny.vqvae_run(tmp_path / "data" / "below", folder / "run")
        with pytest.raises(UserError, match=r"data.source: .*Permission denied; expected data"):
            tiny.train(config)


def test_a_read_only_disk_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k,ro") as disk:
        config = tiny.vqvae_run(tmp_path / "no data", disk / "run")
        with pytest.raises(UserError, match=r"output_dir: .*Read-only file system; expected"):
            tiny.train(config)
