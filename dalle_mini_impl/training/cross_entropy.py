"""The loss of next tokens, in as little memory as it takes."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_nats(
    logits: Float[Tensor, "rows vocab"], token_ids: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """Score true tokens by the logarithm of their softmax: ``F.cross_entropy`` in float32.

    That one holds three tables of logits on its way back; here the gradient is made in the place
    of the one that was kept, which with large vocabularies is a tenth of a training's memory.

    Args:
        logits: Unnormalised, of any float type.
        token_ids: The true ones.

    Returns:
        Negative log-likelihood of each row, in nats, as float32.
    """
    return _TokenNats.apply(logits, token_ids)


class _TokenNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor) -> Tensor:
        log_probs = logits.log_softmax(dim=-1, dtype=torch.float32)
        ctx.save_for_backward(log_probs, token_ids)
        ctx.dtype = logits.dtype
        return -log_probs.gather(1, token_ids[:, None]).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        log_probs, token_ids = ctx.saved_tensors
        # In place of what was kept: torch refuses a second backward pass.
        fractions = log_probs.exp_()
        fractions.scatter_add_(1, token_ids[:, None], fractions.new_full((len(fractions), 1), -1.0))
        return fractions.mul_(gradient[:, None]).to(ctx.dtype), None
