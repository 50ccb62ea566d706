"""Optimizers, and the moving average of the weights."""

from collections.abc import Mapping
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


class MovingAverage:
    """Exponential moving average of a model's parameters; buffers are kept as they are."""

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        """Start from the model's current weights.

        Args:
            model: Whose weights are averaged.
            decay: Share of the average kept at each update, in [0, 1).
        """
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in _averaged(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, *, step: int) -> None:
        """Move towards the model's weights; the first updates move faster.

        Args:
            model: The trained model.
            step: Optimizer updates done so far.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        now, parameters = _averaged(model), dict(model.named_parameters())
        others = now.keys() - parameters.keys()
        own, theirs = ([each[name] for name in parameters] for each in (self.weights, now))
        torch._foreach_lerp_(own, theirs, 1 - decay)
        for name in others:
            self.weights[name].copy_(now[name])

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue with weights that were saved.

        Args:
            weights: ``weights`` of an average of the same model.

        Raises:
            KeyError: If one is missing.
        """
        for name, value in self.weights.items():
            value.copy_(weights[name])

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the averaged and the model's weights, in place; a second call undoes it.

        Args:
            model: The trained model.
        """
        for name, value in _averaged(model).items():
            kept = value.clone()
            value.copy_(self.weights[name])
            self.weights[name].copy_(kept)


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())
