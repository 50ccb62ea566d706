"""Look through your images before training: python scripts/check_data.py --source FOLDER.

Exit code 0: usable. 1: usable, but with problems, which are listed. 2: bad input, nothing usable.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dalle_mini_impl.cli.main import OneLineParser, run_script


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(
        description="Say what is wrong with captioned images, and what a run on them needs.",
        epilog="Exit code 0: usable; 1: problems found; 2: bad input, or nothing usable.",
    )
    parser.add_argument("--source", help="as --data.source; default: that of the preset")
    parser.add_argument("--config", type=Path, help="preset of a run, for its sizes and its needs")
    parser.add_argument("--image-size", type=int, help="side in pixels; default 64")
    parser.add_argument("--text-length", type=int, help="tokens per caption; default 32")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Print the report; problems end the script with exit code 1."""
    options = parse(arguments)
    from dalle_mini_impl.config import read_config
    from dalle_mini_impl.data.check import check_data, report_lines, require_usable
    from dalle_mini_impl.errors import UserError
    from dalle_mini_impl.progress import show_now_and_then
    from dalle_mini_impl.training.config import DataConfig, TextConfig
    from dalle_mini_impl.training.dalle import DalleRunConfig
    from dalle_mini_impl.training.estimate import estimate_lines, tokenizer_of
    from dalle_mini_impl.training.vqvae import VQVAERunConfig

    config: VQVAERunConfig | DalleRunConfig | None = None
    vqvae, text = None, TextConfig()
    if options.config is not None:
        is_decoder = options.config.is_file() and "vqvae_dir:" in options.config.read_text("utf-8")
        config = read_config(DalleRunConfig if is_decoder else VQVAERunConfig, options.config)
        beside = options.config.with_name("vqvae.yaml")
        vqvae = tokenizer_of(
            config, read_config(VQVAERunConfig, beside) if beside.is_file() else None
        )
        text = config.text if isinstance(config, DalleRunConfig) else text
    source = options.source or (config and config.data.source)
    if not source:
        raise UserError("source: got neither --source nor --config")
    report = check_data(
        source,
        image_size=options.image_size or (vqvae.config.image_size if vqvae else 64),
        text_length=options.text_length or text.text_length,
        vocab_size=text.vocab_size,
        progress=show_now_and_then(print, "images read"),
    )
    print("\n".join(report_lines(report)))
    if config is not None and vqvae is not None:
        print("\n".join(estimate_lines(config, vqvae, report)))
    limits = config.data if config else DataConfig
    require_usable(report, max_bad_fraction=limits.max_bad_fraction)
    if report.has_problems:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
