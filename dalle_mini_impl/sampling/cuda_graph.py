"""Generation on a GPU: one step is recorded as a CUDA graph and replayed for all the others.

A step of a small decoder is a few hundred kernels of a few microseconds each; starting them from
Python takes several times as long as running them.
"""

import torch

from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.sampling.sampler import Sampler
from dalle_mini_impl.transformer.key_value_cache import KeyValueCache

NUM_WARM_UP_STEPS = 2  # run before the recording: libraries reserve their memory at first use


def run_cuda_graph(model: TextToImageModel, sampler: Sampler, cache: KeyValueCache) -> None:
    """Choose every token but the first.

    Args:
        model: On a GPU, in evaluation mode.
        sampler: Holds the first token of each image; completed in place.
        cache: Holds the captions.

    Source: CUDA graphs in torch, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
    """
    step = torch.ones(1, dtype=torch.long, device=sampler.seeds.device)
    num_rows = cache.keys.shape[1]

    def advance() -> None:
        last = sampler.for_each_row(sampler.tokens.index_select(1, step - 1))
        logits = model.decode_window(last, cache, first_steps=(step - 1).expand(num_rows))
        sampler.sample_and_record(logits[:, 0], step)
        step.add_(1)

    num_eager = min(NUM_WARM_UP_STEPS, sampler.num_steps - 1)
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(num_eager):
            advance()
    torch.cuda.current_stream().wait_stream(side_stream)
    num_graph_steps = sampler.num_steps - 1 - num_eager
    if num_graph_steps == 0:
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance()  # recorded, not run
    for _ in range(num_graph_steps):
        graph.replay()
