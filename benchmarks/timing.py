"""Interleaved timing, and the machine's own limits.

Every round runs every variant once, in rotating order: a busy or throttled minute then hits all of
them alike, and ratios of medians hold although absolute figures move. The load of other programs is
recorded beside each figure. Every variant is verified before it is timed.

Ceilings are the best rates of matrix products and of memory, measured through torch. They are
yardsticks, not laws: a good kernel of one's own may beat torch's matrix product. Each part of a run
measures them again, and the best of all counts, since only disturbance makes them smaller.
"""

import ctypes
import gc
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dalle_mini_impl import hardware
from dalle_mini_impl.hardware import has_fast_bf16, medium_is_float32

GLIBC_THRESHOLD = 2**25  # the largest that glibc chooses for itself: mallopt(3)
SHORTEST_SECONDS = 1.0  # of a timed block; shorter calls are repeated until it is full
LONGEST_SECONDS = 10.0  # of a call that is warmed up or measured again
QUIET_CORES = 0.1  # used by others; above it a block is measured again
MOST_TRIES = 3
MEMORY_BYTES = 2**28  # far beyond any cache
Precision = Literal["float32", "bfloat16"]


class NotMeasuredError(Exception):
    """A variant cannot run here through no fault of its own; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Verified work, ready to be timed."""

    run: Callable[[], object]  # one call; its result is dropped
    items: float = 1.0  # output of one call: tokens, images, 1 for a whole process
    flops: float = 0.0  # matrix products and convolutions of one call
    bytes: float = 0.0  # memory that one call must read
    note: str = ""  # shown beside the figure


@dataclass(frozen=True)
class Variant:
    """One row of a comparison."""

    name: str
    build: Callable[[], Job]  # builds and verifies the job; raises if the work is not done
    is_ours: bool = False
    precision: Precision = "float32"  # decides which ceiling bounds it
    matmul: str = "highest"  # for `torch.set_float32_matmul_precision` while it is built and runs
    keeps_memory: bool = False  # whether freed memory stays with the process, as in our training
    rounds: int | None = None  # fewer rounds than the others, for work that takes minutes


@dataclass(kw_only=True)
class Result:
    """Measurements of a variant; costs are per item."""

    work: str
    variant: str
    is_ours: bool
    unit: str  # a rate such as `tokens/s`, or a cost: `s`, `ms`, `GiB`
    costs: list[float] = field(default_factory=list)  # of each round: seconds per item, or GiB
    # Processor cores that other programs used during each round; None where unknown.
    others: list[float | None] = field(default_factory=list)
    flops: float = 0.0  # per item
    bytes: float = 0.0  # per item
    precision: Precision = "float32"
    floor: float | None = None  # lower bound of the cost, where it is known without a ceiling
    build_seconds: float = 0.0  # building, verifying and compiling
    failure: str = ""
    note: str = ""


def interleave(work: str, rows: Iterable[Variant], unit: str, rounds: int) -> list[Result]:
    """Build, verify and time all variants of one comparison; those that fail say so."""
    variants = list(rows)
    results = [
        Result(work=work, variant=one.name, is_ours=one.is_ours, unit=unit, precision=one.precision)
        for one in variants
    ]
    # 1. build and verify: a variant that fails here is never timed
    jobs = [_build(one, result) for one, result in zip(variants, results, strict=True)]
    # 2. time in rounds: whoever always ran after the same neighbor would inherit its heat and cache
    for round_number in range(rounds):
        for index in rotated_order(len(variants), round_number):
            one, job, result = variants[index], jobs[index], results[index]
            if job is not None and round_number < (one.rounds or rounds):
                _time(one, job, result)
    for result in results:
        cost = f"{median(result.costs):.4g} s an item" if result.costs else result.failure
        print(f"  {work} | {result.variant}: {cost}")
    return results


def rotated_order(count: int, round_number: int) -> list[int]:
    """Begin each round with another variant, and reverse every second round."""
    order = [(start + round_number // 2) % count for start in range(count)]
    return order[::-1] if round_number % 2 else order


def _build(one: Variant, result: Result) -> Job | None:
    started = time.perf_counter()
    try:
        if one.matmul == "medium" and not medium_is_float32():
            raise NotMeasuredError('this processor rounds at matmul "medium"')
        set_machine(one.matmul, keeps_memory=one.keeps_memory)
        job = one.build()
    # One that fails must not take the others with it.
    except Exception as error:
        result.failure = failure_text(error)
        return None
    result.build_seconds = time.perf_counter() - started
    result.flops, result.bytes = job.flops / job.items, job.bytes / job.items
    result.note = job.note
    return job


def _time(one: Variant, job: Job, result: Result) -> None:
    if result.failure:
        return
    gc.collect()  # here, not in somebody's timed block
    set_machine(one.matmul, keeps_memory=one.keeps_memory)
    blocks: list[tuple[float, float | None]] = []
    try:
        # A block that other programs disturbed is measured again, unless it takes too long.
        for _ in range(MOST_TRIES):
            seconds, cores = _block(job)
            blocks.append((seconds, cores))
            if seconds >= LONGEST_SECONDS or (cores or 0) <= QUIET_CORES:
                break
    except Exception as error:
        result.failure = failure_text(error)
        return
    # The quietest block counts, not the fastest: the fastest may be luck.
    seconds, cores = min(blocks, key=lambda block: block[1] or 0)
    result.costs.append(seconds / job.items)
    result.others.append(cores)


def _block(job: Job) -> tuple[float, float | None]:
    """Return seconds per call of one block, and the cores used by others meanwhile."""
    # The first call warms up; it counts only where a second one would take too long.
    load, started = OtherLoad(), time.perf_counter()
    job.run()
    first = time.perf_counter() - started
    if first > LONGEST_SECONDS:
        return first, load.cores()
    # Short calls fill a second: one alone would be lost in the clock ticks of /proc/stat.
    load, calls, started = OtherLoad(), 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - started < SHORTEST_SECONDS:
        job.run()
        calls += 1
    return (time.perf_counter() - started) / calls, load.cores()


def set_machine(matmul: str, *, keeps_memory: bool) -> None:
    """Set the float32 matrix product, and whether freed memory stays with the process."""
    torch.set_float32_matmul_precision(matmul)
    if not hardware.keep_freed_memory() or keeps_memory:
        return
    # glibc raises its own thresholds as large blocks are freed: this is where they end.
    libc = ctypes.CDLL(None)
    libc.mallopt(hardware.M_MMAP_THRESHOLD, GLIBC_THRESHOLD)
    libc.mallopt(hardware.M_TRIM_THRESHOLD, 2 * GLIBC_THRESHOLD)
    libc.malloc_trim(0)  # kept by earlier variants


def failure_text(error: Exception) -> str:
    """Describe an error in one line."""
    if isinstance(error, NotMeasuredError):
        return f"not measured: {error}"
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())}"[:300]


def require_training(step: Callable[[], Any], *, steps: int, compiled: bool) -> None:
    """Raise a ValueError if the loss does not fall over some steps, or nothing is compiled."""
    require_falling([float(step()) for _ in range(steps)])
    if compiled:
        require_compiled(step)


def require_compiled(run: Callable[[], object]) -> None:
    """Raise a ValueError if a call, compiled by an earlier one, runs as eager code."""
    # torch.compile stays silent when it gives up; only the profiler sees compiled code.
    with torch.profiler.profile() as profiler:
        run()
    if not any("Torch-Compiled Region" in event.name for event in profiler.events()):
        raise ValueError("nothing of it is compiled")


def require_falling(losses: Sequence[float]) -> None:
    """Raise a ValueError unless all losses are finite and the last is below the first."""
    if not all(math.isfinite(loss) for loss in losses) or losses[-1] >= losses[0]:
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        raise ValueError(f"the loss does not fall: {shown}")


class OtherLoad:
    """Load by other processes since construction, from /proc/stat; Linux only."""

    def __init__(self) -> None:
        self._busy, self._own, self._started = _busy_seconds(), _own_seconds(), time.perf_counter()

    def cores(self) -> float | None:
        """Return the average number of cores used by others, or None if unknown."""
        busy, seconds = _busy_seconds(), time.perf_counter() - self._started
        if busy is None or self._busy is None:
            return None
        # Busy time of the machine includes this process and its children.
        return max(0.0, (busy - self._busy) - (_own_seconds() - self._own)) / seconds


def _busy_seconds() -> float | None:
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    # Guest time is part of user already; waiting for a disk is no load.
    user, nice, system, _idle, _wait, interrupts, soft, stolen = (int(f) for f in fields[:8])
    ticks = user + nice + system + interrupts + soft + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure_ceilings(*, side: int = 1536) -> dict[str, float]:
    """Measure ``float32`` and ``bfloat16`` products in FLOP/s, and ``memory`` in bytes/s read."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        rates = [matmul_rate(side, torch.float32)]
        # "medium" counts only where it is as exact: elsewhere it would be bf16's ceiling.
        if medium_is_float32():
            torch.set_float32_matmul_precision("medium")
            rates.append(matmul_rate(side, torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)
    # Where bf16 is emulated, the full size would take seconds a product.
    small = side if has_fast_bf16() else side // 4
    return {
        "float32": max(rates),
        "bfloat16": matmul_rate(small, torch.bfloat16),
        "memory": _read_rate(),
    }


def matmul_rate(
    side: int,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    summarize: Callable[[list[float]], float] = min,
) -> float:
    """Measure the rate of a square matrix product, in FLOP/s."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / summarize(call_seconds(lambda: left @ right))


def _read_rate() -> float:
    values = torch.ones(MEMORY_BYTES // 4)
    vector = torch.ones(4096)
    # Which of torch's reductions reads fastest depends on the vector instructions.
    ways = (values.sum, values.max, lambda: values.view(-1, 4096) @ vector)
    return MEMORY_BYTES / min(min(call_seconds(way)) for way in ways)


def call_seconds(run: Callable[[], object], *, warm_up: int = 3, repeats: int = 10) -> list[float]:
    """Time single calls."""
    for _ in range(warm_up):
        run()
    seconds = []
    # A kernel launch returns before its work is done: wait before and after.
    for _ in range(repeats):
        _synchronize()
        started = time.perf_counter()
        run()
        _synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def fraction_of_ceiling(result: Result, ceilings: dict[str, float]) -> float | None:
    """Divide the least cost that the machine allows by the median cost; None if unbounded."""
    floor = result.floor
    if floor is None and (result.flops or result.bytes):
        floor = max(result.flops / ceilings[result.precision], result.bytes / ceilings["memory"])
    return None if floor is None or not result.costs else floor / median(result.costs)


def count_flops(run: Callable[[], object], *, with_batched: bool = False) -> float:
    """Count matrix products and convolutions of one eager call.

    Batched products count only on request, for networks without attention.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts().get("Global", {})
    # torch does not count its fused attention on a CPU, and the written-out one is batched: leave
    # attention out here and add `attention_flops`, alike for every program.
    return float(sum(flops for op, flops in counts.items() if with_batched or "bmm" not in str(op)))


def attention_flops(layers: int, width: int, length: int, rows: int) -> float:
    """Count attention's two products, forward and backward, as if the mask were full."""
    # Each product costs 2 * length^2 * width; its backward pass has two of the same size.
    return 12.0 * layers * width * length**2 * rows


def autocast(precision: Precision) -> torch.autocast:
    """Run a peer's forward pass as our trainer runs ours: bf16 products, float32 weights."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")


def update(loss: Tensor, optimizer: torch.optim.Optimizer, *, max_norm: float = 0.0) -> float:
    """Finish a training step of a peer: gradients, clipping if ``max_norm`` is set, update."""
    loss.backward()
    if max_norm:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        nn.utils.clip_grad_norm_(weights, max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())
