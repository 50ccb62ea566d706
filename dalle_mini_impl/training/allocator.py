"""How much of what a training step has freed stays with the process, for the next step."""

import ctypes
import os
import sys

import torch

from dalle_mini_impl.training.batch_size import running_out_is_an_error

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# Tensors of a step are hundreds of MiB at most; what is larger still goes back when it is freed.
KEPT_BYTES = 2**30
OLDER_KEPT_BYTES = 2**25  # the most that glibc before 2.35 takes
NEVER = -1
OWN_CHOICE = "MALLOC_TRIM_THRESHOLD_"  # glibc's variable: whoever sets it decides


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
