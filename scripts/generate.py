"""Generate images: python scripts/generate.py --model out/demo/dalle/model --prompt "red heart"."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("generate", sys.argv[1:])
