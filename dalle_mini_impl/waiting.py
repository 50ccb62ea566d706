"""What a person sees during long work that has no bar: a line now and then."""

import time
from collections.abc import Callable

SECONDS_BETWEEN_LINES = 10.0


def show_now_and_then(show: Callable[[str], None], what: str) -> Callable[[int, int], None]:
    """Make a callback for a loop that is silent otherwise.

    Args:
        show: Receives a line about every ten seconds.
        what: What is counted.

    Returns:
        To be called with (done, total) as often as one likes.
    """
    last = time.monotonic()

    def step(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and done < total:
            last = now
            show(f"{what}: {done} of {total}")

    return step
