"""How a command starts and ends: quietly, or with one line that says what to change.

``python scripts/generate.py ...`` and ``dalle-mini generate ...`` are the same command.
"""

import importlib
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from dalle_mini_impl.errors import StoppedError, UserError, without_secrets

CONSOLE = "dalle-mini"
COMMANDS = {
    "train": "Train a model on a folder of captioned images, from nothing to its images.",
    "generate": "Generate images from prompts, or inpaint a part of an image.",
    "app": "Generate images on a page in the browser.",
    "caption": "Rank captions for an image by the text-to-image model's likelihood.",
    "check_data": "Find problems in captioned images, and estimate a run on them.",
    "write_captions": "Write captions for images that have none, by a captioner of transformers.",
    "convert_tokenizer": "Convert a published image tokenizer (LlamaGen, GEAR) to safetensors.",
    "train_vqvae": "Train an image tokenizer (discrete VAE).",
    "train_dalle": "Train a decoder on captioned images.",
    "train_clip": "Train a CLIP on captioned images, to rank generated ones.",
    "train_vit": "Train a Vision Transformer to classify images.",
    "train_translation": "Train a translator on pairs of texts.",
    "evaluate": "Measure a model on held-out images: report.md and report.json.",
    "prepare_emoji": "Write emoji images and captions as an image folder.",
    "prepare_shapes": "Write images of shapes with captions and facts.",
    "prepare_scenes": "Write images of things in all colors with captions and facts.",
    "demo": "Run the demo: emoji data, image tokenizer, decoder, and held-out prompts.",
}


def console() -> None:
    """Run ``dalle-mini COMMAND ...``."""
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("none", [])
    if name in ("-h", "--help"):
        listed = "".join(f"  {command:18} {text}\n" for command, text in COMMANDS.items())
        end = f"\n{CONSOLE} COMMAND --help lists its options.\n"
        try:
            sys.stdout.write(f"usage: {CONSOLE} COMMAND ...\n\n{listed}{end}")
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, such as head, has read enough
            # Else Python would try once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    # Parsers and the line that says how to resume read here what the user typed.
    sys.argv = [f"{CONSOLE} {name}" if name in COMMANDS else CONSOLE, *arguments]
    run_command(name, arguments)


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Run the command of a name: the function ``main`` of its module."""

    def main(arguments: Sequence[str]) -> None:
        if name not in COMMANDS:
            raise UserError(
                f"command: got {name}, expected one of {', '.join(COMMANDS)}; {CONSOLE} --help "
                "says what they do"
            )
        # Only now: another command's libraries take seconds.
        importlib.import_module(f"dalle_mini_impl.cli.{name}").main(arguments)

    run_script(main, arguments, takes_resume=name.startswith("train_"))


class _TerminatedError(BaseException):
    """SIGTERM, where nothing better is done with it."""


def run_script(
    main: Callable[[Sequence[str]], None], arguments: Sequence[str], *, takes_resume: bool = False
) -> None:
    """Call a main function; bad input ends it with one line and exit code 2.

    A signal ends it with one line that says how to resume, and exit code 128 + its number. With
    ``takes_resume``, that is ``--resume latest``.

    Raises:
        SystemExit: The exit code is not 0.
    """
    # From the launcher's environment: no library has been imported yet that could tell.
    is_main_process = int(os.environ.get("RANK", "0")) == 0
    resume = f"to resume: {_resume_command(arguments)}" if takes_resume else "run it again"
    code, line = 0, ""
    with _logging_set_up(is_main_process), _termination_raised():
        try:
            main(arguments)
        except UserError as error:
            code, line = 2, f"error: {printable(str(error))}"
        except StoppedError as stop:
            code, line = 128 + stop.signal, f"{stop}; {resume}"
        except KeyboardInterrupt:
            code, line = 128 + signal.SIGINT, f"stopped; {resume}"
        except _TerminatedError:
            code, line = 128 + signal.SIGTERM, f"stopped; {resume}"
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
    """Raise an exception at SIGTERM, as Ctrl-C does, so that files are closed and removed."""
    # Python sets signal handlers in the main thread only.
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


@contextmanager
def _logging_set_up(is_main_process: bool) -> Iterator[None]:
    """Send progress of our packages to stdout, warnings of all to stderr, secrets nowhere."""
    # File names may contain characters that the terminal's encoding lacks.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    warnings = logging.StreamHandler()
    warnings.setLevel(logging.WARNING)
    warnings.setFormatter(_RedactingFormatter("%(levelname)s: %(message)s"))
    progress = logging.StreamHandler(sys.stdout)
    # Warnings go to stderr alone, although both handlers are of the root.
    progress.addFilter(lambda record: record.levelno < logging.WARNING)
    progress.setFormatter(_RedactingFormatter("%(message)s"))
    # The other processes of a run would only repeat what the first one says.
    level = logging.WARNING if is_main_process else logging.CRITICAL
    root = logging.getLogger()
    packages = [logging.getLogger(name) for name in ("dalle_mini_impl", "vqvae")]
    handlers_before = list(root.handlers)
    levels_before = [logger.level for logger in (root, *packages)]
    root.handlers[:] = [warnings, progress]
    root.setLevel(level)
    for logger in packages:
        logger.setLevel(logging.INFO if is_main_process else level)
    try:
        yield
    finally:
        # A program that runs a command goes on with its own logging, not with ours.
        root.handlers[:] = handlers_before
        for logger, before in zip((root, *packages), levels_before, strict=True):
            logger.setLevel(before)


class _RedactingFormatter(logging.Formatter):
    """Writes a record without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class _MinutesFormatter(_RedactingFormatter):
    """Begins each line with the minutes since the formatter was made."""

    def __init__(self) -> None:
        super().__init__("%(message)s")
        self._started = time.time()

    def format(self, record: logging.LogRecord) -> str:
        return f"[{(record.created - self._started) / 60:4.1f} min] {super().format(record)}"


def show_elapsed_minutes() -> None:
    """Begin each line of progress with the minutes since this call."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setFormatter(_MinutesFormatter())


def printable(text: str) -> str:
    """Make a message one line without control codes, which names of files may hold."""
    # splitlines knows all line ends of Unicode, not only \n.
    line = " ".join(text.splitlines())
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line)


def _resume_command(arguments: Sequence[str]) -> str:
    """Write the command that resumes this one, in the form that the user typed."""
    kept, skip = [], False
    # An old --resume would resume another run's checkpoint, or name this one twice.
    for argument in arguments:
        if not skip and argument != "--resume" and not argument.startswith("--resume="):
            kept.append(argument)
        skip = argument == "--resume"
    is_console = sys.argv[0].startswith(f"{CONSOLE} ")
    program = sys.argv[0].split() if is_console else [sys.argv[0]]
    size, local_size = (os.environ.get(f"{name}WORLD_SIZE", "1") for name in ("", "LOCAL_"))
    launcher: list[str] = []
    if size == "1":
        if not is_console:
            # What the user can type: sys.executable is a long path where plain python is the same.
            python = "python" if shutil.which("python") == sys.executable else sys.executable
            launcher = [python]
    else:
        # The address of another machine's process is not known here.
        nodes = ["--standalone", "--nproc_per_node", size] if size == local_size else ["..."]
        launcher = ["torchrun", *nodes, *(["--no-python"] if is_console else [])]
    return shlex.join([*launcher, *program, *kept, "--resume", "latest"])


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    # Imported only after a failure: --help must not wait for torch.
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
