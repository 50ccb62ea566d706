"""Convert a published image tokenizer to safetensors, for --vqvae_dir of train_dalle."""

import argparse
import logging
from collections.abc import Sequence

from dalle_mini_impl.cli.arguments import OneLineParser, user_path
from dalle_mini_impl.cli.main import COMMANDS
from dalle_mini_impl.errors import UserError, one_line

logger = logging.getLogger(__name__)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(
        description=COMMANDS["convert_tokenizer"],
        epilog="Example: convert_tokenizer vq_ds16_t2i.pt --out tokenizers/vq16",
    )
    add = parser.add_argument
    add("source", type=user_path, help="file of LlamaGen's or GEAR's VQ: .pt, .ckpt, .safetensors")
    add("--out", type=user_path, required=True, help="folder to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Write the folder and log what it holds."""
    options = parse(arguments)
    from vqvae.pretrained.convert import convert_tokenizer

    try:
        tokenizer = convert_tokenizer(options.source, options.out)
    except OSError as error:
        raise UserError(f"out: {options.out}: {error.strerror}; expected a folder") from None
    except ValueError as error:
        raise UserError(one_line(error)) from None
    size, (rows, columns) = tokenizer.config.pixel_size[0], tokenizer.image_grid_size
    logger.info(
        f"{options.out}: {tokenizer.codebook_size} codes; {rows} x {columns} tokens at {size} "
        f"pixels, other sizes with --vqvae_image_size\nfingerprint: {tokenizer.fingerprint()}"
    )
