"""Devices, processes, number formats and memory of this machine."""

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

OUT_OF_MEMORY_MESSAGES = (
    "allocate memory",  # torch on a CPU
    "not enough memory",
    "can't start new thread",  # no room for a thread's stack
    "could not create a primitive",  # oneDNN at its first product
)
# Parameters of mallopt, from malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Tensors of a step are hundreds of MiB at most; larger blocks go back to the kernel when freed.
KEPT_BYTES = 2**30
GLIBC_2_34_KEPT_BYTES = 2**25  # the most that glibc before 2.35 takes
NEVER = -1
# What `accelerate config` of another project leaves in the environment, which Accelerate obeys:
# other engines, a divisor of all gradients, a compiler. And the values that change nothing.
LEFTOVERS = {
    "ACCELERATE_USE_DEEPSPEED": ("false", "0"),
    "ACCELERATE_USE_FSDP": ("false", "0"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "0"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "0"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1",),
    "ACCELERATE_DYNAMO_BACKEND": ("no",),
}
TRIM_VARIABLE = "MALLOC_TRIM_THRESHOLD_"  # of glibc; the user's choice comes first


def find_device() -> torch.device:
    """Return the GPU that models run on, else the CPU."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    # Apple's GPUs count as none: they have no float64.
    return torch.device("cpu") if gpu is None or gpu.type == "mps" else gpu


def has_fast_bf16() -> bool:
    """Tell whether the device multiplies bf16 in hardware; emulation is slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def use_fast_float32() -> None:
    """Let oneDNN multiply float32 matrices where that is faster and still float32.

    torch takes MKL otherwise. On an AMD processor (Zen 5) oneDNN doubles the speed of training; on
    Intel's own it gains nothing, and sampling is up to a quarter slower.
    """
    if torch.cuda.is_available():
        return
    # By the maker and not by a stopwatch, so that all runs of a machine round alike.
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
    # float32 is off by some 1e-7, bf16 by some 1e-3.
    return bool(error <= 1e-5)


def _is_made_by_amd() -> bool:
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        about = platform.processor()
    return "AuthenticAMD" in about


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that a GPU or the machine is out of memory."""
    # On a CPU torch raises a plain RuntimeError, known by its message alone.
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES):
        return True
    # Imported here: it takes a second, and where memory is short there may be none for it.
    from accelerate.utils.memory import should_reduce_batch_size

    return should_reduce_batch_size(error)


def running_out_is_an_error(device: torch.device) -> bool:
    """Tell whether running out of memory raises an exception.

    It does on a GPU. On a CPU the kernel ends the process or the machine stalls, except under a
    limit such as ``ulimit -v``.
    """
    if device.type != "cpu":
        return True
    if sys.platform == "win32":
        return False
    import resource

    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def keep_freed_memory() -> bool:
    """Let a step on a CPU reuse the memory that the step before has freed.

    glibc returns large blocks to the kernel, which must clear each page when it is taken again:
    a quarter of a step of DALL-E's discrete VAE, a twentieth of a small decoder's. Results stay the
    same. Peak memory was the same for decoders and a third larger for that VAE.

    Returns:
        Whether memory is kept; only glibc offers it.

    Source: mallopt(3).
    """
    if not sys.platform.startswith("linux") or torch.cuda.is_available():
        return False
    # Under a memory limit, fragmented free blocks would fill it.
    if TRIM_VARIABLE in os.environ or running_out_is_an_error(torch.device("cpu")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    kept = mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) or mallopt(M_MMAP_THRESHOLD, GLIBC_2_34_KEPT_BYTES)
    return bool(kept and mallopt(M_TRIM_THRESHOLD, NEVER))


def build_accelerator(mixed_precision: Literal["auto", "no", "bf16"]) -> "Accelerator":
    """Find the device and processes of this run; ``auto`` takes bf16 where it is fast.

    Raises:
        UserError: If the launcher started more processes than found each other, or set what the
            options of a run decide.
    """
    _refuse_leftovers()
    # Imported here: Accelerate takes a second, and one process on a CPU has no use for it.
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    if mixed_precision == "auto":
        mixed_precision = "bf16" if has_fast_bf16() else "no"
    # An earlier run in this process may have had another precision. The process group stays:
    # ending it and starting another one under the same torchrun hangs.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        # Accelerate joins processes without a GPU only when it is told to use the CPU.
        cpu=find_device().type == "cpu",
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


def _refuse_leftovers() -> None:
    for name, harmless in LEFTOVERS.items():
        got = os.environ.get(name)
        if got is not None and got.lower() not in harmless:
            raise UserError(
                f"{name}: got {got} from the environment, expected {harmless[0]}, since the "
                "options of a run decide it; unset it, or use torchrun, not accelerate launch"
            )
