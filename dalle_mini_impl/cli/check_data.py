"""Find problems in captioned images, and estimate what a run on them needs."""

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dalle_mini_impl.cli.arguments import OneLineParser, require_at_least, user_path, user_text
from dalle_mini_impl.cli.main import COMMANDS
from dalle_mini_impl.errors import UserError, one_line

if TYPE_CHECKING:
    from dalle_mini_impl.data.pairs import ReadOptions
    from dalle_mini_impl.training.config import DataConfig

logger = logging.getLogger(__name__)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(
        description=COMMANDS["check_data"],
        epilog="Exit code 0: usable; 1: problems found; 2: bad input, or nothing usable.",
    )
    add = parser.add_argument
    add("--source", type=user_text, help="as --data.source; default: that of the preset")
    add("--config", type=user_path, help="preset of a run, for its sizes and its needs")
    add("--image-size", type=int, nargs="+", help="side in pixels, or height and width; default 64")
    add("--text-length", type=int, help="tokens per caption; default 32")
    add("--image-column", help="as --data.image_column")
    add("--caption-columns", nargs="+", help="as --data.caption_columns")
    add("--captions-from", help="as --data.captions_from")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Write the report; problems end the command with exit code 1."""
    options = parse(arguments)
    pixel_size = _pixel_size(options.image_size)
    require_at_least(1, text_length=options.text_length)
    from dalle_mini_impl.config import find_preset
    from dalle_mini_impl.data.check import check_data, report_lines, require_usable
    from dalle_mini_impl.progress import log_now_and_then
    from dalle_mini_impl.training.config import DataConfig, TextConfig
    from dalle_mini_impl.training.dalle import DalleRunConfig
    from dalle_mini_impl.training.estimate import estimate_lines, read_run

    preset = None if options.config is None else find_preset(options.config)
    # A decoder's preset names no image size: that is its tokenizer's.
    config, vqvae = (None, None) if preset is None else read_run(preset)
    text = config.text if isinstance(config, DalleRunConfig) else TextConfig()
    source = options.source or (config and config.data.source)
    if not source:
        raise UserError(
            "source: got none, expected --source with a folder, a file or the name of a data set "
            "on the Hub, or --config with a preset"
        )
    limits = _with_given(config.data if config else DataConfig(source=source), options)
    # The image tokenizer learns from images alone.
    needs_captions = config is None or isinstance(config, DalleRunConfig)
    read_options = limits.read_options(needs_captions=needs_captions)
    report = check_data(
        source,
        options=read_options,
        pixel_size=pixel_size or (vqvae.config.pixel_size if vqvae else (64, 64)),
        text_length=options.text_length or text.text_length,
        vocab_size=text.vocab_size,
        progress=log_now_and_then("images read"),
    )
    logger.info("\n".join(report_lines(report)))
    require_usable(report, max_bad_fraction=limits.max_bad_fraction)
    # Of other data than the preset's, any second split may be the one that is held out.
    if options.source is None:
        splits = (limits.train_split, limits.validation_split)
        require_splits(source, read_options, splits)
    elif len(report.split_sizes) < 2:
        require_splits(source, read_options, (DataConfig.train_split, DataConfig.validation_split))
    if config is not None and vqvae is not None:
        logger.info("\n".join(estimate_lines(config, vqvae, report)))
    # Last, and not as an error: such data can be trained on.
    if report.has_problems:
        raise SystemExit(1)


def _pixel_size(sides: list[int] | None) -> tuple[int, int] | None:
    """Return (height, width) of an option that may be one side; None where it is not given."""
    if sides is None:
        return None
    if len(sides) > 2:
        raise UserError(f"image_size: got {sides}, expected a side, or height and width")
    require_at_least(1, image_size=min(sides))
    return sides[0], sides[-1]


def _with_given(data: "DataConfig", options: argparse.Namespace) -> "DataConfig":
    """Put what the command line says about columns into a run's options."""
    columns = options.caption_columns
    given = {
        "image_column": options.image_column,
        "caption_columns": None if columns is None else tuple(columns),
        "captions_from": options.captions_from,
    }
    try:
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        return dataclasses.replace(data, **changes)
    except ValueError as error:
        raise UserError(one_line(error)) from None


def require_splits(source: str, options: "ReadOptions", splits: tuple[str, str]) -> None:
    """Refuse a source as training does that lacks one of its splits, or is too small for both."""
    from dalle_mini_impl.data.pairs import open_pairs
    from dalle_mini_impl.data.splits import choose_split

    listed = open_pairs(source, options=options).listed
    for split in splits:
        try:
            choose_split(source, listed, split)
        except UserError as error:
            raise UserError(f"source: {error}") from None
