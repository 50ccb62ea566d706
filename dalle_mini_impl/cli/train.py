"""From a folder of images to a model and its images: one command."""

import argparse
import logging
import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_mini_impl.cli.arguments import OneLineParser, user_path, user_text
from dalle_mini_impl.cli.check_data import require_splits
from dalle_mini_impl.cli.main import COMMANDS, show_elapsed_minutes
from dalle_mini_impl.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from dalle_mini_impl.data.check import DataReport
    from dalle_mini_impl.training.config import TrainingConfig
    from dalle_mini_impl.training.dalle import DalleRunConfig
    from dalle_mini_impl.training.vqvae import VQVAERunConfig

logger = logging.getLogger(__name__)

PRESETS = "configs/own"
# Of the minutes: what the demo, which was tuned, gives its tokenizer (docs/log.md).
TOKENIZER_FRACTION = 0.2
NUM_SHOWN = 16
TEXT_LENGTHS = (16, 32, 64)  # captions of scenes have up to 16 tokens
# Of fewer images than these, half of the samples are scenes: they teach colors and backgrounds, on
# which images of single things are silent (docs/log.md).
FEW_IMAGES, SCENES_FRACTION, NUM_SCENES, NUM_SCENE_THINGS = 2_000, 0.5, 6_000, 120
COLUMNS = "  from left to right: the held-out image, the generated one, the nearest training image"


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Read the command line; also what overrules the image tokenizer's and the decoder's preset."""
    parser = OneLineParser(
        description=COMMANDS["train"],
        allow_abbrev=False,
        epilog="--data.FIELD VALUE says how the images are read; --tokenizer.FIELD VALUE and "
        "--dalle.FIELD VALUE overrule single choices. The fields are those of train_vqvae and "
        "train_dalle. The same command again goes on where it stopped.",
    )
    add = parser.add_argument
    add("source", type=user_text, help="folder of images and captions, or what --data.source takes")
    add("--minutes", type=float, default=30.0, help="of training in all; default: %(default)g")
    add("--out", type=user_path, help="output folder; default: out/ and the name of the source")
    add("--presets", type=user_path, default=PRESETS, help="folder of both; default: %(default)s")
    add("--dry_run", "--dry-run", action="store_true", help="show choices and time, train nothing")
    options, rest = parser.parse_known_args(arguments)
    if not options.minutes > 0:
        raise UserError(f"minutes: got {options.minutes:g}, expected above 0")
    overrides: dict[str, list[str]] = {"data": [], "tokenizer": [], "dalle": []}
    kind = ""
    for argument in rest:
        kept = argument
        if argument.startswith("--"):
            kind, dot, field = argument.removeprefix("--").partition(".")
            kind = kind if dot else ""
            kept = argument if kind == "data" else f"--{field}"
        if kind not in overrides:  # an option that there is not, or a value without one
            parser.error(f"unrecognized arguments: {argument}")
        overrides[kind].append(kept)
    data = overrides["data"]
    return options, [*data, *overrides["tokenizer"]], [*data, *overrides["dalle"]]


def main(arguments: Sequence[str]) -> None:
    """Look at the data, say what is chosen, train both models, generate images."""
    options, tokenizer_overrides, dalle_overrides = parse(arguments)
    show_elapsed_minutes()
    from dalle_mini_impl.config import find_preset, load_config
    from dalle_mini_impl.training.dalle import DalleRunConfig
    from dalle_mini_impl.training.vqvae import VQVAERunConfig, with_base

    out = options.out or Path("out") / (Path(options.source).resolve().stem or "images")
    vqvae, dalle = out / "vqvae", out / "dalle"

    def preset(run: Path, fraction: float) -> list[str]:
        is_begun = any((run / "checkpoints").glob("step-*"))
        return [
            *("--config", str(find_preset(options.presets) / f"{run.name}.yaml")),
            *("--data.source", options.source, "--output_dir", str(run)),
            *("--training.max_minutes", f"{fraction * options.minutes:g}"),
            *(["--resume", "latest"] if is_begun else []),
        ]

    tokenizer_preset = [*preset(vqvae, TOKENIZER_FRACTION), *tokenizer_overrides]
    with option_named("tokenizer", tokenizer_overrides):
        vqvae_run, vqvae_resume = load_config(VQVAERunConfig, tokenizer_preset, description="")
    vqvae_run = with_base(vqvae_run)
    dalle_preset = preset(dalle, 1 - TOKENIZER_FRACTION)
    dalle_preset += ["--vqvae_dir", str(vqvae / "model"), *dalle_overrides]
    with option_named("dalle", dalle_overrides):
        dalle_run, dalle_resume = load_config(DalleRunConfig, dalle_preset, description="")
    # 1. look at the data, and say what will be done
    report = look_at(dalle_run, pixel_size=vqvae_run.vqvae.pixel_size)
    split = held_out_split(report, dalle_run.data.validation_split)
    require_splits(
        dalle_run.data.source,
        dalle_run.data.read_options(),
        (dalle_run.data.train_split, split),
    )
    changes: dict[str, Any] = {"validation_split": split}
    num_images, scenes = count_images(report, dalle_run.data.train_split), out / "scenes"
    pixel_size = vqvae_run.vqvae.pixel_size

    def is_open(field: str) -> bool:
        return not any(each.startswith(f"--data.{field}") for each in arguments)

    if 2 * report.num_cut > sum(report.split_sizes.values()) and is_open("fit"):
        changes["fit"] = "pad"
    if num_images < FEW_IMAGES and is_open("mix") and can_mix_scenes(pixel_size):
        changes["mix"] = {str(scenes): SCENES_FRACTION}
    vqvae_run = replace(vqvae_run, data=replace(vqvae_run.data, **changes))
    dalle_run = replace(dalle_run, data=replace(dalle_run.data, **changes))
    if not any(each.startswith("--dalle.text.text_length") for each in arguments):
        length = choose_text_length(report.caption_lengths)
        dalle_run = replace(dalle_run, text=replace(dalle_run.text, text_length=length))
    logger.info("\n".join(explain(report, vqvae_run, dalle_run, is_short=not options.dry_run)))
    if options.dry_run:
        return
    if "mix" in changes:
        write_scenes(scenes)
    # 2. train
    train_both(vqvae_run, dalle_run, vqvae_resume=vqvae_resume, dalle_resume=dalle_resume)
    # 3. generate
    logger.info("generating images of held-out captions")
    show_images(dalle_run, dalle / "model").save(out / "images.png")
    logger.info(f"held-out captions: {out / 'images.png'}\n{COLUMNS}")
    model = shlex.quote(str(dalle / "model"))
    logger.info(f"to generate: python scripts/generate.py --model {model} --prompt TEXT")


@contextmanager
def option_named(prefix: str, overrides: Sequence[str]) -> Iterator[None]:
    """Name a field at fault as it was typed here: with its prefix."""
    try:
        yield
    except UserError as error:
        field = str(error).split(":")[0]
        is_typed = not field.startswith("data.") and f"--{field}" in overrides
        raise UserError(f"{prefix}.{error}" if is_typed else str(error)) from None


def can_mix_scenes(pixel_size: tuple[int, int]) -> bool:
    """Tell whether scenes can be made, and fit an image tokenizer; log why not."""
    from dalle_mini_impl.builtin_datasets.scenes.things import load_sprites
    from dalle_mini_impl.data.check import is_much_cut

    try:
        # What is cut off may be what their captions name.
        if is_much_cut((1, 1), pixel_size):
            height, width = pixel_size
            raise UserError(f"they are square, and {height} x {width} pixels are not")
        load_sprites("twemoji")
    except UserError as error:
        logger.info(f"no scenes are mixed in, which few images gain from: {error}")
        return False
    return True


def write_scenes(folder: Path) -> None:
    """Write the scenes that are mixed in, unless they are there."""
    from dalle_mini_impl.builtin_datasets.scenes.captions import prepare_scenes

    # The last file that is written says that all are.
    if (folder / "metadata.jsonl").is_file():
        return
    logger.info(f"writing {NUM_SCENES} scenes")
    prepare_scenes(
        folder, counts={"train": NUM_SCENES}, kinds=("large",), num_things=NUM_SCENE_THINGS
    )


def train_both(
    vqvae_run: "VQVAERunConfig",
    dalle_run: "DalleRunConfig",
    *,
    vqvae_resume: str | None,
    dalle_resume: str | None,
) -> None:
    """Train the image tokenizer, then the decoder, but what is trained already."""
    from dalle_mini_impl.training.dalle import train_dalle
    from dalle_mini_impl.training.vqvae import train_vqvae

    # Each model's last file says that it is whole.
    if not is_trained(vqvae_run, "config.json"):
        logger.info("training the image tokenizer")
        train_vqvae(vqvae_run, resume=vqvae_resume)
    if not is_trained(dalle_run, "model_index.json"):
        logger.info("training the decoder")
        train_dalle(dalle_run, resume=dalle_resume)


def is_trained(run: Any, last_file: str) -> bool:
    """Tell whether a run has ended; UserError if it was a run on other data or of another model."""
    from dalle_mini_impl.training.checkpoint import newest_checkpoint
    from dalle_mini_impl.training.resume import compare_configs
    from dalle_mini_impl.training.run import as_plain

    folder = Path(run.output_dir)
    if not (folder / "model" / last_file).is_file():
        return False
    if checkpoint := newest_checkpoint(folder / "checkpoints"):
        changed = compare_configs(checkpoint, as_plain(asdict(run)))
        source = checkpoint.state["config"]["data"]["source"]
        if Path(source).resolve() != Path(run.data.source).resolve():
            raise UserError(
                f"source: got {run.data.source}, but {folder / 'model'} was trained on {source}; "
                "expected another --out"
            )
        if changed:
            listed = "; ".join(changed)
            logger.info(
                f"{folder / 'model'} is trained already, so that these do not count: "
                f"{listed}; another --out trains anew"
            )
    return True


def look_at(run: "DalleRunConfig", *, pixel_size: tuple[int, int]) -> "DataReport":
    """Read all images once and log what is wrong with them; UserError if they are of no use."""
    from dalle_mini_impl.data.check import check_data, report_lines, require_usable
    from dalle_mini_impl.progress import log_now_and_then

    report = check_data(
        run.data.source,
        options=run.data.read_options(),
        pixel_size=pixel_size,
        text_length=run.text.text_length,
        vocab_size=run.text.vocab_size,
        progress=log_now_and_then("images read"),
    )
    logger.info("\n".join(report_lines(report)))
    require_usable(report, max_bad_fraction=run.data.max_bad_fraction)
    return report


def held_out_split(report: "DataReport", asked: str) -> str:
    """Name the validation split, or the test split where there is no other."""
    from dalle_mini_impl.data.readers.split_names import TEST, VALIDATION, split_in_name

    names = {split_in_name(name, whole=True): name for name in report.split_sizes}
    is_missing = split_in_name(asked, whole=True) == VALIDATION and VALIDATION not in names
    return names.get(TEST, asked) if is_missing else asked


def count_images(report: "DataReport", split: str) -> int:
    """Count the images of a split, under any of its names: val, validation, ..."""
    from dalle_mini_impl.data.readers.split_names import split_in_name

    meant = split_in_name(split, whole=True) or split
    sizes = report.split_sizes.items()
    return sum(n for name, n in sizes if (split_in_name(name, whole=True) or name) == meant)


def choose_text_length(caption_lengths: Sequence[int]) -> int:
    """Choose the least length that 99 % of the captions fit, in tokens: each one costs time."""
    longest = caption_lengths[math.ceil(0.99 * len(caption_lengths)) - 1]
    return next((length for length in TEXT_LENGTHS if longest <= length), TEXT_LENGTHS[-1])


def budget(training: "TrainingConfig") -> str:
    """Name the limits of a run."""
    from dalle_mini_impl.training.config import DEFAULT_MAX_STEPS

    minutes, steps = training.max_minutes, training.max_steps
    limits = [f"{minutes:g} minutes"] if minutes is not None else []
    limits += [f"{steps} steps"] if steps is not None else []
    return " or ".join(limits) or f"{DEFAULT_MAX_STEPS} steps"


def explain(
    report: "DataReport",
    vqvae_run: "VQVAERunConfig",
    dalle_run: "DalleRunConfig",
    *,
    is_short: bool,
) -> list[str]:
    """Say what will be trained on how many images, and for how long; in full with the memory."""
    from dalle_mini_impl.data.check import MAX_CUT
    from dalle_mini_impl.training.dalle import MIN_COMPARED
    from dalle_mini_impl.training.estimate import estimate_lines
    from vqvae import VQVAE

    config = vqvae_run.vqvae
    (height, width), (rows, columns) = config.pixel_size, config.image_grid_size
    order = dalle_run.task.random_order_probability
    held_out = dalle_run.data.validation_split
    num_held_out = count_images(report, held_out)
    use = (
        "to choose the best weights by" if num_held_out >= MIN_COMPARED else "too few to choose by"
    )
    if dalle_run.training.keep == "last":
        use = "to compare with"
    lines = [
        f"data: {count_images(report, dalle_run.data.train_split)} images to train on, "
        f"{num_held_out} held out ({held_out}), {use}",
        f"image tokenizer: {budget(vqvae_run.training)}, {height} x {width} pixels to "
        f"{rows * columns} tokens of {config.codebook_size}",
        f"decoder: {budget(dalle_run.training)}, {dalle_run.decoder.num_layers} "
        f"layers of {dalle_run.decoder.hidden_size}, {order:.0%} of the samples in random order, "
        f"captions of up to {dalle_run.text.text_length} tokens",
    ]
    if report.num_cut:
        how = {"crop": "the middle of", "pad": "the whole of", "stretch": "the stretched whole of"}
        lines[0] += (
            f"; {how[dalle_run.data.fit]} each image (data.fit {dalle_run.data.fit}): a crop "
            f"cuts more than {MAX_CUT:.0%} off {report.num_cut} of them"
        )
    if dalle_run.data.mix:
        listed = ", ".join(f"{part:.0%} {source}" for source, part in dalle_run.data.mix.items())
        lines.insert(1, f"mixed into training: {listed} (--data.mix '{{}}' mixes nothing in)")
    if is_short:
        return lines
    tokenizer = VQVAE(config)
    return [
        *lines[:-1],
        *(f"  {line}" for line in estimate_lines(vqvae_run, tokenizer, report)),
        lines[-1],
        *(f"  {line}" for line in estimate_lines(dalle_run, tokenizer, report)),
    ]


def show_images(run: "DalleRunConfig", model: Path) -> "Image.Image":
    """Lay out held-out images, what is generated from their captions, and what that is nearest to.

    The nearest training image is the one with most tokens in common.
    """
    import numpy as np
    import torch

    from dalle_mini_impl.cli.pipelines import open_pipeline
    from dalle_mini_impl.data.image_grid import make_grid
    from dalle_mini_impl.data.loading import load_all_pixels
    from dalle_mini_impl.data.pairs import open_pairs
    from dalle_mini_impl.evaluation.samples import encode, evenly_spaced, to_images

    pipeline = open_pipeline(str(model))
    pixel_size = pipeline.vqvae.config.pixel_size
    names = (run.data.train_split, run.data.validation_split)
    train, held_out = (
        open_pairs(run.data.source, split=name, options=run.data.read_options()) for name in names
    )
    (train_pixels, train_kept, _), (pixels, kept, _) = (
        load_all_pixels(pairs, pixel_size=pixel_size, max_bad_fraction=run.data.max_bad_fraction)
        for pairs in (train, held_out)
    )
    chosen = evenly_spaced(len(kept), NUM_SHOWN)
    prompts = [held_out[kept[index]].captions[0] for index in chosen]
    generated = pipeline(prompts).images
    train_ids = encode(pipeline.vqvae, train_pixels)  # (train, image_length)
    images, captions = [], []
    for index, prompt, image in zip(chosen, prompts, generated, strict=True):
        pixels_of = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        token_ids = encode(pipeline.vqvae, pixels_of[None])
        nearest = int((train_ids == token_ids).sum(dim=1).argmax())
        images += [*to_images(pixels[index, None]), image, *to_images(train_pixels[nearest, None])]
        captions += [f"held out: {prompt}", "generated", train[train_kept[nearest]].captions[0]]
    return make_grid(images, columns=6, captions=captions)
