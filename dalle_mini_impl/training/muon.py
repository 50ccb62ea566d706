"""Muon in float32, for hardware that does not multiply bf16.

``torch.optim.Muon`` orthogonalises in bf16. Where bf16 is emulated that took longer than the
forward and backward pass together; float32 products of stacked matrices take a tenth of a step.
The update is the same, and so is the state.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the update's
size as in Liu et al. 2025, arXiv:2502.16982, section 2.2.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Coefficients of the quintic iteration in the source: steep at zero, bounded near one.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5


def orthogonalize(
    matrices: Float[Tensor, "count rows columns"],
) -> Float[Tensor, "count rows columns"]:
    """Move all singular values of each matrix towards one (Newton-Schulz).

    Args:
        matrices: Any matrices of one shape.

    Returns:
        Matrices with the same singular vectors and singular values of roughly 0.7 to 1.2.
    """
    linear, cubic, quintic = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    current = matrices.mT if is_tall else matrices
    current = current / current.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = current @ current.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        current = torch.baddbmm(current, polynomial, current, beta=linear)
    return current.mT if is_tall else current


class Float32Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised, for hidden matrices only."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        """Take the matrices.

        Args:
            parameters: Matrices.
            lr: Learning rate; updates are scaled to the size of AdamW's.
            weight_decay: Decoupled decay per unit of learning rate.
            momentum: Share of the momentum kept at each step.
        """
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient.

        Args:
            closure: Not supported.
        """
        del closure
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = orthogonalize(
                    torch.stack([self._momentum(p, group["momentum"]) for p in parameters])
                )
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Update the momentum and look one step ahead of it."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient, buffer = parameter.grad, state["momentum_buffer"]
        assert gradient is not None  # the caller passes over the others
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)
