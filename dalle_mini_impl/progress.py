"""Progress of long work: a bar on a terminal, logged lines elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm

logger = logging.getLogger(__name__)

LONGEST_SILENCE_SECONDS = 30.0
SECONDS_BETWEEN_LINES = 10.0


class ProgressLine:
    """Shows step, loss, speed and the time left, on the main process only.

    ``progress`` is always a fraction of the run's budget, in [0, 1]; the first one is what earlier
    parts of the run have used.
    """

    def __init__(self, is_main: bool, *, progress: float) -> None:
        self._is_main = is_main
        self._started, self._progress_at_start = time.monotonic(), progress
        self._last_shown = self._started
        self._bar = tqdm(
            total=100.0,
            initial=100 * progress,
            disable=not (is_main and sys.stderr.isatty()),
            bar_format="{percentage:3.0f}% {bar} {elapsed} < {remaining}{postfix}",
        )

    def update(self, step: int, progress: float, values: Mapping[str, float]) -> None:
        """Show the metrics of one log interval."""
        if not self._is_main:
            return
        loss, speed = values["train/loss"], values["train/tokens_per_second"]
        text = f"step {step}  loss {loss:.4f}  {speed:.0f} tokens/s"
        if self._bar.disable:
            self._log(text, progress)
            return
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(100 * progress - self._bar.n)

    def tick(self, step: int, progress: float) -> None:
        """Log a sign of life between two log intervals that are far apart."""
        silent = time.monotonic() - self._last_shown
        if self._is_main and self._bar.disable and silent >= LONGEST_SILENCE_SECONDS:
            self._log(f"step {step}", progress)

    def _log(self, text: str, progress: float) -> None:
        self._last_shown = time.monotonic()
        seconds = self._last_shown - self._started
        # A resumed run has spent its seconds on its own part of the budget alone.
        left = seconds * (1 - progress) / max(1e-9, progress - self._progress_at_start)
        times = f"{tqdm.format_interval(seconds)}, {tqdm.format_interval(left)} left"
        logger.info(f"{100 * progress:3.0f} %  {text}  {times}")

    def close(self) -> None:
        """Keep the bar's last line on the screen."""
        self._bar.close()


def log_now_and_then(what: str) -> Callable[[int, int], None]:
    """Make a callback (done, total) that logs a line about every ten seconds."""
    last = time.monotonic()

    def step(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        # The last call is silent: what follows the loop has a line of its own.
        if now - last >= SECONDS_BETWEEN_LINES and done < total:
            last = now
            logger.info(f"{what}: {done} of {total}")

    return step


def counted(number: int, noun: str) -> str:
    """Write a number of things: 1 image, 2 images."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
