"""How a script starts and ends: quietly, or with one line that says what to change."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from dalle_mini_impl.errors import StoppedError, UserError, without_secrets

GO_ON = "the same command goes on, a training script's with --resume latest"


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are like all others: one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Args:
            message: What is wrong with it.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{message}; {self.prog} --help lists all options")


def run_script(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    """Run a script's main function; bad input ends it with one line and exit code 2.

    Args:
        main: Takes the command line without the program.
        arguments: That command line.

    Raises:
        SystemExit: The script did not end well.
    """
    is_main_process = int(os.environ.get("RANK", "0")) == 0
    # The other processes of a run would only repeat what the first one says.
    handler = logging.StreamHandler()
    handler.setFormatter(_PlainFormatter("%(levelname)s: %(message)s"))
    level = logging.WARNING if is_main_process else logging.CRITICAL
    logging.basicConfig(level=level, handlers=[handler])
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        main(arguments)
        _leave_process_group()
    except UserError as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        raise SystemExit(2) from None
    except StoppedError as stop:
        sys.stderr.write(f"{stop}; {GO_ON}\n")
        raise SystemExit(128 + stop.signal) from None
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped; {GO_ON}\n")
        raise SystemExit(130) from None


class _PlainFormatter(logging.Formatter):
    """Writes a record without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Write the record as text."""
        return without_secrets(super().format(record))


def printable(text: str) -> str:
    """Make a message safe for a terminal: names of files may hold its control codes.

    Args:
        text: Of any characters.

    Returns:
        One line, with what cannot be printed written out.
    """
    line = " ".join(text.splitlines())
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line)


def _leave_process_group() -> None:
    """End what Accelerate started between processes, and with it this one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        # The group's threads may outlive it, and abort a process whose Python has begun to end
        # (github.com/pytorch/pytorch/pull/179291): all is written, so leave without that.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
