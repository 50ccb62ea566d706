"""From nothing to images in ten minutes: python scripts/demo.py."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("demo", sys.argv[1:])
