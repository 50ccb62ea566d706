"""LlamaGen's image tokenizers, VQ-16 and VQ-8 (Sun et al. 2024, arXiv:2406.06525), and GEAR's VQ.

The names are those of ``VQModel`` in github.com/FoundationVision/LlamaGen. Janus took this network
over: under other names, transformers' ``JanusVQVAE`` has the same layers. Its quantizer differs in
one thing. LlamaGen compares the directions of latents and codes; ``JanusVQVAE`` takes the nearest
code as it is stored. With codes of length 1 both choose the same, whatever a latent's length is.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae.pretrained.adapters import JanusSizes
from vqvae.serialization import located, shown

ENCODER_INPUT = "encoder.conv_in.weight"
CODES = "quantize.embedding.weight"
STAGE = "encoder.conv_blocks.{}.res.0.conv1.weight"
BLOCK = "encoder.conv_blocks.0.res.{}.conv1.weight"
TENSORS_OF_BLOCK = 8  # at least: two normalizations and two convolutions
# Recently used tokens, a statistic of training.
UNUSED = "quantize.codebook_used"
# Parts of JanusVQVAE's names, and of LlamaGen's.
RENAMED = (
    (".down.", ".conv_blocks."),
    (".up.", ".conv_blocks."),
    (".block.", ".res."),
    (".mid.block_1.", ".mid.0."),
    (".mid.attn_1.", ".mid.1."),
    (".mid.block_2.", ".mid.2."),
)


def is_llamagen(names: Iterable[str]) -> bool:
    """Recognize the state dict of LlamaGen's tokenizer by its names."""
    return STAGE.format(0) in {_plain(name) for name in names}


def convert_llamagen(weights: Mapping[str, Tensor]) -> tuple[JanusSizes, dict[str, Tensor]]:
    """Rename the tensors of LlamaGen's tokenizer to those of ``JanusVQVAE``, in float32.

    Raises:
        ValueError: If a tensor is missing, unknown, not of floats or of another shape.
    """
    found = {_plain(name): value for name, value in weights.items() if _plain(name) != UNUSED}
    with located("no tensor", (KeyError,)), located("tensors of odd shapes", (IndexError,)):
        sizes = _sizes_of(found)
    with torch.device("meta"):  # names and shapes alone
        expected = sizes.build((1, 1)).state_dict()
    ours = {_their_name(name): name for name in expected}
    for name in sorted(found.keys() | ours.keys()):
        got = tuple(found[name].shape) if name in found else "none"
        want = tuple(expected[ours[name]].shape) if name in ours else "none"
        if got != want:
            raise ValueError(f"tensor {shown(name)}: got {got}, expected {want}")
        if not found[name].is_floating_point():
            raise ValueError(f"tensor {shown(name)}: got {found[name].dtype}, expected floats")
    converted = {ours[name]: value.detach().float() for name, value in found.items()}
    converted[CODES] = F.normalize(converted[CODES], dim=-1)
    return sizes, {name: value.contiguous() for name, value in converted.items()}


def _sizes_of(weights: Mapping[str, Tensor]) -> JanusSizes:
    base_channels = weights[ENCODER_INPUT].shape[0]
    stages = [weights[STAGE.format(stage)].shape[0] for stage in range(_count(weights, STAGE))]
    num_blocks = _count(weights, BLOCK)
    # Before anything is built: some thousand names could ask for millions of layers.
    if TENSORS_OF_BLOCK * len(stages) * num_blocks > len(weights):
        raise ValueError(
            f"got {len(weights)} tensors, expected more for {len(stages)} stages of "
            f"{num_blocks} blocks"
        )
    num_embeddings, embed_dim = weights[CODES].shape[0], weights[CODES].shape[1]
    return JanusSizes(
        embed_dim=embed_dim,
        num_embeddings=num_embeddings,
        latent_channels=weights["encoder.conv_out.weight"].shape[0],
        base_channels=base_channels,
        channel_multiplier=tuple(channels // max(1, base_channels) for channels in stages),
        num_res_blocks=num_blocks,
    )


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    number = 0
    while pattern.format(number) in weights:
        number += 1
    return number


def _their_name(name: str) -> str:
    for ours, theirs in RENAMED:
        name = name.replace(ours, theirs)
    return name


def _plain(name: str) -> str:
    return name.removeprefix("_orig_mod.")  # of torch.compile
