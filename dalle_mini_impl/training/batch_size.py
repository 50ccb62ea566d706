"""``training.find_batch_size``: the largest micro-batch that fits into memory."""

import copy
import logging
from collections.abc import Callable

import torch

from dalle_mini_impl.data.sample_order import step_generator
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.hardware import is_out_of_memory, running_out_is_an_error
from dalle_mini_impl.training.checkpoint import Checkpoint
from dalle_mini_impl.training.trainer import NOISE_PURPOSE, Trainer

logger = logging.getLogger(__name__)


def choose_batch_size(trainer: Trainer, checkpoint: Checkpoint | None) -> None:
    """Divide the batch into as few micro-batches as fit into memory; no weight is updated.

    A resumed run keeps the size that it began with: the sums of another one round differently.

    Raises:
        UserError: If there are several processes, or not even one sample fits.
    """
    before = checkpoint.state["config"].get("training", {}) if checkpoint else {}
    if before.get("find_batch_size"):
        trainer.divide_batch(before["gradient_accumulation_steps"])
    else:
        _find_batch_size(trainer)
    parts, size = trainer.config.gradient_accumulation_steps, trainer.micro_batch_size
    logger.info(f"micro-batches of {size}: training.gradient_accumulation_steps {parts}")


def _find_batch_size(trainer: Trainer) -> None:
    if trainer.accelerator.num_processes > 1:
        raise UserError(
            "training.find_batch_size: got true with several processes, expected one: run it on "
            "one with the fraction of training.global_batch_size that each will have, and pass "
            "on what it finds as training.gradient_accumulation_steps"
        )
    if not running_out_is_an_error(trainer.accelerator.device):
        logger.warning(
            "training.find_batch_size: passed over, as this system ends a process that asks "
            "for too much; set a limit first (ulimit -v)"
        )
        return
    parts = fewest_parts_that_fit(
        trainer.config.global_batch_size, lambda size: _try_micro_batch(trainer, size)
    )
    trainer.divide_batch(parts)


def fewest_parts_that_fit(batch_size: int, attempt: Callable[[int], None]) -> int:
    """Return the least number of equal micro-batches that fit into memory.

    ``attempt`` computes a micro-batch of a given size, and leaves nothing behind.

    Raises:
        UserError: If not even one sample fits.
    """
    from accelerate.utils.memory import clear_device_cache

    # Accelerate's `find_executable_batch_size` takes a tenth off at a time, which divides no batch
    # evenly and so changes it.
    for parts in range(1, batch_size + 1):
        if batch_size % parts:
            continue
        clear_device_cache(garbage_collection=True)
        if _fits(attempt, batch_size // parts):
            clear_device_cache(garbage_collection=True)
            return parts
    raise UserError(
        "training.find_batch_size: not even one sample fits into memory; expected a smaller model "
        "or smaller images"
    )


def _fits(attempt: Callable[[int], None], size: int) -> bool:
    # A function of its own: its return frees the frames of a failed attempt, with their tensors.
    try:
        attempt(size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _try_micro_batch(trainer: Trainer, size: int) -> None:
    """Compute the gradient of one micro-batch, with room for what the optimizer will take."""
    task, accelerator = trainer.task, trainer.accelerator
    # A copy, as some models learn in the forward pass (codebooks by EMA). The copy itself takes
    # the place of one of Adam's two moments.
    model = copy.deepcopy(trainer.model).train()
    moments = [torch.empty_like(weight) for weight in model.parameters()]
    # A quarter more samples: memory is fragmented after some steps.
    sample_ids = trainer.order.indices(0).repeat(2)[: size + -(-size // 4)]
    batch = task.make_batch(sample_ids, torch.zeros(len(sample_ids), task.num_uniforms))
    on_device = {name: value.to(accelerator.device) for name, value in batch.items()}
    seed, step = trainer.config.seed, trainer.state.step
    for progress in (0.0, 1.0):  # some terms of a loss begin late
        generator = step_generator(seed, step, accelerator.process_index, NOISE_PURPOSE)
        with accelerator.autocast():
            loss, _ = task.loss(model, on_device, progress=progress, generator=generator)
        accelerator.backward(loss)
    del moments
