"""What every part of a run is told."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.timing import Precision


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Options of a run."""

    rounds: int
    """Timed blocks per contestant."""
    quick: bool
    """Toy sizes and one round: shows that everything runs, measures nothing."""
    bf16: bool
    """Whether bf16 is measured: on a machine that emulates it, it shows nothing."""

    def precisions(self) -> Iterator[Precision]:
        """Name the precisions of this run.

        Yields:
            Float32, then bf16 if expected.
        """
        yield "float32"
        if self.bf16:
            yield "bfloat16"
