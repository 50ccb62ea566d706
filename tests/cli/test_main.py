"""How commands start and end: bad input is one line, signals say how to resume."""

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from dalle_mini_impl.cli.main import COMMANDS, console, run_script
from dalle_mini_impl.config import find_preset
from tests.reference import tiny
from tests.reference.commands import REPOSITORY, run_apart, run_here, run_python, write_presets

# A command line, and parts of its error in order. Capital words are files, folders and options.
BAD_INPUT = {
    "RUN DATA --vqvae.tint 3": "vqvae.tint ... --help",
    "RUN DATA --config ODD": "vqvae.tint",
    "train_vqvae --config NONE": "config ... NONE",
    "train_dalle --config IMAGE": "config",
    "train_dalle": "data.source",
    "RUN DATA --training.max_steps": "training.max_steps",
    "RUN DATA --training.max_steps many": "training.max_steps: got many, expected int",
    "RUN NONE": "data.source: no folder or file NONE",
    "RUN EMPTY": "data.source: no captioned images found ... x.txt beside each x.jpg",
    "check_data --source BARE": "source: no captioned images found ... data.captions_from takes",
    "RUN DATA --vqvae.image_size 63": "image_size: got 63, expected a multiple of 8",
    "RUN DATA --vqvae.image_size 36 --vqvae.channels [64]": "got 36 ... 8 for the wavelet loss",
    "RUN DATA --output_dir INSIDE": "output_dir: INSIDE lies inside data.source DATA",
    "TRAIN --training.gradient_accumulation_steps 3": "batch_size: got 8, expected a multiple of 3",
    "train_dalle --config DALLE": "vqvae_dir ... train_vqvae.py wrote",
    "TRAIN --resume NONE": "resume: no such folder 'NONE'",
    "RUN DATA --output_dir IMAGE": "output_dir: IMAGE: File exists; expected a folder",
    "PROMPT '   '": "prompt: got '   ', expected some text",
    "generate --model MODEL": "--prompt TEXT or --prompts-file FILE",
    "generate --prompt x": "--model ... --help",
    "generate --model '' --prompt x": "argument --model: got '', expected a name",
    "generate --model ABOVE --prompt x": "model: ABOVE is no model folder ... expected MODEL",
    "generate --model DATA --prompt x": "model: DATA is no model folder ... train_dalle.py wrote",
    "PROMPT x --seed -1": "seed: got -1",
    "PROMPT x --num-images 0": "num_images: got 0, expected at least 1",
    "PROMPT x --top-p 2": "top_p: got 2.0, expected above 0 and up to 1",
    "PROMPT x --top-k many": "--top-k ... many",
    "generate --model MODEL --prompts-file NONE": "prompts-file: NONE: No such file",
    "generate --model MODEL --prompts-file IMAGE": "prompts-file: IMAGE: not UTF-8",
    "PROMPT x --out IMAGE": "out: IMAGE: File exists; expected a folder",
    "evaluate --model DATA": "model: DATA is no model folder",
    "evaluate --model MODEL --data BARE --out OUT": "data: no captioned images found in BARE",
    "evaluate --model MODEL --data DATA --out IMAGE": "out: IMAGE: File exists; expected a folder",
    "evaluate --model MODEL --native int4": "--native: invalid choice: 'int4' ... --help",
    "app --native int4": "--native: invalid choice ... --help",
    "app --port 99999": "port: got 99999, expected 1 to 65535",
    "app --host not/a/host": "host: got 'not/a/host', expected a name or address of this machine",
    "caption --model NONE --images IMAGE --evaluate shapes": "evaluate: got shapes with images",
    "caption --model NONE --complete '' --evaluate emoji": "evaluate: got emoji with complete",
    "evaluate --model MODEL --fast": "--fast ... --help",
    "prepare_emoji --out OUT --size 2": "size: got 2, expected at least 8",
    "prepare_shapes --out OUT --kinds double": "--kinds: ... 'double'",
    "check_data": "source: got none, expected --source",
    "check_data --source NONE": "source: no folder or file NONE",
    "check_data --source FEW": "source: FEW names no splits and has 3 pairs; expected at least 10",
    "RUN FEW": "data.source: FEW names no splits and has 3 pairs; expected at least 10",
    "check_data --source DATA --image-size 0": "image_size: got 0, expected at least 1",
    "check_data --source DATA --text-length -4": "text_length: got -4, expected at least 1",
    "prepare_shapes --out OUT --test-compose -1": "test_compose: got -1, expected at least 0",
    "prepare_scenes --out OUT --test -1": "test: got -1, expected at least 0",
    "demo --out NONE --configs NONE": "configs: got NONE, expected a folder with vqvae.yaml",
    "demo --fast": "--fast ... --help",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, data: Path, model_dir: Path) -> dict[str, str]:
    """What the capital words in `BAD_INPUT` stand for."""
    folder = tmp_path_factory.mktemp("bad")
    bare = folder / "bare"
    bare.mkdir()
    for number in range(12):
        tiny.render_image(number).save(bare / f"{number}.png")
    empty = folder / "empty"
    empty.mkdir()
    few = folder / "few"
    few.mkdir()
    for number in range(3):
        tiny.render_image(number).save(few / f"{number}.png")
        (few / f"{number}.txt").write_text("a box")
    above = shutil.copytree(model_dir, folder / "run" / "model").parent
    (folder / "odd.yaml").write_text("vqvae:\n  tint: 3\n")
    vqvae, dalle = write_presets(data, folder / "runs")
    return {
        "DATA": str(data),
        "INSIDE": str(data / "below" / "run"),
        "BARE": str(bare),
        "EMPTY": str(empty),
        "FEW": str(few),
        "ABOVE": str(above),
        "MODEL": str(above / "model"),
        "OUT": str(folder / "out"),
        "NONE": str(folder / "none"),
        "IMAGE": str(bare / "0.png"),
        "ODD": str(folder / "odd.yaml"),
        "VQVAE": str(vqvae),
        "DALLE": str(dalle),
    }


def filled(text: str, places: dict[str, str]) -> str:
    text = text.replace("RUN", "train_vqvae --output_dir OUT --data.source")
    text = text.replace("TRAIN", "train_vqvae --config VQVAE")
    text = text.replace("PROMPT", "generate --model MODEL --prompt")
    return re.sub(r"\b[A-Z]+\b", lambda word: places.get(word[0], word[0]), text)


def assert_one_line(error: str, expected: str, places: dict[str, str]) -> None:
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert "Traceback" not in error
    assert re.search(".*".join(map(re.escape, filled(expected, places).split(" ... "))), error)


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input(
    command: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(*shlex.split(filled(command, places))) == 2
    assert_one_line(capsys.readouterr().err, BAD_INPUT[command], places)


@pytest.mark.parametrize(
    "command", ["RUN EMPTY", "generate --model DATA --prompt x", "generate --prompt x"]
)
def test_bad_input_of_a_process(command: str, places: dict[str, str]) -> None:
    result = run_apart(*shlex.split(filled(command, places)))
    assert (result.returncode, result.stdout) == (2, "")
    assert_one_line(result.stderr, BAD_INPUT[command], places)


def test_damaged_model(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    weights = folder / "dalle" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run_here("generate", "--model", folder, "--prompt", "x") == 2
    assert_one_line(capsys.readouterr().err, f"model: {folder} does not load", {})


@pytest.mark.parametrize(
    ("program", "env", "expected"),
    [
        ("dalle-mini train_clip", {}, "dalle-mini train_clip"),
        ("my scripts/x.py", {}, "python 'my scripts/x.py'"),
        (
            "x.py",
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            "torchrun --standalone --nproc_per_node 2 x.py",
        ),
        (
            "dalle-mini train_clip",
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            "torchrun ... --no-python dalle-mini train_clip",
        ),
    ],
)
def test_resume_line_is_what_was_typed(
    program: str,
    env: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(arguments: Sequence[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    arguments = ["--a.b", "two words", "--resume", "latest", "--resume=x"]
    with pytest.raises(SystemExit) as exit_:
        run_script(stopped, arguments, takes_resume=True)
    assert exit_.value.code == 130
    error = capsys.readouterr().err
    assert error == f"stopped; to resume: {expected} --a.b 'two words' --resume latest\n"


def test_logging_of_the_program_is_as_before() -> None:
    loggers = [logging.getLogger(name) for name in (None, "dalle_mini_impl", "vqvae")]

    def state() -> list[object]:
        return [list(logging.getLogger().handlers), *(logger.level for logger in loggers)]

    def note(arguments: Sequence[str]) -> None:
        inside.append(state())

    inside: list[list[object]] = []
    before = state()
    run_script(note, [])
    assert state() == before
    assert inside[0] != before


def test_every_command_has_a_script_and_a_module() -> None:
    scripts = {path.stem for path in (REPOSITORY / "scripts").glob("*.py")}
    assert scripts == set(COMMANDS)
    for name in COMMANDS:
        module = (REPOSITORY / "dalle_mini_impl" / "cli" / f"{name}.py").read_text("utf-8")
        assert "\ndef main(arguments: Sequence[str]) -> None:" in module
        assert f'run_command("{name}", ' in (REPOSITORY / "scripts" / f"{name}.py").read_text()


def run_console(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["/bin/dalle-mini", *arguments])
    try:
        console()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_console_lists_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_console(monkeypatch, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for name, summary in COMMANDS.items():
        assert f"  {name:18} {summary}" in lines
    for arguments, got in (((), "none"), (("sketch",), "sketch"), (("../x",), "../x")):
        assert run_console(monkeypatch, *arguments) == 2
        message = f"command: got {got}, expected one of train, generate"
        assert_one_line(capsys.readouterr().err, message, {})
    assert run_console(monkeypatch, "generate", "--prompt", "x") == 2
    assert "dalle-mini generate --help lists" in capsys.readouterr().err


def test_help_to_a_reader_that_has_left() -> None:
    code = "from dalle_mini_impl.cli.main import console; console()"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", code, "--help"]
    with open(writer, "w") as stdout:
        pipes = {"stdout": stdout, "stderr": subprocess.PIPE}
        done = subprocess.run(command, cwd=REPOSITORY, check=False, **pipes)
    assert (done.returncode, done.stderr) == (0, b"")


WITH_PIL = [name for name in COMMANDS if name.startswith("prepare_")]
LIGHT = [name for name in COMMANDS if not name.startswith("train_") and name not in WITH_PIL]


@pytest.mark.parametrize(("names", "heaviest"), [(LIGHT, []), (WITH_PIL, ["PIL"])])
def test_help_loads_no_heavy_library(names: list[str], heaviest: list[str]) -> None:
    code = (
        "import runpy, sys\n"
        "from dalle_mini_impl.cli.main import console\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'wandb', 'numpy', 'PIL'}\n"
        "def script():\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"for name in {names}:\n"
        "    own = ['scripts/' + name + '.py', '--help']\n"
        "    for start, sys.argv in ((console, ['dalle-mini', name, '--help']), (script, own)):\n"
        "        try:\n"
        "            start()\n"
        "        except SystemExit as error:\n"
        "            assert not error.code\n"
        "print('loaded:', sorted(heavy & sys.modules.keys()))\n"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"loaded: {heaviest}"
    for name in names:
        assert f"usage: dalle-mini {name} " in result.stdout
        assert f"usage: {name}.py " in result.stdout


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_in_a_narrow_encoding(encoding: str, model_dir: Path, tmp_path: Path) -> None:
    arguments = ["--model", model_dir, "--prompt", "빨간 원", "--out", tmp_path / "그림"]
    result = run_apart("generate", *arguments, "--num-images=1", PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr
    assert rf"{tmp_path}/\uadf8\ub9bc" in result.stdout
    assert (tmp_path / "그림" / "0000-빨간-원_0.png").is_file()


def test_home_folder_in_options(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The shell does not expand `--out=~/x`, nor what stands in YAML."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, tmp_path / "m")
    arguments = ["--model=~/m", "--prompt=x", "--num-images=1", "--out=~/images"]
    assert run_here("generate", *arguments) == 0
    assert len(list((tmp_path / "images").glob("0000-x*.png"))) == 1
    assert run_here("train_vqvae", "--data.source=~/no", "--output_dir=~/run") == 2
    assert f"data.source: no folder or file {tmp_path}/no" in capsys.readouterr().err
    data = tiny.write_data(tmp_path / "data")
    preset, _ = write_presets(data, tmp_path / "presets")
    assert run_here("train_vqvae", f"--config={preset}", "--output_dir=~/a") == 0
    resume = ["--resume=~/a/checkpoints/step-00000003", "--output_dir=~/b"]
    assert run_here("train_vqvae", f"--config={preset}", *resume) == 0
    _, preset = write_presets(data, tmp_path / "presets")
    run = ["--vqvae_dir=~/b/model", "--output_dir=~/c"]
    assert run_here("train_dalle", f"--config={preset}", *run) == 0
    assert (tmp_path / "c" / "model" / "model_index.json").is_file()
    assert not (tmp_path / "~").exists()


def test_app_needs_a_model_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_here("app") == 2
    assert_one_line(capsys.readouterr().err, "model: got none ... expected --model with a", {})


def test_presets_are_found_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    presets = sorted(path.relative_to(REPOSITORY) for path in REPOSITORY.glob("configs/*/*.yaml"))
    assert len(presets) > 10
    for preset in presets:
        assert find_preset(preset).read_bytes() == (REPOSITORY / preset).read_bytes()
    assert find_preset("configs/none.yaml") == Path("configs/none.yaml")
    own = tmp_path / presets[0]
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert find_preset(presets[0]).read_text() == "mine"
