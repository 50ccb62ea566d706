"""The options of a training run that do not depend on the model."""

import math
from dataclasses import dataclass, field
from typing import Literal

from dalle_mini_impl.data.images import Fit
from dalle_mini_impl.data.pairs import CAPTION_COLUMNS, ReadOptions
from dalle_mini_impl.data.readers.captions import is_captions_from

DEFAULT_MAX_STEPS = 10_000


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Refuse a value of a config by its dotted name."""
    if not holds:
        raise ValueError(f"{name}: got {value}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The caption tokenizer."""

    vocab_size: int = 2048
    """Largest number of caption tokens, the 256 bytes included."""
    text_length: int = 32
    """Tokens per caption; longer captions are cut."""

    def __post_init__(self) -> None:
        require(self.text_length >= 1, "text.text_length", self.text_length, "at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Budget, optimizer and intervals of a run."""

    max_steps: int | None = None
    """Optimizer updates after which the run ends; 10,000 if max_minutes is not given either."""
    max_minutes: float | None = None
    """Wall-clock minutes after which the run ends. Of two limits, the first one counts."""
    global_batch_size: int = 64
    """Samples per optimizer update, over all processes and accumulation."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per update on each process."""
    find_batch_size: bool = False
    """Before the run, find the largest micro-batch that fits into memory; the global batch stays,
    and gradient_accumulation_steps follows. One process only."""
    activation_checkpointing: bool = False
    """Recompute the inner activations of each Transformer block in the backward pass: less memory,
    more time, the same numbers."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon on hidden matrices and convolutions with AdamW on the rest."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices, per unit of learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the first and second moment."""
    schedule: Literal["wsd", "cosine", "inverse_sqrt"] = "wsd"
    """Warm-up, stable, linear decay; half a cosine; or 1 / sqrt(step) (Vaswani et al. 2017)."""
    warmup_steps: int = 50
    """Updates over which the learning rate rises."""
    decay_fraction: float = 0.3
    """Fraction of the run over which ``wsd`` decays to zero."""
    cosine_ends_at: float = 1.0
    """Progress in (0, 1] at which ``cosine`` has reached its end."""
    cosine_floor: float = 0.0
    """Fraction of the learning rate at which ``cosine`` ends."""
    gradient_clip_norm: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    ema_decay: float = 0.0
    """Decay per update of the averaged weights, which are evaluated and kept; 0 switches averaging
    off."""
    keep: Literal["best", "last"] = "best"
    """Weights of the model folder: those of the best evaluation (decoders only), or the last."""
    patience: int | None = None
    """Evaluations without a better one after which the run ends early; None: it never does."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """bf16 autocast: ``auto`` uses it where the hardware multiplies bf16."""
    compile: bool = False
    """Compile the model's training pass (torch.compile): a minute at the start, less per step."""
    log_every_steps: int = 20
    """Updates between two log lines."""
    evaluate_every_steps: int = 500
    """Updates between two evaluations on held-out samples."""
    sample_every_steps: int = 1_000
    """Updates between two image grids; a multiple of evaluate_every_steps."""
    checkpoint_every_steps: int = 500
    """Updates between two checkpoints."""
    seed: int = 0
    """Decides initial weights, sample order and every random number of the run."""

    def __post_init__(self) -> None:
        for name in (
            "global_batch_size",
            "gradient_accumulation_steps",
            "log_every_steps",
            "evaluate_every_steps",
            "sample_every_steps",
            "checkpoint_every_steps",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("weight_decay", "warmup_steps", "gradient_clip_norm"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "at least 0")
        self._require("max_steps", self.max_steps is None or self.max_steps >= 1, "at least 1")
        patience = self.patience
        self._require("patience", patience is None or patience >= 1, "at least 1")
        self._require(
            "patience", patience is None or self.keep == "best", "null with training.keep last"
        )
        self._require("max_minutes", self.max_minutes is None or self.max_minutes > 0, "above 0")
        self._require("learning_rate", 0 < self.learning_rate < math.inf, "above 0")
        self._require("betas", all(0 <= beta < 1 for beta in self.betas), "0 to below 1")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "0 to below 1")
        self._require("decay_fraction", 0 < self.decay_fraction <= 1, "above 0 and up to 1")
        self._require("cosine_ends_at", 0 < self.cosine_ends_at <= 1, "above 0 and up to 1")
        self._require("cosine_floor", 0 <= self.cosine_floor <= 1, "0 to 1")
        self._require("seed", 0 <= self.seed < 2**63, "0 to 2 ** 63 - 1")
        # Grids are made in evaluations, as both need the averaged weights.
        self._require(
            "sample_every_steps",
            self.sample_every_steps % self.evaluate_every_steps == 0,
            f"a multiple of evaluate_every_steps ({self.evaluate_every_steps})",
        )

    def progress(self, step: int, minutes: float) -> float:
        """Fraction of the budget that is used, in [0, 1]: the larger one of the two limits."""
        # The schedule follows this fraction, so it ends with the run whichever limit comes first.
        fractions = []
        if self.max_minutes is not None:
            fractions.append(minutes / self.max_minutes)
        if self.max_steps is not None or self.max_minutes is None:
            fractions.append(step / (self.max_steps or DEFAULT_MAX_STEPS))
        return min(1.0, max(fractions))

    def _require(self, name: str, holds: bool, expected: str) -> None:
        require(holds, f"training.{name}", getattr(self, name), expected)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which captioned images a run uses."""

    source: str
    """Image folder, folder of WebDataset tars, parquet file, or Hub name."""
    train_split: str = "train"
    """Split that is trained on."""
    validation_split: str = "val"
    """Held-out split; 5 % of the images where the source has no splits."""
    caption_columns: tuple[str, ...] = CAPTION_COLUMNS
    """Fields of metadata, tar members or tables that hold captions, each a text or a list of texts;
    main captions first."""
    image_column: str | None = None
    """Column of tables, field of metadata or extension of tar members that holds or names the
    image; null: the usual names."""
    captions_from: str | None = None
    """Captions from elsewhere: ``file_name`` ("red cup 03.jpg"), ``folder_name``
    ("red cup/001.jpg"), or one for all images: ``text:a red cup``; null: those of the source."""
    fit: Fit = "crop"
    """How an image of other proportions than the model's becomes one of its size: the middle of it
    (crop), the whole of it with white beside it (pad), or the whole of it stretched (stretch)."""
    mix: dict[str, float] = field(default_factory=dict)
    """Other sources that are mixed into training, each with its fraction of the samples: their
    training split, with the usual names of columns. Held-out images stay those of ``source``."""
    balance_by: str | None = None
    """Attribute whose groups are evened out: an image has the weight 1 / sqrt(group size)."""
    max_bad_fraction: float = 0.1
    """Fraction of bad records (no image, no caption, not readable) above which the run stops, in
    [0, 1]. One bad record is always allowed."""

    def __post_init__(self) -> None:
        fraction = self.max_bad_fraction
        require(0 <= fraction <= 1, "data.max_bad_fraction", fraction, "0 to 1")
        fits = all(0 < part < 1 for part in self.mix.values()) and sum(self.mix.values()) < 1
        require(fits, "data.mix", self.mix, "fractions above 0 whose sum is below 1")
        require(self.source not in self.mix, "data.mix", self.mix, "other sources than data.source")
        columns = self.caption_columns
        require(len(columns) > 0, "data.caption_columns", columns, "at least one name")
        require(
            is_captions_from(self.captions_from),
            "data.captions_from",
            self.captions_from,
            "file_name, folder_name, text: and a text, or null",
        )

    def read_options(self, *, needs_captions: bool = True) -> ReadOptions:
        """Return what the readers ask for."""
        return ReadOptions(
            caption_columns=self.caption_columns,
            image_column=self.image_column,
            captions_from=self.captions_from,
            needs_captions=needs_captions,
            fit=self.fit,
        )
