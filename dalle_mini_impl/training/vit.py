"""A whole classifier run: labelled images in, model folder and a report out."""

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
from dalle_mini_impl.data.augmentation import shift_images
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.vit import VisionTransformer, ViTConfig
from dalle_mini_impl.training.config import TrainingConfig
from dalle_mini_impl.training.run import begin_run, run_task
from dalle_mini_impl.training.task import ImageGrid
from dalle_mini_impl.training.tracking import TrackingConfig
from vqvae.serialization import save_weights

logger = logging.getLogger(__name__)

EVALUATION_BATCH_SIZE = 256
NEIGHBOURS = (1, 3, 5)


@dataclass(frozen=True, kw_only=True)
class ViTTaskConfig:
    """What the loss is made of, and how the images are varied.

    Raises:
        ValueError: If a value is out of range.
    """

    label_smoothing: float = 0.1
    """Fraction of the probability spread over all classes (Szegedy et al. 2016,
    arXiv:1512.00567)."""
    max_shift: int = 1
    """Largest shift of a training image, in pixels, in both directions."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use."""
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"task.label_smoothing: got {self.label_smoothing}, expected 0 to below 1"
            )
        if self.max_shift < 0:
            raise ValueError(f"task.max_shift: got {self.max_shift}, expected at least 0")


@dataclass(frozen=True, kw_only=True)
class LabelledDataConfig:
    """Which images a run classifies.

    Raises:
        ValueError: If a value is out of range.
    """

    source: str = DIGITS
    """``digits`` for those of scikit-learn, or captioned images as train_vqvae.py takes them."""
    label: str = "group"
    """Attribute of captioned images that names the class."""
    families: tuple[str, ...] = ("role", "base")
    """Attributes of captioned images: those that agree in the first one that is given are
    variants of one thing, and held out together."""
    image_size: int = 32
    """Side of captioned images in pixels; digits are 8."""
    held_out_percent: int = 20
    """Fraction of the things that are only measured."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use."""
        if self.image_size < 1:
            raise ValueError(f"data.image_size: got {self.image_size}, expected at least 1")
        if not 1 <= self.held_out_percent <= 50:
            raise ValueError(
                f"data.held_out_percent: got {self.held_out_percent}, expected 1 to 50"
            )


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


class TransformersViT(nn.Module):
    """The Vision Transformer of ``transformers`` at the sizes of ours."""

    def __init__(self, ours: VisionTransformer) -> None:
        """Build it with its own fresh weights.

        Args:
            ours: Gives the sizes.
        """
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
        return self.head(self.model(pixels).last_hidden_state[:, 0])


class ViTTask:
    """Images, their classes, and the loss of telling them."""

    num_uniforms = 2
    tokens_per_sample = 1  # an image

    def __init__(self, splits: LabelledSplits, config: ViTTaskConfig) -> None:
        """Collect what training needs.

        Args:
            splits: What is learned and what is measured.
            config: Loss and augmentation.
        """
        self.splits, self.config = splits, config
        self.num_samples = len(splits.train.labels)
        sizes = Counter(splits.train.families)  # many alike of one thing: 1 / sqrt(how many)
        self.sample_weights: Tensor | None = torch.tensor(
            [sizes[family] ** -0.5 for family in splits.train.families]
        )
        digest = hashlib.sha256(repr(splits.class_names).encode())
        for part in (splits.train, splits.held_out):
            digest.update(part.pixels.numpy().tobytes() + part.labels.numpy().tobytes())
        self.identity = digest.hexdigest()[:16]

    def make_batch(
        self, sample_ids: Int[Tensor, " batch"], uniforms: Float[Tensor, "batch num_uniforms"]
    ) -> dict[str, Tensor]:
        """Look up the images and shift them."""
        train, largest = self.splits.train, self.config.max_shift
        images = train.pixels[sample_ids]
        if largest:
            images = shift_images(images, (uniforms * (2 * largest + 1)).long() - largest)
        return {"pixels": images.float() / 127.5 - 1, "labels": train.labels[sample_ids]}

    def loss(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        *,
        progress: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the smoothed cross-entropy in nats, and the fraction of right answers."""
        del progress, generator
        logits = model(batch["pixels"])
        loss = F.cross_entropy(logits, batch["labels"], label_smoothing=self.config.label_smoothing)
        is_right = logits.detach().argmax(dim=-1) == batch["labels"]
        return loss, {"accuracy": is_right.float().mean()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measure held-out accuracy."""
        device = next(model.parameters()).device
        logits = torch.cat(
            [
                model(part.to(device).float() / 127.5 - 1).float().cpu()
                for part in self.splits.held_out.pixels.split(EVALUATION_BATCH_SIZE)
            ]
        )
        labels = self.splits.held_out.labels
        scores = score_classes(logits.argmax(dim=-1), self.splits.held_out)
        scores["nats"] = float(F.cross_entropy(logits, labels))
        return {f"validation/{name}": value for name, value in scores.items()}

    def make_image_grids(self, model: nn.Module) -> list[ImageGrid]:
        """Generate nothing."""
        del model
        return []


def train_vit(
    config: ViTRunConfig,
    *,
    resume: str | None = None,
) -> Path:
    """Train a classifier and compare it with the nearest neighbors.

    Args:
        config: The run.
        resume: None, ``latest`` or a checkpoint folder.

    Returns:
        The model's folder; ``report.json`` lies beside it.

    Raises:
        UserError: If the data or the folders do not serve.
    """
    with begin_run(config, resume) as accelerator:
        splits = _load(config.data)
        train, held_out = splits.train, splits.held_out
        logger.info(f"{len(train.labels)} images to learn, {len(held_out.labels)} held out")
        baseline = nearest_neighbour_scores(splits)
        torch.manual_seed(config.training.seed)
        model, task = build_classifier(config, splits), ViTTask(splits, config.task)

        def save(folder: Path) -> None:
            save_classifier(model, config, splits, folder)

        folder = run_task(
            model,
            task,
            config,
            accelerator=accelerator,
            resume=resume,
            save_pretrained=save,
        )
        if accelerator.is_main_process:
            measured = task.evaluate(model.eval())
            own = {name: measured[f"validation/{name}"] for name in baseline}
            report = {"model": own, "nearest neighbors": baseline}
            for name, scores in report.items():
                figures = "  ".join(f"{key} {x:.1%}" for key, x in scores.items())
                logger.info(f"{name:20} {figures}")
            path = Path(config.output_dir) / "report.json"
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        accelerator.wait_for_everyone()
    return folder


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


def build_classifier(config: ViTRunConfig, splits: LabelledSplits) -> nn.Module:
    """Build the model that a run trains.

    Args:
        config: The run.
        splits: Decide the image's size and the number of classes.

    Returns:
        A module from pixels to logits.

    Raises:
        UserError: If the patches do not fill the image.
    """
    _, num_channels, image_size, _ = splits.train.pixels.shape
    num_classes = len(splits.class_names)
    try:
        ours = VisionTransformer(
            config.model,
            image_size=image_size,
            num_channels=num_channels,
            num_classes=num_classes,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return ours if config.implementation == "ours" else TransformersViT(ours)


def save_classifier(
    model: nn.Module, config: ViTRunConfig, splits: LabelledSplits, folder: Path
) -> None:
    """Write ``config.json`` and ``model.safetensors``.

    Args:
        model: Trained.
        config: The run.
        splits: Give the classes' names and the image's size.
        folder: Made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / "model.safetensors", dtype=torch.float32)
    values = {
        "implementation": config.implementation,
        "model": dataclasses.asdict(config.model),
        "image_size": splits.train.pixels.shape[-1],
        "num_channels": splits.train.pixels.shape[1],
        "class_names": splits.class_names,
    }
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def score_classes(predicted: Int64[Tensor, " samples"], images: LabelledImages) -> dict[str, float]:
    """Count right answers.

    Args:
        predicted: Classes told.
        images: With the true ones.

    Returns:
        ``accuracy``, and ``family_accuracy``, the mean over families of the accuracy in each, so
        that a thing in twenty variants counts once. Both in [0, 1].
    """
    is_right = (predicted == images.labels).double()
    sizes = Counter(images.families)
    weights = torch.tensor([1 / sizes[name] for name in images.families], dtype=torch.double)
    return {
        "accuracy": float(is_right.mean()),
        "family_accuracy": float((is_right * weights).sum() / weights.sum()),
    }


def nearest_neighbour_scores(splits: LabelledSplits) -> dict[str, float]:
    """Classify held-out images by their nearest training images, pixel by pixel.

    Args:
        splits: What is known and what is asked.

    Returns:
        The scores of the best of 1, 3 and 5 neighbors, chosen on the held-out images
        themselves: in favour of this baseline.

    Raises:
        UserError: If scikit-learn is not installed.
    """
    try:
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError:
        raise UserError("scikit-learn is missing; want: pip install -e '.[vision]'") from None
    train, held_out = (
        part.pixels.flatten(1).float().numpy() for part in (splits.train, splits.held_out)
    )
    found = []
    for count in NEIGHBOURS:
        classifier = KNeighborsClassifier(n_neighbors=min(count, len(train)))
        classifier.fit(train, splits.train.labels.numpy())
        predicted = torch.from_numpy(classifier.predict(held_out))
        found.append(score_classes(predicted, splits.held_out))
    return max(found, key=lambda scores: scores["accuracy"])
