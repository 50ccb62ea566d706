"""How a script starts and ends: quietly, or with one line that says what to change."""

import argparse
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from dalle_mini_impl.errors import StoppedError, UserError, without_secrets


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


class _TerminatedError(BaseException):
    """SIGTERM, where nothing better is done with it."""


def run_script(
    main: Callable[[Sequence[str]], None], arguments: Sequence[str], *, takes_resume: bool = False
) -> None:
    """Run a script's main function; bad input ends it with one line and exit code 2.

    A signal ends it with one line that says how to go on, and exit code 128 + its number.

    Args:
        main: Takes the command line without the program.
        arguments: That command line.
        takes_resume: Whether the script goes on where it was with ``--resume latest``.

    Raises:
        SystemExit: The script did not end well.
    """
    is_main_process = int(os.environ.get("RANK", "0")) == 0
    _set_up_logging(is_main_process)
    go_on = f"to go on: {_resume_command(arguments)}" if takes_resume else "run it again"
    code, line = 0, ""
    with _termination_raised():
        try:
            main(arguments)
        except UserError as error:
            code, line = 2, f"error: {printable(str(error))}"
        except StoppedError as stop:
            code, line = 128 + stop.signal, f"{stop}; {go_on}"
        except KeyboardInterrupt:
            code, line = 128 + signal.SIGINT, f"stopped; {go_on}"
        except _TerminatedError:
            code, line = 128 + signal.SIGTERM, f"stopped; {go_on}"
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            code, line = 2, "error: out of memory; expected fewer or smaller images at a time"
    # All processes of a run stop alike, and one line is enough; errors may be of one process alone.
    if line and (code == 2 or is_main_process):
        sys.stderr.write(f"{line}\n")
    _leave_process_group(code)
    if code:
        raise SystemExit(code)


@contextmanager
def _termination_raised() -> Iterator[None]:
    """Make SIGTERM end what is under way as Ctrl-C does, so that files are closed and put away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _set_up_logging(is_main_process: bool) -> None:
    """Progress of our packages goes to stdout, warnings of all to stderr, secrets nowhere."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    warnings = logging.StreamHandler()
    warnings.setLevel(logging.WARNING)
    warnings.setFormatter(_PlainFormatter("%(levelname)s: %(message)s"))
    progress = logging.StreamHandler(sys.stdout)
    progress.addFilter(lambda record: record.levelno < logging.WARNING)
    progress.setFormatter(_PlainFormatter("%(message)s"))
    # The other processes of a run would only repeat what the first one says.
    level = logging.WARNING if is_main_process else logging.CRITICAL
    logging.basicConfig(level=level, handlers=[warnings, progress])
    for package in ("dalle_mini_impl", "vqvae"):
        logging.getLogger(package).setLevel(logging.INFO if is_main_process else level)


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


def _resume_command(arguments: Sequence[str]) -> str:
    """Write the command that goes on where this one was."""
    kept, skip = [sys.argv[0]], False
    for argument in arguments:
        if not skip and argument != "--resume" and not argument.startswith("--resume="):
            kept.append(argument)
        skip = argument == "--resume"
    size, local_size = (os.environ.get(f"{name}WORLD_SIZE", "1") for name in ("", "LOCAL_"))
    if size == "1":
        launcher = ["python" if shutil.which("python") == sys.executable else sys.executable]
    elif size == local_size:
        launcher = ["torchrun", "--standalone", "--nproc_per_node", size]
    else:
        launcher = ["torchrun", "..."]
    return shlex.join([*launcher, *kept, "--resume", "latest"])


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    from dalle_mini_impl.hardware import is_out_of_memory

    return is_out_of_memory(error)


def _leave_process_group(code: int) -> None:
    """End what Accelerate started between processes, and with it this one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        if code == 0:  # else the others may never come to the same
            torch.distributed.destroy_process_group()
        # The group's threads may outlive it, and abort a process whose Python has begun to end
        # (github.com/pytorch/pytorch/pull/179291): all is written, so leave without that.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
