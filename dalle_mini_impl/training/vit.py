"""Training a Vision Transformer: labelled images in, a classifier's folder and a report out."""

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_mini_impl.builtin_datasets.labelled_images import (
    DIGITS,
    LabelledImages,
    LabelledSplits,
    load_digits,
    load_labelled_images,
)
from dalle_mini_impl.data.augmentation import shifted_pixels
from dalle_mini_impl.data.images import bytes_to_pixels
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.vit import VisionTransformer, ViTConfig
from dalle_mini_impl.training.config import TrainingConfig, require
from dalle_mini_impl.training.run import RunContext, run_training
from dalle_mini_impl.training.task import ImageGrid
from dalle_mini_impl.training.tracking import TrackingConfig
from vqvae.serialization import save_weights

logger = logging.getLogger(__name__)

EVALUATION_BATCH_SIZE = 256
NEIGHBOR_COUNTS = (1, 3, 5)


@dataclass(frozen=True, kw_only=True)
class ViTTaskConfig:
    """The classifier's loss and its augmentation."""

    label_smoothing: float = 0.1
    """Fraction of the probability spread over all classes (Szegedy et al. 2016,
    arXiv:1512.00567)."""
    max_shift: int = 1
    """Largest shift of a training image, in pixels, in both directions."""

    def __post_init__(self) -> None:
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "task.label_smoothing", smoothing, "0 to below 1")
        require(self.max_shift >= 0, "task.max_shift", self.max_shift, "at least 0")


@dataclass(frozen=True, kw_only=True)
class LabelledDataConfig:
    """Which images a run classifies."""

    source: str = DIGITS
    """``digits`` for those of scikit-learn, or captioned images as for train_vqvae.py."""
    label: str = "group"
    """Attribute of captioned images that names the class."""
    families: tuple[str, ...] = ("role", "base")
    """Attributes of captioned images: images with the same value of the first attribute present
    are variants of one thing, and held out together."""
    image_size: int = 32
    """Side of captioned images in pixels; digits are 8."""
    held_out_percent: int = 20
    """Percentage of the things that are held out."""

    def __post_init__(self) -> None:
        require(self.image_size >= 1, "data.image_size", self.image_size, "at least 1")
        percent = self.held_out_percent
        require(1 <= percent <= 50, "data.held_out_percent", percent, "1 to 50")


@dataclass(frozen=True, kw_only=True)
class ViTRunConfig:
    """Options of ``train_vit.py``."""

    output_dir: str
    """Folder of the run: checkpoints, metrics, ``report.json``, and ``model/`` at the end."""
    implementation: Literal["ours", "transformers"] = "ours"
    """Our Vision Transformer, or that of the library ``transformers`` at the same sizes, for
    comparison."""
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    """Images to learn from."""
    model: ViTConfig = field(default_factory=ViTConfig)
    """The Transformer."""
    task: ViTTaskConfig = field(default_factory=ViTTaskConfig)
    """Its loss."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Budget and optimizer."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where metrics go."""


def train_vit(config: ViTRunConfig, *, resume: str | None = None) -> Path:
    """Train a classifier and compare it with the nearest neighbors; see ``run_training``."""
    return run_training(config, build_task, resume=resume, report=_report)


def build_task(config: ViTRunConfig, _: RunContext) -> "ViTTask":
    """Read the data and build the classifier, before it is trained."""
    splits = _load(config.data)
    num_train, num_held_out = len(splits.train.labels), len(splits.held_out.labels)
    logger.info(f"{num_train} images to learn, {num_held_out} held out")
    baseline = nearest_neighbor_scores(splits)  # fails now, not at the end
    torch.manual_seed(config.training.seed)
    return ViTTask(splits, config, _build_classifier(config, splits), baseline=baseline)


def _load(config: LabelledDataConfig) -> LabelledSplits:
    if config.source == DIGITS:
        return load_digits(held_out_percent=config.held_out_percent)
    return load_labelled_images(
        config.source,
        label=config.label,
        families=config.families,
        image_size=config.image_size,
        held_out_percent=config.held_out_percent,
    )


def _build_classifier(config: ViTRunConfig, splits: LabelledSplits) -> nn.Module:
    """Build a module from pixels to logits for these images and classes."""
    _, num_channels, image_size, _ = splits.train.pixels.shape
    try:
        ours = VisionTransformer(
            config.model,
            image_size=image_size,
            num_channels=num_channels,
            num_classes=len(splits.class_names),
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return ours if config.implementation == "ours" else TransformersViT(ours)


class TransformersViT(nn.Module):
    """The Vision Transformer of ``transformers`` at the sizes of ours."""

    def __init__(self, ours: VisionTransformer) -> None:
        super().__init__()
        from transformers import ViTConfig as TheirConfig
        from transformers import ViTModel

        config = ours.config
        self.model = ViTModel(
            TheirConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=config.intermediate_size,
                hidden_dropout_prob=config.dropout_probability,
                layer_norm_eps=1e-6,
                image_size=ours.image_size,
                patch_size=config.patch_size,
                num_channels=ours.num_channels,
            ),
            add_pooling_layer=False,
        )
        self.head = nn.Linear(config.hidden_size, ours.num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Score the classes of images with pixels in [-1, 1]."""
        return self.head(self.model(pixels).last_hidden_state[:, 0])  # of the class token


class ViTTask:
    """Images, their classes, and the loss of telling them; ``baseline`` is for the report."""

    num_uniforms = 2  # shift down, shift right
    tokens_per_sample = 1  # an image

    def __init__(
        self,
        splits: LabelledSplits,
        config: ViTRunConfig,
        model: nn.Module,
        *,
        baseline: dict[str, float],
    ) -> None:
        self.splits, self.config, self.model, self.baseline = splits, config, model, baseline
        self.num_samples = len(splits.train.labels)
        # A thing in n variants counts like sqrt(n) things.
        sizes = Counter(splits.train.families)
        self.selection_metric: str | None = None
        self.sample_weights: Tensor | None = torch.tensor(
            [sizes[family] ** -0.5 for family in splits.train.families]
        )
        # The labels are this model's tokens: a resumed run must have the same images and classes.
        digest = hashlib.sha256(repr(splits.class_names).encode())
        for part in (splits.train, splits.held_out):
            digest.update(part.pixels.numpy().tobytes() + part.labels.numpy().tobytes())
        self.identity = digest.hexdigest()[:16]

    def make_batch(
        self, sample_ids: Int[Tensor, " batch"], uniforms: Float[Tensor, "batch 2"]
    ) -> dict[str, Tensor]:
        """Look up the images and shift them."""
        train, max_shift = self.splits.train, self.config.task.max_shift
        return {
            "pixels": shifted_pixels(train.pixels[sample_ids], uniforms, max_shift=max_shift),
            "labels": train.labels[sample_ids],
        }

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], **_: object
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the smoothed cross-entropy in nats, and the accuracy."""
        logits, labels = model(batch["pixels"]), batch["labels"]
        smoothing = self.config.task.label_smoothing
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        is_right = logits.detach().argmax(dim=-1) == labels
        return loss, {"accuracy": is_right.float().mean()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure held-out accuracy."""
        held_out = self.splits.held_out
        device = next(self.model.parameters()).device
        batches = held_out.pixels.split(EVALUATION_BATCH_SIZE)
        parts = [self.model(bytes_to_pixels(batch.to(device))).float().cpu() for batch in batches]
        logits = torch.cat(parts)
        scores = score_classes(logits.argmax(dim=-1), held_out)
        scores["nats"] = float(F.cross_entropy(logits, held_out.labels))
        return {f"validation/{name}": value for name, value in scores.items()}

    def make_image_grids(self) -> list[ImageGrid]:
        """Return none: this task has no sample grid."""
        return []

    def save_pretrained(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, folder / "model.safetensors", dtype=torch.float32)
        values = {
            "implementation": self.config.implementation,
            "model": dataclasses.asdict(self.config.model),
            "image_size": self.splits.train.pixels.shape[-1],
            "num_channels": self.splits.train.pixels.shape[1],
            "class_names": self.splits.class_names,
        }
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def score_classes(predicted: Int64[Tensor, " samples"], images: LabelledImages) -> dict[str, float]:
    """Return ``accuracy`` and ``family_accuracy`` in [0, 1].

    The second is the mean over families of the accuracy in each, so that a thing in twenty
    variants counts once.
    """
    is_right = (predicted == images.labels).double()
    sizes = Counter(images.families)
    # Each family weighs 1 in all, so that the weighted mean is a mean over families.
    weights = torch.tensor([1 / sizes[name] for name in images.families], dtype=torch.double)
    return {
        "accuracy": float(is_right.mean()),
        "family_accuracy": float((is_right * weights).sum() / weights.sum()),
    }


def nearest_neighbor_scores(splits: LabelledSplits) -> dict[str, float]:
    """Score held-out images classified by their nearest training images, pixel by pixel.

    Of 1, 3 and 5 neighbors the best number on the held-out images themselves is taken, in favor of
    this baseline.

    Raises:
        UserError: If scikit-learn is not installed.
    """
    try:
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError:
        raise UserError("scikit-learn is missing; expected: pip install -e '.[vision]'") from None
    train = splits.train.pixels.flatten(1).float().numpy()
    held_out = splits.held_out.pixels.flatten(1).float().numpy()
    # Pixels as they are, with Euclidean distances: what a model has to beat.
    all_scores = []
    for count in NEIGHBOR_COUNTS:
        classifier = KNeighborsClassifier(n_neighbors=min(count, len(train)))
        classifier.fit(train, splits.train.labels.numpy())
        predicted = torch.from_numpy(classifier.predict(held_out))
        all_scores.append(score_classes(predicted, splits.held_out))
    return max(all_scores, key=lambda scores: scores["accuracy"])


def _report(task: ViTTask, _: Path) -> dict[str, dict[str, float]]:
    measured = task.evaluate()
    own = {name: measured[f"validation/{name}"] for name in task.baseline}
    report = {"model": own, "nearest neighbors": task.baseline}
    for name, scores in report.items():
        figures = "  ".join(f"{key} {value:.1%}" for key, value in scores.items())
        logger.info(f"{name:20} {figures}")
    return report
