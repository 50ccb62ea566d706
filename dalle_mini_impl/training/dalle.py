"""Training the decoder: captioned images and an image tokenizer in, a whole model folder out.

All images are tokenized once, before the first step (`data/token_dataset.py`); from then on the
decoder sees tokens only. The loss is the cross-entropy of the image tokens plus, in models that
predict captions, a small weight times that of the caption tokens.
"""

import logging
import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dalle_mini_impl.data.token_dataset import TokenDataset, Variation, build_token_dataset
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.models.dalle_config import PAD_TOKEN_ID, DalleConfig, DecoderConfig
from dalle_mini_impl.models.text_to_image import build_text_to_image
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.sampler import SamplingConfig
from dalle_mini_impl.training.config import DataConfig, TextConfig, TrainingConfig, require
from dalle_mini_impl.training.cross_entropy import token_nats
from dalle_mini_impl.training.run import RunContext, learn_text_tokenizer, run_training
from dalle_mini_impl.training.task import ImageGrid
from dalle_mini_impl.training.tracking import TrackingConfig
from vqvae.config import ImageSize, height_and_width
from vqvae.image_tokenizer import ImageTokenizer, require_working
from vqvae.pretrained.hub import tokenizer_folder
from vqvae.pretrained.load import load_tokenizer
from vqvae.serialization import CONFIG_NAME

logger = logging.getLogger(__name__)
MAX_ZOOM = 4.0
EVALUATION_BATCH_SIZE = 64
MAX_MEASURED_TRAINING_SAMPLES = 256
NUM_DEFAULT_PROMPTS = 16
MIN_COMPARED = 16  # held-out images; of fewer, chance decides which evaluation is best


@dataclass(frozen=True, kw_only=True)
class DalleTaskConfig:
    """The decoder's loss and its augmentations."""

    text_loss_weight: float = 0.1
    """Weight of the caption's loss relative to the image's, in models that predict captions."""
    caption_dropout_probability: float = 0.1
    """Fraction of samples trained without their caption, for guidance."""
    unknown_word_probability: float = 0.0
    """Fraction of samples in whose captions parts of words stand in place of some or all tokens, as
    they do for words that training never shows. So such words leave open what they name, where
    they would otherwise call up any image of the training set."""
    token_noise_probability: float = 0.0
    """Upper bound of the fraction of input image tokens replaced by tokens of other images. Each
    sample's fraction is uniform below it; targets stay. Keeps the decoder from continuing a
    memorized image instead of following the caption."""
    random_order_probability: float = 0.0
    """Fraction of samples trained in random order instead of raster order."""
    shifted_view_probability: float = 0.0
    """Fraction of samples taken from a shifted or enlarged view."""
    bpe_dropout_probability: float = 0.0
    """Probability that a merge is left out when a training caption is split into tokens; 0.1 in
    DALL-E (Provilkov et al. 2020, arXiv:1910.13267)."""
    augmentation_ends_at: float = 0.75
    """Progress in [0, 1] at which random order, shifted views and token noise end."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(0 <= value <= 1, f"task.{name}", value, "0 to 1")

    @property
    def ends_in_random_order(self) -> bool:
        """Whether the decoder can generate in any order when training has ended."""
        return self.random_order_probability > 0 and self.augmentation_ends_at == 1


@dataclass(frozen=True, kw_only=True)
class DalleRunConfig:
    """Options of ``train_dalle.py``."""

    data: DataConfig
    """Captioned images to learn from."""
    vqvae_dir: str = ""
    """Folder of the trained image tokenizer, ours or one that ``vqvae.pretrained.load`` reads, or
    its name on the Hub, ``user/name``. Empty: that of ``init_from``."""
    init_from: str | None = None
    """Model folder whose decoder the run starts from. Caption tokenizer and sizes are that model's,
    and ``text`` and ``decoder`` do not count."""
    vqvae_image_size: ImageSize | None = None
    """Side of the square images in pixels, or [height, width], for another library's tokenizer that
    takes several sizes."""
    output_dir: str
    """Folder of the run: checkpoints, metrics, sample grids, and ``model/`` at the end."""
    num_views: int = 1
    """Views of each image that are tokenized; all but the first are shifted or enlarged."""
    max_shift: int = 0
    """Largest shift of these views, in pixels."""
    max_zoom: float = 1.0
    """Largest enlargement of these views, of which a window of the old size is kept; 9/8 in DALL-E
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
        size = self.vqvae_image_size
        is_positive = size is None or min(height_and_width(size)) >= 1
        require(is_positive, "vqvae_image_size", size, "at least 1")
        require(self.num_views >= 1, "num_views", self.num_views, "at least 1")
        require(self.max_shift >= 0, "max_shift", self.max_shift, "at least 0")
        require(1 <= self.max_zoom <= MAX_ZOOM, "max_zoom", self.max_zoom, f"1 to {MAX_ZOOM}")
        random_order = self.task.random_order_probability
        require(
            not (self.decoder.raster_order_only and random_order),
            "task.random_order_probability",
            random_order,
            "0 with decoder.attention dalle, or without decoder.has_target_positions: both fit "
            "raster order only",
        )
        require(
            bool(self.vqvae_dir or self.init_from),
            "vqvae_dir",
            "nothing",
            "the folder of a trained image tokenizer, or init_from",
        )
        if any(not prompt.strip() for prompt in self.fixed_prompts):
            raise ValueError("fixed_prompts: got an empty prompt, expected some text in each")


def train_dalle(config: DalleRunConfig, *, resume: str | None = None) -> Path:
    """Train a decoder on the tokens of captioned images; see ``run_training``."""
    return run_training(with_base(config), build_task, resume=resume)


def with_base(config: DalleRunConfig) -> DalleRunConfig:
    """Take all sizes from the model that the run starts from, if there is one."""
    if config.init_from is None:
        return config
    base = open_base(config.init_from)
    text = base.text_tokenizer
    return replace(
        config,
        vqvae_dir=config.vqvae_dir or str(Path(config.init_from) / "vqvae"),
        text=TextConfig(vocab_size=text.vocab_size, text_length=text.text_length),
        decoder=base.dalle.config.decoder,
    )


def open_base(folder: str) -> TextToImagePipeline:
    """Open the model that a run starts from."""
    try:
        return TextToImagePipeline.from_pretrained(folder)
    except UserError as error:
        raise UserError(f"init_from: {error}") from None


def build_task(config: DalleRunConfig, run: RunContext) -> "DalleTask":
    """Read and tokenize the data; build the decoder and the pipeline around it."""
    # 1. The image tokenizer, frozen.
    try:
        folder = tokenizer_folder(config.vqvae_dir)
        vqvae = load_tokenizer(folder, image_size=config.vqvae_image_size)
        require_working(vqvae)
    except ValueError as error:
        expected = (
            "a folder that train_vqvae.py wrote, or another project's tokenizer (a folder, or a "
            "name on the Hub), with vqvae_image_size if it takes several sizes"
        )
        model = Path(config.vqvae_dir) / "model"
        if (model / CONFIG_NAME).is_file():  # the run's folder
            expected = str(model)
        raise UserError(f"vqvae_dir: {error}; expected {expected}") from None
    base = None if config.init_from is None else open_base(config.init_from)
    if base is not None:
        require_same_tokens(base, vqvae)
    vqvae = vqvae.to(run.accelerator.device)

    # 2. Captions and images as tokens; only the training split is augmented.
    variation = Variation(
        num_views=config.num_views,
        max_shift=config.max_shift,
        max_zoom=config.max_zoom,
        bpe_dropout=config.task.bpe_dropout_probability,
    )
    # The main process tokenizes; the others wait, then find its files.
    with run.accelerator.main_process_first():
        train, held_out = run.load_splits(config.data, pixel_size=vqvae.config.pixel_size)
        # `listed`: a resumed run must learn the very vocabulary that it began with.
        texts = (text for pair in train.listed for text in pair.captions)
        text_tokenizer = base.text_tokenizer if base else learn_text_tokenizer(config.text, texts)
        tokenize = partial(
            build_token_dataset,
            vqvae=vqvae,
            text_tokenizer=text_tokenizer,
            cache_dir=Path(config.output_dir) / "tokens",
        )
        train_tokens = tokenize(train.pairs, train.pixels, variation=variation)
        held_out_tokens = tokenize(held_out.pairs, held_out.pixels, variation=Variation())

    # 3. The decoder, in the pipeline that is saved at the end.
    torch.manual_seed(config.training.seed)
    dalle_config = DalleConfig(
        decoder=config.decoder,
        vocab_size=text_tokenizer.vocab_size,
        text_length=text_tokenizer.text_length,
        codebook_levels=vqvae.codebook_levels,
        image_grid_size=vqvae.image_grid_size,
    )
    pipeline = TextToImagePipeline(
        dalle=base.dalle.train() if base else build_text_to_image(dalle_config),
        vqvae=vqvae,
        text_tokenizer=text_tokenizer,
        sampling_config=config.sampling,
        generates_any_order=config.task.ends_in_random_order,
    )
    first_captions = tuple(pair.captions[0] for pair in held_out.pairs[:NUM_DEFAULT_PROMPTS])
    return DalleTask(
        train_tokens,
        held_out_tokens,
        config.task,
        sample_weights=train.weights(config.data.balance_by),
        num_own=train.num_own,
        pipeline=pipeline,
        fixed_prompts=config.fixed_prompts or first_captions,
        fragment_ids=text_tokenizer.fragment_ids(
            text for pair in train.listed for text in pair.captions
        ),
    )


def require_same_tokens(base: TextToImagePipeline, vqvae: ImageTokenizer) -> None:
    """Raise a ``UserError`` if the tokens of an image tokenizer do not fit a trained decoder."""
    expected = (base.vqvae.codebook_levels, base.vqvae.image_grid_size)
    got = (vqvae.codebook_levels, vqvae.image_grid_size)
    if got != expected:
        raise UserError(
            f"vqvae_dir: got codebook and grid {got}, the decoder of init_from expects {expected}; "
            "leave vqvae_dir out to take that model's own, or train without init_from"
        )
    if vqvae.fingerprint() != base.vqvae.fingerprint():
        logger.warning(
            "the decoder of init_from was trained on the tokens of another image tokenizer than "
            "vqvae_dir: it has to learn anew what they mean, unless only the decoder half differs"
        )


class SampleUniforms(NamedTuple):
    """The random numbers of each sample, uniform in [0, 1), by what they decide."""

    caption: Float[Tensor, " batch"]
    use_view: Float[Tensor, " batch"]
    view: Float[Tensor, " batch"]
    drop_caption: Float[Tensor, " batch"]
    random_order: Float[Tensor, " batch"]
    noise_fraction: Float[Tensor, " batch"]
    order: Float[Tensor, "batch image_length"]
    is_noise: Float[Tensor, "batch image_length"]
    noise_source: Float[Tensor, "batch image_length"]

    @staticmethod
    def count(image_length: int) -> int:
        """Numbers per sample."""
        return 6 + 3 * image_length

    @classmethod
    def from_matrix(cls, uniforms: Float[Tensor, "batch num_uniforms"]) -> "SampleUniforms":
        """Name the columns of a matrix: six single ones, then three of ``image_length``."""
        return cls(*uniforms[:, :6].unbind(1), *uniforms[:, 6:].chunk(3, dim=1))


class DalleTask:
    """Caption and image tokens, and the decoder's loss on them.

    The pipeline holds the decoder in training; it generates the images of the sample grid.
    """

    def __init__(
        self,
        train: TokenDataset,
        held_out: TokenDataset,
        config: DalleTaskConfig,
        *,
        sample_weights: Tensor | None,
        pipeline: TextToImagePipeline,
        fixed_prompts: tuple[str, ...],
        fragment_ids: Int[Tensor, " fragments"] | None = None,
        num_own: int | None = None,
    ) -> None:
        self.model: nn.Module = pipeline.dalle
        self.train, self.held_out, self.config = train, held_out, config
        self.sample_weights = sample_weights
        self.num_own = len(train) if num_own is None else num_own
        tokenizers = (pipeline.vqvae, pipeline.text_tokenizer)
        self.identity = "-".join(each.fingerprint() for each in tokenizers)
        self.pipeline, self.fixed_prompts = pipeline, fixed_prompts
        self.fragment_ids = torch.arange(1, 257) if fragment_ids is None else fragment_ids
        self.selection_metric: str | None = None
        if len(held_out) >= MIN_COMPARED:
            self.selection_metric = "validation/log_likelihood_ratio_nats"
        else:
            logger.info(
                f"{len(held_out)} held-out images are too few to tell which weights are best: "
                "the last ones are kept"
            )
        self.num_samples = len(train)
        self.image_length = train.image_token_ids.shape[-1]
        self.num_uniforms = SampleUniforms.count(self.image_length)
        self.tokens_per_sample = train.text_token_ids.shape[-1] + self.image_length
        self.baselines = self._baselines()

    def _baselines(self) -> dict[str, float]:
        """Nats of a model that knows nothing, and of one that knows how frequent each token is."""
        sizes = self.pipeline.dalle.config
        image_token_ids = self.train.image_token_ids[: self.num_own, 0].flatten()
        baselines = {
            "baseline/image_uniform_nats": math.log(sizes.codebook_size),
            "baseline/image_unigram_nats": _entropy(
                torch.bincount(image_token_ids, minlength=sizes.codebook_size)
            ),
        }
        if isinstance(self.pipeline.dalle, Dalle):
            text_token_ids = self.train.text_token_ids
            words = text_token_ids[text_token_ids != PAD_TOKEN_ID]
            baselines["baseline/text_uniform_nats"] = math.log(sizes.vocab_size)
            baselines["baseline/text_unigram_nats"] = _entropy(words.bincount())
        return baselines

    def make_batch(
        self, sample_ids: Int[Tensor, " batch"], uniforms: Float[Tensor, "batch num_uniforms"]
    ) -> dict[str, Tensor]:
        """Look up the tokens; the random numbers travel along to the loss."""
        named = SampleUniforms.from_matrix(uniforms)
        uses_view = named.use_view < self.config.shifted_view_probability
        # Each cell's noise is the token of the same cell in another image of the training set.
        cells = torch.arange(self.image_length)
        noise_sample_ids = (named.noise_source * self.num_samples).long()  # (batch, image_length)
        return {
            "text_token_ids": self.train.captions_of(sample_ids, named.caption),
            "image_token_ids": self.train.images_of(sample_ids, torch.zeros(len(sample_ids))),
            "view_token_ids": self.train.images_of(
                sample_ids, torch.where(uses_view, named.view, torch.zeros(()))
            ),
            "noise_token_ids": self.train.image_token_ids[noise_sample_ids, 0, cells].long(),
            "uniforms": uniforms,
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
        config, uniforms = self.config, SampleUniforms.from_matrix(batch["uniforms"])
        text_token_ids = batch["text_token_ids"]
        # The last part of a run trains on the images as they are, in the order of generation.
        is_augmented = progress < config.augmentation_ends_at

        # Unknown words: parts of words in place of some tokens, or of all.
        given_text, is_spoiled = self._with_unknown_words(text_token_ids, generator)

        # Caption dropout: the decoder also learns p(image), which guidance needs.
        is_dropped = uniforms.drop_caption < config.caption_dropout_probability
        given_text = given_text.masked_fill(is_dropped[:, None], PAD_TOKEN_ID)

        # Shifted or enlarged views.
        image = batch["view_token_ids"] if is_augmented else batch["image_token_ids"]

        # Token noise: wrong inputs, right targets, each sample with a fraction of its own.
        noise_fraction = uniforms.noise_fraction * config.token_noise_probability * is_augmented
        is_noise = uniforms.is_noise < noise_fraction[:, None]
        inputs = torch.where(is_noise, batch["noise_token_ids"], image)

        # Random order: a permutation of the cells in place of the raster order.
        is_random = uniforms.random_order < config.random_order_probability * is_augmented
        raster_order = torch.arange(self.image_length, device=image.device)
        order = torch.where(is_random[:, None], uniforms.order.argsort(dim=1), raster_order)

        # The model takes tokens in generation order: token i belongs to cell order[i].
        logits = model(given_text, inputs.gather(1, order), image_order=order)
        targets = image.gather(1, order)
        image_nats = token_nats(logits.image.flatten(0, 1), targets.flatten()).mean()
        if logits.text is None:
            return image_nats, {"image_nats": image_nats.detach()}
        # The text loss of a dropped caption is masked out: it enters the mean as zero.
        text_nats = text_loss(logits.text, text_token_ids, is_counted=~is_dropped & ~is_spoiled)
        loss = image_nats + config.text_loss_weight * text_nats
        # The metric averages over the captions that are kept, the loss over the whole batch.
        fraction_counted = (1 - config.caption_dropout_probability) * (
            1 - config.unknown_word_probability
        )
        fraction_counted = max(fraction_counted, 1e-9)
        return loss, {
            "image_nats": image_nats.detach(),
            "text_nats": text_nats.detach() / fraction_counted,
        }

    def _with_unknown_words(
        self, text_token_ids: Int[Tensor, "batch text_length"], generator: torch.Generator
    ) -> tuple[Int[Tensor, "batch text_length"], Bool[Tensor, " batch"]]:
        """Put parts of words in place of tokens of some captions; also tell of which."""
        batch, length = text_token_ids.shape
        if not self.config.unknown_word_probability:
            return text_token_ids, text_token_ids.new_zeros(batch, dtype=torch.bool)
        # On the CPU, as the generator may be there.
        sample, token, choice = torch.rand(
            (3, batch, max(length, 3)), generator=generator, device=generator.device
        ).to(text_token_ids.device)
        is_spoiled = sample[:, 0] < self.config.unknown_word_probability
        # Each token with a probability of the caption's own: from one word to all.
        is_token = text_token_ids != PAD_TOKEN_ID
        is_replaced = is_token & (token[:, :length] < sample[:, 1, None])
        # An unknown word has more tokens than a known one: up to three times as many.
        longest = is_token.sum(dim=1, keepdim=True) * (1 + 2 * sample[:, 2, None])
        positions = torch.arange(length, device=text_token_ids.device)
        is_replaced |= ~is_token & (positions + 1 <= longest)
        is_replaced &= is_spoiled[:, None]
        fragment_ids = self.fragment_ids.to(text_token_ids.device)
        fragments = fragment_ids[(choice[:, :length] * len(fragment_ids)).long()]
        return torch.where(is_replaced, fragments, text_token_ids), is_spoiled

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure nats per image token on held-out pairs, with and without their captions."""
        # Mixed sources aside: what is compared is of one kind.
        step = max(1, self.num_own // MAX_MEASURED_TRAINING_SAMPLES)
        held_out = self._nats(self.held_out, torch.arange(len(self.held_out)))
        train = self._nats(self.train, torch.arange(0, self.num_own, step))
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

    def _nats(self, data: TokenDataset, sample_ids: Tensor) -> dict[str, float]:
        """Nats per image token ``given`` captions and ``null`` ones, and per ``text`` token."""
        device = next(self.model.parameters()).device
        totals = {"given": 0.0, "null": 0.0}
        # Always view 0 and the first caption, in raster order: comparable over the run.
        for ids in sample_ids.split(EVALUATION_BATCH_SIZE):
            image = data.images_of(ids, torch.zeros(len(ids))).to(device)
            text = data.captions_of(ids, torch.zeros(len(ids))).to(device)
            for name, caption in (("given", text), ("null", torch.full_like(text, PAD_TOKEN_ID))):
                logits = self.model(caption, image)
                nats = token_nats(logits.image.flatten(0, 1), image.flatten()).mean()
                totals[name] += float(nats) * len(ids) / len(sample_ids)
                if name == "given" and logits.text is not None:
                    is_counted = torch.ones(len(ids), dtype=torch.bool, device=device)
                    text_nats = text_loss(logits.text, text, is_counted=is_counted)
                    weighted = float(text_nats) * len(ids) / len(sample_ids)
                    totals["text"] = totals.get("text", 0.0) + weighted
        return totals

    @torch.no_grad()
    def make_image_grids(self) -> list[ImageGrid]:
        """Generate one image per fixed prompt, always with the same seeds."""
        generated = self.pipeline(list(self.fixed_prompts), num_images=1, seed=0)
        return [ImageGrid("samples", generated.images, list(self.fixed_prompts))]

    def save_pretrained(self, folder: Path) -> None:
        """Write the whole pipeline."""
        self.pipeline.save_pretrained(folder)


def text_loss(
    logits: Float[Tensor, "batch text_length vocab"],
    text_token_ids: Int[Tensor, "batch text_length"],
    *,
    is_counted: Bool[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Return nats per token: averaged over each caption's tokens without pads, then over samples.

    Samples that are not counted are zeros of the mean, so that it does not depend on how a batch
    is divided among processes.
    """
    flat = token_nats(logits.flatten(0, 1), text_token_ids.flatten())
    nats = flat.view_as(text_token_ids)
    is_token = (text_token_ids != PAD_TOKEN_ID) & is_counted[:, None]
    per_sample = (nats * is_token).sum(dim=1) / is_token.sum(dim=1).clamp_min(1)
    return per_sample.mean()


def _entropy(counts: Tensor) -> float:
    fractions = counts[counts > 0].double() / counts.sum()
    return float(-(fractions * fractions.log()).sum())
