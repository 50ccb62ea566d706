"""One training loop for every model, on Accelerate: it knows steps, never losses.

Order and randomness are functions, not state. The samples of a step are f(seed, step); every
random number a batch needs is f(seed, step, place in the global batch), so that any number of
processes trains on the same numbers; network dropout is f(seed, step, process). A run that was
stopped continues as if it had not been, and a checkpoint stores nothing but weights, moments and
the step.
"""

import copy
import json
import logging
import math
import textwrap
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalle_mini_impl.data.sample_order import SampleOrder, step_generator
from dalle_mini_impl.errors import StoppedError, UserError
from dalle_mini_impl.hardware import is_out_of_memory, running_out_is_an_error
from dalle_mini_impl.progress import ProgressLine
from dalle_mini_impl.training.batch_size import fewest_parts_that_fit
from dalle_mini_impl.training.checkpoint import (
    Checkpoint,
    checkpoint_before,
    flatten_optimizer_state,
    restore_optimizer_state,
    save_checkpoint,
)
from dalle_mini_impl.training.config import TrainingConfig
from dalle_mini_impl.training.ema import MovingAverage
from dalle_mini_impl.training.metrics import Meter
from dalle_mini_impl.training.optimizer import build_optimizers, keep_memory_formats
from dalle_mini_impl.training.schedule import learning_rate_factor
from dalle_mini_impl.training.signals import StopRequest
from dalle_mini_impl.training.task import ImageGrid, Task
from dalle_mini_impl.training.tracking import Tracker
from dalle_mini_impl.transformer.blocks import recompute_activations

logger = logging.getLogger(__name__)
MAX_SKIPPED_IN_A_ROW = 10
MAX_REASON = 300
NOT_FINITE_NAME = "not_finite.jsonl"
DROPOUT_PURPOSE, UNIFORMS_PURPOSE, NOISE_PURPOSE = 1, 2, 3


@dataclass
class RunState:
    """Where a run stands."""

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
    """A model, its task and its optimizers, between two checkpoints."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainingConfig,
        *,
        accelerator: Accelerator,
        output_dir: Path,
        tracker: Tracker | None = None,
    ) -> None:
        """Prepare a run at step 0.

        Args:
            model: Freshly built or loaded; moved to the accelerator's device.
            task: Its data and loss.
            config: Budget, optimizer and intervals.
            accelerator: Processes, device and precision.
            output_dir: Checkpoints go to ``output_dir / "checkpoints"``.
            tracker: Where metrics and images go; nowhere when None.

        Raises:
            UserError: If the global batch does not divide among processes and accumulation, or
                activations shall be recomputed in a model without our Transformer blocks.
        """
        self.config, self.task = config, task
        self.tracker = tracker or Tracker(None, None)
        self.accelerator = accelerator
        self.divide_batch(config.gradient_accumulation_steps)
        self.checkpoint_dir = output_dir / "checkpoints"
        self.not_finite_file = output_dir / NOT_FINITE_NAME
        self.model = model.to(accelerator.device)
        if config.activation_checkpointing and not recompute_activations(self.model):
            raise UserError(
                "training.activation_checkpointing: got true, expected false: "
                f"{type(model).__name__} has none of our Transformer blocks"
            )
        self.wrapped = accelerator.prepare_model(self.model)
        if config.compile:  # evaluation and generation, whose shapes vary, go through self.model
            # CUDA graphs keep gradients where the next micro-batch would write over them.
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
        self.average = (
            MovingAverage(self.model, decay=config.ema_decay) if config.ema_decay else None
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
        """Run to the end of the budget, evaluating, generation and saving on the way.

        Raises:
            UserError: If the loss stays non-finite, or memory runs out.
            StoppedError: If a signal asked for it; a checkpoint of the last step was written.
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
                f"training.global_batch_size (now {self.config.global_batch_size}), or take a "
                "smaller model; checkpoints are whole"
            ) from None

    def _train(self) -> None:
        """Do it, without a care for memory."""
        config, state = self.config, self.state
        progress_line = ProgressLine(
            self.accelerator.is_main_process, progress=state.progress(config)
        )
        started = time.perf_counter() - state.elapsed_seconds
        meter = Meter()
        # One thread only: a second team of threads beside the training's took a fifth of its speed.
        loader_threads = partial(torch.set_num_threads, 1)
        with (
            ThreadPoolExecutor(max_workers=1, initializer=loader_threads) as loader,
            StopRequest() as request,
        ):
            pending = self._prefetch(loader, state.step)
            if state.evaluation_is_due:
                self._evaluate(request)
                self.save()
                if state.evaluation_is_due:
                    raise StoppedError(state.step, self._largest(request.signal))
            is_due = False
            while state.progress(config) < 1.0:
                with meter.waiting():
                    batches = pending.result()
                pending = self._prefetch(loader, state.step + 1)
                metrics = self._step(batches)
                state.step += 1
                state.elapsed_seconds = self._agreed(time.perf_counter() - started)
                meter.add(metrics, samples=config.global_batch_size)
                done = state.progress(config) >= 1.0
                if done or state.step % config.log_every_steps == 0:
                    values = meter.read(self.accelerator, self.task.tokens_per_sample)
                    self.tracker.log({**values, "progress": state.progress(config)}, state.step)
                    progress_line.update(state.step, state.progress(config), values)
                else:
                    progress_line.tick(state.step, state.progress(config))
                if done or state.step % config.evaluate_every_steps == 0:
                    self._evaluate(request)
                # A run that is all done ends as if no signal had come.
                goes_on = not done or state.evaluation_is_due
                stop_signal = self._largest(request.signal) if goes_on else 0
                is_due |= done or stop_signal > 0 or state.step % config.checkpoint_every_steps == 0
                # A step that was skipped may be the first of many: its checkpoint waits.
                if is_due and not state.skipped_in_a_row:
                    with meter.saving():
                        is_due = not self.save()
                if stop_signal:
                    progress_line.close()
                    raise StoppedError(state.step, stop_signal, saved=not is_due)
        progress_line.close()
        logger.info(meter.cost_of_saving())
        minutes = state.elapsed_seconds / 60
        if config.max_minutes is not None and minutes >= config.max_minutes:
            speed = state.step / max(1e-9, state.elapsed_seconds)
            logger.info(f"{state.step} steps in {minutes:.1f} minutes ({speed:.1f} per second)")

    def _step(self, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Make one optimizer update from this process's micro-batches."""
        config, state, accelerator = self.config, self.state, self.accelerator
        progress = state.progress(config)
        torch.manual_seed(self._seed(DROPOUT_PURPOSE))
        generator = self._generator(NOISE_PURPOSE)
        self.wrapped.train()
        if config.compile:  # not otherwise: it loads the compiler
            torch.compiler.cudagraph_mark_step_begin()
        totals: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            on_device = {name: value.to(accelerator.device) for name, value in batch.items()}
            is_last = index == len(batches) - 1
            with _no_gradient_sync(accelerator, self.wrapped, skip=is_last):
                with accelerator.autocast():
                    loss, metrics = self.task.loss(
                        self.wrapped, on_device, progress=progress, generator=generator
                    )
                accelerator.backward(loss / len(batches))
            for name, value in {"loss": loss.detach(), **metrics}.items():
                totals[name] = totals.get(name, 0) + value.detach() / len(batches)
        gradient_norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), config.gradient_clip_norm or math.inf
        )
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
        state = self.state
        finite = torch.isfinite(gradient_norm) & torch.isfinite(loss)
        if self._largest(int(not finite)):
            state.skipped_in_a_row += 1
            state.skipped_in_all += 1
            logger.warning("step %d: loss or gradient not finite; no update", state.step)
            self._note_samples(loss)
            if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                # A checkpoint of the first of these steps holds the weights that failed in all.
                first = state.step + 1 - MAX_SKIPPED_IN_A_ROW
                good = checkpoint_before(self.checkpoint_dir, first)
                remedy = f"pass --resume {good}" if good else "start anew in another output_dir"
                raise UserError(
                    f"training: the loss was not finite {MAX_SKIPPED_IN_A_ROW} steps in a row up "
                    f"to step {state.step}; {self.not_finite_file} lists the samples; lower "
                    "training.learning_rate (now "
                    f"{self.config.learning_rate}) and {remedy}"
                )
        else:
            state.skipped_in_a_row = 0
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
                optimizer.step()
            if self.average is not None:
                self.average.update(self.model, step=state.step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _note_samples(self, loss: Tensor) -> None:
        """Write which samples a skipped step was made of, to find a bad one among them."""
        losses = self.accelerator.gather(loss.detach().float().reshape(1)).tolist()
        if not self.accelerator.is_main_process:
            return
        row = {
            "step": self.state.step,
            "loss_of_each_process": [str(value) for value in losses],  # JSON knows no nan
            "sample_ids": self.order.indices(self.state.step).tolist(),
        }
        try:
            with self.not_finite_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            logger.warning("cannot write %s: %s", self.not_finite_file, error)

    @torch.no_grad()
    def _evaluate(self, request: StopRequest) -> None:
        """Measure and generate with the averaged weights, if there are any; a signal cuts it short."""
        config, state = self.config, self.state
        make_grids = state.progress(config) >= 1.0 or state.step % config.sample_every_steps == 0

        def work() -> tuple[dict[str, float], list[ImageGrid]]:
            metrics = self.task.evaluate(self.model)
            return metrics, self.task.make_image_grids(self.model) if make_grids else []

        if self.average is not None:
            self.average.swap(self.model)
        self.model.eval()
        done = True
        if self.accelerator.is_main_process:
            found = request.run_unless_stopped(work)
            if found is None:
                done = False
            else:
                self.tracker.log(found[0], state.step)
                for grid in found[1]:
                    self.tracker.log_images(grid.key, grid.images, grid.captions, state.step)
        if self.average is not None:
            self.average.swap(self.model)
        state.evaluation_is_due = bool(self._largest(int(not done)))

    def save(self) -> bool:
        """Write a checkpoint of the current step, unless it would hold non-finite numbers.

        Returns:
            False on the main process if nothing was written.
        """
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
            for index, optimizer in enumerate(self.optimizers):
                name = f"optimizer_{index}"
                tensors[name], state[name] = flatten_optimizer_state(optimizer)
            saved = all(
                bool(value.isfinite().all())
                for group in tensors.values()
                for value in group.values()
            )
            if saved:
                save_checkpoint(self.checkpoint_dir, self.state.step, tensors=tensors, state=state)
            else:
                logger.warning("step %d: weights not finite; no checkpoint", self.state.step)
        self.accelerator.wait_for_everyone()
        return saved

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Args:
            checkpoint: Of a run with the same config.

        Raises:
            UserError: If it is of another model, another optimizer, or other tokens.
        """
        if checkpoint.state.get("identity") != self.task.identity:
            raise UserError(
                f"resume: {checkpoint.path} was trained on other tokens: the image tokenizer, the "
                "images or the captions have changed since; expected them as they were, or another "
                "output_dir"
            )
        num_samples = checkpoint.state.get("num_samples", self.task.num_samples)
        if num_samples != self.task.num_samples:
            raise UserError(
                f"resume: {checkpoint.path} was trained on {num_samples} samples, now there are "
                f"{self.task.num_samples}; expected the same ones, or another output_dir"
            )
        try:
            self.model.load_state_dict(checkpoint.tensors["model"])
            if self.average is not None:
                self.average.load(checkpoint.tensors["average"])
            for index, optimizer in enumerate(self.optimizers):
                name = f"optimizer_{index}"
                # torch would put the saved run's learning rate in place of this config's.
                options = [dict(group) for group in optimizer.param_groups]
                restore_optimizer_state(optimizer, checkpoint.tensors[name], checkpoint.state[name])
                for group, own in zip(optimizer.param_groups, options, strict=True):
                    group.update(own)
                keep_memory_formats(optimizer)
            self.state = RunState(
                step=checkpoint.step,
                elapsed_seconds=float(checkpoint.state["elapsed_seconds"]),
                skipped_in_all=int(checkpoint.state["skipped_in_all"]),
                evaluation_is_due=bool(checkpoint.state.get("evaluation_is_due", False)),
            )
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            first = " ".join(str(error).splitlines()[:2])  # torch lists all that differs
            reason = textwrap.shorten(first, MAX_REASON)
            raise UserError(
                f"resume: {checkpoint.path} does not fit this config: {reason}; expected the config "
                "that the run was started with, or another output_dir"
            ) from None

    def divide_batch(self, accumulation: int) -> None:
        """Make each process's fraction of the batch in so many micro-batches.

        Args:
            accumulation: Micro-batches per update on each process.

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

    def find_batch_size(self) -> None:
        """Divide the batch into as few micro-batches as memory has room for; no update is made.

        Raises:
            UserError: If there are several processes, or not even one sample fits.
        """
        if self.accelerator.num_processes > 1:
            raise UserError(
                "training.find_batch_size: got true with several processes, expected one: run it on "
                "one with the fraction of training.global_batch_size that each will have, and pass "
                "on what it finds as training.gradient_accumulation_steps"
            )
        if not running_out_is_an_error(self.accelerator.device):
            logger.warning(
                "training.find_batch_size: passed over, as this system ends a process that asks "
                "for too much; set a limit first (ulimit -v)"
            )
            return
        batch_size = self.config.global_batch_size
        self.divide_batch(fewest_parts_that_fit(batch_size, self._try_micro_batch))

    def _try_micro_batch(self, size: int) -> None:
        """Make the gradient of one micro-batch beside as much memory as the optimizer will take.

        It is made of a quarter more samples: memory has gaps after some steps.
        """
        model = copy.deepcopy(self.model).train()  # as some models learn by being used
        moments = [torch.empty_like(weight) for weight in model.parameters()]  # the copy is more
        sample_ids = self.order.indices(0).repeat(2)[: size + -(-size // 4)]
        uniforms = torch.zeros(len(sample_ids), self.task.num_uniforms)
        batch = self.task.make_batch(sample_ids, uniforms)
        on_device = {name: value.to(self.accelerator.device) for name, value in batch.items()}
        for progress in (0.0, 1.0):  # some parts of a loss begin late
            with self.accelerator.autocast():
                loss, _ = self.task.loss(
                    model, on_device, progress=progress, generator=self._generator(NOISE_PURPOSE)
                )
            self.accelerator.backward(loss)
        del moments

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the averaged weights into the model, for good."""
        if self.average is not None:
            self.average.swap(self.model)

    def _prefetch(self, loader: ThreadPoolExecutor, step: int) -> Future[list[dict[str, Tensor]]]:
        return loader.submit(self._batches, step)

    def _batches(self, step: int) -> list[dict[str, Tensor]]:
        """Make this process's micro-batches of one step."""
        sample_ids = self.order.indices(step)
        shape = (len(sample_ids), self.task.num_uniforms)
        generator = step_generator(self.config.seed, step, 0, UNIFORMS_PURPOSE)
        uniforms = torch.rand(shape, generator=generator)
        size, accumulation = self.micro_batch_size, self.config.gradient_accumulation_steps
        start = self.accelerator.process_index * size * accumulation
        slices = [slice(start + i * size, start + (i + 1) * size) for i in range(accumulation)]
        return [self.task.make_batch(sample_ids[part], uniforms[part]) for part in slices]

    def _generator(self, purpose: int) -> torch.Generator:
        rank = self.accelerator.process_index
        return step_generator(self.config.seed, self.state.step, rank, purpose)

    def _seed(self, purpose: int) -> int:
        return int(torch.randint(2**62, (1,), generator=self._generator(purpose)))

    def _agreed(self, seconds: float) -> float:
        """Take the main process's clock, so that all stop at the same step."""
        if self.accelerator.num_processes == 1:
            return seconds
        clock = torch.tensor([seconds], dtype=torch.float64, device=self.accelerator.device)
        torch.distributed.broadcast(clock, src=0)
        return float(clock)

    def _largest(self, number: int) -> int:
        """Agree with the other processes on the largest of their numbers."""
        if self.accelerator.num_processes == 1:
            return number
        own = torch.tensor([number], device=self.accelerator.device)
        return int(self.accelerator.gather(own).max())


def _no_gradient_sync(accelerator: Accelerator, model: nn.Module, *, skip: bool) -> Any:
    """Hold back DDP's gradient exchange until the last micro-batch."""
    from contextlib import nullcontext

    return nullcontext() if skip else accelerator.no_sync(model)
