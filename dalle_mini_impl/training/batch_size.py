"""What to do when memory runs out: say it in one line, or look beforehand for what fits."""

import sys
from collections.abc import Callable, Sequence

import torch

from dalle_mini_impl.errors import UserError

# What torch says on a CPU; no room for a thread's stack; none for what oneDNN needs to begin.
SIGNS = (
    "allocate memory",
    "not enough memory",
    "can't start new thread",
    "could not create a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that there is not enough memory, of a GPU or of the machine.

    Args:
        error: Any.

    Returns:
        True if it does.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if any(sign in str(error) for sign in SIGNS):
        return True
    # Imported here: it takes a second, and where memory is short there may be none for it.
    from accelerate.utils.memory import should_reduce_batch_size

    return should_reduce_batch_size(error)


def running_out_is_an_error(device: torch.device) -> bool:
    """Tell whether too much memory raises here, and does not end the process or stall the machine.

    Args:
        device: Where the model is.

    Returns:
        True on a GPU; on a CPU only under a limit such as ``ulimit -v``.
    """
    if device.type != "cpu":
        return True
    if sys.platform == "win32":
        return False
    import resource

    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def fewest_parts_that_fit(batch_size: int, attempt: Callable[[int], None]) -> int:
    """Find the largest micro-batch that fits into memory.

    Accelerate's ``find_executable_batch_size`` takes a tenth off at a time, which divides no batch
    evenly and so changes it; here only whole parts are tried.

    Args:
        batch_size: Samples of one process per optimizer update.
        attempt: Does the work of one micro-batch of so many samples, and leaves nothing behind.

    Returns:
        Into how many micro-batches the batch has to be divided.

    Raises:
        UserError: If not even one sample fits.
    """
    from accelerate.utils.memory import clear_device_cache

    for parts in _divisors(batch_size):
        clear_device_cache(garbage_collection=True)
        if _fits(attempt, batch_size // parts):
            clear_device_cache(garbage_collection=True)
            return parts
    raise UserError(
        "training.find_batch_size: not even one sample fits into memory; wanted a smaller model or "
        "smaller pictures"
    )


def _fits(attempt: Callable[[int], None], size: int) -> bool:
    """Try; what a failed try held is free again on return, with the frames of its error."""
    try:
        attempt(size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _divisors(number: int) -> Sequence[int]:
    return [parts for parts in range(1, number + 1) if number % parts == 0]
