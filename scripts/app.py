"""Generate on a page in the browser, on this machine alone: python scripts/app.py."""

import argparse
import sys
from collections.abc import Sequence

from dalle_mini_impl.cli.main import OneLineParser, run_script


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description="Generate on a page in the browser.")
    add = parser.add_argument
    add("--model", default="checkpoints/emoji-64", help="model folder; default: %(default)s")
    add("--port", type=int, default=7860, help="default: %(default)s")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets others in; default: %(default)s")
    add("--native", choices=("float32", "int8"), help="compiled here, not torch; see guide")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Serve the page."""
    options = parse(arguments)
    from dalle_mini_impl.cli.app import serve  # torch loads after the options fit

    serve(options.model, host=options.host, port=options.port, native=options.native)


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
