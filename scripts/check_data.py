"""Check your images before training: python scripts/check_data.py --source FOLDER."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("check_data", sys.argv[1:])
