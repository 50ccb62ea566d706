"""Means of a run's metrics between two log lines, and its speed."""

import time

import torch
from accelerate import Accelerator
from torch import Tensor


class RunningMetrics:
    """Averages metrics between two log lines, and times data, steps and checkpoints."""

    def __init__(self) -> None:
        self._begun, self._num_saves, self._save_seconds = time.perf_counter(), 0, 0.0
        self._reset()

    def _reset(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._num_steps, self._num_samples = 0, 0
        self._wait, self._save = _Stopwatch(), _Stopwatch()
        self._started = time.perf_counter()

    def waiting(self) -> "_Stopwatch":
        """Time a ``with`` block as waiting for data."""
        return self._wait

    def saving(self) -> "_Stopwatch":
        """Time a ``with`` block as saving a checkpoint."""
        self._num_saves += 1
        return self._save

    def add(self, metrics: dict[str, Tensor], *, samples: int) -> None:
        """Count one step of so many samples; it has the same names as all others."""
        for name, value in metrics.items():
            # Tensors are added, not floats: `float()` would make the host wait for the GPU.
            self._totals[name] = self._totals.get(name, 0) + value.float()
        self._num_steps += 1
        self._num_samples += samples

    def read(self, accelerator: Accelerator, tokens_per_sample: int) -> dict[str, float]:
        """Return the means over steps and processes, and reset.

        Returns:
            Means as ``train/<name>``, speeds per second, and the fractions of time in [0, 1] that
            were spent waiting for data and saving checkpoints.
        """
        seconds = max(1e-9, time.perf_counter() - self._started)
        # One transfer and one reduction for all metrics together.
        means = torch.stack(
            [value.to(accelerator.device) / self._num_steps for value in self._totals.values()]
        )
        if accelerator.num_processes > 1:
            means = accelerator.reduce(means, reduction="mean")
        names = [f"train/{name}" for name in self._totals]
        values = dict(zip(names, means.tolist(), strict=True))
        values["train/samples_per_second"] = self._num_samples / seconds
        values["train/tokens_per_second"] = self._num_samples * tokens_per_sample / seconds
        values["train/data_wait_fraction"] = self._wait.seconds / seconds
        values["train/save_fraction"] = self._save.seconds / seconds
        self._save_seconds += self._save.seconds
        self._reset()
        return values

    def cost_of_saving(self) -> str:
        """Report number, seconds and fraction of time of all checkpoints since the start."""
        seconds = self._save_seconds + self._save.seconds
        fraction = seconds / max(1e-9, time.perf_counter() - self._begun)
        return (
            f"checkpoints: {self._num_saves} in {seconds:.2f} s, {100 * fraction:.2f} % of the time"
        )


class _Stopwatch:
    """Adds up the seconds of its ``with`` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started
