"""Weights copied from our modules into torch's own, which know nothing of ours."""

import torch
from torch import nn

from dalle_mini_impl.transformer.attention import MultiHeadAttention
from dalle_mini_impl.transformer.blocks import TransformerBlock
from tests.reference.random_weights import randomize

TheirBlock = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer


@torch.no_grad()
def copy_block(mine: TransformerBlock, theirs: TheirBlock) -> None:
    """Randomize our block and give torch's layer the same weights."""
    randomize(mine)
    give_block(mine, theirs)


@torch.no_grad()
def give_block(mine: TransformerBlock, theirs: TheirBlock) -> None:
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
