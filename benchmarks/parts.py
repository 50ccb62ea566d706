"""The parts of a run, by name. Their modules load only when they run."""

from collections.abc import Callable, Sequence
from importlib import import_module

from benchmarks.config import BenchmarkConfig
from benchmarks.sizes import MEDIUM, SMALL, TOY, Size
from benchmarks.timing import Result


def _plain(module: str) -> Callable[[BenchmarkConfig], list[Result]]:
    return lambda config: import_module(f"benchmarks.{module}").run(config)


def _sized(module: str, size: Size, *options: object) -> Callable[[BenchmarkConfig], list[Result]]:
    return lambda config: import_module(f"benchmarks.{module}").run(
        config, TOY if config.quick else size, *options
    )


PARTS: dict[str, Callable[[BenchmarkConfig], list[Result]]] = {
    "startup": _plain("startup"),
    "lookup": _plain("lookup"),
    "data": _plain("data"),
    "tokenizer": _plain("tokenizer"),
    "quality": _plain("quality"),
    "memory": _sized("memory", MEDIUM),
    "train_small": _sized("training", SMALL),
    "train_medium": _sized("training", MEDIUM),
    "users": _plain("end_to_end"),
    "shipped": _plain("shipped"),
    "sample_one": _sized("sampling", MEDIUM, (1,)),
    "sample_many": _sized("sampling", MEDIUM, (4, 16, 64)),
}


def choose_parts(words: Sequence[str]) -> list[str]:
    """Find the parts that a user asked for.

    Args:
        words: Names or beginnings of names ("train" means both sizes), or "all".

    Returns:
        Names, in the order in which they run.

    Raises:
        ValueError: If a word fits no part.
    """
    for word in words:
        if word != "all" and not any(name.startswith(word) for name in PARTS):
            raise ValueError(f"parts: got {word!r}, expected all, or some of {', '.join(PARTS)}")
    return [name for name in PARTS if any(word == "all" or name.startswith(word) for word in words)]
