"""Kill trainings and flip bits of their checkpoints: python -m benchmarks.crash_recovery.

A tokenizer and a decoder in training are killed with SIGKILL again and again, half of the times
between or in the steps and half inside a save, and resume each time. In the end their weights must
be those of a run that was never killed. The same is done to Accelerate's `save_state` and
`load_state`, in the loop that its documentation shows. A kill counts only if it hit while training.
"""

import argparse
import hashlib
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.data import read_json_lines, write_images
from dalle_mini_impl.models.dalle_config import DecoderConfig
from dalle_mini_impl.training import checkpoint, dalle, trainer, vqvae
from dalle_mini_impl.training.config import DataConfig, TextConfig, TrainingConfig
from dalle_mini_impl.training.dalle import DalleRunConfig, DalleTaskConfig, train_dalle
from dalle_mini_impl.training.run import RunContext
from dalle_mini_impl.training.run_dataset import RunRecords
from dalle_mini_impl.training.tracking import TrackingConfig
from dalle_mini_impl.training.vqvae import VQVAERunConfig, VQVAETaskConfig, train_vqvae
from vqvae import VQVAE, VQVAEConfig

SIZE, NUM_IMAGES, BATCH = 16, 40, 8
STEPS, INTERVAL = 90, 5
LAST_EVENT = 60  # about the number of file operations of two saves
FLIPS = 100
KINDS = ("tokenizer", "decoder")
# Called with ("resumed", step) once and ("step", step) after each step.
Report = Callable[[str, int], None]

VQVAE_CONFIG = VQVAEConfig(
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
    """Write the inputs of all runs: images with captions, and an image tokenizer."""
    write_images(folder / "data", NUM_IMAGES, side=SIZE)
    torch.manual_seed(0)
    VQVAE(VQVAE_CONFIG).save_pretrained(folder / "vqvae")


def build_config(kind: str, folder: Path, out: Path) -> VQVAERunConfig | DalleRunConfig:
    """Configure a run of seconds in which every part of the state matters."""
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
        return VQVAERunConfig(vqvae=VQVAE_CONFIG, task=VQVAETaskConfig(max_shift=1), **shared)
    return DalleRunConfig(
        vqvae_dir=str(folder / "vqvae"),
        fixed_prompts=("a red image",),
        text=TextConfig(vocab_size=300, text_length=8),
        decoder=DECODER,
        task=DalleTaskConfig(caption_dropout_probability=0.3, token_noise_probability=0.2),
        **shared,
    )


class Ours:
    """Runs of this project; ``folder`` is filled by `prepare`, ``out`` is the folder of the run."""

    def run(self, kind: str, folder: Path, out: Path, report: Report, *, fatal_event: int) -> None:
        """Start or resume a run; see `signal_inside_a_save` for ``fatal_event``."""
        save = signal_inside_a_save(checkpoint.save_checkpoint, fatal_event)
        trainer.save_checkpoint = save  # type: ignore[attr-defined]
        logger = logging.getLogger("dalle_mini_impl")
        logger.setLevel(logging.INFO)
        logger.addHandler(StepLines(report))
        logger.propagate = False
        config = build_config(kind, folder, out)
        # "latest" starts a fresh run where there is no checkpoint.
        if isinstance(config, VQVAERunConfig):
            train_vqvae(config, resume="latest")
        else:
            train_dalle(config, resume="latest")

    def newest_checkpoint(self, out: Path) -> Path | None:
        """Find the newest whole checkpoint folder."""
        found = checkpoint.newest_checkpoint(out / "checkpoints")
        return found.path if found else None

    def loader(self, kind: str, folder: Path) -> Callable[[Path], Any]:
        """Return the function that loads a checkpoint."""
        return checkpoint.load_checkpoint

    def fingerprint(self, out: Path) -> str:
        """Hash the result of a finished run: weights, averages, moments and losses."""
        rows = read_json_lines(out / "metrics.jsonl")
        # In hexadecimal: a difference in the last bit shows.
        losses = [float(row["train/loss"]).hex() for row in rows if "train/loss" in row]
        assert len(losses) == STEPS
        digest = hashlib.sha256(" ".join(losses).encode())
        files = [*(out / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")]
        files += (out / "model").rglob("*.safetensors")
        for path in sorted(files):
            digest.update(path.read_bytes())
        return digest.hexdigest()


class StepLines(logging.Handler):
    """Reports the steps that a run of ours logs."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.INFO)
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        """Report the step of a line, if it names one."""
        line = record.getMessage()
        if record.levelno == logging.INFO and (found := re.search(r"\bstep (\d+)", line)):
            self.report("resumed" if line.startswith("resuming") else "step", int(found[1]))


class Accelerate:
    """The same training in the loop that Accelerate documents.

    That of examples/by_feature/checkpointing.py and of the guide on checkpoints: `save_state` every
    few steps into `step_<n>`, `load_state` of the newest folder, `skip_first_batches`. Model, loss,
    data and budget are those of `Ours`.
    """

    def run(self, kind: str, folder: Path, out: Path, report: Report, *, fatal_event: int) -> None:
        """Start or resume a run."""
        from accelerate.utils import set_seed
        from torch.utils.data import DataLoader, TensorDataset

        set_seed(0)
        model, task = build_model_and_task(kind, folder, out)
        data = TensorDataset(torch.arange(task.num_samples))
        loader = DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True)
        accelerator, (model, optimizer, schedule, loader) = _accelerate(model, loader)
        save = signal_inside_a_save(accelerator.save_state, fatal_event)
        step = 0
        if newest := self.newest_checkpoint(out):
            accelerator.load_state(str(newest))
            step = int(newest.name.removeprefix("step_"))
            report("resumed", step)
        # A resumed run skips the batches of this epoch that it has seen.
        skipped = step % len(loader)
        while step < STEPS:
            batches = accelerator.skip_first_batches(loader, skipped) if skipped else loader
            skipped = 0
            model.train()
            for (sample_ids,) in batches:
                uniforms = torch.rand(len(sample_ids), task.num_uniforms)
                batch = task.make_batch(sample_ids, uniforms)
                # The default generator is among the states that Accelerate saves.
                generator = torch.default_generator
                loss, _ = task.loss(model, batch, progress=step / STEPS, generator=generator)
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

    def newest_checkpoint(self, out: Path) -> Path | None:
        """Find the newest checkpoint folder."""
        # By the time of the last change, as the documented loop does: a folder may be half written.
        return max(out.glob("step_*"), key=os.path.getctime, default=None)

    def loader(self, kind: str, folder: Path) -> Callable[[Path], Any]:
        """Return the function that loads a checkpoint."""
        model, _ = build_model_and_task(kind, folder, folder / "loaded")
        accelerator, _ = _accelerate(model)
        return lambda path: accelerator.load_state(str(path))

    def fingerprint(self, out: Path) -> str:
        """Hash the final weights."""
        weights = torch.load(out / "final.pt", weights_only=True)
        digest = hashlib.sha256()
        for name in sorted(weights):
            digest.update(weights[name].contiguous().view(-1).numpy().tobytes())
        return digest.hexdigest()


PROGRAMS: dict[str, Ours | Accelerate] = {"ours": Ours(), "Accelerate": Accelerate()}


def _accelerate(model: torch.nn.Module, *loaders: Any) -> tuple[Any, Any]:
    """Hand a model, its optimizer and schedule, and loaders to an accelerator."""
    from transformers import get_linear_schedule_with_warmup

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    return accelerator, accelerator.prepare(model, optimizer, schedule, *loaders)


def build_model_and_task(kind: str, folder: Path, out: Path) -> tuple[torch.nn.Module, Any]:
    """Build model and task as a run of this project does; tokens are kept in ``out``."""
    config = build_config(kind, folder, out)
    out.mkdir(parents=True, exist_ok=True)
    run = RunContext(Accelerator(cpu=True), RunRecords(folder=out, writes=False, resumes=False))
    build_task: Any = (dalle if isinstance(config, DalleRunConfig) else vqvae).build_task
    task = build_task(config, run)
    return task.model, task


def signal_inside_a_save(
    save: Callable[..., Any], fatal_event: int, number: signal.Signals = signal.SIGKILL
) -> Callable[..., Any]:
    """Wrap a function that saves, so that it signals its own process at a file operation.

    ``fatal_event`` counts from 1 over all saves, twice an operation: before and after; 0 is none.
    """
    events, is_saving = 0, False

    def event() -> None:
        nonlocal events
        events += is_saving  # a run also renames and unlinks outside of saves
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

    # Everything that touches the disk in a save passes through one of these functions.
    if fatal_event:
        for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, around(getattr(os, name)))
        for module, name in ((checkpoint, "save_file"), (torch, "save"), (shutil, "copymode")):
            setattr(module, name, around(getattr(module, name)))
    return saves


@dataclass
class Outcome:
    """The result of a campaign against one training."""

    who: str
    kind: str
    kills: int = 0
    kills_inside_a_save: int = 0
    # Times that a run did not start again before its newest checkpoint was deleted by hand.
    failed_resumes: int = 0
    # Steps between the last one seen before a kill and the one that the run resumed from.
    largest_loss: int = 0
    finished: int = 0
    equal: int = 0  # finished runs with the weights of the run that was never killed
    flips: int = 0
    flips_noticed: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def _child(
    who: str, kind: str, folder: Path, out: Path, fatal_event: int, pipe: Connection
) -> None:
    torch.set_num_threads(1)
    logging.getLogger().addHandler(logging.NullHandler())  # warnings would go to stderr

    def report(what: str, step: int) -> None:
        pipe.send((what, step))

    PROGRAMS[who].run(kind, folder, out, report, fatal_event=fatal_event)


def attempt(
    who: str, kind: str, folder: Path, out: Path, *, fatal_event: int = 0, steps: int = 0
) -> tuple[int | None, int, int]:
    """Start or resume a run in its own process until it ends or is killed.

    It kills itself at ``fatal_event`` of its saves or is killed after ``steps``; 0 is never.
    Returns the exit code (negative: a signal), the step resumed from and the last reported step.
    """
    context = multiprocessing.get_context("forkserver")
    # Loaded once and inherited: a start then costs a tenth of a second instead of three.
    preload = ["benchmarks.crash_recovery", "datasets", "torch._dynamo", "transformers"]
    context.set_forkserver_preload(preload)
    listener, speaker = context.Pipe(duplex=False)
    arguments = (who, kind, folder, out, fatal_event, speaker)
    process = context.Process(target=_child, args=arguments, daemon=True)
    process.start()
    speaker.close()  # or the pipe would outlive the child
    resumed = last = seen = 0
    # The pipe closes when the process ends, whatever ended it.
    while True:
        try:
            what, step = listener.recv()
        except EOFError:
            break
        last = step
        if what == "resumed":
            resumed = step
            continue
        seen += 1
        # A random wait, so that the kill falls into the middle of a step.
        if seen == steps:
            time.sleep(random.uniform(0, 0.03))
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode, resumed, last


def kill_repeatedly(who: str, kind: str, folder: Path, *, kills: int, seed: int = 0) -> Outcome:
    """Run the campaign against one training until ``kills`` have hit."""
    outcome, started = Outcome(who, kind), time.perf_counter()
    random.seed(seed)
    base = folder / who / kind
    # 1. the reference: a run that is never killed
    exit_code, _, last = attempt(who, kind, folder, base / "straight")
    assert (exit_code, last) == (0, STEPS), f"{who}, {kind}: exit code {exit_code} at step {last}"
    expected = PROGRAMS[who].fingerprint(base / "straight")
    while outcome.kills < kills or outcome.finished == 0:
        # 2. a run that is killed until it ends, or until there were enough kills
        out, reached, is_over = base / f"killed-{outcome.finished}", 0, False
        while not is_over:
            # Every second kill goes into a save, which is a small part of the time.
            plan: dict[str, int] = {}
            if outcome.kills < kills:
                inside = outcome.kills % 2 == 1
                number = random.randint(1, LAST_EVENT if inside else 2 * INTERVAL)
                plan = {"fatal_event" if inside else "steps": number}
            exit_code, resumed, last = attempt(who, kind, folder, out, **plan)
            if exit_code not in {0, -signal.SIGKILL}:
                # What a person would do whose run does not start.
                outcome.failed_resumes += 1
                newest = PROGRAMS[who].newest_checkpoint(out)
                assert who != "ours", "a run of ours did not start again"
                assert newest is not None, f"{who} did not start, without a checkpoint to blame"
                shutil.rmtree(newest)
                continue
            outcome.largest_loss = max(outcome.largest_loss, reached - resumed)
            reached, is_over = last, exit_code == 0
            if exit_code:
                outcome.kills += 1
                outcome.kills_inside_a_save += "fatal_event" in plan
        # 3. its result beside the reference
        outcome.finished += 1
        outcome.equal += PROGRAMS[who].fingerprint(out) == expected
        shutil.rmtree(out)
    outcome.seconds = time.perf_counter() - started
    return outcome


def flip_bits(folder: Path, outcome: Outcome, *, flips: int) -> None:
    """Flip one bit of a checkpoint at a time, and count how often loading reports it."""
    who, kind = outcome.who, outcome.kind
    newest = PROGRAMS[who].newest_checkpoint(folder / who / kind / "straight")
    assert newest is not None
    files = sorted(path for path in newest.iterdir() if path.is_file())
    load = PROGRAMS[who].loader(kind, folder)
    silent: dict[str, int] = {}
    # The files in turn, large or small: by size nearly all flips would hit the weights.
    for number in range(flips):
        file = files[number % len(files)]
        original = file.read_bytes()
        content = bytearray(original)
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        file.write_bytes(content)
        try:
            load(newest)
            silent[file.name] = silent.get(file.name, 0) + 1
        # Whatever loading raises, it has noticed.
        except Exception:
            outcome.flips_noticed += 1
        file.write_bytes(original)
        outcome.flips += 1
    if silent:
        names = ", ".join(f"{name} {count}" for name, count in sorted(silent.items()))
        outcome.notes.append(f"loaded in silence: {names}")


def render(outcomes: list[Outcome]) -> str:
    """Format a table with a row per training as Markdown."""
    head = (
        "| training | kills that hit | of these inside a save | resumed unaided | most steps lost "
        f"(a save every {INTERVAL}) | runs ended, of these with equal weights "
        "| flipped bits noticed | minutes |"
    )
    lines = [head, "|" + "---|" * 8]
    for found in outcomes:
        unaided = found.kills - found.failed_resumes
        lines.append(
            f"| {found.who}, {found.kind} | {found.kills} | {found.kills_inside_a_save} "
            f"| {unaided} of {found.kills} | {found.largest_loss} "
            f"| {found.finished}, {found.equal} | {found.flips_noticed} of {found.flips} "
            f"| {found.seconds / 60:.1f} |"
        )
    notes = [f"- {found.who}, {found.kind}: {note}" for found in outcomes for note in found.notes]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def main() -> None:
    """Run all campaigns and print the table."""
    prog = "python -m benchmarks.crash_recovery"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--kills", type=int, default=40, help="of each training")
    parser.add_argument("--out", type=Path, default=Path("out/crash_recovery"))
    parser.add_argument("--who", choices=(*PROGRAMS, "all"), default="all")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    prepare(options.out)
    outcomes = []
    for who in PROGRAMS if options.who == "all" else [options.who]:
        for kind in KINDS:
            outcome = kill_repeatedly(who, kind, options.out, kills=options.kills)
            flip_bits(options.out, outcome, flips=FLIPS)
            outcomes.append(outcome)
            print(render([outcome]).splitlines()[2], flush=True)
    table = render(outcomes)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    own = [outcome for outcome in outcomes if outcome.who == "ours"]
    if any(found.equal < found.finished or found.largest_loss > INTERVAL for found in own):
        raise SystemExit("work was lost")


if __name__ == "__main__":
    main()
