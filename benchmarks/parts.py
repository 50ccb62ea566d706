"""The parts of a run, by name. Their modules load only when they run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module

from benchmarks.sizes import MEDIUM, SMALL, TOY, Size
from benchmarks.timing import Precision, Result


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Options of a run."""

    rounds: int  # timed blocks per variant
    quick: bool  # toy sizes and one round: shows that everything runs, measures nothing
    bf16: bool  # whether bf16 is measured: emulated, its figures mean nothing

    def precisions(self) -> Iterator[Precision]:
        """Yield float32, then bf16 if it is measured."""
        yield "float32"
        if self.bf16:
            yield "bfloat16"


Part = Callable[[BenchmarkConfig], list[Result]]


def _part(module: str, function: str, size: Size | None = None, **options: object) -> Part:
    """Name a function of a module; a size becomes the toy size in a quick run."""

    # Imported late: a part then runs although the packages of the others are missing.
    def run(config: BenchmarkConfig) -> list[Result]:
        sizes = [] if size is None else [TOY if config.quick else size]
        compare = getattr(import_module(f"benchmarks.{module}"), function)
        return compare(config, *sizes, **options)

    return run


PARTS: dict[str, Part] = {
    "startup": _part("end_to_end", "compare_startup"),
    "lookup": _part("tokenizer", "compare_lookups"),
    "data": _part("data", "compare_readers"),
    "tokenizer": _part("tokenizer", "compare_tokenizers"),
    "quality": _part("tokenizer", "compare_time_to_quality"),
    "memory": _part("training", "compare_peak_memory", MEDIUM),
    "train_small": _part("training", "compare_steps", SMALL),
    "train_medium": _part("training", "compare_steps", MEDIUM),
    "users": _part("end_to_end", "compare_whole_training"),
    "shipped": _part("sampling", "compare_trained_weights"),
    "sample_one": _part("sampling", "compare_random_weights", MEDIUM, batches=(1,)),
    "sample_many": _part("sampling", "compare_random_weights", MEDIUM, batches=(4, 16, 64)),
}


def choose_parts(words: Sequence[str]) -> list[str]:
    """List the parts that begin with one of the words, or all of them, in the order of a run."""
    for word in words:
        if word != "all" and not any(name.startswith(word) for name in PARTS):
            raise ValueError(f"parts: got {word!r}, expected all, or some of {', '.join(PARTS)}")
    return [name for name in PARTS if any(word == "all" or name.startswith(word) for word in words)]
