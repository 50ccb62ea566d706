"""``evaluate.py``: measure a model in every way, write the report, show it in W&B."""

import dataclasses
import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml

from dalle_mini_impl.cli.pipelines import open_pipeline
from dalle_mini_impl.clip_ranker import load_clip_ranker
from dalle_mini_impl.data.pairs import DEFAULT_OPTIONS, ReadOptions
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.clip_score import measure_clip_score
from dalle_mini_impl.evaluation.distribution import (
    FeatureSpace,
    measure_distribution,
    network_or_none,
)
from dalle_mini_impl.evaluation.emoji import HeldOutPrompt, held_out_prompts, measure_emoji
from dalle_mini_impl.evaluation.facts import measure_facts
from dalle_mini_impl.evaluation.likelihood import measure_likelihood
from dalle_mini_impl.evaluation.memorization import measure_memorization
from dalle_mini_impl.evaluation.reconstruction import measure_reconstruction
from dalle_mini_impl.evaluation.report import (
    RECONSTRUCTED,
    Section,
    numbers_in,
    write_report,
)
from dalle_mini_impl.evaluation.samples import (
    EvaluationData,
    Pixels,
    Samples,
    decode,
    generate_candidates,
    join,
    read_data,
)
from dalle_mini_impl.evaluation.scenes import SCENES
from dalle_mini_impl.evaluation.shapes import SHAPES
from dalle_mini_impl.model_folder import file_hashes
from dalle_mini_impl.native.decoder import NativeWeights
from dalle_mini_impl.output_dirs import make_folder
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.rerank import ImageRanker
from dalle_mini_impl.sampling.sampler import SamplingConfig
from dalle_mini_impl.training.checkpoint import newest_checkpoint
from dalle_mini_impl.training.config import DataConfig
from dalle_mini_impl.training.tracking import TrackingConfig, open_tracker

logger = logging.getLogger(__name__)

LIBRARIES = ("dalle-mini-impl", "torch", "numpy", "scipy", "scikit-image", "pillow")
ONE = "one image"
StoredT = TypeVar("StoredT", DataConfig, TrackingConfig)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Options of ``evaluate.py``."""

    model: str
    """Model folder."""
    data: str
    """Captioned images, as in training."""
    out: Path
    """Folder of the report."""
    styles: tuple[str, ...] = ()
    """Styles of emoji to generate; all when empty."""
    language: str = "en"
    """Of the captions: ``en`` or ``ko``."""
    num_candidates: int = 1
    """Images generated per caption; from 2 on the best of them is judged as well."""
    rank: Literal["likelihood", "clip", "none"] = "likelihood"
    """Ranker of the candidates: the decoder's likelihoods, ``clip``, or none: a single image."""
    seed: int = 0
    """Of the first image, and of every other random choice."""
    max_samples: int = 512
    """Images per style or split to generate, and images per split to measure the loss of."""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of ``SamplingConfig``."""
    native: NativeWeights | None = None
    """Generate with the compiled pass and weights of this kind, where possible; likelihoods are
    torch's in any case."""
    clip: str | None = None
    """Folder or name of a CLIP, for the CLIP score and for ``rank``."""
    tracking: Literal["auto", "online", "offline", "disabled"] | None = None
    """W&B mode; None is that of the model's run."""


def evaluate(config: EvaluationConfig) -> Path:
    """Measure a model on held-out images and write a report.

    Returns:
        The report's ``report.md``; ``report.json`` and the images lie in the same folder.

    Raises:
        UserError: If the model, the data or an option is invalid.
    """
    if config.max_samples < 1:
        raise UserError(f"max_samples: got {config.max_samples}, expected at least 1")
    if config.rank == "clip" and not config.clip:
        raise UserError(
            "rank: got clip without --clip; expected --clip with a folder that train_clip.py "
            "wrote, or the name of a CLIP of transformers"
        )
    # Refuse bad options before the images are read, which takes minutes.
    make_folder(config.out, field="out")
    pipeline = open_pipeline(config.model, native=config.native)
    sampling_config = pipeline.sampling_config.override(config.overrides)
    clip = load_clip_ranker(config.clip).to(pipeline.device) if config.clip else None
    clock = _Clock()
    data = read_data(
        config.data,
        pipeline.vqvae,
        language=config.language,
        styles=config.styles,
        options=_read_options_of(Path(config.model).resolve().parent, config.data),
    )
    clock.lap("images read and tokenized")
    sections = _measure(pipeline, data, sampling_config, config, clock, clip)
    protocol = _protocol(pipeline, data, sampling_config, config)
    write_report(config.out, f"Evaluation of {config.model}", protocol, sections)
    # Apart from the report: times differ from run to run, the report must not.
    seconds = json.dumps(clock.seconds, indent=1)
    (config.out / "timings.json").write_text(seconds + "\n", encoding="utf-8")
    _track(config, protocol, sections)
    return config.out / "report.md"


class _Clock:
    """Logs and keeps the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, what: str) -> None:
        now = time.monotonic()
        self.seconds[what] = round(now - self._last, 1)
        logger.info(f"{what}: {self.seconds[what]} s")
        self._last = now


def _measure(
    pipeline: TextToImagePipeline,
    data: EvaluationData,
    sampling_config: SamplingConfig,
    config: EvaluationConfig,
    clock: _Clock,
    clip: ImageRanker | None,
) -> list[Section]:
    """Generate an image of every held-out caption, and judge the images in every way."""
    vqvae, seed = pipeline.vqvae, config.seed
    # 1. Generate; bad options and data without held-out emoji end the evaluation here.
    prompts: list[HeldOutPrompt] = []
    if data.kind == "emoji":
        prompts, reference = held_out_prompts(data, config.styles, max_samples=config.max_samples)
    else:
        reference = join([split.subsample(config.max_samples) for split in data.held_out.values()])
    rank = clip if config.rank == "clip" else config.rank
    assert rank is not None  # `evaluate` refuses the ranker clip without a CLIP
    candidates = generate_candidates(
        pipeline,
        reference.captions,
        sampling_config=sampling_config,
        num_candidates=config.num_candidates,
        seed=seed,
        rank=rank,
    )
    clock.lap(f"{candidates.scores.numel()} images generated")
    # Never only the best of N: selection hides the quality of a single sample.
    ways = {ONE: decode(vqvae, candidates.first)}
    if candidates.scores.shape[1] > 1:
        ways[f"best of {config.num_candidates}"] = decode(vqvae, candidates.best)
    # 2. Measure what needs no generated image.
    sections = [measure_reconstruction(vqvae, data.held_out_samples)]
    clock.lap("tokenizer measured")
    splits = {"train": data.train, **data.held_out}
    sections.append(measure_likelihood(pipeline, splits, max_samples=config.max_samples, seed=seed))
    clock.lap("likelihoods measured")
    # 3. Judge each image by its caption.
    captions, reconstructions = reference.captions, decode(vqvae, reference.image_token_ids)
    if data.kind == "emoji":
        sections.append(measure_emoji(prompts, captions, ways, reconstructions, seed=seed))
    elif data.kind in ("shapes", "scenes"):
        world = SHAPES if data.kind == "shapes" else SCENES
        sections.append(measure_facts(world, reference, ways, reconstructions, seed=seed))
    if clip is not None:
        sections.append(measure_clip_score(clip, ways, reference.pixels, captions, seed=seed))
    clock.lap("generated images judged")
    # 4. Judge the images as a set, without selection: the best of many are less diverse.
    generated = Samples(reference.pairs, ways[ONE], candidates.first)
    sections += _compare(pipeline, data, generated, reference, reconstructions, seed=seed)
    clock.lap("generated images compared with reference images")
    return sections


def _compare(
    pipeline: TextToImagePipeline,
    data: EvaluationData,
    generated: Samples,
    reference: Samples,
    reconstructions: Pixels,
    *,
    seed: int,
) -> list[Section]:
    """Compare generated images with reference images as sets, and each with the training set."""
    plain = FeatureSpace(data.train.pixels)
    features = {
        "generated": plain(generated.pixels),
        "held_out": plain(reference.pixels),
        "reconstructed": plain(reconstructions),
        "train": plain(data.train.pixels),
    }
    # A model that memorizes would generate the training images nearest to the held-out ones.
    nearest = torch.cdist(features["held_out"], features["train"]).argmin(dim=1)
    features["copied"] = plain(decode(pipeline.vqvae, data.train.image_token_ids[nearest]))
    # Baselines: what the tokenizer alone costs, and what perfect memorization would score.
    others = {"generated": generated.pixels, RECONSTRUCTED: reconstructions}
    if len(data.train) >= len(reference):
        # Only in sets of one size: the distance between two sets shrinks as they grow.
        others["training images"] = data.train.subsample(len(reference)).pixels
    # Plain features always, those of a network where its weights are installed.
    spaces = [plain]
    if network := network_or_none():
        spaces.append(FeatureSpace(reference.pixels, describe=network))
    sections = [
        measure_distribution(
            space(reference.pixels),
            {name: space(pixels) for name, pixels in others.items()},
            seed=seed,
            by_network=space is not plain,
        )
        for space in spaces
    ]
    return [*sections, measure_memorization(generated, reference, data.train, features, seed=seed)]


def _protocol(
    pipeline: TextToImagePipeline,
    data: EvaluationData,
    sampling_config: SamplingConfig,
    config: EvaluationConfig,
) -> dict[str, Any]:
    """Everything that decides the figures."""
    # Hashes in place of paths: the same model and data elsewhere give the same report.
    digests = {Path(name).parent.name: digest for name, digest in file_hashes(config.model).items()}
    return {
        "model": {
            **{name: digest[:16] for name, digest in digests.items()},
            "vqvae": pipeline.vqvae.fingerprint(),
        },
        "data": {
            "kind": data.kind,
            "fingerprint": data.fingerprint,
            "train": len(data.train),
            **{name: len(split) for name, split in data.held_out.items()},
        },
        "sampling": {
            **dataclasses.asdict(sampling_config),
            "num_candidates": config.num_candidates,
            **({} if config.rank == "likelihood" else {"rank": config.rank}),
            **pipeline.native_metadata,
        },
        "options": {
            "seed": config.seed,
            "max_samples": config.max_samples,
            "language": config.language,
            "styles": " ".join(config.styles) or "all",
            **({"clip": Path(config.clip).name} if config.clip else {}),
        },
        # These decide the last digits, and thereby now and then a token.
        "machine": {
            "device": pipeline.device.type,
            "threads": torch.get_num_threads(),
            "float32_matmul": torch.get_float32_matmul_precision(),
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    # Metrics depend on the libraries that resize images and invert matrices.
    for name in LIBRARIES:  # the source tree without an installation has no version of its own
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _track(
    config: EvaluationConfig, protocol: Mapping[str, Any], sections: Sequence[Section]
) -> None:
    """Show the report in the W&B run of the model, or in a new one if the config asks for it."""
    run_dir = Path(config.model).resolve().parent
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    run_id = checkpoint.state.get("run_id") if checkpoint else None
    # A model that was copied to another folder has no run: then only an option tracks.
    if config.tracking is None and run_id is None:
        return
    tracking = _stored(run_dir, "tracking", TrackingConfig) or TrackingConfig()
    if config.tracking is not None:
        tracking = dataclasses.replace(tracking, mode=config.tracking)
    if tracking.mode == "disabled":
        return
    step = checkpoint.step if checkpoint else 0
    try:
        tracker = open_tracker(
            tracking,
            output_dir=config.out / "tracking",
            run_config={"evaluation": protocol},
            is_main=True,
            run_id=run_id,
        )
    except UserError as error:  # the report is written: tracking must not lose it
        logger.warning("W&B: %s", error)
        return
    try:
        for section in sections:
            name = f"evaluation/{section.title.lower()}"
            tracker.log(numbers_in(section.figures, name), step)
            for table in section.tables:
                tracker.log_table(f"{name}/{table.name}", table.columns, table.rows, step)
            for file, image in section.images.items():
                tracker.log_images(f"{name}/{file}", [image], [section.title], step)
    finally:
        tracker.close()


def _read_options_of(run_dir: Path, source: str) -> ReadOptions:
    """Read the same data as the model's run did; other data by the defaults."""
    run = _stored(run_dir, "data", DataConfig)
    if run is None or Path(run.source).resolve() != Path(source).expanduser().resolve():
        return DEFAULT_OPTIONS
    return run.read_options()


def _stored(run_dir: Path, name: str, config_class: type[StoredT]) -> StoredT | None:
    """Read one section of the config of the model's run, if there is any."""
    try:
        stored = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in stored[name].items()
        }
        return config_class(**values)
    # A model may come without its run, or its config.yaml be of something else.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None
