"""Muon with all matrices of one shape in one product, in bf16 where the hardware multiplies it.

``torch.optim.Muon`` takes the matrices one by one, and always in bf16. Where bf16 is emulated that
took longer than the forward and backward pass together, and a GPU spends its time starting
kernels. The update is the same, and so is the state.

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


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised, for hidden matrices only."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take the matrices.

        Args:
            parameters: Matrices.
            lr: Learning rate; updates are scaled to the size of AdamW's.
            weight_decay: Decoupled decay per unit of learning rate.
            momentum: Fraction of the momentum kept at each step.
            dtype: Of the products that orthogonalise; weights and momentum keep their own.
        """
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient.

        Args:
            closure: Not supported.
        """
        del closure
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                ahead = torch.stack(self._momentum(parameters, group["momentum"]))
                updates = orthogonalize(ahead.to(self._dtype)).to(ahead.dtype)
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, updates.unbind(), alpha=-scale)

    def _momentum(self, parameters: list[Tensor], momentum: float) -> list[Tensor]:
        """Update the momentum and look one step ahead of it."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]  # the caller saw to it
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, buffers, momentum))
