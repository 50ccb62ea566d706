"""Convert an image tokenizer: python scripts/convert_tokenizer.py vq_ds16_t2i.pt --out FOLDER."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("convert_tokenizer", sys.argv[1:])
