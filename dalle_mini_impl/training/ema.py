"""An exponential moving average of the weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MovingAverage:
    """Exponential moving average of a model's parameters; buffers are copied as they are.

    An update keeps the fraction ``decay``, in [0, 1), of the average.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, *, step: int) -> None:
        """Move towards the model's weights; ``step`` counts updates."""
        # The first updates move faster, or the initial weights would linger in the average.
        decay = min(self.decay, (1 + step) / (10 + step))
        # One fused kernel for all parameters; buffers (counters, codebooks) have no mean.
        current = model.state_dict()
        names = [name for name, _ in model.named_parameters()]
        averaged_parameters = [self.weights[name] for name in names]
        torch._foreach_lerp_(averaged_parameters, [current[name] for name in names], 1 - decay)
        for name in current.keys() - names:
            self.weights[name].copy_(current[name])

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue with saved weights; a missing one is a KeyError."""
        for name, value in self.weights.items():
            value.copy_(weights[name])

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the averaged and the model's weights, in place; a second call undoes it."""
        # One tensor at a time: a whole second copy of the weights need not fit into memory.
        for name, value in model.state_dict().items():
            kept = value.clone()
            value.copy_(self.weights[name])
            self.weights[name].copy_(kept)
