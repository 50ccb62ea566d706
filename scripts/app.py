"""Generate on a page in the browser, on this machine alone: python scripts/app.py."""

import sys

from dalle_mini_impl.cli.main import run_command

if __name__ == "__main__":
    run_command("app", sys.argv[1:])
