"""DALL-E's own tokenizer: its published weights, as safetensors, in our networks of its shape.

The names are those of the state dicts of ``Encoder`` and ``Decoder`` in github.com/openai/DALL-E.
They were published as pickles of whole modules, which this project does not load: write
``encoder.safetensors`` and ``decoder.safetensors`` from their ``state_dict()`` where you trust
them.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vqvae.config import VQVAEConfig
from vqvae.dalle_networks import BottleneckBlock
from vqvae.model import VQVAE
from vqvae.serialization import own_file

ENCODER_NAME = "encoder.safetensors"
DECODER_NAME = "decoder.safetensors"


def load_openai_dvae(folder: str | Path, *, image_size: int) -> VQVAE:
    """Load DALL-E's tokenizer; its sizes are those of the tensors.

    Args:
        folder: Holds ``encoder.safetensors`` and ``decoder.safetensors``.
        image_size: Side of the images in pixels; 256 as published, but any multiple of 8 serves.

    Returns:
        The tokenizer in evaluation mode.

    Raises:
        ValueError: If a file is missing or damaged, or a tensor is missing, unknown, of another
            shape or not finite.
    """
    folder = Path(folder)
    encoder, decoder = (_read(own_file(folder, name)) for name in (ENCODER_NAME, DECODER_NAME))
    try:
        config = _config_of(encoder, decoder, image_size)
        model = VQVAE(config)
        table, bias = (decoder.pop(f"blocks.input.{name}") for name in "wb")
        weights = {"quantizer.codebook": (table[:, :, 0, 0].T + bias).contiguous()}
        weights |= _renamed(encoder, model.encoder, "encoder", config.num_encoder_blocks)
        weights |= _renamed(decoder, model.decoder, "decoder", config.num_decoder_blocks)
        weights["quantizer.temperature"] = torch.tensor(1.0)
        model.load_state_dict(weights, strict=True)
    except (RuntimeError, IndexError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: not DALL-E's tokenizer: {reason}") from None
    except KeyError as error:
        raise ValueError(f"{folder}: not DALL-E's tokenizer: no tensor {error}") from None
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not loaded: {' '.join(str(error).split())[:300]}") from None
    for name, value in weights.items():
        if not value.is_floating_point() or not torch.isfinite(value).all():
            raise ValueError(f"{path}: tensor {name[:80]}: holds other than finite numbers")
    return {name: value.float() for name, value in weights.items()}


def _config_of(
    encoder: dict[str, Tensor], decoder: dict[str, Tensor], image_size: int
) -> VQVAEConfig:
    width = len(encoder["blocks.input.w"])
    code_dim, codebook_size = decoder["blocks.input.w"].shape[:2]
    num_groups = _count(encoder, "blocks.group_{}.block_1.res_path.conv_1.w")
    encoder_blocks, decoder_blocks = (
        _count(weights, "blocks.group_1.block_{}.res_path.conv_1.w")
        for weights in (encoder, decoder)
    )
    return VQVAEConfig(
        architecture="dalle",
        decoder_output="logit_laplace",
        image_size=image_size,
        patch_size=1,
        channels=tuple(width * 2**group for group in range(num_groups)),
        num_encoder_blocks=encoder_blocks,
        num_decoder_blocks=decoder_blocks,
        quantizer="gumbel",
        vq_codebook_size=codebook_size,
        vq_code_dim=code_dim,
    )


def _count(weights: dict[str, Tensor], pattern: str) -> int:
    number = 1
    while pattern.format(number) in weights:
        number += 1
    return number - 1


def _renamed(
    weights: dict[str, Tensor], network: nn.Module, part: str, num_blocks: int
) -> dict[str, Tensor]:
    """Give the tensors of one network our names; a name of neither side fails the strict load."""
    layers = network.get_submodule("layers")
    blocks = [name for name, each in layers.named_children() if isinstance(each, BottleneckBlock)]
    ours = {}
    for index, name in enumerate(blocks):
        theirs = f"blocks.group_{index // num_blocks + 1}.block_{index % num_blocks + 1}"
        for number in range(1, 5):
            ours[f"{theirs}.res_path.conv_{number}"] = f"layers.{name}.residual.{2 * number - 1}"
        ours[f"{theirs}.id_path"] = f"layers.{name}.skip"
    ours["blocks.input"] = "layers.0"
    last = "output" if part == "encoder" else f"layers.{len(list(layers.children())) - 1}"
    ours["blocks.output.conv"] = last
    found = {}
    for name, value in weights.items():
        module, kind = name.rsplit(".", 1)
        kinds = {"w": "weight", "b": "bias"}
        found[f"{part}.{ours.get(module, module)}.{kinds.get(kind, kind)}"] = value
    return found
