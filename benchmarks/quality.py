"""Seconds of training until held-out emoji come back from 256 tokens with 22 dB.

Both sides make 16 x 16 tokens of a 64 px Twemoji. They train in turns of equal time, on images
that are in memory, each by a preset of its own: ours at a rate that decays over a number of steps
chosen beforehand, DALLE-pytorch's discrete VAE as its train_vae.py trains (Adam, rate 1e-3, batches
of 8, no KL term). The quality is that of single codes, as a decoder generates them, over the images
of `test_compose`; measuring it is not part of the time. Who has not got there in six times our
time is stopped.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ours, ours_pictures, peers
from benchmarks.config import BenchmarkConfig
from benchmarks.timing import OtherLoad, Result, median, set_machine
from dalle_mini_impl.hardware import has_fast_bf16, medium_is_float32
from vqvae.metrics import psnr

GOAL_DB = 22.0
TURN_SECONDS = 5.0
MOST_TIMES_OURS = 6.0
MOST_SECONDS = 1200.0
# Defaults of train_vae.py at commit 58c1e1a of lucidrains/DALLE-pytorch, but for 16 x 16 tokens.
DEFAULT_DVAE = {"num_tokens": 8192, "codebook_dim": 512, "hidden_dim": 256, "num_resnet_blocks": 2}
SMALL_DVAE = {"num_tokens": 1024, "codebook_dim": 512, "hidden_dim": 64, "num_resnet_blocks": 1}
DVAE_BATCH, DVAE_RATE = 8, 1e-3
DVAE_TEMPERATURE = 1.0
PRODUCT_TRIALS = 5


class Learner:
    """A tokenizer in training, its clock and its quality."""

    def __init__(
        self, step: Callable[[], object], rebuild: Callable[[Tensor], Tensor], result: Result
    ) -> None:
        """Start at no time.

        Args:
            step: Makes one update.
            rebuild: Sends images in [-1, 1] through single codes.
            result: The row that is filled.
        """
        self.step, self.rebuild, self.result = step, rebuild, result
        self.matmul = ours.matmul_setting() if result.is_ours else faster_product(step)
        self.seconds, self.steps, self.db = 0.0, 0, 0.0

    def take_turn(self, held_out: Tensor, *, seconds: float) -> None:
        """Train for some seconds, then measure.

        Args:
            held_out: Images as bytes, (images, 3, side, side).
            seconds: Of training.
        """
        load, started = OtherLoad(), time.perf_counter()
        while time.perf_counter() - started < seconds:
            self.step()
            self.steps += 1
        self.seconds += time.perf_counter() - started
        self.result.others.append(load.cores())
        self.db = quality(self.rebuild, held_out)


def run(config: BenchmarkConfig) -> list[Result]:
    """Train ours and DALLE-pytorch's in turns.

    Args:
        config: Of the run.

    Returns:
        Rows in seconds.
    """
    goal, turn = (5.0, 0.1) if config.quick else (GOAL_DB, TURN_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = emoji(Path(folder), few=config.quick)
    step, rebuild = ours_pictures.tokenizer_to_quality(train)
    own = Learner(step, rebuild, _row("ours (FSQ, 1,000 codes)", goal, is_ours=True))
    learners = [own]
    failed: list[Result] = []
    for words, sizes in (("1,024 codes, width 64", SMALL_DVAE), ("its defaults", DEFAULT_DVAE)):
        row = _row(f"{peers.DALLE}, {words}", goal)
        try:
            learners.append(Learner(*dvae(sizes, train), row))
        except Exception as error:  # one that fails must not take the others with it
            row.failure = f"failed: {error}"[:300]
            failed.append(row)
    running = list(learners)
    while running:
        for learner in list(running):
            set_machine(learner.matmul, keeps_memory=True)
            learner.take_turn(held_out, seconds=turn)
            limit = MOST_SECONDS if own in running else MOST_TIMES_OURS * own.seconds
            reached = f"{learner.db:.2f} dB after {learner.steps} steps"
            if learner.db >= goal:
                learner.result.costs, learner.result.note = [learner.seconds], reached
            elif learner.seconds >= limit:
                learner.result.failure = f"more than {learner.seconds:.0f} s: {reached}"
            else:
                continue
            running.remove(learner)
            print(f"  {learner.result.work} | {learner.result.variant}: {reached}", flush=True)
    return [*(learner.result for learner in learners), *failed]


def _row(name: str, goal: float, *, is_ours: bool = False) -> Result:
    precision = "bf16" if has_fast_bf16() else "float32"
    work = f"training until {goal:g} dB, 64 px, 256 tokens, {precision}"
    return Result(work=work, variant=name, is_ours=is_ours, unit="s")


def emoji(folder: Path, *, few: bool) -> tuple[Tensor, Tensor]:
    """Write Twemoji of 64 px and read them.

    Args:
        folder: To write to.
        few: Keep 64 of each split.

    Returns:
        Training images and those of `test_compose` as bytes, (images, 3, 64, 64).
    """
    from dalle_mini_impl.builtin_datasets.emoji.prepare import prepare_emoji
    from dalle_mini_impl.data.images import decode_image, image_to_pixels

    prepare_emoji(folder, size=64, styles=["twemoji"], npm_dir=None)
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    splits = []
    for split in ("train", "test_compose"):
        chosen = [row["file_name"] for row in rows if row["split"] == split]
        images = [
            decode_image((folder / name).read_bytes(), source=name)
            for name in chosen[: 64 if few else None]
        ]
        pixels = torch.stack([image_to_pixels(image) for image in images])
        splits.append(((pixels + 1) * 127.5).round().byte())
    return splits[0], splits[1]


def faster_product(step: Callable[[], object]) -> str:
    """Find the float32 product with which a step takes less time; its updates count for nothing.

    Args:
        step: Makes one update.

    Returns:
        For ``torch.set_float32_matmul_precision``.
    """
    names = ("highest", "medium") if medium_is_float32() else ("highest",)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(PRODUCT_TRIALS):
        for name in names:
            set_machine(name, keeps_memory=True)
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return min(names, key=lambda name: median(seconds[name]))


@torch.no_grad()
def quality(rebuild: Callable[[Tensor], Tensor], held_out: Tensor) -> float:
    """Measure PSNR as the mean over images, in dB.

    Args:
        rebuild: Sends images in [-1, 1] through single codes.
        held_out: Images as bytes.

    Returns:
        The mean.
    """
    total = 0.0
    for images in held_out.split(64):
        pixels = images.float() / 127.5 - 1
        total += float(psnr(rebuild(pixels), pixels)) * len(images)
    return total / len(held_out)


def dvae(
    sizes: dict[str, Any], train: Tensor
) -> tuple[Callable[[], object], Callable[[Tensor], Tensor]]:
    """Train DALLE-pytorch's discrete VAE as its script does.

    Args:
        sizes: Arguments of the model.
        train: Images as bytes.

    Returns:
        A training step, and the way of images through single codes.
    """
    torch.manual_seed(0)
    side = train.shape[-1]
    model = peers.import_dalle_pytorch().DiscreteVAE(image_size=side, num_layers=2, **sizes)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=DVAE_RATE)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        ids = torch.randint(len(train), (DVAE_BATCH,), generator=generator)
        images = (train[ids].float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16()):  # as ours
            loss = model(images, return_loss=True, temp=DVAE_TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def rebuild(pixels: Tensor) -> Tensor:
        model.eval()
        # It subtracts 0.5 and divides by 0.5 on the way in, and does not undo it on the way out.
        reconstructions = model.decode(model.get_codebook_indices((pixels + 1) / 2))
        model.train()
        return reconstructions

    return step, rebuild
