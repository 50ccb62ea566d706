"""Write the emoji data set: python scripts/prepare_emoji.py --out out/emoji64/data [--size 64]."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("prepare_emoji", sys.argv[1:])
