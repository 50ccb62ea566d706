"""Weights copied from our modules into torch's own, which know nothing of ours."""

import torch
from torch import nn

from dalle_mini_impl.transformer.attention import MultiHeadAttention
from dalle_mini_impl.transformer.blocks import TransformerBlock


@torch.no_grad()
def randomize(model: nn.Module, *, seed: int = 0, scale: float = 0.3) -> None:
    """Generate every weight so widely that a mistake anywhere moves the results; biases too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm_scale = "norm" in name and name.endswith("weight")
        parameter.copy_(1 + 0.3 * noise if is_norm_scale else scale * noise)


@torch.no_grad()
def copy_block(
    mine: TransformerBlock, theirs: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer
) -> None:
    """Generate new weights for our block and give torch's layer the same."""
    randomize(mine)
    give_block(mine, theirs)


@torch.no_grad()
def give_block(
    mine: TransformerBlock, theirs: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer
) -> None:
    """Give torch's layer the weights of our block."""
    _give_attention(mine.attention, theirs.self_attn)
    norms = [mine.attention_norm, mine.feed_forward_norm]
    if isinstance(theirs, nn.TransformerDecoderLayer):
        _give_attention(mine.cross_attention, theirs.multihead_attn)
        norms.insert(1, mine.cross_attention_norm)
    for number, norm in enumerate(norms, start=1):
        getattr(theirs, f"norm{number}").load_state_dict(norm.state_dict())
    theirs.linear1.load_state_dict(mine.feed_forward.input.state_dict())
    theirs.linear2.load_state_dict(mine.feed_forward.output.state_dict())


def _give_attention(mine: MultiHeadAttention, theirs: nn.MultiheadAttention) -> None:
    parts = (mine.query, mine.key, mine.value)
    theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    theirs.out_proj.load_state_dict(mine.output.state_dict())
