"""How a script ends: quietly, or with one line that says what to change."""

import logging
import sys
from collections.abc import Callable, Sequence

from dalle_mini_impl.errors import UserError


def run_script(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    """Run a script's main function; bad input ends it with one line and exit code 2.

    Args:
        main: Takes the command line without the program.
        arguments: That command line.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        main(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; --resume latest continues from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
