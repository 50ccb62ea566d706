"""Random weights, so wide that a mistake anywhere moves the results by more than rounding does."""

import torch
from torch import Tensor, nn


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_pixels(count: int = 3, size: int = 16, *, seed: int = 0) -> Tensor:
    """Images of uniform numbers in [-1, 1], the same each time."""
    shape, generator = (count, 3, size, size), torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * 2 - 1


@torch.no_grad()
def randomize(model: nn.Module, *, seed: int = 0, scale: float = 0.3) -> None:
    """Set every weight but scalars; norms vary around one, biases are random as well."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim:
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm_scale = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_norm_scale else scale * noise)
