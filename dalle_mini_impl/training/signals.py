"""Ctrl-C, SIGTERM and their like end a run after the current step, with a checkpoint."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")

# Batch systems announce the end of a job by SIGTERM, SIGUSR1 or SIGUSR2; Windows has no SIGUSR.
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
# A terminal or a batch system signals the launcher and its processes, and the launcher passes the
# signal on: two within this time are one request.
SAME_REQUEST_SECONDS = 3.0


class _CutShortError(BaseException):
    """Ends repeatable work; a BaseException, so that no ``except Exception`` swallows it."""


class StopRequest:
    """Listens for a signal while it is open; a second one, later, ends the process as usual."""

    def __init__(self) -> None:
        self.signal = 0
        self._received = 0.0
        self._may_cut_short = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Python lets only the main thread handle signals.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def run_unless_stopped(self, work: Callable[[], Result]) -> Result | None:
        """Run repeatable work that a signal may cut short at any point.

        Args:
            work: Leaves nothing half-done behind.

        Returns:
            Its result, or None where it was cut short or not begun.
        """
        result = None
        try:
            # First the permission, then the look: a signal in between raises or is seen.
            self._may_cut_short = True
            if not self.signal:
                result = work()
            self._may_cut_short = False
        except _CutShortError:
            return None
        return result

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._received = number, now
            if self._may_cut_short:
                self._may_cut_short = False
                raise _CutShortError
        elif now - self._received > SAME_REQUEST_SECONDS:
            # Somebody insists: restore the usual handlers and let this signal end the process.
            self.__exit__()
            signal.raise_signal(number)
