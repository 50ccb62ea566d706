"""Training a classifier of pictures: its loss, its held-out accuracy, and its baselines."""

import hashlib
from collections import Counter
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_mini_impl.builtin_datasets.labelled_images import LabelledPictures, LabelledSplits
from dalle_mini_impl.data.token_dataset import shift_images
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.trainer import PictureGrid

EVALUATION_BATCH_SIZE = 256
NEIGHBOURS = (1, 3, 5)


@dataclass(frozen=True, kw_only=True)
class ViTTaskConfig:
    """What the loss is made of, and how the pictures are varied.

    Raises:
        ValueError: If a value is out of range.
    """

    label_smoothing: float = 0.1
    """Share of the probability spread over all classes (Szegedy et al. 2016,
    arXiv:1512.00567)."""
    max_shift: int = 1
    """Largest shift of a training picture, in pixels, in both directions."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use."""
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"task.label_smoothing: got {self.label_smoothing}, wanted 0 to below 1"
            )
        if self.max_shift < 0:
            raise ValueError(f"task.max_shift: got {self.max_shift}, wanted at least 0")


class ViTTask:
    """Pictures, their classes, and the loss of telling them."""

    num_draws = 2
    tokens_per_sample = 1  # a picture

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
        self, sample_ids: Int[Tensor, " batch"], draws: Float[Tensor, "batch num_draws"]
    ) -> dict[str, Tensor]:
        """Look up the pictures and shift them."""
        train, largest = self.splits.train, self.config.max_shift
        images = train.pixels[sample_ids]
        if largest:
            images = shift_images(images, (draws * (2 * largest + 1)).long() - largest)
        return {"pixels": images.float() / 127.5 - 1, "labels": train.labels[sample_ids]}

    def loss(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        *,
        progress: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the smoothed cross-entropy in nats, and the share of right answers."""
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

    def draw_pictures(self, model: nn.Module) -> list[PictureGrid]:
        """Draw nothing."""
        del model
        return []


def score_classes(
    predicted: Int64[Tensor, " samples"], pictures: LabelledPictures
) -> dict[str, float]:
    """Count right answers.

    Args:
        predicted: Classes told.
        pictures: With the true ones.

    Returns:
        ``accuracy``, and ``family_accuracy``, the mean over families of the accuracy in each, so
        that a thing in twenty variants counts once. Both in [0, 1].
    """
    is_right = (predicted == pictures.labels).double()
    sizes = Counter(pictures.families)
    weights = torch.tensor([1 / sizes[name] for name in pictures.families], dtype=torch.double)
    return {
        "accuracy": float(is_right.mean()),
        "family_accuracy": float((is_right * weights).sum() / weights.sum()),
    }


def nearest_neighbour_scores(splits: LabelledSplits) -> dict[str, float]:
    """Classify held-out pictures by their nearest training pictures, pixel by pixel.

    Args:
        splits: What is known and what is asked.

    Returns:
        The scores of the best of 1, 3 and 5 neighbours, chosen on the held-out pictures
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
