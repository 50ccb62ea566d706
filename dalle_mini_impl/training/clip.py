"""A whole CLIP run: captioned images in, ranker's folder and a report out."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from dalle_mini_impl.clip_ranker import ClipRanker
from dalle_mini_impl.data.augmentation import shift_images
from dalle_mini_impl.data.pairs import Pair
from dalle_mini_impl.data.text_tokenizer import TextTokenizer
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.clip import Clip, ClipConfig, TowersConfig, sigmoid_loss, softmax_loss
from dalle_mini_impl.training.config import DataConfig, TextConfig, TrainingConfig
from dalle_mini_impl.training.run import begin_run, run_task
from dalle_mini_impl.training.run_dataset import LoadedPairs, RunRecords, load_pairs
from dalle_mini_impl.training.task import ImageGrid
from dalle_mini_impl.training.tracking import TrackingConfig

logger = logging.getLogger(__name__)

MAX_MEASURED = 2_000  # held-out images; retrieval gets harder with their number


@dataclass(frozen=True, kw_only=True)
class ClipTaskConfig:
    """How the images are varied.

    Raises:
        ValueError: If a value is out of range.
    """

    max_shift: int = 2
    """Largest shift of a training image, in pixels, in both directions."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use."""
        if self.max_shift < 0:
            raise ValueError(f"task.max_shift: got {self.max_shift}, expected at least 0")


@dataclass(frozen=True, kw_only=True)
class ClipRunConfig:
    """Options of ``train_clip.py``.

    Raises:
        ValueError: If a value is out of range.
    """

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
    """Budget and optimizer. An image's contrast is its micro-batch: accumulation and processes
    make it smaller."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where metrics go."""

    def __post_init__(self) -> None:
        """Refuse what would fail, or change the loss, only when training has begun."""
        if self.image_size < 1:
            raise ValueError(f"image_size: got {self.image_size}, expected at least 1")
        if self.training.find_batch_size:
            raise ValueError(
                "training.find_batch_size: got true, expected false: the images of a micro-batch "
                "are each other's contrast, so that its size is part of the loss"
            )


@dataclass(frozen=True)
class Retrieval:
    """Images and captions among which the right ones are to be found."""

    pixels: UInt8[Tensor, "images 3 height width"]
    captions: list[str]
    """Different ones."""
    is_right: Bool[Tensor, "images captions"]
    """True where a caption is one of the image's own: there may be several in a row or column."""

    @property
    def chance(self) -> float:
        """Fraction of right answers of one who guesses, the same in both directions."""
        return float(self.is_right.double().mean())


class ClipTask:
    """Images with their captions, and the loss of telling which belong together."""

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
        """Collect what training needs.

        Args:
            train: What is learned.
            held_out: What is measured.
            config: Augmentation.
            ranker: Holds the model in training, and the caption tokenizer.
            sample_weights: How often each image is expected, or None.
        """
        self.pixels, self.config, self.ranker = train.pixels, config, ranker
        self.sample_weights = sample_weights
        self.num_samples = len(train.pairs)
        text_tokenizer, sizes = ranker.text_tokenizer, ranker.model.config
        texts = [text for pair in train.pairs for text in pair.captions]
        self.text_token_ids = text_tokenizer.encode(texts, log_truncated=True)
        counts = torch.tensor([0, *(len(pair.captions) for pair in train.pairs)])
        self.caption_offsets = counts.cumsum(0)
        num_patches = (sizes.image_size // sizes.towers.image.patch_size) ** 2
        self.tokens_per_sample = sizes.text_length + num_patches
        self.identity = text_tokenizer.fingerprint()
        self.held_out = build_retrieval(held_out.pairs, held_out.pixels, text_tokenizer)

    def make_batch(
        self, sample_ids: Int[Tensor, " batch"], uniforms: Float[Tensor, "batch num_uniforms"]
    ) -> dict[str, Tensor]:
        """Look up images, shift them, and choose one caption of each."""
        start, end = self.caption_offsets[sample_ids], self.caption_offsets[sample_ids + 1]
        chosen = start + (uniforms[:, 0] * (end - start)).long()
        largest = self.config.max_shift
        images = self.pixels[sample_ids]
        if largest:
            offsets = (uniforms[:, 1:] * (2 * largest + 1)).long() - largest
            images = shift_images(images, offsets)
        return {
            "pixels": images.float() / 127.5 - 1,
            "text_token_ids": self.text_token_ids[chosen],
            "sample_ids": sample_ids,
        }

    def loss(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        *,
        progress: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the contrastive loss, and how many images find a caption of their own."""
        del progress, generator
        text_token_ids, ids = batch["text_token_ids"], batch["sample_ids"]
        logits = model(text_token_ids, batch["pixels"])
        is_match = matches(text_token_ids, ids)
        towers = self.ranker.model.config.towers
        loss = (softmax_loss if towers.loss == "softmax" else sigmoid_loss)(logits, is_match)
        best = logits.detach().argmax(dim=1, keepdim=True)
        return loss, {
            "batch_r1": is_match.gather(1, best).float().mean(),
            "logit_scale": self.ranker.model.log_scale.detach().exp(),
        }

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measure retrieval on held-out pairs."""
        del model  # the ranker holds the same module
        return {
            f"validation/{name}": x
            for name, x in score_retrieval(self.ranker, self.held_out).items()
        }

    def make_image_grids(self, model: nn.Module) -> list[ImageGrid]:
        """Generate nothing."""
        del model
        return []


def train_clip(
    config: ClipRunConfig,
    *,
    resume: str | None = None,
) -> Path:
    """Train a CLIP and measure retrieval.

    Args:
        config: The run.
        resume: None, ``latest`` or a checkpoint folder.

    Returns:
        The ranker's folder; ``report.json`` lies beside it.

    Raises:
        UserError: If the data or the folders do not serve.
    """
    with begin_run(config, resume) as accelerator:
        task = _prepare(config, resume, accelerator)
        folder = run_task(
            task.ranker.model,
            task,
            config,
            accelerator=accelerator,
            resume=resume,
            save_pretrained=task.ranker.save_pretrained,
        )
        if accelerator.is_main_process:
            _write_report(task, Path(config.output_dir))
        accelerator.wait_for_everyone()
    return folder


def _prepare(
    config: ClipRunConfig,
    resume: str | None,
    accelerator: Accelerator,
) -> ClipTask:
    """Read the pairs, learn their tokens, build the model."""
    records = RunRecords(
        folder=Path(config.output_dir),
        writes=accelerator.is_main_process,
        resumes=resume is not None,
    )
    with accelerator.main_process_first():  # it may write which images the run begins with
        train, held_out = (
            load_pairs(config.data, split, image_size=config.image_size, records=records)
            for split in (config.data.train_split, config.data.validation_split)
        )
    text_tokenizer = TextTokenizer.learn(
        (text for pair in train.listed for text in pair.captions),
        vocab_size=config.text.vocab_size,
        text_length=config.text.text_length,
    )
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


def _write_report(task: ClipTask, output_dir: Path) -> None:
    """Measure the trained model and write ``report.json``."""
    task.ranker.model.eval()
    scores, retrieval = score_retrieval(task.ranker, task.held_out), task.held_out
    chance = scores["chance_r1"]
    report = {
        "images": len(retrieval.pixels),
        "captions": len(retrieval.captions),
        **scores,
        "image_to_text_times_chance": scores["image_to_text_r1"] / chance,
        "text_to_image_times_chance": scores["text_to_image_r1"] / chance,
    }
    logger.info(
        f"held out: {len(retrieval.pixels)} images, {len(retrieval.captions)} captions; R@1 image to "
        f"caption {scores['image_to_text_r1']:.1%}, caption to image "
        f"{scores['text_to_image_r1']:.1%}, chance {chance:.2%}"
    )
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def matches(
    text_token_ids: Int[Tensor, "batch text_length"], sample_ids: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch batch"]:
    """Tell which images and captions of a batch belong together.

    Args:
        text_token_ids: Caption of each sample.
        sample_ids: Image of each sample.

    Returns:
        (image, caption): True for a sample's own, for an equal caption, and for another caption
        of the same image.
    """
    same_text = (text_token_ids[:, None] == text_token_ids[None]).all(dim=2)
    return same_text | (sample_ids[:, None] == sample_ids[None])


def build_retrieval(
    pairs: Sequence[Pair],
    pixels: UInt8[Tensor, "samples 3 height width"],
    text_tokenizer: TextTokenizer,
) -> Retrieval:
    """Ask for the main caption of each image.

    Args:
        pairs: Held-out images; no more than ``MAX_MEASURED`` are taken, spread over all.
        pixels: Of each.
        text_tokenizer: Says which captions are the same to the model but for cut ends.

    Returns:
        Images and captions.
    """
    count = min(len(pairs), MAX_MEASURED)
    chosen = [index * len(pairs) // count for index in range(count)]
    normalize = text_tokenizer.tokenizer.normalizer.normalize_str
    own = [{normalize(text) for text in pairs[index].captions} for index in chosen]
    queries = list(dict.fromkeys(normalize(pairs[index].captions[0]) for index in chosen))
    is_right = torch.tensor([[text in texts for text in queries] for texts in own])
    return Retrieval(pixels[torch.tensor(chosen)], queries, is_right)


def score_retrieval(ranker: ClipRanker, retrieval: Retrieval) -> dict[str, float]:
    """Count how often the nearest one is right.

    Args:
        ranker: With its model in evaluation mode.
        retrieval: Among what.

    Returns:
        ``image_to_text_r1`` and ``text_to_image_r1`` in [0, 1] (R@1), and ``chance_r1``.
    """
    parts = [ranker.embed_pixels(part.float() / 127.5 - 1) for part in retrieval.pixels.split(512)]
    scores = torch.cat(parts) @ ranker.embed_texts(retrieval.captions).T  # (images, captions)
    top_texts, top_images = scores.argmax(dim=1), scores.argmax(dim=0)
    images, captions = (torch.arange(size) for size in scores.shape)
    return {
        "image_to_text_r1": float(retrieval.is_right[images, top_texts].double().mean()),
        "text_to_image_r1": float(retrieval.is_right[top_images, captions].double().mean()),
        "chance_r1": retrieval.chance,
    }
