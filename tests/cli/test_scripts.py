"""The scripts as a user meets them: their own folder, their mistakes, the files that come out."""

import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle_mini_impl.cli.main import run_script
from dalle_mini_impl.training.run import save_config
from tests.reference import tiny

REPOSITORY = Path(__file__).parents[2]


def main_of(name: str) -> Callable[[Sequence[str]], None]:
    """The `main` of a script, which is no module of any package."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run_here(name: str, *arguments: str | Path) -> int:
    """Runs a script in this process; returns its exit code."""
    before = torch.get_float32_matmul_precision()
    try:
        run_script(main_of(name), [str(argument) for argument in arguments])
    except SystemExit as exit_:
        return int(exit_.code or 0)
    finally:
        torch.set_float32_matmul_precision(before)
    return 0


def run_apart(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a script as a user does."""
    return subprocess.run(
        [sys.executable, f"scripts/{name}.py", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(autouse=True)
def no_handlers_left() -> Iterator[None]:
    """A script sets logging up for its process; here the next test has other streams."""
    before = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers[:] = before


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "model"
    tiny.build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "images")


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


def presets(data: Path, out: Path) -> tuple[Path, Path]:
    """Two tiny presets as YAML files."""
    vqvae = tiny.vqvae_run(data, out / "vqvae", max_steps=3)
    dalle = tiny.dalle_run(data, out / "vqvae" / "model", out / "dalle", max_steps=3)
    out.mkdir(exist_ok=True)
    for name, config in (("vqvae", vqvae), ("dalle", dalle)):
        save_config(config, out / f"{name}.yaml")
    return out / "vqvae.yaml", out / "dalle.yaml"


def test_a_users_own_folder_goes_the_whole_road(
    own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    vqvae, dalle = presets(own_folder, out)
    assert run_here("train_vqvae", "--config", vqvae) == 0
    shown = capsys.readouterr().out
    assert re.search(r"skipped 그림 7\.png: .*damaged", shown)
    assert "skipped 더 많은 그림/그림 10.png: no caption: 그림 10.txt is empty" in shown
    assert len(re.findall(r"^skipped ", shown, re.MULTILINE)) == 2
    assert re.search(r"^train: \d+ images from .*my images, 2 skipped$", shown, re.MULTILINE)
    assert re.search(r"100 %  step 3  loss \d\.\d{4}  \d+ tokens/s  ", shown)
    assert f"model folder: {out / 'vqvae' / 'model'}" in shown
    listed = (out / "vqvae" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["path"] for line in listed} == {
        "그림 7.png",
        "더 많은 그림/그림 10.png",
    }

    assert run_here("train_dalle", "--config", dalle, "--text.text_length", "32") == 0
    shown = capsys.readouterr().out
    assert "skipped 그림 7.png" in shown
    cut = re.findall(r"^(\d+) of \d+ captions were longer than 32 tokens", shown, re.MULTILINE)
    assert cut == ["1"]
    counts = [int(n) for n in re.findall(r"^(?:train|val): (\d+) images", shown, re.MULTILINE)]
    assert sum(counts) == 38

    arguments = ["--model", out / "dalle" / "model", "--prompt", "보라색 원", "--num-images", "2"]
    assert run_here("generate", *arguments, "--out", out / "images") == 0
    shown = capsys.readouterr().out
    assert shown.splitlines() == [
        "generation 2 images",
        f"images: {out / 'images'}",
        f"grid: {out / 'images' / 'grid-0000.png'}",
    ]
    names = sorted(path.name for path in (out / "images").iterdir())
    assert names == ["0000-보라색-원_0.png", "0000-보라색-원_1.png", "grid-0000.png"]


def test_image_metadata_and_grid_of_one_call(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "images"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc\n\n  a blue box  \na red disc\n", encoding="utf-8")
    common = ["--model", model_dir, "--out", out]
    assert run_here("generate", *common, "--prompt", "an old one", "--num-images", "3") == 0
    assert (
        run_here(
            "generate",
            *common,
            *("--prompts-file", prompts, "--num-images", "12", "--seed", "5"),
            *("--guidance-scale", "1.5", "--top-k", "9"),
        )
        == 0
    )
    capsys.readouterr()
    assert len(list(out.glob("0000-an-old-one_*.png"))) == 3
    assert len(list(out.glob("0001-a-red-disc_*.png"))) == 12
    assert len(list(out.glob("0002-a-blue-box_*.png"))) == 12
    with Image.open(out / "0002-a-blue-box_16.png") as image:
        assert image.size == (tiny.SIZE, tiny.SIZE)
        facts = json.loads(image.text["dalle_mini_impl"])  # type: ignore[attr-defined]
        pixels = image.tobytes()
    assert (facts["prompt"], facts["seed"]) == ("a blue box", 16)
    assert (model_dir.name, facts["model"]) == ("model", model_dir.parent.name)
    assert (facts["guidance_scale"], facts["top_k"], facts["temperature"]) == (1.5, 9, 1.0)
    again = tmp_path / "again"
    options = ["--seed", str(facts["seed"]), "--num-images", "1", "--top-k", str(facts["top_k"])]
    renamed = shutil.copytree(model_dir, tmp_path / "boxes")
    arguments = ["--model", renamed, "--out", again, "--prompt", facts["prompt"], *options]
    assert run_here("generate", *arguments, "--guidance-scale", "1.5") == 0
    with Image.open(again / "0000-a-blue-box_16.png") as image:
        assert image.tobytes() == pixels
        facts = json.loads(image.text["dalle_mini_impl"])  # type: ignore[attr-defined]
    assert facts["model"] == "boxes"
    # Two rows of twelve, of which the eleventh is seed 15: not in the order of the file names.
    assert {path.name for path in out.glob("grid*")} == {"grid-0000.png", "grid-0001.png"}
    with Image.open(out / "grid-0001.png") as grid:
        columns = grid.width // (grid.height // 2)
        assert columns >= 8
        step = (grid.width - 2) // 12
        cell = grid.crop((2 + 10 * step, 2, 2 + 11 * step - 2, step))
    with Image.open(out / "0001-a-red-disc_15.png") as image:
        expected = image.resize((step - 2, step - 2), Image.Resampling.NEAREST)
    assert cell.tobytes() == expected.tobytes()


def test_many_prompts_show_how_far_they_are(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"disc {number}" for number in range(70)))
    arguments = ["--model", model_dir, "--prompts-file", tmp_path / "prompts.txt"]
    arguments += ["--num-images", "1", "--out", tmp_path / "images"]
    assert run_here("generate", *arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == ["generation 70 images", "64 of 70 generated", "70 of 70 generated"]


BASE = ("--data.source", "DATA", "--output_dir", "OUT")
BAD_INPUT = {
    "unknown key": ("train_vqvae", [*BASE, "--vqvae.colour", "3"], ["vqvae.colour", "--help"]),
    "unknown key in a file": ("train_vqvae", [*BASE, "--config", "ODD"], ["vqvae", "colour"]),
    "no such preset": ("train_vqvae", ["--config", "NONE"], ["config", "NONE"]),
    "a preset that is no YAML": ("train_dalle", ["--config", "PICTURE"], ["config"]),
    "nothing at all": ("train_dalle", [], ["data.source", "vqvae_dir", "output_dir"]),
    "no value": ("train_vqvae", [*BASE, "--training.max_steps"], ["training.max_steps"]),
    "a word for a number": (
        "train_vqvae",
        [*BASE, "--training.max_steps", "many"],
        ["training.max_steps", "many", "int"],
    ),
    "missing folder": (
        "train_vqvae",
        ["--data.source", "NONE", "--output_dir", "OUT"],
        ["data.source", "no folder or file", "NONE"],
    ),
    "no captions": (
        "train_vqvae",
        ["--data.source", "BARE", "--output_dir", "OUT"],
        ["data.source", "no captioned images found", "x.txt beside each x.jpg"],
    ),
    "image size": (
        "train_vqvae",
        [*BASE, "--vqvae.image_size", "63"],
        ["image_size: got 63, expected a multiple of 8"],
    ),
    "image size for the loss": (
        "train_vqvae",
        [*BASE, "--vqvae.image_size", "36", "--vqvae.channels", "[64]"],
        ["vqvae.image_size: got 36, expected a multiple of 8 for the wavelet loss"],
    ),
    "output among the data": (
        "train_vqvae",
        ["--data.source", "DATA", "--output_dir", "INSIDE"],
        ["output_dir: INSIDE lies inside data.source DATA"],
    ),
    "batch size": (
        "train_vqvae",
        ["--config", "VQVAE", "--training.gradient_accumulation_steps", "3"],
        ["training.global_batch_size: got 8, expected a multiple of 3"],
    ),
    "no tokenizer": ("train_dalle", ["--config", "DALLE"], ["vqvae_dir", "train_vqvae.py wrote"]),
    "resume from nowhere": (
        "train_vqvae",
        ["--config", "VQVAE", "--resume", "NONE"],
        ["NONE", "no such folder"],
    ),
    "prompt of spaces": (
        "generate",
        ["--model", "MODEL", "--prompt", "   "],
        ["prompt: got '   ', expected some text"],
    ),
    "no prompt": ("generate", ["--model", "MODEL"], ["--prompt TEXT or --prompts-file FILE"]),
    "no model": ("generate", ["--prompt", "x"], ["--model", "--help"]),
    "no model folder": (
        "generate",
        ["--model", "DATA", "--prompt", "x"],
        ["model: DATA is no model folder", "train_dalle.py wrote"],
    ),
    "seed": ("generate", ["--model", "MODEL", "--prompt", "x", "--seed", "-1"], ["seed: got -1"]),
    "no images": (
        "generate",
        ["--model", "MODEL", "--prompt", "x", "--num-images", "0"],
        ["num_images: got 0, expected at least 1"],
    ),
    "top-p": (
        "generate",
        ["--model", "MODEL", "--prompt", "x", "--top-p", "2"],
        ["top_p: got 2.0, expected above 0 and up to 1"],
    ),
    "a word for a count": (
        "generate",
        ["--model", "MODEL", "--prompt", "x", "--top-k", "many"],
        ["--top-k", "many"],
    ),
    "prompts file": (
        "generate",
        ["--model", "MODEL", "--prompts-file", "NONE"],
        ["prompts-file: NONE: No such file"],
    ),
    "prompts file that is an image": (
        "generate",
        ["--model", "MODEL", "--prompts-file", "PICTURE"],
        ["prompts-file: PICTURE: not UTF-8"],
    ),
    "out is a file": (
        "generate",
        ["--model", "MODEL", "--prompt", "x", "--out", "PICTURE"],
        ["out: PICTURE: File exists; expected a folder"],
    ),
    "output_dir is a file": (
        "train_vqvae",
        ["--data.source", "DATA", "--output_dir", "PICTURE"],
        ["output_dir: PICTURE: File exists; expected a folder"],
    ),
    "a model to measure": ("evaluate", ["--model", "DATA"], ["model: DATA is no model folder"]),
    "data to measure with": (
        "evaluate",
        ["--model", "MODEL", "--data", "BARE", "--out", "OUT"],
        ["data: no captioned images found in BARE"],
    ),
    "a report in a file": (
        "evaluate",
        ["--model", "MODEL", "--data", "DATA", "--out", "PICTURE"],
        ["out: PICTURE: File exists; expected a folder"],
    ),
    "a pass to measure": (
        "evaluate",
        ["--model", "MODEL", "--native", "int4"],
        ["--native: invalid choice: 'int4'", "--help"],
    ),
    "a pass for the page": (
        "app",
        ["--native", "int4"],
        ["--native: invalid choice: 'int4'", "--help"],
    ),
    "unknown option": ("evaluate", ["--model", "MODEL", "--fast"], ["--fast", "--help"]),
    "unknown option of the demo": ("demo", ["--fast"], ["--fast", "--help"]),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, data: Path, model_dir: Path) -> dict[str, str]:
    """What the capital words in `BAD_INPUT` stand for."""
    folder = tmp_path_factory.mktemp("bad")
    bare = folder / "bare"
    bare.mkdir()
    for number in range(12):
        tiny.render_image(number).save(bare / f"{number}.png")
    (folder / "odd.yaml").write_text("vqvae:\n  color: 3\n")
    vqvae, dalle = presets(data, folder / "runs")
    return {
        "DATA": str(data),
        "INSIDE": str(data / "below" / "run"),
        "BARE": str(bare),
        "MODEL": str(model_dir),
        "OUT": str(folder / "out"),
        "NONE": str(folder / "none"),
        "PICTURE": str(bare / "0.png"),
        "ODD": str(folder / "odd.yaml"),
        "VQVAE": str(vqvae),
        "DALLE": str(dalle),
    }


def filled(text: str, places: dict[str, str]) -> str:
    for word, path in places.items():
        text = re.sub(rf"\b{word}\b", lambda _, path=path: path, text)
    return text


def assert_one_line(error: str, expected: Sequence[str], places: dict[str, str]) -> None:
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert "Traceback" not in error
    for part in expected:
        assert filled(part, places) in error


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_that_says_what_to_change(
    case: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    name, arguments, expected = BAD_INPUT[case]
    assert run_here(name, *(places.get(word, word) for word in arguments)) == 2
    assert_one_line(capsys.readouterr().err, expected, places)


def test_a_damaged_model_is_one_line(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = shutil.copytree(model_dir, tmp_path / "model")
    weights = folder / "dalle" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run_here("generate", "--model", folder, "--prompt", "x") == 2
    error = capsys.readouterr().err
    assert_one_line(error, [f"model: {folder} does not load"], {})


@pytest.mark.parametrize("case", ["unknown key", "no captions", "no model folder", "no model"])
def test_bad_input_leaves_a_real_process_with_code_2(case: str, places: dict[str, str]) -> None:
    name, arguments, expected = BAD_INPUT[case]
    result = run_apart(name, *(places.get(word, word) for word in arguments))
    assert result.returncode == 2
    assert result.stdout == ""
    assert_one_line(result.stderr, expected, places)


def test_a_stopped_script_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(arguments: Sequence[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        run_script(stopped, ["--a.b", "two words"], takes_resume=True)
    assert exit_.value.code == 130
    assert capsys.readouterr().err.endswith(" --a.b 'two words' --resume latest\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_stopped_run_goes_on_in_a_new_process(data: Path, tmp_path: Path, name: str) -> None:
    import signal
    import time

    number = signal.Signals[name]
    straight, stopped = (
        tiny.vqvae_run(
            data, tmp_path / run, max_steps=400, log_every_steps=1, checkpoint_every_steps=5
        )
        for run in ("straight", "stopped")
    )
    for config, run in ((straight, "straight"), (stopped, "stopped")):
        save_config(config, tmp_path / f"{run}.yaml")
    assert run_apart("train_vqvae", "--config", tmp_path / "straight.yaml").returncode == 0
    process = subprocess.Popen(
        [sys.executable, "scripts/train_vqvae.py", "--config", tmp_path / "stopped.yaml"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoints = tmp_path / "stopped" / "checkpoints"
    deadline = time.monotonic() + 240
    while not list(checkpoints.glob("step-0000001*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        newest = max(path.name for path in checkpoints.glob("step-*"))
        step = int(newest.removeprefix("step-"))
        assert f"stopped after step {step}, with a checkpoint" in error
        assert "--resume latest" in error
        logged = [row["step"] for row in tiny.read_metrics(tmp_path / "stopped")]
        assert max(logged) == step < 400
    result = run_apart("train_vqvae", "--config", tmp_path / "stopped.yaml", "--resume", "latest")
    assert result.returncode == 0, result.stderr
    assert "resuming at step" in result.stdout
    one, two = (
        (tmp_path / run / "model" / "model.safetensors").read_bytes()
        for run in ("straight", "stopped")
    )
    assert one == two
    assert tiny.losses(tmp_path / "straight") == tiny.losses(tmp_path / "stopped")


@pytest.mark.slow
def test_the_demo_picks_up_where_it_was(tmp_path: Path) -> None:
    """`scripts/demo.py` with budgets of seconds: every step, then nothing twice."""
    presets_dir = tmp_path / "presets"
    presets_dir.mkdir()
    for name in ("vqvae", "dalle"):
        text = (REPOSITORY / "configs" / "demo" / f"{name}.yaml").read_text()
        text = re.sub(r"max_minutes: .*", "max_minutes: 0.05", text)
        (presets_dir / f"{name}.yaml").write_text(text)
    arguments = ["--out", tmp_path / "demo", "--configs", presets_dir]
    first = run_apart("demo", *arguments)
    assert first.returncode == 0, first.stderr
    assert "Traceback" not in first.stderr
    for name in ("prompts.png", "prompts_ko.png", "held_out.png"):
        assert (tmp_path / "demo" / name).is_file()
        assert name in first.stdout
    assert "right skin tone" in first.stdout
    again = run_apart("demo", *arguments)
    assert again.returncode == 0, again.stderr
    assert "training" not in again.stdout
    assert (
        again.stdout.splitlines()[-1].split("]")[1] == first.stdout.splitlines()[-1].split("]")[1]
    )


def test_generate_script_inpaints(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.render_image(3).save(tmp_path / "box.png")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 8, 16, 16))
    mask.save(tmp_path / "mask.png")
    shared = ("--model", model_dir, "--prompt", "a red disc", "--num-images", "2")
    image = ("--image", tmp_path / "box.png")
    out = tmp_path / "out"
    assert run_here("generate", *shared, *image, "--mask", tmp_path / "mask.png", "--out", out) == 0
    generated = [Image.open(out / f"0000-a-red-disc_{seed}.png") for seed in range(2)]
    rows = tmp_path / "rows"
    assert run_here("generate", *shared, *image, "--keep-rows", "1", "--out", rows) == 0
    same = [Image.open(rows / f"0000-a-red-disc_{seed}.png") for seed in range(2)]
    for first, second in zip(generated, same, strict=True):
        assert first.tobytes() == second.tobytes()
        top = (0, 0, 16, 8)
        assert first.crop(top).tobytes() == tiny.render_image(3).crop(top).tobytes()
    facts = json.loads(generated[0].text["dalle_mini_impl"])  # type: ignore[attr-defined]
    assert (facts["image"], facts["mask"], facts["seed"]) == ("box.png", "mask.png", 0)
    assert (out / "grid-0000.png").is_file()
    capsys.readouterr()
    for options, message in (
        (("--mask", tmp_path / "mask.png"), "error: image: none given; expected --image with"),
        (
            image,
            "error: mask: got none of them, expected exactly one of mask, ",
        ),
        (("--image", tmp_path / "no.png", "--keep-rows", "1"), "error: image: .*No such file"),
        ((*image, "--keep-fraction", "0.75"), "error: keep_fraction: something stays after"),
    ):
        assert run_here("generate", *shared, *options, "--out", out) == 2
        assert re.match(message, capsys.readouterr().err)


def test_a_model_with_an_encoder_goes_the_whole_road(
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


def test_caption_script_ranks_and_completes(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.render_image(3).save(tmp_path / "box.png")
    (tmp_path / "list.txt").write_text("\n".join(tiny.CAPTIONS), encoding="utf-8")
    shared = ("--model", model_dir, "--num-tokens", "2", "--num-samples", "3")
    images = ("--images", tmp_path / "box.png", "--top", "12")
    assert run_here("caption", *shared, *images, "--captions-file", tmp_path / "list.txt") == 0
    row = json.loads(capsys.readouterr().out)
    assert row["image"] == str(tmp_path / "box.png")
    assert {entry["caption"] for entry in row["captions"]} == set(tiny.CAPTIONS)
    assert sum(entry["probability"] for entry in row["captions"]) == pytest.approx(1, abs=1e-3)
    nats = [entry["image_nats"] for entry in row["captions"]]
    assert nats == sorted(nats, reverse=True)

    assert run_here("caption", *shared, "--complete", "a red") == 0
    longer = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert 1 <= len(longer) <= 3
    assert all(text.startswith("a red") for text in longer)
    assert run_here("caption", *shared, *images, "--complete", "a red") == 0
    offered = {entry["caption"] for entry in json.loads(capsys.readouterr().out)["captions"]}
    assert {"a red", *longer} <= offered
    assert run_here("caption", *shared, *images) == 2
    assert "caption: none given" in capsys.readouterr().err
    assert run_here("caption", "--model", model_dir) == 2
    assert run_here("caption", *shared, "--complete", "a", "--num-tokens", "0") == 2
    assert run_here("caption", *shared, "--complete", "a", "--num-tokens", "1000") == 2
    assert "num_tokens: got 0, expected at least 1" in capsys.readouterr().err
