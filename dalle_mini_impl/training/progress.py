"""What a person sees while a model trains: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Callable, Mapping

from tqdm import tqdm


class ProgressLine:
    """Shows step, loss, speed and the time left, on the main process only."""

    def __init__(self, is_main: bool, max_steps: int, show: Callable[[str], None]) -> None:
        """Open the bar.

        Args:
            is_main: Whether this is the process that talks.
            max_steps: Budget of the run in steps.
            show: Receives the plain lines.
        """
        self._is_main = is_main
        self._max_steps = max_steps
        self._show = show
        self._bar = tqdm(
            total=100.0,
            disable=not (is_main and sys.stderr.isatty()),
            bar_format="{percentage:3.0f}% {bar} {elapsed} < {remaining}{postfix}",
        )

    def update(self, step: int, progress: float, values: Mapping[str, float]) -> None:
        """Show one log interval.

        Args:
            step: Optimizer updates done.
            progress: Share of the budget used, in [0, 1].
            values: Metrics of the interval.
        """
        if not self._is_main:
            return
        loss = values["train/loss"]
        speed = values["train/samples_per_second"]
        text = f"step {step}  loss {loss:.4f}  {speed:.0f} images/s"
        if self._bar.disable:
            elapsed = self._bar.format_dict["elapsed"] or 0.0
            self._show(f"{100 * progress:3.0f} %  {text}  {elapsed / 60:.1f} min")
            return
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(100 * progress - self._bar.n)

    def close(self) -> None:
        """Leave the last line standing."""
        self._bar.close()
