"""One of two processes that train a VectorQuantizer; run by its test as a script.

Arguments: rank, and a folder for the rendezvous file and the results.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from vqvae.quantizers import VectorQuantizer
from vqvae.quantizers.distributed import gather_rows

CODEBOOK_SIZE, CODE_DIM, STEPS, BATCH = 16, 4, 4, 6


def whole_batch(step: int) -> Tensor:
    """The latents of all processes at one step."""
    generator = torch.Generator().manual_seed(100 + step)
    latents = torch.randn(BATCH, CODE_DIM, 4, 4, generator=generator)
    latents[:, step % CODE_DIM] += 4  # another corner at each step leaves old codes to die
    return latents


def moving_averages_only(part: slice) -> VectorQuantizer:
    """Train on a part of each batch from a given codebook, without k-means or restarts."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codebook_size=CODEBOOK_SIZE, code_dim=CODE_DIM)
    quantizer.ema_counts.fill_(1.0)
    quantizer.ema_sums.copy_(quantizer.codebook)
    quantizer.is_initialized.fill_(True)
    quantizer.freeze_restarts = True
    for step in range(STEPS):
        quantizer(whole_batch(step)[part])
    return quantizer


def everything(part: slice) -> VectorQuantizer:
    """Train with k-means start and restarts; start and noise differ between processes."""
    torch.manual_seed(part.start)
    generator = torch.Generator().manual_seed(10 + part.start)
    quantizer = VectorQuantizer(codebook_size=CODEBOOK_SIZE, code_dim=CODE_DIM)
    quantizer.ema_decay, quantizer.dead_code_threshold = 0.05, 100.0
    for step in range(STEPS):
        quantizer(whole_batch(step)[part], generator=generator)
    return quantizer


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    results = {
        "world_size": torch.tensor(dist.get_world_size()),
        "gathered": gather_rows(torch.full((3 + rank, 2), float(rank))),
    }
    for name, train in (("averages", moving_averages_only), ("everything", everything)):
        for key, tensor in train(slice(rank, None, 2)).state_dict().items():
            results[f"{name}.{key}"] = tensor
    save_file(results, folder / f"rank-{rank}.safetensors")
    dist.destroy_process_group()
