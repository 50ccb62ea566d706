"""Devices, processes, number formats and memory of this machine, asked once per run."""

import ctypes
import os
import platform
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from dalle_mini_impl.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

# What torch says on a CPU; no room for a thread's stack; none for what oneDNN needs to begin.
SIGNS = (
    "allocate memory",
    "not enough memory",
    "can't start new thread",
    "could not create a primitive",
)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# Tensors of a step are hundreds of MiB at most; what is larger still goes back when it is freed.
KEPT_BYTES = 2**30
OLDER_KEPT_BYTES = 2**25  # the most that glibc before 2.35 takes
NEVER = -1
OWN_CHOICE = "MALLOC_TRIM_THRESHOLD_"  # glibc's variable: whoever sets it decides


def has_fast_bf16() -> bool:
    """Say whether the device multiplies bf16 in hardware; emulation is slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def use_fast_float32() -> None:
    """Let oneDNN multiply float32 matrices where that is faster and still float32.

    torch takes MKL otherwise. On an AMD processor (Zen 5) oneDNN doubles the speed of training; on
    Intel's own it gains nothing, and generates up to a quarter more slowly. The maker decides and not
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


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that there is not enough memory, of a GPU or of the machine.

    Args:
        error: Any.

    Returns:
        True if it does.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if any(sign in str(error) for sign in SIGNS):
        return True
    # Imported here: it takes a second, and where memory is short there may be none for it.
    from accelerate.utils.memory import should_reduce_batch_size

    return should_reduce_batch_size(error)


def running_out_is_an_error(device: torch.device) -> bool:
    """Tell whether too much memory raises here, and does not end the process or stall the machine.

    Args:
        device: Where the model is.

    Returns:
        True on a GPU; on a CPU only under a limit such as ``ulimit -v``.
    """
    if device.type != "cpu":
        return True
    if sys.platform == "win32":
        return False
    import resource

    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def keep_freed_memory() -> bool:
    """Let a step on a CPU take the memory that the step before has freed.

    glibc hands large blocks back to the kernel, which must clear each page when it is taken again:
    a quarter of a step of DALL-E's discrete VAE, a twentieth of a small decoder's. Nothing that is
    computed changes. The peak was the same for decoders and a third larger for that VAE. Under a
    limit such as ``ulimit -v`` nothing is kept: what lies free in pieces would fill it. Nor is it
    where the variable ``MALLOC_TRIM_THRESHOLD_`` is set.

    Returns:
        Whether it will; of the C libraries only glibc can be told.

    Source: mallopt(3).
    """
    if not sys.platform.startswith("linux") or torch.cuda.is_available():
        return False
    if OWN_CHOICE in os.environ or running_out_is_an_error(torch.device("cpu")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    kept = mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) or mallopt(M_MMAP_THRESHOLD, OLDER_KEPT_BYTES)
    return bool(kept and mallopt(M_TRIM_THRESHOLD, NEVER))


def build_accelerator(mixed_precision: Literal["auto", "no", "bf16"]) -> "Accelerator":
    """Find the device and processes of this run.

    Args:
        mixed_precision: ``auto`` takes bf16 where the hardware multiplies it.

    Returns:
        Accelerate's view of the run.

    Raises:
        UserError: If the launcher started more processes than found each other.
    """
    # Imported here: Accelerate takes a second, and one process on a CPU has no use for it.
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    if mixed_precision == "auto":
        mixed_precision = "bf16" if has_fast_bf16() else "no"
    # An earlier run in this process may have had another precision. The process group stays: to
    # end it and to start another under the same torchrun hangs.
    AcceleratorState._reset_state()
    # Accelerate joins processes without a GPU only when it is told that it must do without. Apple's
    # GPUs count as none: they have no float64.
    gpu = torch.accelerator.current_accelerator(check_available=True)
    accelerator = Accelerator(
        cpu=gpu is None or gpu.type == "mps",
        mixed_precision=mixed_precision,
        # One process alone tokenizes and evaluates, while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise UserError(
            f"WORLD_SIZE: got {expected} from the launcher, but {accelerator.num_processes} found "
            "each other; start them with torchrun --nproc_per_node or accelerate launch"
        )
    return accelerator
