"""An exponential moving average of the weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MovingAverage:
    """Exponential moving average of a model's parameters; buffers are kept as they are."""

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        """Start from the model's current weights.

        Args:
            model: Whose weights are averaged.
            decay: Fraction of the average kept at each update, in [0, 1).
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
