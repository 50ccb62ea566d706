"""Training CLIP: captioned images in, the ranker's folder and a report of its retrieval out."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from dalle_mini_impl.clip_ranker import ClipRanker
from dalle_mini_impl.data.augmentation import shifted_pixels
from dalle_mini_impl.data.images import bytes_to_pixels
from dalle_mini_impl.data.pairs import Pair
from dalle_mini_impl.data.text_tokenizer import TextTokenizer
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.clip import Clip, ClipConfig, TowersConfig, sigmoid_loss, softmax_loss
from dalle_mini_impl.training.config import DataConfig, TextConfig, TrainingConfig, require
from dalle_mini_impl.training.run import RunContext, learn_text_tokenizer, run_training
from dalle_mini_impl.training.run_dataset import LoadedPairs
from dalle_mini_impl.training.task import ImageGrid
from dalle_mini_impl.training.tracking import TrackingConfig

logger = logging.getLogger(__name__)

MAX_MEASURED = 2_000  # held-out images; retrieval gets harder with their number
EVALUATION_BATCH_SIZE = 512


@dataclass(frozen=True, kw_only=True)
class ClipTaskConfig:
    """CLIP's augmentation."""

    max_shift: int = 2
    """Largest shift of a training image, in pixels, in both directions."""

    def __post_init__(self) -> None:
        require(self.max_shift >= 0, "task.max_shift", self.max_shift, "at least 0")


@dataclass(frozen=True, kw_only=True)
class ClipRunConfig:
    """Options of ``train_clip.py``."""

    data: DataConfig
    """Captioned images to learn from."""
    output_dir: str
    """Folder of the run: checkpoints, metrics, ``report.json``, and ``model/`` at the end."""
    image_size: int = 64
    """Side of the square images in pixels; others are scaled to it."""
    text: TextConfig = field(default_factory=TextConfig)
    """The caption tokenizer."""
    model: TowersConfig = field(default_factory=TowersConfig)
    """Both towers."""
    task: ClipTaskConfig = field(default_factory=ClipTaskConfig)
    """Augmentation."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Budget and optimizer. Negatives come from the same micro-batch: accumulation and processes
    make their number smaller."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where metrics go."""

    def __post_init__(self) -> None:
        require(self.image_size >= 1, "image_size", self.image_size, "at least 1")
        require(
            not self.training.find_batch_size,
            "training.find_batch_size",
            "true",
            "false: the images of a micro-batch are each other's negatives, so that its size is "
            "part of the loss",
        )


def train_clip(config: ClipRunConfig, *, resume: str | None = None) -> Path:
    """Train a CLIP and measure its retrieval; see ``run_training``."""
    return run_training(config, build_task, resume=resume, report=_report)


def build_task(config: ClipRunConfig, run: RunContext) -> "ClipTask":
    """Read the pairs, learn their tokens, build the model."""
    with run.accelerator.main_process_first():  # it may write the list of the run's images
        train, held_out = run.load_splits(
            config.data, pixel_size=(config.image_size, config.image_size)
        )
    texts = (text for pair in train.listed for text in pair.captions)
    text_tokenizer = learn_text_tokenizer(config.text, texts)
    torch.manual_seed(config.training.seed)
    try:
        model = Clip(
            ClipConfig(
                towers=config.model,
                image_size=config.image_size,
                vocab_size=text_tokenizer.vocab_size,
                text_length=text_tokenizer.text_length,
            )
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return ClipTask(
        train,
        held_out,
        config.task,
        ranker=ClipRanker(model, text_tokenizer),
        sample_weights=train.weights(config.data.balance_by),
    )


class ClipUniforms(NamedTuple):
    """The random numbers of each sample, uniform in [0, 1), by what they decide."""

    caption: Float[Tensor, " batch"]
    shift: Float[Tensor, "batch 2"]

    @classmethod
    def from_matrix(cls, uniforms: Float[Tensor, "batch 3"]) -> "ClipUniforms":
        """Name the columns of a matrix."""
        return cls(uniforms[:, 0], uniforms[:, 1:])


class ClipTask:
    """Images with their captions, and the loss of telling which belong together.

    The ranker holds the model in training, and the caption tokenizer.
    """

    num_uniforms = 3

    def __init__(
        self,
        train: LoadedPairs,
        held_out: LoadedPairs,
        config: ClipTaskConfig,
        *,
        ranker: ClipRanker,
        sample_weights: Tensor | None,
    ) -> None:
        self.model: nn.Module = ranker.model
        self.pixels, self.config, self.ranker = train.pixels, config, ranker
        self.selection_metric: str | None = None
        self.sample_weights = sample_weights
        self.num_samples = len(train.pairs)
        text_tokenizer, sizes = ranker.text_tokenizer, ranker.model.config
        texts = [text for pair in train.pairs for text in pair.captions]
        self.text_token_ids = text_tokenizer.encode(texts, log_truncated=True)
        # Captions of all images in one table; those of image i begin at caption_offsets[i].
        counts = torch.tensor([0, *(len(pair.captions) for pair in train.pairs)])
        self.caption_offsets = counts.cumsum(0)
        num_patches = (sizes.image_size // sizes.towers.image.patch_size) ** 2
        self.tokens_per_sample = sizes.text_length + num_patches
        self.identity = text_tokenizer.fingerprint()
        self.held_out = build_retrieval(held_out.pairs, held_out.pixels, text_tokenizer)

    def make_batch(
        self, sample_ids: Int[Tensor, " batch"], uniforms: Float[Tensor, "batch 3"]
    ) -> dict[str, Tensor]:
        """Look up images, shift them, and choose one caption of each."""
        named = ClipUniforms.from_matrix(uniforms)
        start, end = self.caption_offsets[sample_ids], self.caption_offsets[sample_ids + 1]
        chosen = start + (named.caption * (end - start)).long()
        images = self.pixels[sample_ids]
        return {
            "pixels": shifted_pixels(images, named.shift, max_shift=self.config.max_shift),
            "text_token_ids": self.text_token_ids[chosen],
            "sample_ids": sample_ids,
        }

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], **_: object
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the contrastive loss, and how often an image's best caption is its own."""
        text_token_ids = batch["text_token_ids"]
        logits = model(text_token_ids, batch["pixels"])  # (images, captions)
        # Equal captions and captions of one image are no negatives of each other.
        is_match = matches(text_token_ids, batch["sample_ids"])
        towers = self.ranker.model.config.towers
        loss = (softmax_loss if towers.loss == "softmax" else sigmoid_loss)(logits, is_match)
        # R@1 within the batch, as a sign of life: it depends on the size of the batch.
        best = logits.detach().argmax(dim=1, keepdim=True)
        return loss, {
            "batch_r1": is_match.gather(1, best).float().mean(),
            "logit_scale": self.ranker.model.log_scale.detach().exp(),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure retrieval on held-out pairs."""
        scores = score_retrieval(self.ranker, self.held_out)
        return {f"validation/{name}": value for name, value in scores.items()}

    def make_image_grids(self) -> list[ImageGrid]:
        """Return none: this task has no sample grid."""
        return []

    def save_pretrained(self, folder: Path) -> None:
        """Write the ranker: model and caption tokenizer."""
        self.ranker.save_pretrained(folder)


@dataclass(frozen=True)
class Retrieval:
    """Held-out images and captions to be matched."""

    pixels: UInt8[Tensor, "images 3 height width"]
    captions: list[str]
    """All different."""
    is_match: Bool[Tensor, "images captions"]
    """True where a caption is one of the image's own; rows and columns may have several."""

    @property
    def chance(self) -> float:
        """Expected recall of a random choice, the same in both directions."""
        return float(self.is_match.double().mean())


def matches(
    text_token_ids: Int[Tensor, "batch text_length"], sample_ids: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch batch"]:
    """True where image (row) and caption (column) of a batch belong together.

    That is a sample's own caption, an equal one, and another caption of the same image.
    """
    same_text = (text_token_ids[:, None] == text_token_ids[None]).all(dim=2)
    return same_text | (sample_ids[:, None] == sample_ids[None])


def build_retrieval(
    pairs: Sequence[Pair],
    pixels: UInt8[Tensor, "samples 3 height width"],
    text_tokenizer: TextTokenizer,
) -> Retrieval:
    """Take the main caption of each held-out image as a query.

    At most ``MAX_MEASURED`` images are taken, spread over all.
    """
    count = min(len(pairs), MAX_MEASURED)
    chosen = [index * len(pairs) // count for index in range(count)]
    # Captions that differ in case or spaces only are one query to the model.
    normalize = text_tokenizer.tokenizer.normalizer.normalize_str
    own = [{normalize(text) for text in pairs[index].captions} for index in chosen]
    queries = list(dict.fromkeys(normalize(pairs[index].captions[0]) for index in chosen))
    is_match = torch.tensor([[text in texts for text in queries] for texts in own])
    return Retrieval(pixels[torch.tensor(chosen)], queries, is_match)


def score_retrieval(ranker: ClipRanker, retrieval: Retrieval) -> dict[str, float]:
    """Return recall at 1 in both directions, and chance, all in [0, 1]."""
    batches = retrieval.pixels.split(EVALUATION_BATCH_SIZE)
    parts = [ranker.embed_pixels(bytes_to_pixels(batch)) for batch in batches]
    scores = torch.cat(parts) @ ranker.embed_texts(retrieval.captions).T  # (images, captions)
    top_texts, top_images = scores.argmax(dim=1), scores.argmax(dim=0)
    images, captions = torch.arange(scores.shape[0]), torch.arange(scores.shape[1])
    return {
        "image_to_text_r1": float(retrieval.is_match[images, top_texts].double().mean()),
        "text_to_image_r1": float(retrieval.is_match[top_images, captions].double().mean()),
        "chance_r1": retrieval.chance,
    }


def _report(task: ClipTask, _: Path) -> dict[str, int | float]:
    scores, retrieval = score_retrieval(task.ranker, task.held_out), task.held_out
    chance = scores["chance_r1"]
    num_images, num_captions = len(retrieval.pixels), len(retrieval.captions)
    logger.info(
        f"held out: {num_images} images, {num_captions} captions; R@1 image to caption "
        f"{scores['image_to_text_r1']:.1%}, caption to image {scores['text_to_image_r1']:.1%}, "
        f"chance {chance:.2%}"
    )
    return {
        "images": num_images,
        "captions": num_captions,
        **scores,
        "image_to_text_times_chance": scores["image_to_text_r1"] / chance,
        "text_to_image_times_chance": scores["text_to_image_r1"] / chance,
    }
