"""What a person sees while a model trains: a bar on a terminal, plain lines elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm

logger = logging.getLogger(__name__)

LONGEST_SILENCE_SECONDS = 30.0
SECONDS_BETWEEN_LINES = 10.0


class ProgressLine:
    """Shows step, loss, speed and the time left, on the main process only."""

    def __init__(self, is_main: bool, *, progress: float) -> None:
        """Open the bar.

        Args:
            is_main: Whether this is the process that talks.
            progress: Fraction of the budget that an earlier part of the run used, in [0, 1].
        """
        self._is_main = is_main
        self._started, self._progress_at_start = time.monotonic(), progress
        self._shown = self._started
        self._bar = tqdm(
            total=100.0,
            initial=100 * progress,
            disable=not (is_main and sys.stderr.isatty()),
            bar_format="{percentage:3.0f}% {bar} {elapsed} < {remaining}{postfix}",
        )

    def update(self, step: int, progress: float, values: Mapping[str, float]) -> None:
        """Show one log interval.

        Args:
            step: Optimizer updates done.
            progress: Fraction of the budget used, in [0, 1].
            values: Metrics of the interval.
        """
        if not self._is_main:
            return
        loss, speed = values["train/loss"], values["train/tokens_per_second"]
        text = f"step {step}  loss {loss:.4f}  {speed:.0f} tokens/s"
        if self._bar.disable:
            self._show_line(text, progress)
            return
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(100 * progress - self._bar.n)

    def tick(self, step: int, progress: float) -> None:
        """Show a sign of life between two log intervals, where they are far apart.

        Args:
            step: Optimizer updates done.
            progress: Fraction of the budget used, in [0, 1].
        """
        silent = time.monotonic() - self._shown
        if self._is_main and self._bar.disable and silent >= LONGEST_SILENCE_SECONDS:
            self._show_line(f"step {step}", progress)

    def _show_line(self, text: str, progress: float) -> None:
        self._shown = time.monotonic()
        seconds = self._shown - self._started
        left = seconds * (1 - progress) / max(1e-9, progress - self._progress_at_start)
        times = f"{tqdm.format_interval(seconds)}, {tqdm.format_interval(left)} left"
        logger.info(f"{100 * progress:3.0f} %  {text}  {times}")

    def close(self) -> None:
        """Leave the last line standing."""
        self._bar.close()


def log_now_and_then(what: str) -> Callable[[int, int], None]:
    """Make a callback that logs a line about every ten seconds of a loop.

    Args:
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
            logger.info(f"{what}: {done} of {total}")

    return step
