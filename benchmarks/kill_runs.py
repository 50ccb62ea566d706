"""Runs that are made to be killed: ours, and the same training in Accelerate's own loop.

The loop of `run_stock` is the one that Accelerate documents (examples/by_feature/checkpointing.py
and the guide on checkpoints): `save_state` every few steps into `step_<n>`, `load_state` of the
newest folder, `skip_first_batches`. Model, loss, data and budget are those of `run_ours`.
"""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.images import write_images
from dalle_mini_impl.models.dalle_config import DecoderConfig
from dalle_mini_impl.training import checkpoint
from dalle_mini_impl.training import dalle as dalle_run
from dalle_mini_impl.training import trainer as loop
from dalle_mini_impl.training.config import DataConfig, TextConfig, TrainingConfig
from dalle_mini_impl.training.dalle import DalleRunConfig, DalleTaskConfig, train_dalle
from dalle_mini_impl.training.run import RunContext
from dalle_mini_impl.training.run_dataset import RunRecords, load_pairs
from dalle_mini_impl.training.tracking import TrackingConfig
from dalle_mini_impl.training.vqvae import VQVAERunConfig, VQVAETask, VQVAETaskConfig, train_vqvae
from vqvae import VQVAE, VQVAEConfig

SIZE, NUM_IMAGES, BATCH = 16, 40, 8
STEPS, INTERVAL = 90, 5
Report = Callable[[str, int], None]
"""Told ``("resumed", step)`` once and ``("step", step)`` after each step."""

SIZES = VQVAEConfig(
    image_size=SIZE,
    patch_size=4,
    channels=(8, 12),
    num_encoder_blocks=1,
    num_decoder_blocks=1,
    quantizer="vq",  # its codes move by averages, which are state beside the weights
    vq_codebook_size=16,
    vq_code_dim=4,
)
DECODER = DecoderConfig(hidden_size=16, num_layers=2, num_heads=2, dropout_probability=0.1)


def prepare(folder: Path) -> None:
    """Write what all runs read: images with captions, and an image tokenizer.

    Args:
        folder: Of the campaign.
    """
    write_images(folder / "data", NUM_IMAGES, side=SIZE)
    torch.manual_seed(0)
    VQVAE(SIZES).save_pretrained(folder / "vqvae")


def build_config(kind: str, folder: Path, out: Path) -> VQVAERunConfig | DalleRunConfig:
    """Describe a run of seconds in which every part of the state matters.

    Args:
        kind: ``tokenizer`` or ``decoder``.
        folder: That `prepare` filled.
        out: Folder of the run.

    Returns:
        Its config.
    """
    shared: dict[str, Any] = {
        "data": DataConfig(source=str(folder / "data")),
        "output_dir": str(out),
        "training": TrainingConfig(
            max_steps=STEPS,
            global_batch_size=BATCH,
            gradient_accumulation_steps=2,
            optimizer="adamw" if kind == "tokenizer" else "muon",
            ema_decay=0.9,
            warmup_steps=2,
            log_every_steps=1,
            evaluate_every_steps=10,
            sample_every_steps=1000,
            checkpoint_every_steps=INTERVAL,
            mixed_precision="no",
        ),
        "tracking": TrackingConfig(mode="disabled"),
    }
    if kind == "tokenizer":
        return VQVAERunConfig(vqvae=SIZES, task=VQVAETaskConfig(max_shift=1), **shared)
    return DalleRunConfig(
        vqvae_dir=str(folder / "vqvae"),
        fixed_prompts=("a red image",),
        text=TextConfig(vocab_size=300, text_length=8),
        decoder=DECODER,
        task=DalleTaskConfig(caption_dropout_probability=0.3, token_noise_probability=0.2),
        **shared,
    )


def run_ours(kind: str, folder: Path, out: Path, report: Report, *, fatal_event: int) -> None:
    """Start or go on with a run of this project.

    Args:
        kind: ``tokenizer`` or ``decoder``.
        folder: That `prepare` filled.
        out: Folder of the run.
        report: Told of the steps.
        fatal_event: See `signal_inside_a_save`; 0 for never.
    """
    save = checkpoint.save_checkpoint
    loop.save_checkpoint = signal_inside_a_save(save, fatal_event)  # type: ignore[attr-defined]
    config = build_config(kind, folder, out)

    def show(line: str) -> None:
        words = line.replace(" at step", "  step").split()
        if "step" in words:
            kind_of_line = "resumed" if words[0] == "resuming" else "step"
            report(kind_of_line, int(words[words.index("step") + 1]))

    if isinstance(config, VQVAERunConfig):
        train_vqvae(config, resume="latest", show=show)
    else:
        train_dalle(config, resume="latest", show=show)


def build_stock(kind: str, folder: Path, out: Path) -> tuple[torch.nn.Module, Any]:
    """Build model and task as a run of this project does.

    Args:
        kind: ``tokenizer`` or ``decoder``.
        folder: That `prepare` filled.
        out: Folder of the run; tokens are kept there.

    Returns:
        The model and its task.
    """
    config = build_config(kind, folder, out)
    out.mkdir(parents=True, exist_ok=True)
    records = RunRecords(folder=out, writes=False, resumes=False)
    if isinstance(config, DalleRunConfig):
        task = dalle_run._build_task(config, RunContext(Accelerator(), records))
        return task.model, task
    train, held_out = (
        load_pairs(config.data, split, image_size=SIZE, records=records)
        for split in ("train", "val")
    )
    torch.manual_seed(config.training.seed)
    model = VQVAE(config.vqvae)
    pixels = (train.pixels, held_out.pixels)
    return model, VQVAETask(*pixels, config.task, sample_weights=None, vqvae=model)


def newest_stock(out: Path) -> Path | None:
    """Find the newest folder of `save_state`, by the time of its last change.

    Args:
        out: Folder of the run.

    Returns:
        The folder, or None where there is none.
    """
    folders = sorted(out.glob("step_*"), key=os.path.getctime)
    return folders[-1] if folders else None


def run_stock(kind: str, folder: Path, out: Path, report: Report, *, fatal_event: int) -> None:
    """Start or go on with the same training in Accelerate's documented loop.

    Args:
        kind: ``tokenizer`` or ``decoder``.
        folder: That `prepare` filled.
        out: Folder of the run.
        report: Told of the steps.
        fatal_event: See `signal_inside_a_save`; 0 for never.
    """
    from accelerate.utils import set_seed
    from torch.utils.data import DataLoader, TensorDataset
    from transformers import get_linear_schedule_with_warmup

    set_seed(0)
    accelerator = Accelerator(cpu=True)
    model, task = build_stock(kind, folder, out)
    data = TensorDataset(torch.arange(task.num_samples))
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    save = signal_inside_a_save(accelerator.save_state, fatal_event)
    newest = newest_stock(out)
    step = 0
    if newest is not None:
        accelerator.load_state(str(newest))
        step = int(newest.name.removeprefix("step_"))
        report("resumed", step)
    skipped = step % len(loader)
    while step < STEPS:
        batches = accelerator.skip_first_batches(loader, skipped) if skipped else loader
        skipped = 0
        model.train()
        for (sample_ids,) in batches:
            uniforms = torch.rand(len(sample_ids), task.num_uniforms)
            batch = task.make_batch(sample_ids, uniforms)
            loss, _ = task.loss(
                model, batch, progress=step / STEPS, generator=torch.default_generator
            )
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % INTERVAL == 0:
                save(str(out / f"step_{step}"))
            report("step", step)
            if step == STEPS:
                break
    accelerator.unwrap_model(model)
    torch.save(model.state_dict(), out / "final.pt")


def signal_inside_a_save(
    save: Callable[..., Any], fatal_event: int, number: signal.Signals = signal.SIGKILL
) -> Callable[..., Any]:
    """Wrap a function that saves, so that it signals its own process at a file operation.

    Args:
        save: What is called to save.
        fatal_event: Which operation, counted from 1 over all saves, twice for each: before and
            after; 0 for none.
        number: The signal.

    Returns:
        To be called in its place.
    """
    events, is_saving = 0, False

    def event() -> None:
        nonlocal events
        events += is_saving
        if is_saving and events == fatal_event:
            os.kill(os.getpid(), number)

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            event()
            result = call(*arguments, **options)
            event()
            return result

        return wrapped

    def saves(*arguments: Any, **options: Any) -> Any:
        nonlocal is_saving
        is_saving = True
        result = save(*arguments, **options)
        is_saving = False
        return result

    if fatal_event:
        for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, around(getattr(os, name)))
        for module, name in ((checkpoint, "save_file"), (torch, "save"), (shutil, "copymode")):
            setattr(module, name, around(getattr(module, name)))
    return saves
