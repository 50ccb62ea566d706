"""The options of a training run that do not depend on the model."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Budget, optimizer and intervals of a run.

    Raises:
        ValueError: If a value is out of range.
    """

    max_steps: int = 10_000
    """Optimizer updates after which the run ends."""
    max_minutes: float | None = None
    """Wall-clock minutes after which the run ends, if that comes first."""
    global_batch_size: int = 64
    """Samples per optimizer update, over all processes and accumulation."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per update on each process."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon on hidden matrices with AdamW on the rest."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices, per unit of learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the first and second moment."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """Warm-up, stable, linear decay; or half a cosine."""
    warmup_steps: int = 50
    """Updates over which the learning rate rises."""
    decay_fraction: float = 0.3
    """Share of the run over which ``wsd`` decays to zero."""
    gradient_clip_norm: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    ema_decay: float = 0.0
    """Decay per update of the averaged weights that are kept; 0 keeps the last weights."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """bf16 autocast: ``auto`` uses it where the hardware multiplies bf16."""
    log_every_steps: int = 20
    """Updates between two log lines."""
    evaluate_every_steps: int = 500
    """Updates between two evaluations on held-out samples."""
    sample_every_steps: int = 1_000
    """Updates between two picture grids; a multiple of evaluate_every_steps."""
    checkpoint_every_steps: int = 500
    """Updates between two checkpoints."""
    seed: int = 0
    """Decides weights, order and every random number of the run."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use."""
        for name in (
            "max_steps",
            "global_batch_size",
            "gradient_accumulation_steps",
            "log_every_steps",
            "evaluate_every_steps",
            "sample_every_steps",
            "checkpoint_every_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}: got {getattr(self, name)}, wanted at least 1")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"training.max_minutes: got {self.max_minutes}, wanted more than 0")
        if not self.learning_rate > 0:
            raise ValueError(f"training.learning_rate: got {self.learning_rate}, wanted above 0")
        for name in ("ema_decay", "decay_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"training.{name}: got {getattr(self, name)}, wanted 0 to below 1"
                )
        if self.sample_every_steps % self.evaluate_every_steps:
            raise ValueError(
                f"training.sample_every_steps: got {self.sample_every_steps}, wanted a multiple of "
                f"evaluate_every_steps ({self.evaluate_every_steps})"
            )
