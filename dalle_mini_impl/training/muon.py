"""Muon with all matrices of one shape in one product, in bf16 where the hardware multiplies it.

``torch.optim.Muon`` updates the matrices one by one, and always in bf16: slower than the forward
and backward pass together where bf16 is emulated, and on a GPU mostly kernel launches. The update
and the state are the same.

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
MOMENTUM = 0.95


def orthogonalize(
    matrices: Float[Tensor, "count rows columns"],
) -> Float[Tensor, "count rows columns"]:
    """Move all singular values of each matrix towards one (Newton-Schulz), to roughly 0.7 to 1.2.

    The singular vectors stay.
    """
    linear, cubic, quintic = COEFFICIENTS
    # The smaller side gives the smaller Gram matrix; U and V trade places in a transpose.
    is_tall = matrices.shape[1] > matrices.shape[2]
    current = matrices.mT if is_tall else matrices
    # The Frobenius norm bounds the largest singular value: all lie in [0, 1], where the iteration
    # converges.
    current = current / current.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(NUM_ITERATIONS):
        # X <- a X + (b A + c A A) X with A = X X^T, which maps each singular value s to
        # a s + b s^3 + c s^5.
        gram = current @ current.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        current = torch.baddbmm(current, polynomial, current, beta=linear)
    return current.mT if is_tall else current


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalized, for hidden matrices only.

    A convolution's kernel is a matrix of its output channels and all that one of them reads.
    Updates have the size of AdamW's. ``dtype`` is that of the products that orthogonalize; weights
    and momentum keep their own.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient; a closure is not supported."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                momenta = torch.stack(self._nesterov(parameters))
                matrices = momenta.flatten(2)  # (count, rows, columns)
                updates = orthogonalize(matrices.to(self._dtype)).to(momenta.dtype)
                updates = updates.view_as(momenta)
                # An orthogonal update has RMS 1 / sqrt(max(shape)), AdamW's about 0.2 (Liu et al.).
                scale = group["lr"] * 0.2 * max(shape[0], shape[1:].numel()) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, updates.unbind(), alpha=-scale)

    def _nesterov(self, parameters: list[Tensor]) -> list[Tensor]:
        """Update the momentum, then look one step ahead of it."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]  # none is, for mypy
        torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
        return list(torch._foreach_lerp(gradients, buffers, MOMENTUM))
