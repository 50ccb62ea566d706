"""Training as users run it: from a folder of images, each program by its own defaults.

DALLE-pytorch encodes every image anew in every step, here by the discrete VAE that its
train_vae.py makes by default. Ours reads and encodes each image once: that work, spread over
the 20 epochs that DALLE-pytorch trains by default, is part of what is timed here.
"""

import itertools
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import ours, ours_pictures, peers
from benchmarks.ceilings import attention_flops, count_flops
from benchmarks.config import BenchmarkConfig
from benchmarks.data import DallePytorchFolder
from benchmarks.images import write_images
from benchmarks.timing import Job, Result, Variant, interleave, require_falling
from dalle_mini_impl.hardware import has_fast_bf16

EPOCHS = 20  # DALLE-pytorch's default
NUM_IMAGES = 128
# Defaults of train_vae.py and train_dalle.py at commit 58c1e1a of lucidrains/DALLE-pytorch.
VAE = {
    "image_size": 128,
    "num_layers": 3,
    "num_tokens": 8192,
    "codebook_dim": 512,
    "hidden_dim": 256,
    "num_resnet_blocks": 2,
}
DALLE = {
    "dim": 512,
    "depth": 2,
    "heads": 8,
    "dim_head": 64,
    "text_seq_len": 256,
    "num_text_tokens": 49408,
    "shift_tokens": False,
    "rotary_emb": False,
}
TOY_VAE = VAE | {"image_size": 32, "num_tokens": 64, "codebook_dim": 16, "hidden_dim": 16}
TOY_DALLE = DALLE | {
    "dim": 32, "heads": 2, "dim_head": 16, "text_seq_len": 16, "num_text_tokens": 300,
}  # fmt: skip
BATCH, LEARNING_RATE, CLIP_NORM = 4, 3e-4, 0.5
STEPS_PER_CALL = 5


def run(config: BenchmarkConfig) -> list[Result]:
    """Compare whole training.

    Args:
        config: Of the run.

    Returns:
        Rows in images per second.
    """
    vae, dalle = (TOY_VAE, TOY_DALLE) if config.quick else (VAE, DALLE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        write_images(folder, 24 if config.quick else NUM_IMAGES)
        own = {
            "ours, our defaults": ours_pictures.toy_run()
            if config.quick
            else ours_pictures.default_run(),
            "ours, DALLE-pytorch's sizes": ours_pictures.matched_run(vae, dalle, batch=BATCH),
        }
        rows = [
            Variant(
                name=words,
                build=partial(ours_pictures.whole_training, folder, setup, epochs=EPOCHS),
                is_ours=True,
                precision="bfloat16" if has_fast_bf16() else "float32",  # as training chooses
                matmul=ours.matmul_setting(),
                keeps_memory=True,
            )
            for words, setup in own.items()
        ]
        for words, matmul in (("as shipped", "highest"), ('matmul "medium"', "medium")):
            rows.append(
                Variant(
                    name=f"{peers.DALLE}, its defaults, {words}",
                    build=partial(peer_training, folder, vae, dalle),
                    matmul=matmul,
                    keeps_memory=words != "as shipped",
                )
            )
        results = interleave(
            "training as users run it", rows, unit="images/s", rounds=config.rounds
        )
        try:
            wait = ours_pictures.data_wait(
                folder, Path(name) / "run", steps=3 if config.quick else 20
            )
            results[0].note += f"; training waits for data {100 * wait:.2f} % of its time"
        except Exception as error:
            results[0].note += f"; data wait failed: {error}"
    return results


def peer_training(folder: Path, vae: dict[str, Any], dalle: dict[str, Any]) -> Job:
    """Train as DALLE-pytorch's train_dalle.py does on one device, without logging and samples.

    Args:
        folder: Images with captions.
        vae: Arguments of its discrete VAE.
        dalle: Arguments of its decoder.

    Returns:
        Some steps; items are images.
    """
    dalle_pytorch = peers.import_dalle_pytorch()
    torch.manual_seed(0)
    model = dalle_pytorch.DALLE(vae=dalle_pytorch.DiscreteVAE(**vae), **dalle)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE)
    training_images = DallePytorchFolder(folder, side=vae["image_size"])
    loader = DataLoader(training_images, batch_size=BATCH, shuffle=True, drop_last=True)
    # Its own BPE needs a package that no longer builds; made-up captions cost it nothing.
    text = torch.randint(1, dalle["num_text_tokens"], (BATCH, dalle["text_seq_len"]))

    def step(images: Tensor) -> float:
        loss = model(text.clone(), images, return_loss=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def endless() -> Iterator[Tensor]:
        while True:
            yield from loader

    batches = endless()
    first = next(batches)
    require_falling([step(first) for _ in range(3)])
    flops = count_flops(lambda: step(first)) + attention_flops(
        layers=dalle["depth"], width=dalle["dim"], length=model.total_seq_len, rows=BATCH
    )
    return Job(
        run=lambda: [step(images) for images in itertools.islice(batches, STEPS_PER_CALL)],
        items=BATCH * STEPS_PER_CALL,
        flops=flops * STEPS_PER_CALL,
        note=f"{vae['image_size']} px, {dalle['dim']} wide, {dalle['depth']} layers",
    )
