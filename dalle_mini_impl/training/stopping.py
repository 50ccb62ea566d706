"""Ctrl-C and SIGTERM end a run after the step at hand, with a checkpoint."""

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Listens for the first signal while it is open; a second one ends the process as usual."""

    def __init__(self) -> None:
        """Start without a request."""
        self.signal = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Listen, where Python lets us: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the signals as they were."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        self.__exit__()
