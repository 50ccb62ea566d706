"""A whole decoder run: captioned images and a tokenizer in, model folder out."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle_mini_impl.data.text_tokenizer import TextTokenizer
from dalle_mini_impl.data.token_dataset import TokenDataset, Variation, build_token_dataset
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.models.dalle_config import PAD_TOKEN_ID, DalleConfig, DecoderConfig
from dalle_mini_impl.models.text_to_image import TextToImageModel, build_text_to_image
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.sampler import SamplingConfig
from dalle_mini_impl.training.config import DataConfig, TextConfig, TrainingConfig
from dalle_mini_impl.training.cross_entropy import token_nats
from dalle_mini_impl.training.run import begin_run, run_task
from dalle_mini_impl.training.run_dataset import RunRecords, load_pairs
from dalle_mini_impl.training.task import ImageGrid
from dalle_mini_impl.training.tracking import TrackingConfig
from vqvae.image_tokenizer import ImageTokenizer, require_working
from vqvae.pretrained.load import load_tokenizer

MAX_ZOOM = 4.0
EVALUATION_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class DalleTaskConfig:
    """What the decoder's loss is made of, and how its data is varied.

    Raises:
        ValueError: If a share is not in [0, 1].
    """

    text_loss_weight: float = 0.1
    """Weight of the caption's loss beside the image's, in models that write captions."""
    caption_dropout_probability: float = 0.1
    """Fraction of samples trained without their caption, for guidance."""
    token_noise_probability: float = 0.0
    """Largest fraction of a sample's input image tokens that come from other images, while it
    lasts; each sample generates its own share below it, and its targets stay. Keeps the decoder from
    following a remembered image instead of the caption."""
    random_order_probability: float = 0.0
    """Fraction of samples sampled in random order instead of raster order, while it lasts."""
    shifted_view_probability: float = 0.0
    """Fraction of samples taken from a shifted or enlarged view, while it lasts."""
    bpe_dropout_probability: float = 0.0
    """Probability that a merge is left out when a training caption is split into tokens; 0.1 in
    DALL-E (Provilkov et al. 2020, arXiv:1910.13267)."""
    augmentation_ends_at: float = 0.75
    """Progress in [0, 1] at which random order, shifted views and token noise have faded out."""

    def __post_init__(self) -> None:
        """Refuse shares outside [0, 1]."""
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"task.{name}: got {value}, expected 0 to 1")

    @property
    def ends_in_random_order(self) -> bool:
        """Whether the decoder can generate in any order when training has ended."""
        return self.random_order_probability > 0 and self.augmentation_ends_at == 1


@dataclass(frozen=True, kw_only=True)
class DalleRunConfig:
    """Options of ``train_dalle.py``.

    Raises:
        ValueError: If a value is out of range.
    """

    data: DataConfig
    """Captioned images to learn from."""
    vqvae_dir: str
    """Folder of the trained image tokenizer: ours, or one of those of ``vqvae.pretrained.load``."""
    vqvae_image_size: int | None = None
    """Side of the images in pixels, for a tokenizer of others that takes several sizes."""
    output_dir: str
    """Folder of the run: checkpoints, metrics, sample grids, and ``model/`` at the end."""
    num_views: int = 1
    """Copies of each image that are tokenized; all but the first are shifted or enlarged."""
    max_shift: int = 0
    """Largest shift of the copies, in pixels."""
    max_zoom: float = 1.0
    """Largest enlargement of the copies, of which a window of the old size is kept; 9/8 in DALL-E
    (Ramesh et al. 2021, arXiv:2102.12092, listing 2)."""
    fixed_prompts: tuple[str, ...] = ()
    """Prompts of the sample grid; held-out captions when empty."""
    text: TextConfig = field(default_factory=TextConfig)
    """The caption tokenizer."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The decoder."""
    task: DalleTaskConfig = field(default_factory=DalleTaskConfig)
    """Its loss."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How images are generated, unless a call says otherwise."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Budget and optimizer."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where metrics go."""

    def __post_init__(self) -> None:
        """Refuse what would fail only when training has begun."""
        if self.vqvae_image_size is not None and self.vqvae_image_size < 1:
            raise ValueError(f"vqvae_image_size: got {self.vqvae_image_size}, expected at least 1")
        if self.num_views < 1:
            raise ValueError(f"num_views: got {self.num_views}, expected at least 1")
        if self.max_shift < 0:
            raise ValueError(f"max_shift: got {self.max_shift}, expected at least 0")
        if not 1 <= self.max_zoom <= MAX_ZOOM:
            raise ValueError(f"max_zoom: got {self.max_zoom}, expected 1 to {MAX_ZOOM}")
        if self.decoder.raster_order_only and self.task.random_order_probability:
            raise ValueError(
                f"task.random_order_probability: got {self.task.random_order_probability}, expected "
                "0 with decoder.attention dalle, or without decoder.has_target_positions: both fit "
                "raster order only"
            )
        if any(not prompt.strip() for prompt in self.fixed_prompts):
            raise ValueError("fixed_prompts: got an empty prompt, expected some text in each")


class DalleTask:
    """Caption and image tokens, and the decoder's loss on them."""

    def __init__(
        self,
        train: TokenDataset,
        held_out: TokenDataset,
        config: DalleTaskConfig,
        *,
        sample_weights: Tensor | None,
        identity: str,
        pipeline: TextToImagePipeline,
        fixed_prompts: tuple[str, ...],
    ) -> None:
        """Collect what training needs.

        Args:
            train: Training samples.
            held_out: Samples that are only measured.
            config: Loss weights and augmentation.
            sample_weights: How often each sample is expected, or None.
            identity: Hash of the tokens that the decoder learns.
            pipeline: Generates the sample grid with the model in training.
            fixed_prompts: Prompts of the sample grid.
        """
        self.train, self.held_out, self.config = train, held_out, config
        self.sample_weights, self.identity = sample_weights, identity
        self.pipeline, self.fixed_prompts = pipeline, fixed_prompts
        self.num_samples = len(train)
        self.image_length = train.image_token_ids.shape[-1]
        self.num_uniforms = 6 + 3 * self.image_length
        self.tokens_per_sample = train.text_token_ids.shape[-1] + self.image_length
        codebook_size = pipeline.dalle.config.codebook_size
        counts = torch.bincount(train.image_token_ids[:, 0].flatten(), minlength=codebook_size)
        self.baselines = {
            "baseline/image_uniform_nats": math.log(codebook_size),
            "baseline/image_unigram_nats": _entropy(counts),
        }
        if isinstance(pipeline.dalle, Dalle):
            words = train.text_token_ids[train.text_token_ids != PAD_TOKEN_ID]
            self.baselines |= {
                "baseline/text_uniform_nats": math.log(pipeline.dalle.config.vocab_size),
                "baseline/text_unigram_nats": _entropy(words.bincount()),
            }

    def make_batch(
        self, sample_ids: Int[Tensor, " batch"], uniforms: Float[Tensor, "batch num_uniforms"]
    ) -> dict[str, Tensor]:
        """Look up the tokens; the random numbers of the loss travel with them."""
        views = torch.where(
            uniforms[:, 1] < self.config.shifted_view_probability, uniforms[:, 2], torch.zeros(())
        )
        length = self.image_length
        noise_sample_ids = (
            uniforms[:, -length:] * self.num_samples
        ).long()  # (batch, image_length)
        return {
            "text_token_ids": self.train.captions_of(sample_ids, uniforms[:, 0]),
            "image_token_ids": self.train.images_of(sample_ids, torch.zeros(len(sample_ids))),
            "view_token_ids": self.train.images_of(sample_ids, views),
            "noise_token_ids": self.train.image_token_ids[
                noise_sample_ids, 0, torch.arange(length)
            ].long(),
            "uniforms": uniforms[:, 3 : 6 + 2 * length],
        }

    def loss(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        *,
        progress: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return image loss plus weighted text loss, if there is one, in nats per token."""
        del generator  # every random number here belongs to a sample, not to a process
        text_token_ids, uniforms = batch["text_token_ids"], batch["uniforms"]
        augmentation = 1.0 if progress < self.config.augmentation_ends_at else 0.0
        image = batch["view_token_ids"] if augmentation else batch["image_token_ids"]
        dropped = uniforms[:, 0] < self.config.caption_dropout_probability
        given_text = text_token_ids.masked_fill(dropped[:, None], PAD_TOKEN_ID)

        length = self.image_length
        order_uniforms, noise_uniforms = uniforms[:, 3:].split(length, dim=1)
        is_random = uniforms[:, 1] < self.config.random_order_probability * augmentation
        order = torch.where(
            is_random[:, None],
            order_uniforms.argsort(dim=1),
            torch.arange(length, device=image.device),
        )
        noise_fractions = uniforms[:, 2:3] * self.config.token_noise_probability * augmentation
        is_noise = noise_uniforms < noise_fractions
        noisy = torch.where(is_noise, batch["noise_token_ids"], image)

        logits = model(given_text, noisy.gather(1, order), image_order=order)
        targets = image.gather(1, order)
        image_nats = token_nats(logits.image.flatten(0, 1), targets.flatten()).mean()
        if logits.text is None:
            return image_nats, {"image_nats": image_nats.detach()}
        text_nats = text_loss(logits.text, text_token_ids, is_counted=~dropped)
        loss = image_nats + self.config.text_loss_weight * text_nats
        fraction_counted = max(1 - self.config.caption_dropout_probability, 1e-9)
        return loss, {
            "image_nats": image_nats.detach(),
            "text_nats": text_nats.detach()
            / fraction_counted,  # hidden captions count as zero in it
        }

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measure nats per image token on held-out pairs, with and without their captions."""
        train_part = torch.arange(0, len(self.train), max(1, len(self.train) // 256))
        held_out = self._image_nats(model, self.held_out, torch.arange(len(self.held_out)))
        train = self._image_nats(model, self.train, train_part)
        text = {"validation/text_nats": held_out["text"]} if "text" in held_out else {}
        return {
            "validation/image_nats": held_out["given"],
            "validation/image_nats_null_caption": held_out["null"],
            **text,
            "validation/log_likelihood_ratio_nats": held_out["null"] - held_out["given"],
            "validation/train_image_nats": train["given"],
            "validation/memorization_gap_nats": held_out["given"] - train["given"],
            **self.baselines,
        }

    def _image_nats(
        self, model: nn.Module, data: TokenDataset, sample_ids: Tensor
    ) -> dict[str, float]:
        device = next(model.parameters()).device
        totals = {"given": 0.0, "null": 0.0}
        for ids in sample_ids.split(EVALUATION_BATCH_SIZE):
            image = data.images_of(ids, torch.zeros(len(ids))).to(device)
            text = data.captions_of(ids, torch.zeros(len(ids))).to(device)
            everything = torch.ones(len(ids), dtype=torch.bool, device=device)
            for name, caption in (("given", text), ("null", torch.full_like(text, PAD_TOKEN_ID))):
                logits = model(caption, image)
                nats = token_nats(logits.image.flatten(0, 1), image.flatten()).mean()
                totals[name] += float(nats) * len(ids) / len(sample_ids)
                if name == "given" and logits.text is not None:
                    text_nats = text_loss(logits.text, text, is_counted=everything)
                    weighted = float(text_nats) * len(ids) / len(sample_ids)
                    totals["text"] = totals.get("text", 0.0) + weighted
        return totals

    @torch.no_grad()
    def make_image_grids(self, model: nn.Module) -> list[ImageGrid]:
        """Generate the fixed prompts, one image each, always with the same seeds."""
        del model  # the pipeline holds the same module
        generated = self.pipeline(list(self.fixed_prompts), num_images=1, seed=0)
        return [ImageGrid("samples", generated.images, list(self.fixed_prompts))]


def train_dalle(
    config: DalleRunConfig,
    *,
    resume: str | None = None,
) -> Path:
    """Train a decoder on the tokens of captioned images.

    Args:
        config: The run.
        resume: None, ``latest`` or a checkpoint folder.

    Returns:
        The model folder.

    Raises:
        UserError: If the data or the folders do not serve.
    """
    with begin_run(config, resume) as accelerator:
        return _train(config, resume, accelerator)


def _train(
    config: DalleRunConfig,
    resume: str | None,
    accelerator: Accelerator,
) -> Path:
    """Do it, in a folder that is this run's own."""
    records = RunRecords(
        folder=Path(config.output_dir),
        writes=accelerator.is_main_process,
        resumes=resume is not None,
    )
    try:
        vqvae = load_tokenizer(config.vqvae_dir, image_size=config.vqvae_image_size)
        require_working(vqvae)
    except ValueError as error:
        raise UserError(
            f"vqvae_dir: {error}; expected a folder that train_vqvae.py wrote, or somebody else's "
            "tokenizer and perhaps vqvae_image_size"
        ) from None
    with accelerator.main_process_first():  # the others find the main process's tokens
        task, dalle, pipeline = _prepare(config, vqvae.to(accelerator.device), records)
    return run_task(
        dalle,
        task,
        config,
        accelerator=accelerator,
        resume=resume,
        save_pretrained=pipeline.save_pretrained,
    )


def _prepare(
    config: DalleRunConfig,
    vqvae: ImageTokenizer,
    records: RunRecords,
) -> tuple[DalleTask, TextToImageModel, TextToImagePipeline]:
    """Read and tokenize the data; build the decoder and the pipeline around it."""
    size = vqvae.config.image_size
    train, held_out = (
        load_pairs(config.data, split, image_size=size, records=records)
        for split in (config.data.train_split, config.data.validation_split)
    )
    text_tokenizer = TextTokenizer.learn(
        (text for pair in train.listed for text in pair.captions),
        vocab_size=config.text.vocab_size,
        text_length=config.text.text_length,
    )
    cache_dir = Path(config.output_dir) / "tokens"
    held_out_variation = Variation(max_shift=config.max_shift)  # none; older data sets have it so
    variation = replace(
        held_out_variation,
        num_views=config.num_views,
        max_zoom=config.max_zoom,
        bpe_dropout=config.task.bpe_dropout_probability,
    )
    tokens = {
        name: build_token_dataset(
            loaded.pairs,
            loaded.pixels,
            vqvae=vqvae,
            text_tokenizer=text_tokenizer,
            variation=variation if name == "train" else held_out_variation,
            cache_dir=cache_dir,
        )
        for name, loaded in (("train", train), ("held_out", held_out))
    }
    torch.manual_seed(config.training.seed)
    dalle = build_text_to_image(
        DalleConfig(
            decoder=config.decoder,
            vocab_size=text_tokenizer.vocab_size,
            text_length=text_tokenizer.text_length,
            codebook_levels=vqvae.codebook_levels,
            image_grid_size=vqvae.image_grid_size,
        )
    )
    pipeline = TextToImagePipeline(
        dalle=dalle,
        vqvae=vqvae,
        text_tokenizer=text_tokenizer,
        sampling_config=config.sampling,
        generates_any_order=config.task.ends_in_random_order,
    )
    prompts = config.fixed_prompts or tuple(pair.captions[0] for pair in held_out.pairs[:16])
    task = DalleTask(
        tokens["train"],
        tokens["held_out"],
        config.task,
        sample_weights=train.weights(config.data.balance_by),
        identity=f"{vqvae.fingerprint()}-{text_tokenizer.fingerprint()}",
        pipeline=pipeline,
        fixed_prompts=prompts,
    )
    return task, dalle, pipeline


def text_loss(
    logits: Float[Tensor, "batch text_length vocab"],
    text_token_ids: Int[Tensor, "batch text_length"],
    *,
    is_counted: Tensor,
) -> Float[Tensor, ""]:
    """Average the captions' loss: over a caption's tokens without pads, then over samples.

    Samples whose caption is hidden count as zero, so that the mean does not depend on how a batch
    is divided among processes.

    Args:
        logits: Of every caption position.
        text_token_ids: The true captions.
        is_counted: False for samples whose caption is hidden.

    Returns:
        Nats per token.
    """
    flat = token_nats(logits.flatten(0, 1), text_token_ids.flatten())
    nats = flat.view_as(text_token_ids)
    is_token = (text_token_ids != PAD_TOKEN_ID) & is_counted[:, None]
    per_sample = (nats * is_token).sum(dim=1) / is_token.sum(dim=1).clamp_min(1)
    return per_sample.mean()


def _entropy(counts: Tensor) -> float:
    fractions = counts[counts > 0].double() / counts.sum()
    return float(-(fractions * fractions.log()).sum())
