"""The position-wise half of a Transformer block."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class GatedFeedForward(nn.Module):
    """SwiGLU: one projection gates another."""

    def __init__(self, *, hidden_size: int, intermediate_size: int, use_bias: bool = False) -> None:
        """Build the three projections.

        Args:
            hidden_size: Width of the residual stream.
            intermediate_size: Width between the projections.
            use_bias: Give the projections a bias.
        """
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=use_bias)
        self.value = nn.Linear(hidden_size, intermediate_size, bias=use_bias)
        self.output = nn.Linear(intermediate_size, hidden_size, bias=use_bias)

    def forward(
        self, hidden_states: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length hidden"]:
        """Transform each position on its own."""
        gate, value = self.gate(hidden_states), self.value(hidden_states)
        if gate.requires_grad and not torch.compiler.is_compiling():  # which saves as little
            return self.output(_Gated.apply(gate, value))
        return self.output(F.silu(gate) * value)


class _Gated(torch.autograd.Function):
    """``F.silu(gate) * value``, whose backward pass computes the first factor again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return F.silu(gate) * value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradient * value, gate)
        return of_gate, gradient * F.silu(gate)


class FeedForward(nn.Module):
    """Two projections with a nonlinearity between them."""

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        activation: Literal["relu", "gelu"],
        use_bias: bool,
    ) -> None:
        """Build the two projections.

        Args:
            hidden_size: Width of the residual stream.
            intermediate_size: Width between the projections.
            activation: The nonlinearity; GELU is the exact one.
            use_bias: Give the projections a bias.
        """
        super().__init__()
        self.activation = F.relu if activation == "relu" else F.gelu
        self.input = nn.Linear(hidden_size, intermediate_size, bias=use_bias)
        self.output = nn.Linear(intermediate_size, hidden_size, bias=use_bias)

    def forward(
        self, hidden_states: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length hidden"]:
        """Transform each position on its own."""
        return self.output(self.activation(self.input(hidden_states)))


class ChannelDropout(nn.Module):
    """Dropout that hides a channel of a sample at all positions at once.

    As strong a regulariser as hiding single numbers (Gal & Ghahramani 2016, arXiv:1512.05287) and
    far cheaper: generating one random number per activation took a quarter of a training step on CPUs.
    """

    def __init__(self, probability: float) -> None:
        """Remember the share.

        Args:
            probability: Fraction of channels hidden in training, in [0, 1).
        """
        super().__init__()
        self.probability = probability

    def forward(
        self, hidden_states: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length hidden"]:
        """Hide channels in training; do nothing in evaluation."""
        if not self.training or self.probability == 0:
            return hidden_states
        mask = torch.ones_like(hidden_states[:, :1])
        return hidden_states * F.dropout(mask, self.probability)
