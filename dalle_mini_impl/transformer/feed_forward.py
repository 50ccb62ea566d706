"""The position-wise half of a Transformer block: each position is transformed on its own."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class GatedFeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): one projection gates another."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, use_bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=use_bias)
        self.value = nn.Linear(hidden_size, intermediate_size, bias=use_bias)
        self.output = nn.Linear(intermediate_size, hidden_size, bias=use_bias)

    def forward(
        self, hidden_states: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length hidden"]:
        """Compute output(silu(gate) * value)."""
        gate = self.gate(hidden_states)  # (batch, length, intermediate), as value
        value = self.value(hidden_states)
        # A compiler decides by itself what to save for the backward pass, and saves as little.
        if gate.requires_grad and not torch.compiler.is_compiling():
            return self.output(_SiluProduct.apply(gate, value))
        return self.output(F.silu(gate) * value)


class _SiluProduct(torch.autograd.Function):
    """``F.silu(gate) * value``, whose backward pass computes the first factor again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return F.silu(gate) * value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        gate_gradient = torch.ops.aten.silu_backward(gradient * value, gate)
        return gate_gradient, gradient * F.silu(gate)


class FeedForward(nn.Module):
    """Two projections with ReLU or the exact GELU between them."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Literal["relu", "gelu"],
        use_bias: bool,
    ) -> None:
        super().__init__()
        self.activation = F.relu if activation == "relu" else F.gelu
        self.input = nn.Linear(hidden_size, intermediate_size, bias=use_bias)
        self.output = nn.Linear(intermediate_size, hidden_size, bias=use_bias)

    def forward(
        self, hidden_states: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length hidden"]:
        """Compute output(activation(input))."""
        return self.output(self.activation(self.input(hidden_states)))


class ChannelDropout(nn.Module):
    """Dropout of whole channels, at all positions of a sample (Gal & Ghahramani 2016)."""

    # arXiv:1512.05287. As strong a regularizer as dropping single numbers, and far cheaper: one
    # random number per activation took a quarter of a training step on CPUs.

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(
        self, hidden_states: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length hidden"]:
        """Drop channels in training; do nothing in evaluation."""
        if not self.training or self.probability == 0:
            return hidden_states
        mask = torch.ones_like(hidden_states[:, :1])  # (batch, 1, hidden)
        return hidden_states * F.dropout(mask, self.probability)
