"""What this machine can do at best: matrix products and memory, measured through torch.

They are yardsticks, not laws: a good kernel of one's own may beat torch's matrix product. Each
part of a run measures them anew, and the best of all counts, since only disturbance makes them
smaller.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Result, median
from dalle_mini_impl.hardware import has_fast_bf16, medium_is_float32

GIGA = 1e9
REPEATS = 5
MEMORY_BYTES = 2**28  # far beyond any cache


def measure_ceilings(*, side: int = 1536) -> dict[str, float]:
    """Measure the machine.

    Args:
        side: Rows and columns of the matrices.

    Returns:
        ``float32`` and ``bfloat16`` in FLOP/s, ``memory`` in bytes/s read.
    """
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        rates = [_matmul_rate(side, torch.float32)]
        if medium_is_float32():
            torch.set_float32_matmul_precision("medium")
            rates.append(_matmul_rate(side, torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)
    small = side if has_fast_bf16() else side // 4  # emulation takes seconds
    return {
        "float32": max(rates),
        "bfloat16": _matmul_rate(small, torch.bfloat16),
        "memory": _read_rate(),
    }


def _matmul_rate(side: int, dtype: torch.dtype) -> float:
    left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
    return 2 * side**3 / _best_seconds(lambda: left @ right)


def _read_rate() -> float:
    values = torch.ones(MEMORY_BYTES // 4)
    vector = torch.ones(4096)
    ways = (values.sum, values.max, lambda: values.view(-1, 4096) @ vector)
    return MEMORY_BYTES / min(_best_seconds(way) for way in ways)


def _best_seconds(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def fraction_of_ceiling(result: Result, ceilings: dict[str, float]) -> float | None:
    """Compare a result with the least cost that the machine allows.

    Args:
        result: Of a contestant.
        ceilings: As `measure_ceilings` returns them.

    Returns:
        A share, usually in [0, 1]; None if nothing is known that bounds this work.
    """
    floor = result.floor
    if floor is None and (result.flops or result.bytes):
        floor = max(result.flops / ceilings[result.precision], result.bytes / ceilings["memory"])
    return None if floor is None or not result.costs else floor / median(result.costs)


def count_flops(run: Callable[[], object], *, with_batched: bool = False) -> float:
    """Count the arithmetic of matrix products and convolutions in one call.

    torch does not count its fused attention on a CPU, so attention is left out here (its written
    products are batched ones) and added by `attention_flops`, alike for all.

    Args:
        run: Runs eagerly, not compiled.
        with_batched: Count batched products too, for networks without attention.

    Returns:
        Floating-point operations.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts().get("Global", {})
    return float(sum(flops for op, flops in counts.items() if with_batched or "bmm" not in str(op)))


def attention_flops(*, layers: int, width: int, length: int, rows: int) -> float:
    """Count attention's two products, forward and backward, as if the mask were full."""
    return 12.0 * layers * width * length**2 * rows


def bytes_of(*tensors: Tensor) -> float:
    """Add up the sizes of tensors."""
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
