"""Interleaved timing: every round runs every contestant once, in turning order.

A busy or throttled minute then hits all contestants alike, and ratios of medians hold although
absolute figures move. How much of the machine other programs used meanwhile stands beside each
figure. Nothing is timed that was not verified first.
"""

import ctypes
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dalle_mini_impl.hardware import (
    M_MMAP_THRESHOLD,
    M_TRIM_THRESHOLD,
    keep_freed_memory,
    medium_is_float32,
)

GLIBC_THRESHOLD = 2**25  # the largest that it chooses for itself: mallopt(3)
SHORTEST_SECONDS = 1.0  # of a timed block; quicker calls are repeated until it is full
LONGEST_SECONDS = 10.0  # of a call that is made once more to warm up, or measured again
QUIET_CORES = 0.1  # that others may use in a block that is not measured again
MOST_TRIES = 3
Precision = Literal["float32", "bfloat16"]


class NotMeasuredError(Exception):
    """A contestant cannot take part here, and that is no fault of it; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Verified work, ready to be timed."""

    run: Callable[[], object]
    """One call; what it returns is dropped."""
    items: float = 1.0
    """What one call makes: tokens, images, 1 for a whole process."""
    flops: float = 0.0
    """Arithmetic of one call that matrix products or convolutions must do."""
    bytes: float = 0.0
    """Memory that one call must read."""
    note: str = ""
    """What the reader of the figure must know."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a comparison."""

    name: str
    build: Callable[[], Job]
    """Makes the job and proves that it does the work; raises if it does not."""
    is_ours: bool = False
    precision: Precision = "float32"
    """Decides which ceiling bounds it."""
    matmul: str = "highest"
    """For ``torch.set_float32_matmul_precision`` while it is built and runs."""
    keeps_memory: bool = False
    """Whether freed memory stays with the process, as in our training."""
    rounds: int | None = None
    """Fewer rounds than the others, for work that takes minutes."""


@dataclass(kw_only=True)
class Result:
    """What became of a contestant; costs are per item."""

    work: str
    variant: str
    is_ours: bool
    unit: str
    """``tokens/s`` and the like, or ``s`` and ``GiB``, where less is better."""
    costs: list[float] = field(default_factory=list)
    """Of each round: seconds per item, or GiB."""
    others: list[float | None] = field(default_factory=list)
    """Processor cores that other programs used during each round; None where it is not known."""
    flops: float = 0.0
    """Per item."""
    bytes: float = 0.0
    """Per item."""
    precision: Precision = "float32"
    floor: float | None = None
    """Least cost that is possible, where it is known without a ceiling."""
    build_seconds: float = 0.0
    """Building, verifying and compiling."""
    failure: str = ""
    note: str = ""


def interleave(
    work: str,
    variants: Sequence[Variant],
    *,
    unit: str,
    rounds: int,
    show: Callable[[str], None] = print,
) -> list[Result]:
    """Build, verify and time all contestants of one comparison.

    Args:
        work: What is compared, the heading of the table.
        variants: Rows of the table.
        unit: Of the figure shown; see `Result.unit`.
        rounds: Timed blocks per contestant.
        show: Receives a line per contestant.

    Returns:
        One result per contestant, in order; those that failed say so.
    """
    results = [
        Result(
            work=work,
            variant=one.name,
            is_ours=one.is_ours,
            unit=unit,
            precision=one.precision,
        )
        for one in variants
    ]
    jobs = [_build(one, result) for one, result in zip(variants, results, strict=True)]
    for round_number in range(rounds):
        for index in turning_order(len(variants), round_number):
            one, job, result = variants[index], jobs[index], results[index]
            if job is not None and round_number < (one.rounds or rounds):
                _time(one, job, result)
    for result in results:
        cost = f"{median(result.costs):.4g} s an item" if result.costs else result.failure
        show(f"  {work} | {result.variant}: {cost}")
    return results


def turning_order(count: int, round_number: int) -> list[int]:
    """Let another contestant begin in each round, and turn the order round in every other one.

    Args:
        count: Number of contestants.
        round_number: From 0.

    Returns:
        Their indices in the order of that round.
    """
    order = [(start + round_number // 2) % count for start in range(count)]
    return order[::-1] if round_number % 2 else order


def _build(one: Variant, result: Result) -> Job | None:
    started = time.perf_counter()
    try:
        if one.matmul == "medium" and not medium_is_float32():
            raise NotMeasuredError('this processor rounds at matmul "medium"')
        set_machine(one.matmul, keeps_memory=one.keeps_memory)
        job = one.build()
    except NotMeasuredError as reason:
        result.failure = f"not measured: {reason}"
        return None
    except Exception as error:  # one that fails must not take the others with it
        result.failure = failure_text(error)
        return None
    result.build_seconds = time.perf_counter() - started
    result.flops, result.bytes = job.flops / job.items, job.bytes / job.items
    result.note = job.note
    return job


def _time(one: Variant, job: Job, result: Result) -> None:
    if result.failure:
        return
    gc.collect()
    set_machine(one.matmul, keeps_memory=one.keeps_memory)
    try:
        blocks = [_block(job)]
        while (
            (blocks[-1][1] or 0) > QUIET_CORES
            and blocks[-1][0] < LONGEST_SECONDS
            and len(blocks) < MOST_TRIES
        ):
            blocks.append(_block(job))
    except Exception as error:
        result.failure = failure_text(error)
        return
    seconds, cores = min(blocks, key=lambda block: block[1] or 0)  # the quietest, not the quickest
    result.costs.append(seconds / job.items)
    result.others.append(cores)


def _block(job: Job) -> tuple[float, float | None]:
    """Time one block; seconds per call, and cores that others used meanwhile."""
    load, started = OtherLoad(), time.perf_counter()
    job.run()
    first = time.perf_counter() - started
    if first > LONGEST_SECONDS:
        return first, load.cores()
    load, calls, started = OtherLoad(), 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - started < SHORTEST_SECONDS:
        job.run()
        calls += 1
    return (time.perf_counter() - started) / calls, load.cores()


def set_machine(matmul: str, *, keeps_memory: bool) -> None:
    """Choose the float32 product and what becomes of freed memory, for what runs next.

    Args:
        matmul: For ``torch.set_float32_matmul_precision``.
        keeps_memory: As our training does, or where glibc's own rule ends after some large blocks.
    """
    torch.set_float32_matmul_precision(matmul)
    if not keep_freed_memory() or keeps_memory:
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, GLIBC_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * GLIBC_THRESHOLD)
    libc.malloc_trim(0)  # what others kept


def failure_text(error: Exception) -> str:
    """Say in one line why a contestant dropped out."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())}"[:300]


def median(values: Sequence[float]) -> float:
    """Middle value; the mean of the two middle ones if their number is even."""
    return statistics.median(values)


def require_training(step: Callable[[], Any], *, steps: int, compiled: bool) -> None:
    """Refuse a step that does not train, or that is said to be compiled and is not.

    Args:
        step: Makes one update and returns the loss.
        steps: Over which the loss must fall.
        compiled: Whether compiled code must run in it.

    Raises:
        ValueError: As `require_falling` and `require_compiled`.
    """
    require_falling([float(step()) for _ in range(steps)])
    if compiled:
        require_compiled(step)


def require_compiled(run: Callable[[], object]) -> None:
    """Refuse a call in which nothing is compiled: torch.compile stays silent when it gives up.

    Args:
        run: Compiled by an earlier call.

    Raises:
        ValueError: If it ran as eager code.
    """
    with torch.profiler.profile() as profiler:
        run()
    if not any("Torch-Compiled InpaintingMask" in event.name for event in profiler.events()):
        raise ValueError("nothing of it is compiled")


def require_falling(losses: Sequence[float]) -> None:
    """Refuse training that does not train.

    Args:
        losses: Of successive steps on the same data.

    Raises:
        ValueError: If one is not finite or the last is not below the first.
    """
    if not all(math.isfinite(loss) for loss in losses) or losses[-1] >= losses[0]:
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        raise ValueError(f"the loss does not fall: {shown}")


class OtherLoad:
    """How busy other processes keep the machine, from /proc/stat; Linux only."""

    def __init__(self) -> None:
        """Start to watch."""
        self._busy, self._own, self._started = _busy_seconds(), _own_seconds(), time.perf_counter()

    def cores(self) -> float | None:
        """Average number of cores that others used since the start, or None if not known."""
        busy, seconds = _busy_seconds(), time.perf_counter() - self._started
        if busy is None or self._busy is None:
            return None
        return max(0.0, (busy - self._busy) - (_own_seconds() - self._own)) / seconds


def _busy_seconds() -> float | None:
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait, interrupts, soft, stolen = (int(f) for f in fields[:8])
    ticks = user + nice + system + interrupts + soft + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
