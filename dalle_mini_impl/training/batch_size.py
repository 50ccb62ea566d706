"""What to do when memory runs out: say it in one line, or look beforehand for what fits."""

from collections.abc import Callable, Sequence

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.hardware import is_out_of_memory


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
        "training.find_batch_size: not even one sample fits into memory; expected a smaller model or "
        "smaller images"
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
