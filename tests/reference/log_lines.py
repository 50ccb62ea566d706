"""What the packages log while a block runs."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Handler(logging.Handler):
    def __init__(self, react: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.react = react

    def emit(self, record: logging.LogRecord) -> None:
        self.react(record.getMessage())


@contextmanager
def log_lines(react: Callable[[str], None] = lambda line: None) -> Iterator[list[str]]:
    """Collects the lines of level INFO that the package logs, and hands each to `react` at once."""
    lines: list[str] = []

    def note(line: str) -> None:
        lines.append(line)
        react(line)

    logger, handler = logging.getLogger("dalle_mini_impl"), _Handler(note)
    handler.addFilter(lambda record: record.levelno == logging.INFO)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
