"""Find problems in captioned images, and estimate what a run on them needs."""

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dalle_mini_impl.cli.arguments import OneLineParser, require_at_least, user_path, user_text
from dalle_mini_impl.cli.main import COMMANDS
from dalle_mini_impl.errors import UserError

if TYPE_CHECKING:
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
    add("--image-size", type=int, help="side in pixels; default 64")
    add("--text-length", type=int, help="tokens per caption; default 32")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Write the report; problems end the command with exit code 1."""
    options = parse(arguments)
    require_at_least(1, image_size=options.image_size, text_length=options.text_length)
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
    limits = config.data if config else DataConfig(source=source)
    report = check_data(
        source,
        text_columns=limits.text_columns,
        image_size=options.image_size or (vqvae.config.image_size if vqvae else 64),
        text_length=options.text_length or text.text_length,
        vocab_size=text.vocab_size,
        progress=log_now_and_then("images read"),
    )
    logger.info("\n".join(report_lines(report)))
    require_usable(report, max_bad_fraction=limits.max_bad_fraction)
    # Of other data than the preset's, any second split may be the one that is held out.
    if options.source is None:
        _require_splits(source, limits)
    elif len(report.split_sizes) < 2:
        _require_splits(source, DataConfig(source=source, text_columns=limits.text_columns))
    if config is not None and vqvae is not None:
        logger.info("\n".join(estimate_lines(config, vqvae, report)))
    # Last, and not as an error: such data can be trained on.
    if report.has_problems:
        raise SystemExit(1)


def _require_splits(source: str, limits: "DataConfig") -> None:
    """Refuse a source as training does that lacks one of its splits, or is too small for both."""
    from dalle_mini_impl.data.pairs import open_pairs
    from dalle_mini_impl.data.splits import choose_split

    listed = open_pairs(source, text_columns=limits.text_columns).listed
    for split in (limits.train_split, limits.validation_split):
        try:
            choose_split(source, listed, split)
        except UserError as error:
            raise UserError(f"source: {error}") from None
