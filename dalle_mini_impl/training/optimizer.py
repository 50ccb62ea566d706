"""Optimizers, and the moving average of the weights."""

from typing import Literal

import torch
from torch import Tensor, nn

from dalle_mini_impl.hardware import has_fast_bf16
from dalle_mini_impl.training.muon import Muon


def build_optimizers(
    model: nn.Module,
    *,
    kind: Literal["adamw", "muon"],
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> list[torch.optim.Optimizer]:
    """Build AdamW for all weights, or Muon for the hidden matrices and AdamW for the rest.

    Only matrices decay: biases, norm scales and token tables do not.

    Args:
        model: Its trainable parameters are optimized.
        kind: ``adamw`` (Loshchilov & Hutter 2019, arXiv:1711.05101) or ``muon`` (Jordan et al.
            2024), whose update is scaled to the size of AdamW's (Liu et al. 2025,
            arXiv:2502.16982), so that one learning rate serves both.
        learning_rate: Base rate, before the schedule.
        weight_decay: Decoupled decay per unit of learning rate.
        betas: Decay of AdamW's two moments.

    Returns:
        One or two optimizers; each group holds its base rate as ``initial_lr``.
    """
    matrix_ids = {
        id(module.weight): not name.endswith("head")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    hidden, matrices, vectors = [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) not in matrix_ids:
            vectors.append(parameter)
        elif kind == "muon" and parameter.ndim == 2 and matrix_ids[id(parameter)]:
            hidden.append(parameter)
        else:
            matrices.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, betas=betas, fused=True
    )
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if hidden:
        dtype = torch.bfloat16 if has_fast_bf16() else torch.float32
        muon = Muon(hidden, lr=learning_rate, weight_decay=weight_decay, dtype=dtype)
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = learning_rate
    return optimizers


def keep_memory_formats(optimizer: torch.optim.Optimizer) -> None:
    """Lay an optimizer's restored state out in memory like its parameters.

    Fused AdamW on a CPU walks through parameter and moments side by side in memory, whatever
    their strides: moments read from a file must be in the parameter's order, for example
    channels-last.

    Args:
        optimizer: Its state is changed in place.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
