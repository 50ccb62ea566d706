"""One training loop for every model, on Accelerate; it knows steps, never losses.

Order and randomness are functions, not state. The samples of a step are f(seed, step); every
random number of a batch is f(seed, step, place in the global batch), so that they do
not depend on the number of processes; network dropout is f(seed, step, process). A resumed run
therefore continues as if it had never stopped, and a checkpoint needs no RNG, sampler or scheduler
state: it holds weights, their average, optimizer state, and the position in the budget.
"""

import json
import logging
import math
import textwrap
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalle_mini_impl.data.sample_order import SampleOrder, step_generator
from dalle_mini_impl.errors import StoppedError, UserError
from dalle_mini_impl.hardware import is_out_of_memory
from dalle_mini_impl.progress import ProgressLine
from dalle_mini_impl.training.best_weights import BestWeights
from dalle_mini_impl.training.checkpoint import (
    Checkpoint,
    checkpoint_before,
    save_checkpoint,
)
from dalle_mini_impl.training.config import TrainingConfig
from dalle_mini_impl.training.ema import MovingAverage
from dalle_mini_impl.training.metrics import RunningMetrics
from dalle_mini_impl.training.optimizer import (
    build_optimizers,
    flatten_optimizer_state,
    restore_optimizer_state,
)
from dalle_mini_impl.training.resume import require_same_data
from dalle_mini_impl.training.schedule import learning_rate_factor
from dalle_mini_impl.training.signals import StopRequest
from dalle_mini_impl.training.task import ImageGrid, Task
from dalle_mini_impl.training.tracking import Tracker
from dalle_mini_impl.transformer.blocks import recompute_activations

logger = logging.getLogger(__name__)
MAX_SKIPPED_IN_A_ROW = 10
MAX_REASON = 300
NOT_FINITE_NAME = "not_finite.jsonl"
# Three independent streams of random numbers per step.
DROPOUT_PURPOSE, UNIFORMS_PURPOSE, NOISE_PURPOSE = 1, 2, 3

Batch = dict[str, Tensor]


@dataclass
class RunState:
    """Position of a run in its budget."""

    step: int = 0
    elapsed_seconds: float = 0.0
    skipped_in_a_row: int = 0
    skipped_in_all: int = 0
    evaluation_is_due: bool = False
    """Whether a signal cut the evaluation of this step short."""

    def progress(self, config: TrainingConfig) -> float:
        """Fraction of the budget used, in [0, 1]."""
        return config.progress(self.step, self.elapsed_seconds / 60)


class Trainer:
    """Trains a task's model from step 0, or from a checkpoint, to the end of its budget.

    Args:
        task: A fresh model, its data and its loss.
        config: Budget, optimizer and intervals.
        accelerator: Processes, device and precision.
        output_dir: Checkpoints go to ``output_dir / "checkpoints"``.
        tracker: Where metrics and images go; nowhere when None.

    Raises:
        UserError: If the global batch does not divide among processes and accumulation, or
            activation checkpointing is on for a model without our Transformer blocks.
    """

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        *,
        accelerator: Accelerator,
        output_dir: Path,
        tracker: Tracker | None = None,
    ) -> None:
        self.config, self.task = config, task
        self.tracker = tracker or Tracker(None, None)
        self.accelerator = accelerator
        self.divide_batch(config.gradient_accumulation_steps)
        self.checkpoint_dir = output_dir / "checkpoints"
        self.not_finite_file = output_dir / NOT_FINITE_NAME
        self.model = task.model.to(accelerator.device)
        if config.activation_checkpointing and not recompute_activations(self.model):
            raise UserError(
                "training.activation_checkpointing: got true, expected false: "
                f"{type(self.model).__name__} has none of our Transformer blocks"
            )
        # The loss goes through `wrapped`; evaluation, saving and the optimizers see `model`.
        self.wrapped = accelerator.prepare_model(self.model)
        if config.compile:
            # CUDA graphs own their gradients, which a second micro-batch would write over.
            graphs = accelerator.num_processes == config.gradient_accumulation_steps == 1
            mode = "reduce-overhead" if graphs else "default"
            self.wrapped = torch.compile(self.wrapped, dynamic=False, mode=mode)
        self.optimizers = build_optimizers(
            self.model,
            kind=config.optimizer,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=config.betas,
        )
        self.average: MovingAverage | None = None
        if config.ema_decay:
            self.average = MovingAverage(self.model, decay=config.ema_decay)
        self.best: BestWeights | None = None
        if config.keep == "best" and task.selection_metric is not None:
            self.best = BestWeights()
        elif config.patience is not None:
            raise UserError(
                f"training.patience: got {config.patience}, expected null: no evaluation of this "
                "run tells which weights are best"
            )
        self.order = SampleOrder(
            task.num_samples,
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            weights=task.sample_weights,
        )
        self.state = RunState()
        self.run_config: Mapping[str, Any] = {}
        """All settings of the run, kept in its checkpoints."""

    def train(self) -> None:
        """Train to the end of the budget; evaluate, log and save on the way.

        Raises:
            UserError: If the loss stays non-finite, or memory runs out.
            StoppedError: After a signal; a checkpoint of the last step was written.
        """
        try:
            self._train()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"training: out of memory after step {self.state.step}; raise "
                "training.gradient_accumulation_steps (now "
                f"{self.config.gradient_accumulation_steps}) or pass --training.find_batch_size "
                f"true, --training.activation_checkpointing true for a Transformer, lower "
                f"training.global_batch_size (now {self.config.global_batch_size}), or use a "
                "smaller model; existing checkpoints are intact"
            ) from None

    def _train(self) -> None:
        """Run the loop; `train` handles out-of-memory errors."""
        config, state = self.config, self.state
        is_main = self.accelerator.is_main_process
        progress_line = ProgressLine(is_main, progress=state.progress(config))
        started = time.perf_counter() - state.elapsed_seconds
        metrics = RunningMetrics()
        # A second thread pool of torch slowed training by a fifth.
        one_thread = partial(torch.set_num_threads, 1)
        with (
            ThreadPoolExecutor(max_workers=1, initializer=one_thread) as loader,
            StopRequest() as stop_request,
        ):
            next_batches = loader.submit(self._batches, state.step)
            if state.evaluation_is_due:
                self._make_up_for_evaluation(stop_request)
            checkpoint_is_due, ends_early = False, self._is_out_of_patience()
            while state.progress(config) < 1.0 and not ends_early:
                # 1. One step; the batches of the next one are made meanwhile.
                with metrics.waiting():
                    batches = next_batches.result()
                next_batches = loader.submit(self._batches, state.step + 1)
                step_metrics = self._step(batches)
                state.step += 1
                state.elapsed_seconds = self._main_clock(time.perf_counter() - started)
                is_last = state.progress(config) >= 1.0

                # 2. Log.
                metrics.add(step_metrics, samples=config.global_batch_size)
                if is_last or state.step % config.log_every_steps == 0:
                    values = metrics.read(self.accelerator, self.task.tokens_per_sample)
                    self.tracker.log({**values, "progress": state.progress(config)}, state.step)
                    progress_line.update(state.step, state.progress(config), values)
                else:
                    progress_line.tick(state.step, state.progress(config))

                # 3. Evaluate.
                if is_last or state.step % config.evaluate_every_steps == 0:
                    self._evaluate(stop_request)
                    ends_early = self._is_out_of_patience()
                    is_last |= ends_early

                # 4. Save and stop. A signal after the last step comes too late to matter, unless
                # it cut the last evaluation short. All processes must stop at the same step.
                is_finished = is_last and not state.evaluation_is_due
                stop_signal = 0 if is_finished else self._largest(stop_request.signal)
                is_interval = state.step % config.checkpoint_every_steps == 0
                checkpoint_is_due |= is_last or is_interval or stop_signal > 0
                # A skipped step may be the first of many: its checkpoint waits for a good step.
                if checkpoint_is_due and not state.skipped_in_a_row:
                    with metrics.saving():
                        checkpoint_is_due = not self.save()
                if stop_signal:
                    progress_line.close()
                    raise StoppedError(state.step, stop_signal, saved=not checkpoint_is_due)
        progress_line.close()
        logger.info(metrics.cost_of_saving())
        minutes = state.elapsed_seconds / 60
        if config.max_minutes is not None and minutes >= config.max_minutes:
            speed = state.step / max(1e-9, state.elapsed_seconds)
            logger.info(f"{state.step} steps in {minutes:.1f} minutes ({speed:.1f} per second)")

    def _is_out_of_patience(self) -> bool:
        """Tell whether so many evaluations were worse that the run ends early."""
        if self.config.patience is None:
            return False
        # The main process alone has evaluated.
        num_worse = self._largest(0 if self.best is None else self.best.num_worse)
        return num_worse >= self.config.patience

    def _make_up_for_evaluation(self, stop_request: StopRequest) -> None:
        """Run the evaluation that a signal interrupted before this checkpoint was saved."""
        self._evaluate(stop_request)
        self.save()
        if self.state.evaluation_is_due:
            raise StoppedError(self.state.step, self._largest(stop_request.signal))

    def _step(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Make one optimizer update from this process's micro-batches."""
        config, state, accelerator = self.config, self.state, self.accelerator
        progress = state.progress(config)
        # Dropout uses torch's global generator; other noise uses its own.
        seed = torch.randint(2**62, (1,), generator=self._generator(DROPOUT_PURPOSE))
        torch.manual_seed(int(seed))
        generator = self._generator(NOISE_PURPOSE)
        self.wrapped.train()
        if config.compile:  # only then, as the call itself loads the compiler
            torch.compiler.cudagraph_mark_step_begin()
        totals: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            on_device = {name: value.to(accelerator.device) for name, value in batch.items()}
            # DDP exchanges gradients once per update, in the backward pass of the last micro-batch.
            is_last = index == len(batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(self.wrapped):
                with accelerator.autocast():
                    loss, metrics = self.task.loss(
                        self.wrapped, on_device, progress=progress, generator=generator
                    )
                accelerator.backward(loss / len(batches))
            # Sums stay tensors: reading a float would make the host wait for the GPU.
            for name, value in {"loss": loss.detach(), **metrics}.items():
                totals[name] = totals.get(name, 0) + value.detach() / len(batches)
        # Clipping at infinity only measures the norm.
        max_norm = config.gradient_clip_norm or math.inf
        gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        # A function of step and progress only, so there is no scheduler state to resume.
        factor = learning_rate_factor(
            state.step,
            progress,
            warmup_steps=config.warmup_steps,
            schedule=config.schedule,
            decay_fraction=config.decay_fraction,
            cosine_ends_at=config.cosine_ends_at,
            cosine_floor=config.cosine_floor,
        )
        self._update(gradient_norm, totals["loss"], factor)
        totals["gradient_norm"] = gradient_norm.detach()
        totals["learning_rate"] = torch.tensor(config.learning_rate * factor)
        return totals

    def _update(self, gradient_norm: Tensor, loss: Tensor, factor: float) -> None:
        """Step the optimizers, unless any process met a non-finite number."""
        finite = torch.isfinite(gradient_norm) & torch.isfinite(loss)
        # Gradients are the same on all processes, losses are not: one bad process stops them all.
        if self._largest(int(not finite)):
            self._skip_step(loss)
        else:
            self.state.skipped_in_a_row = 0
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
                optimizer.step()
            if self.average is not None:
                self.average.update(self.model, step=self.state.step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _skip_step(self, loss: Tensor) -> None:
        """Count a step without an update; too many in a row end the run."""
        state = self.state
        state.skipped_in_a_row += 1
        state.skipped_in_all += 1
        logger.warning("step %d: loss or gradient not finite; no update", state.step)
        self._note_samples(loss)
        if state.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            return
        # A checkpoint of the first of these steps holds the very weights that failed.
        first = state.step + 1 - MAX_SKIPPED_IN_A_ROW
        good = checkpoint_before(self.checkpoint_dir, first)
        remedy = f"pass --resume {good}" if good else "start again in another output_dir"
        raise UserError(
            f"training: the loss was not finite {MAX_SKIPPED_IN_A_ROW} steps in a row up to step "
            f"{state.step}; {self.not_finite_file} lists the samples; lower "
            f"training.learning_rate (now {self.config.learning_rate}) and {remedy}"
        )

    def _note_samples(self, loss: Tensor) -> None:
        """List the samples of a skipped step, so that a bad one among them can be found."""
        losses = self.accelerator.gather(loss.detach().float().reshape(1)).tolist()
        if not self.accelerator.is_main_process:
            return
        # Losses as text: JSON has no nan.
        row = {
            "step": self.state.step,
            "loss_of_each_process": [str(value) for value in losses],
            "sample_ids": self.order.indices(self.state.step).tolist(),
        }
        try:
            with self.not_finite_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            logger.warning("cannot write %s: %s", self.not_finite_file, error)

    @torch.no_grad()
    def _evaluate(self, stop_request: StopRequest) -> None:
        """Evaluate with the averaged weights, if there are any; a signal cuts it short."""
        config, state = self.config, self.state
        make_grids = state.progress(config) >= 1.0 or state.step % config.sample_every_steps == 0

        def work() -> tuple[dict[str, float], list[ImageGrid]]:
            return self.task.evaluate(), self.task.make_image_grids() if make_grids else []

        # All processes swap, as all go on with the same weights; only the main one evaluates.
        if self.average is not None:
            self.average.swap(self.model)
        self.model.eval()
        was_cut_short = False
        if self.accelerator.is_main_process:
            result = stop_request.run_unless_stopped(work)
            was_cut_short = result is None
            if result is not None:
                metrics, grids = result
                self.tracker.log(metrics, state.step)
                if self.best is not None and self.task.selection_metric is not None:
                    name = self.task.selection_metric
                    self.best.offer(self.model, metrics, name=name, step=state.step)
                for grid in grids:
                    self.tracker.log_images(grid.key, grid.images, grid.captions, state.step)
        if self.average is not None:
            self.average.swap(self.model)
        state.evaluation_is_due = bool(self._largest(int(was_cut_short)))

    def save(self) -> bool:
        """Write a checkpoint; False, on the main process, if weights or moments are not finite."""
        saved = True
        if self.accelerator.is_main_process:
            tensors = {"model": self.model.state_dict()}
            state: dict[str, Any] = {
                **vars(self.state),
                "run_id": self.tracker.run_id,
                "identity": self.task.identity,
                "num_samples": self.task.num_samples,
                "num_processes": self.accelerator.num_processes,
                "config": self.run_config,
            }
            if self.average is not None:
                tensors["average"] = self.average.weights
            if self.best is not None and self.best.step >= 0:
                tensors["best"], state["best"] = self.best.weights, self.best.position()
            for index, optimizer in enumerate(self.optimizers):
                name = f"optimizer_{index}"
                tensors[name], state[name] = flatten_optimizer_state(optimizer)
            values = [value for group in tensors.values() for value in group.values()]
            saved = all(bool(value.isfinite().all()) for value in values)
            if saved:
                save_checkpoint(self.checkpoint_dir, self.state.step, tensors=tensors, state=state)
            else:
                logger.warning("step %d: weights not finite; no checkpoint", self.state.step)
        self.accelerator.wait_for_everyone()
        return saved

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: If it belongs to another model, optimizer or token data set.
        """
        require_same_data(checkpoint, self.task.identity, self.task.num_samples)
        try:
            self.model.load_state_dict(checkpoint.tensors["model"])
            if self.average is not None:
                self.average.load(checkpoint.tensors["average"])
            if self.best is not None and "best" in checkpoint.tensors:
                self.best.load(checkpoint.tensors["best"], checkpoint.state["best"])
            for index, optimizer in enumerate(self.optimizers):
                name = f"optimizer_{index}"
                restore_optimizer_state(optimizer, checkpoint.tensors[name], checkpoint.state[name])
            # No `skipped_in_a_row`: a checkpoint is written after a good step only.
            self.state = RunState(
                step=checkpoint.step,
                elapsed_seconds=float(checkpoint.state["elapsed_seconds"]),
                skipped_in_all=int(checkpoint.state["skipped_in_all"]),
                evaluation_is_due=bool(checkpoint.state["evaluation_is_due"]),
            )
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            first = " ".join(str(error).splitlines()[:2])  # torch lists every difference
            reason = textwrap.shorten(first, MAX_REASON)
            raise UserError(
                f"resume: {checkpoint.path} does not fit this config: {reason}; expected the "
                "config that the run was started with, or another output_dir"
            ) from None

    def divide_batch(self, accumulation: int) -> None:
        """Set the micro-batches per update on each process; the global batch stays.

        Raises:
            UserError: If the global batch does not divide among processes and accumulation.
        """
        processes, batch_size = self.accelerator.num_processes, self.config.global_batch_size
        parts = processes * accumulation
        if batch_size % parts:
            raise UserError(
                f"training.global_batch_size: got {batch_size}, expected a multiple of {parts} "
                f"({processes} processes x {accumulation} gradient_accumulation_steps)"
            )
        self.config = replace(self.config, gradient_accumulation_steps=accumulation)
        self.micro_batch_size = batch_size // parts

    @torch.no_grad()
    def use_kept(self) -> None:
        """Put the weights that the run keeps into the model, for good: the best, or the last."""
        if self.average is not None:
            self.average.swap(self.model)
        best = self.best
        # The main process alone has evaluated, and it alone writes the model.
        if best is None or best.step < 0:
            return
        if best.step != self.state.step:
            self.model.load_state_dict(best.weights)
            logger.info(f"kept the weights of step {best.step}, the best on held-out images")
        prefix = "validation/"
        kept = {
            f"kept/{name.removeprefix(prefix)}": value
            for name, value in best.metrics.items()
            if name.startswith(prefix)
        }
        self.tracker.log({"kept/step": float(best.step), **kept}, self.state.step)

    def _batches(self, step: int) -> list[Batch]:
        """Make this process's micro-batches of one step."""
        sample_ids = self.order.indices(step)
        shape = (len(sample_ids), self.task.num_uniforms)
        # Every process makes the numbers of the whole global batch and takes its own rows: a
        # sample gets the same ones on any number of processes.
        generator = step_generator(self.config.seed, step, 0, UNIFORMS_PURPOSE)
        uniforms = torch.rand(shape, generator=generator)
        # Process r takes the r-th part of the global batch, in order.
        size, accumulation = self.micro_batch_size, self.config.gradient_accumulation_steps
        start = self.accelerator.process_index * size * accumulation
        slices = [slice(start + i * size, start + (i + 1) * size) for i in range(accumulation)]
        return [self.task.make_batch(sample_ids[part], uniforms[part]) for part in slices]

    def _generator(self, purpose: int) -> torch.Generator:
        rank = self.accelerator.process_index
        return step_generator(self.config.seed, self.state.step, rank, purpose)

    def _main_clock(self, seconds: float) -> float:
        """Take the main process's clock, so that all stop at the same step."""
        if self.accelerator.num_processes == 1:
            return seconds
        # float64: a float32 of a run's seconds would lose milliseconds after some hours.
        clock = torch.tensor([seconds], dtype=torch.float64, device=self.accelerator.device)
        torch.distributed.broadcast(clock, src=0)
        return float(clock)

    def _largest(self, number: int) -> int:
        """Return the largest of all processes' numbers, the same on each."""
        if self.accelerator.num_processes == 1:
            return number
        own = torch.tensor([number], device=self.accelerator.device)
        return int(self.accelerator.gather(own).max())
