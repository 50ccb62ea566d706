"""A whole decoder run: captioned pictures and a tokenizer in, model folder out."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from dalle_mini_impl.data.text_tokenizer import CaptionEncoder
from dalle_mini_impl.data.token_dataset import Variation, build_token_dataset
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.dalle_config import DalleConfig, DecoderConfig
from dalle_mini_impl.models.text_to_image import TextToImageModel, build_text_to_image
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.sampler import SamplingConfig
from dalle_mini_impl.training.config import TextConfig, TrainingConfig
from dalle_mini_impl.training.dalle_task import DalleTask, DalleTaskConfig
from dalle_mini_impl.training.run import begin_run, run_task
from dalle_mini_impl.training.run_dataset import RunRecords, load_pairs
from dalle_mini_impl.training.sources import DataConfig
from dalle_mini_impl.training.tracking import TrackingConfig
from vqvae.image_tokenizer import ImageTokenizer, require_working
from vqvae.pretrained.load import load_tokenizer

MAX_ZOOM = 4.0


@dataclass(frozen=True, kw_only=True)
class DalleRunConfig:
    """Options of ``train_dalle.py``.

    Raises:
        ValueError: If a value is out of range.
    """

    data: DataConfig
    """Captioned pictures to learn from."""
    vqvae_dir: str
    """Folder of the trained image tokenizer: ours, or one of those of ``vqvae.pretrained.load``."""
    vqvae_image_size: int | None = None
    """Side of the pictures in pixels, for a tokenizer of others that takes several sizes."""
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
    """How pictures are drawn, unless a call says otherwise."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Budget and optimizer."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where metrics go."""

    def __post_init__(self) -> None:
        """Refuse what would fail only when training has begun."""
        if self.vqvae_image_size is not None and self.vqvae_image_size < 1:
            raise ValueError(f"vqvae_image_size: got {self.vqvae_image_size}, wanted at least 1")
        if self.num_views < 1:
            raise ValueError(f"num_views: got {self.num_views}, wanted at least 1")
        if self.max_shift < 0:
            raise ValueError(f"max_shift: got {self.max_shift}, wanted at least 0")
        if not 1 <= self.max_zoom <= MAX_ZOOM:
            raise ValueError(f"max_zoom: got {self.max_zoom}, wanted 1 to {MAX_ZOOM}")
        if self.decoder.draws_raster_order_only and self.task.random_order_probability:
            raise ValueError(
                f"task.random_order_probability: got {self.task.random_order_probability}, wanted "
                "0 with decoder.attention dalle, or without decoder.has_target_positions: both fit "
                "raster order only"
            )
        if any(not prompt.strip() for prompt in self.fixed_prompts):
            raise ValueError("fixed_prompts: got an empty prompt, wanted some text in each")


def train_dalle(
    config: DalleRunConfig,
    *,
    resume: str | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train a decoder on the tokens of captioned pictures.

    Args:
        config: The run.
        resume: None, ``latest`` or a checkpoint folder.
        show: Receives plain lines about the run, on the main process.

    Returns:
        The model folder.

    Raises:
        UserError: If the data or the folders do not serve.
    """
    with begin_run(config, resume, show) as (accelerator, say):
        return _train(config, resume, accelerator, say)


def _train(
    config: DalleRunConfig,
    resume: str | None,
    accelerator: Accelerator,
    show: Callable[[str], None],
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
            f"vqvae_dir: {error}; wanted a folder that train_vqvae.py wrote, or somebody else's "
            "tokenizer and perhaps vqvae_image_size"
        ) from None
    with accelerator.main_process_first():  # the others find the main process's tokens
        task, dalle, pipeline = _prepare(config, vqvae.to(accelerator.device), records, show)
    return run_task(
        dalle,
        task,
        config,
        accelerator=accelerator,
        resume=resume,
        show=show,
        save_pretrained=pipeline.save_pretrained,
    )


def _prepare(
    config: DalleRunConfig,
    vqvae: ImageTokenizer,
    records: RunRecords,
    show: Callable[[str], None],
) -> tuple[DalleTask, TextToImageModel, TextToImagePipeline]:
    """Read and tokenize the data; build the decoder and the pipeline around it."""
    size = vqvae.config.image_size
    train, held_out = (
        load_pairs(config.data, split, image_size=size, records=records, show=show)
        for split in (config.data.train_split, config.data.validation_split)
    )
    captions = CaptionEncoder.learn(
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
            captions=captions,
            variation=variation if name == "train" else held_out_variation,
            cache_dir=cache_dir,
            show=show,
        )
        for name, loaded in (("train", train), ("held_out", held_out))
    }
    torch.manual_seed(config.training.seed)
    dalle = build_text_to_image(
        DalleConfig(
            decoder=config.decoder,
            vocab_size=captions.vocab_size,
            text_length=captions.text_length,
            codebook_levels=vqvae.codebook_levels,
            image_grid_size=vqvae.image_grid_size,
        )
    )
    pipeline = TextToImagePipeline(
        dalle=dalle,
        vqvae=vqvae,
        captions=captions,
        settings=config.sampling,
        draws_any_order=config.task.ends_in_random_order,
    )
    prompts = config.fixed_prompts or tuple(pair.captions[0] for pair in held_out.pairs[:16])
    task = DalleTask(
        tokens["train"],
        tokens["held_out"],
        config.task,
        sample_weights=train.weights(config.data.balance_by),
        identity=f"{vqvae.fingerprint()}-{captions.fingerprint()}",
        pipeline=pipeline,
        fixed_prompts=prompts,
    )
    return task, dalle, pipeline
