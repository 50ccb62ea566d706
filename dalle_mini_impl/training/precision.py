"""Which number formats this machine is fast at: asked once per run, never at import."""

import torch


def has_fast_bf16() -> bool:
    """Say whether the device multiplies bf16 in hardware; emulation is slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def use_fast_float32() -> None:
    """Let oneDNN multiply float32 matrices where its answer is still a float32 one.

    On several CPUs this doubles the speed of training. On others the same switch rounds to
    bf16, so the error of one product decides.
    """
    if torch.cuda.is_available():
        return
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    torch.set_float32_matmul_precision("medium")
    error = ((left @ right).double() - exact).abs().max() / exact.abs().max()
    if error > 1e-5:
        torch.set_float32_matmul_precision("highest")
