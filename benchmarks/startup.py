"""Seconds from the start of a process: to the help text, and to the first image."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import ours_pictures, peers
from benchmarks.config import BenchmarkConfig
from benchmarks.sizes import Size
from benchmarks.timing import Job, NotMeasuredError, Result, Variant, interleave

REPOSITORY = Path(__file__).resolve().parents[1]
GENERATE = str(REPOSITORY / "scripts" / "generate.py")
PROMPT = "red heart"
# As large as the demo's decoder: 4 layers, width 256, 16 + 64 tokens, images of 64 px.
DEMO = Size(
    name="demo", width=256, layers=4, heads=4, text_length=16, grid=8, vocab=2048,
    codebook=1000, batch=1,
)  # fmt: skip
# What DALLE-pytorch's generate.py does between its imports and the file, without its tokenizer,
# whose import needs a package that no longer builds.
PEER_GENERATES = """
import numpy, sys, torch
from PIL import Image
from dalle_pytorch import DALLE, DiscreteVAE
saved = torch.load(sys.argv[1])
dalle = DALLE(vae=DiscreteVAE(**saved["vae_params"]), **saved["hparams"])
dalle.load_state_dict(saved["weights"])
image = dalle.generate_images(torch.ones(1, 16, dtype=torch.long), filter_thres=0.9)[0]
pixels = (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
Image.fromarray(numpy.ascontiguousarray(pixels)).save(sys.argv[2])
"""


def run(config: BenchmarkConfig) -> list[Result]:
    """Compare starting programs.

    Args:
        config: Of the run.

    Returns:
        Rows in seconds.
    """
    python = [sys.executable, "-W", "ignore", "-c"]
    commands = {
        "generate.py --help": [sys.executable, GENERATE, "--help"],
        f"{peers.LLAMA}: import of the model": [
            *python,
            "from transformers import LlamaForCausalLM",
        ],
        "import torch": [*python, "import torch"],
        "python alone": [*python, "pass"],
    }
    helps = [
        Variant(
            name=f"ours, {name}" if name.startswith("generate") else name,
            build=partial(process_job, command),
            is_ours=name.startswith("generate"),
        )
        for name, command in commands.items()
    ]
    helps.insert(
        1,
        Variant(
            name=f"{peers.DALLE}: its imports, before it reads a command line",
            build=lambda: process_job([*python, stub_code()]),
        ),
    )
    results = interleave("start-up", helps, unit="s", rounds=max(config.rounds, 1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = [
            Variant(name="ours, generate.py", build=partial(own_image, folder), is_ours=True),
            Variant(
                name=f"{peers.DALLE}, what its generate.py does, without text tokenizer",
                build=partial(peer_image, folder),
            ),
            Variant(name="import torch", build=partial(process_job, [*python, "import torch"])),
        ]
        work = "first image from process start, a model of the demo's size"
        results += interleave(work, images, unit="s", rounds=config.rounds)
    return results


def process_job(command: Sequence[str], *, expected: Path | None = None) -> Job:
    """Start a process and wait for its end.

    Args:
        command: What to start.
        expected: File that it must write; the folder of the file is emptied before each call.

    Returns:
        The job.
    """

    def start() -> None:
        if expected is not None:
            shutil.rmtree(expected.parent, ignore_errors=True)  # images are numbered on
            expected.parent.mkdir(parents=True)
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if done.returncode or (expected is not None and not expected.is_file()):
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ValueError(lines[-1])

    start()  # also brings the files into the page cache
    return Job(run=start)


def own_image(folder: Path) -> Job:
    """Generate one image with ``generate.py``.

    Args:
        folder: For the model and the images.

    Returns:
        The job.
    """
    ours_pictures.write_model(folder / "model")
    out = folder / "images"
    command = [sys.executable, GENERATE, "--model", str(folder / "model"), "--prompt", PROMPT]
    command += ["--num-images", "1", "--out", str(out)]
    return process_job(command, expected=out / "grid-0000.png")


def peer_image(folder: Path) -> Job:
    """Generate one image with DALLE-pytorch.

    Args:
        folder: For the model and the image.

    Returns:
        The job.
    """
    dalle_pytorch = peers.import_dalle_pytorch()
    vae = {"image_size": 64, "num_layers": 3, "num_tokens": DEMO.codebook}
    arguments = {
        "dim": DEMO.width,
        "depth": DEMO.layers,
        "heads": DEMO.heads,
        "dim_head": DEMO.head_dim,
        "num_text_tokens": DEMO.vocab,
        "text_seq_len": DEMO.text_length,
    }
    model = dalle_pytorch.DALLE(vae=dalle_pytorch.DiscreteVAE(**vae), **arguments)
    saved = {"vae_params": vae, "hparams": arguments, "weights": model.state_dict()}
    torch.save(saved, folder / "peer.pt")
    image = folder / "peer" / "peer.png"
    code = [sys.executable, "-W", "ignore", "-c", stub_code() + PEER_GENERATES]
    return process_job([*code, str(folder / "peer.pt"), str(image)], expected=image)


def stub_code() -> str:
    """Write the few lines that import DALLE-pytorch with stubs, in a process of its own.

    Returns:
        Python source.

    Raises:
        NotMeasuredError: If DALLE-pytorch is not installed.
    """
    if peers.versions()["dalle-pytorch"] == "not installed":
        raise NotMeasuredError("dalle-pytorch is not installed; make bench installs it")
    lines = ["import sys, types"]
    for name in peers.missing_modules():
        lines.append(f"sys.modules[{name!r}] = types.ModuleType({name!r})")
        lines += [
            f"sys.modules[{name!r}].{attribute} = type({attribute!r}, (), {{}})"
            for attribute in peers.STUBS[name]
        ]
    return "\n".join([*lines, "import dalle_pytorch"])
