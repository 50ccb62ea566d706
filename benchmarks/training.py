"""Training steps of a decoder and their peak memory, on random tokens.

python -m benchmarks.training NAME SIZE PRECISION prints the peak GiB of one variant.
"""

import dataclasses
import functools
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks import ours, peers
from benchmarks.parts import BenchmarkConfig
from benchmarks.sizes import MEDIUM, SMALL, TOY, Size
from benchmarks.timing import Precision, Result, Variant, interleave, set_machine

SIZES = {size.name: size for size in (SMALL, MEDIUM, TOY)}
GIB = 2**30
BYTES_PER_WEIGHT = 16  # itself, its gradient and AdamW's two moments, all float32
MOST_SECONDS = 1800.0
# How peers run: (words of the row, compiled, float32 matrix product).
WAYS = (
    ("as shipped", False, "highest"),
    ('matmul "medium"', False, "medium"),
    ("compiled", True, "highest"),
    ('compiled, matmul "medium"', True, "medium"),
)


def compare_steps(config: BenchmarkConfig, size: Size) -> list[Result]:
    """Compare one training step in each precision, in tokens per second."""
    results = []
    for precision in config.precisions():
        rows = step_variants(size, precision, with_compiled=not config.quick)
        work = f"train {size.name}, {precision}"
        results += interleave(work, rows, "tokens/s", config.rounds)
    return results


def step_variants(size: Size, precision: Precision, *, with_compiled: bool) -> Iterator[Variant]:
    """Yield our rows, and every peer in every way it can run; compiling takes a minute each."""
    for name, compiled in (("ours", False), ("ours, training.compile", True)):
        if with_compiled or not compiled:
            build = partial(ours.decoder_training, size, precision, compile=compiled)
            yield ours.variant(name, build, precision=precision, keeps_memory=True)
    for name in peers.DECODERS:
        # One model for all ways of a peer: they do not run at the same time.
        decoder = functools.cache(partial(peers.build_decoder, name, size))
        for words, compiled, matmul in WAYS:
            # Under autocast the float32 product does not matter.
            if precision == "bfloat16" and matmul != "highest":
                continue
            if compiled and not with_compiled:
                continue
            yield Variant(
                f"{name}, {words}",
                partial(peers.decoder_training, decoder, size, precision, compiled=compiled),
                precision=precision,
                matmul=matmul,
                keeps_memory=words != WAYS[0][0],
            )


def compare_peak_memory(config: BenchmarkConfig, size: Size) -> list[Result]:
    """Compare the peak GiB of a training process, Python and torch included."""
    floor = BYTES_PER_WEIGHT * sum(w.numel() for w in ours.build_decoder(size).parameters()) / GIB
    results = []
    for precision in config.precisions():
        for one in memory_variants(size, precision):
            work = f"peak memory, train {size.name} at batch {size.batch}, {precision}"
            result = Result(work=work, variant=one.name, is_ours=one.is_ours, unit="GiB")
            result.floor = floor
            # In a fresh process: a peak never falls.
            try:
                result.costs = [measure_in_fresh_process(one.name, size, precision)]
            except (ValueError, subprocess.TimeoutExpired) as error:
                result.failure = f"failed: {error}"
            print(f"  {result.work} | {one.name}: {result.costs or result.failure}")
            results.append(result)
    return results


def memory_variants(size: Size, precision: Precision) -> Iterator[Variant]:
    """Yield the rows of training that differ in memory, and ours with activation checkpointing."""
    for one in step_variants(size, precision, with_compiled=False):
        # The float32 product changes no memory.
        if not one.is_ours and one.matmul == "medium":
            continue
        yield one
        if one.is_ours:
            yield dataclasses.replace(
                one,
                name="ours, activation checkpointing",
                build=lambda: ours.decoder_training(size, precision, activation_checkpointing=True),
                is_ours=False,  # not the row that others are compared with
            )


def measure_in_fresh_process(name: str, size: Size, precision: Precision) -> float:
    """Return the peak GiB of a few steps; a ValueError with the last line if they failed."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training", name, size.name]
    done = subprocess.run(
        [*command, precision], capture_output=True, text=True, timeout=MOST_SECONDS, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(lines[-1][:300])
    return float(done.stdout.split()[-1])


def peak_gib() -> float:
    """Return this process's largest resident size so far, in GiB."""
    # Not from getrusage where /proc exists: Linux hands a new program the peak of its parent.
    status = Path("/proc/self/status")
    if status.is_file():
        [line] = [row for row in status.read_text().splitlines() if row.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def main(name: str, size: str, precision: Precision) -> None:
    """Train one variant and print the peak."""
    [one] = [each for each in memory_variants(SIZES[size], precision) if each.name == name]
    set_machine(one.matmul, keeps_memory=one.keeps_memory)
    job = one.build()
    for _ in range(2):
        job.run()
    print(peak_gib())


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
