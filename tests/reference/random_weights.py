"""Random weights, so wide that a mistake anywhere moves the results by more than rounding does."""

import torch
from torch import nn


@torch.no_grad()
def randomize(model: nn.Module, *, seed: int = 0, scale: float = 0.3) -> None:
    """Set every weight but scalars; norms vary around one, biases are random as well."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim:
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm_scale = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_norm_scale else scale * noise)
