"""Which number formats this machine is fast at: asked once per run, never at import."""

import platform
from pathlib import Path

import torch


def has_fast_bf16() -> bool:
    """Say whether the device multiplies bf16 in hardware; emulation is slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def use_fast_float32() -> None:
    """Let oneDNN multiply float32 matrices where that is faster and still float32.

    torch takes MKL otherwise. On an AMD processor (Zen 5) oneDNN doubles the speed of training; on
    Intel's own it gains nothing, and draws up to a quarter more slowly. The maker decides and not
    a stopwatch, so that every run of a machine multiplies alike.
    """
    if torch.cuda.is_available():
        return
    fast = _is_made_by_amd() and medium_is_float32()
    torch.set_float32_matmul_precision("medium" if fast else "highest")


def medium_is_float32() -> bool:
    """Tell whether the float32 product "medium" is a float32 one here; some CPUs round to bf16."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    error = ((left @ right).double() - exact).abs().max() / exact.abs().max()
    torch.set_float32_matmul_precision(before)
    return bool(error <= 1e-5)


def _is_made_by_amd() -> bool:
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        about = platform.processor()
    return "AuthenticAMD" in about
