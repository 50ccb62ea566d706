"""Memory that a step frees serves the next step."""

import platform
import statistics
import sys
from pathlib import Path

import pytest
import torch

from tests.reference.commands import run_python

COUNT_FAULTS = """
import resource, torch
from dalle_mini_impl.hardware import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
weight = torch.ones(64, 1, 1, requires_grad=True)
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    (torch.ones(4, 64, 256, 256) * weight).square().mean().backward()  # blocks of 64 MiB
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def median_faults(*, keep: bool) -> float:
    """Pages that the kernel cleared in a step, once there is memory to take again."""
    done = run_python("-c", COUNT_FAULTS.format(keep=keep))
    assert done.returncode == 0, done.stderr
    return statistics.median(int(line) for line in done.stdout.split()[4:])


only_where_it_keeps = pytest.mark.skipif(
    not sys.platform.startswith("linux")
    or platform.libc_ver()[0] != "glibc"
    or torch.cuda.is_available(),
    reason="only on CPUs, and only glibc can be told",
)


@only_where_it_keeps
def test_freed_memory_is_reused() -> None:
    if tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35):
        pytest.skip("keeps no blocks as large as those here")
    large_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if large_pages.is_file() and "[always]" in large_pages.read_text():
        pytest.skip("pages are so large that few are cleared")
    assert 50 * median_faults(keep=True) < median_faults(keep=False)


@only_where_it_keeps
@pytest.mark.parametrize(
    "choice",
    [
        "os.environ['MALLOC_TRIM_THRESHOLD_'] = '131072'",
        "resource.setrlimit(resource.RLIMIT_AS, (2**42, 2**42))",
    ],
)
def test_limit_or_users_choice_comes_first(choice: str) -> None:
    code = f"""
import os, resource
from dalle_mini_impl.hardware import keep_freed_memory
assert keep_freed_memory()
{choice}
assert not keep_freed_memory()
"""
    assert run_python("-c", code).returncode == 0
