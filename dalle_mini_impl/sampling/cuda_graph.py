"""Captured GPU steps: one step is recorded as a CUDA graph and replayed for all the others.

A step of a small decoder is a few hundred kernels of a few microseconds each; launching them from
Python takes several times as long as running them.

Source: CUDA graphs in torch, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from collections.abc import Callable

import torch

NUM_WARM_UP_STEPS = 2  # before the capture: libraries reserve their memory at first use


def run_cuda_graph(step: Callable[[], None], num_steps: int) -> None:
    """Call ``step`` that many times, most of them without Python.

    The step must read and write the same tensors each time and may not look at their values.
    """
    # Warm up on another stream, as torch requires before a capture.
    num_eager = min(NUM_WARM_UP_STEPS, num_steps)
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(num_eager):
            step()
    torch.cuda.current_stream().wait_stream(side_stream)
    if num_eager == num_steps:
        return
    # Kernels read and write the same addresses at every replay, whatever the tensors hold by then.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()  # recorded, not run
    for _ in range(num_steps - num_eager):
        graph.replay()
