"""DALL-E's own tokenizer: its published weights, as safetensors, in our networks of its shape.

The names are those of the state dicts of ``Encoder`` and ``Decoder`` in github.com/openai/DALL-E.
They were published as pickles of whole modules, which this project does not load: if you trust
them, write ``encoder.safetensors`` and ``decoder.safetensors`` from their ``state_dict()``.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from vqvae.config import ImageSize, VQVAEConfig
from vqvae.dalle_networks import BottleneckBlock
from vqvae.model import VQVAE
from vqvae.serialization import located, own_file, read_weights

ENCODER_NAME = "encoder.safetensors"
DECODER_NAME = "decoder.safetensors"


def load_openai_dvae(folder: str | Path, *, image_size: ImageSize) -> VQVAE:
    """Load DALL-E's tokenizer in evaluation mode; its sizes are those of the tensors.

    Args:
        folder: Holds ``encoder.safetensors`` and ``decoder.safetensors``.
        image_size: Side of the images in pixels, or (height, width); 256 as published, but any
            multiples of 8 work.

    Raises:
        ValueError: If a file is missing or damaged, or a tensor is missing, unknown, of another
            shape or not finite.
    """
    folder = Path(folder)
    encoder = _read(own_file(folder, ENCODER_NAME))
    decoder = _read(own_file(folder, DECODER_NAME))
    # A hostile tensor may have any shape: slicing, indexing or unpacking it fails in these ways.
    errors = (RuntimeError, IndexError, ValueError)
    with (
        located(f"{folder}: not DALL-E's tokenizer", errors),
        located("no tensor", (KeyError,)),
    ):
        config = _config_of(encoder, decoder, image_size)
        model = VQVAE(config)
        # Their first convolution reads one-hot codes: as a codebook, with the bias in every code.
        table = decoder.pop("blocks.input.w")
        codebook = (table[:, :, 0, 0].T + decoder.pop("blocks.input.b")).contiguous()
        weights = {"quantizer.codebook": codebook, "quantizer.temperature": torch.tensor(1.0)}
        # Strict loading below refuses every tensor that has no place in our networks.
        weights |= _renamed(encoder, model.encoder, "encoder", config.num_encoder_blocks)
        weights |= _renamed(decoder, model.decoder, "decoder", config.num_decoder_blocks)
        model.load_state_dict(weights, strict=True)
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    weights = read_weights(path)
    for name, value in weights.items():
        if not value.is_floating_point():
            raise ValueError(f"{path}: tensor {name[:80]}: got {value.dtype}, expected floats")
    return {name: value.float() for name, value in weights.items()}


def _config_of(
    encoder: dict[str, Tensor], decoder: dict[str, Tensor], image_size: ImageSize
) -> VQVAEConfig:
    # Each group but the last halves the grid and doubles the channels.
    width = len(encoder["blocks.input.w"])
    # A 1 x 1 convolution over one-hot codes: (code_dim, codebook_size, 1, 1).
    code_dim, codebook_size = decoder["blocks.input.w"].shape[:2]
    num_groups = _count(encoder, "blocks.group_{}.block_1.res_path.conv_1.w")
    block = "blocks.group_1.block_{}.res_path.conv_1.w"
    return VQVAEConfig(
        architecture="dalle",
        decoder_output="logit_laplace",
        image_size=image_size,
        patch_size=1,
        channels=tuple(width * 2**group for group in range(num_groups)),
        num_encoder_blocks=_count(encoder, block),
        num_decoder_blocks=_count(decoder, block),
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
    """Return the tensors of one network under our names; unknown names stay and fail the load."""
    layers = network.get_submodule("layers")
    blocks = [name for name, each in layers.named_children() if isinstance(each, BottleneckBlock)]
    ours = {}
    for index, name in enumerate(blocks):
        theirs = f"blocks.group_{index // num_blocks + 1}.block_{index % num_blocks + 1}"
        # A convolution follows each ReLU: 1, 3, 5 and 7 of our residual branch.
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
