"""Write captions for images: python scripts/write_captions.py FOLDER --captioner NAME."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("write_captions", sys.argv[1:])
