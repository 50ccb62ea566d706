"""Collectives that do nothing in a single process."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

MAX_GATHERED_ROWS = 16384


def process_count() -> int:
    """Return the number of processes in training: 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of all processes' tensors, the same on each; `values` may be overwritten."""
    if process_count() > 1:
        dist.all_reduce(values)
    return values


def broadcast_first(values: Tensor) -> Tensor:
    """Return the tensor of process 0 on every process; `values` may be overwritten."""
    if process_count() > 1:
        values = values.contiguous()
        dist.broadcast(values, src=0)
    return values


def gather_rows(
    rows: Float[Tensor, "count width"], *, generator: torch.Generator | None = None
) -> Float[Tensor, "gathered width"]:
    """Gather a random sample of the rows of all processes, at most `MAX_GATHERED_ROWS`.

    Processes may have different numbers of rows; all return the same sample.
    """
    processes = process_count()
    # `all_gather` takes equal shapes, so the process with the fewest rows decides.
    shortest = torch.tensor(len(rows), device=rows.device)
    if processes > 1:
        dist.all_reduce(shortest, op=dist.ReduceOp.MIN)
    count = min(int(shortest), MAX_GATHERED_ROWS // processes)
    device = rows.device if generator is None else generator.device
    order = torch.randperm(len(rows), generator=generator, device=device)
    chosen = rows[order[:count].to(rows.device)].contiguous()
    if processes == 1:
        return chosen
    gathered = [torch.empty_like(chosen) for _ in range(processes)]
    dist.all_gather(gathered, chosen)
    return torch.cat(gathered)
