"""Caption images: python scripts/caption.py --model DIR --images a.png --complete "a red"."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("caption", sys.argv[1:])
