"""Peak memory of training, each contestant in a fresh process.

python -m benchmarks.memory NAME SIZE PRECISION prints the GiB of one contestant.
"""

import dataclasses
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import ours
from benchmarks import training as train
from benchmarks.config import BenchmarkConfig
from benchmarks.sizes import MEDIUM, SMALL, TOY, Size
from benchmarks.timing import Precision, Result, Variant, set_machine

SIZES = {size.name: size for size in (SMALL, MEDIUM, TOY)}
GIB = 2**30
BYTES_PER_WEIGHT = 16  # itself, its gradient and AdamW's two moments, all float32
MOST_SECONDS = 1800.0


def run(config: BenchmarkConfig, size: Size) -> list[Result]:
    """Compare the peak memory of a training process, Python and torch included.

    Args:
        config: Of the run.
        size: Of the decoder.

    Returns:
        Rows in GiB.
    """
    floor = BYTES_PER_WEIGHT * sum(w.numel() for w in ours.build_decoder(size).parameters()) / GIB
    results = []
    for precision in config.precisions():
        for one in variants(size, precision):
            result = Result(
                work=f"peak memory, train {size.name} at batch {size.batch}, {precision}",
                variant=one.name,
                is_ours=one.is_ours,
                unit="GiB",
                floor=floor,
            )
            try:
                result.costs = [measure(one.name, size, precision)]
            except (ValueError, subprocess.TimeoutExpired) as error:
                result.failure = f"failed: {error}"
            print(f"  {result.work} | {one.name}: {result.costs or result.failure}")
            results.append(result)
    return results


def variants(size: Size, precision: Precision) -> Iterator[Variant]:
    """Name the rows: those of training, and ours when it keeps less.

    Args:
        size: Of the decoder.
        precision: Of the training.

    Yields:
        Contestants.
    """
    for one in train.variants(size, precision, with_compiled=False):
        if not one.is_ours and one.matmul == "medium":
            continue  # takes as much
        yield one
        if one.is_ours:
            yield dataclasses.replace(
                one,
                name="ours, activation checkpointing",
                build=lambda: ours.decoder_training(size, precision, activation_checkpointing=True),
                is_ours=False,  # not the row that others are compared with
            )


def measure(name: str, size: Size, precision: Precision) -> float:
    """Train for a few steps in a fresh process.

    Args:
        name: Of a contestant.
        size: Of the decoder.
        precision: Of the training.

    Returns:
        Peak memory in GiB.

    Raises:
        ValueError: If the process failed; with the last line of what it said.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", name, size.name]
    done = subprocess.run(
        [*command, precision], capture_output=True, text=True, timeout=MOST_SECONDS, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(lines[-1][:300])
    return float(done.stdout.split()[-1])


def peak_gib() -> float:
    """Read this process's largest resident size so far, in GiB.

    Not from ``getrusage`` where it can be helped: Linux hands a new program the peak of the one
    that started it.

    Returns:
        GiB.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        [line] = [row for row in status.read_text().splitlines() if row.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def main(name: str, size: str, precision: Precision) -> None:
    """Train one contestant and print the peak."""
    every = variants(SIZES[size], precision)
    [one] = [variant for variant in every if variant.name == name]
    set_machine(one.matmul, keeps_memory=one.keeps_memory)
    job = one.build()
    for _ in range(2):
        job.run()
    print(peak_gib())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])  # type: ignore[arg-type]
