"""Tiny image tokenizers of every kind, in folders as their own libraries write them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from tests.reference import openai_dvae
from vqvae import VQVAE, VQVAEConfig

SIZE = 16
FOREIGN = ("janus", "emu3", "diffusers")


def library_model(kind: str) -> Any:
    """The library's own class, as small as its 32 groups of channels let it be."""
    import transformers

    sizes = {"embed_dim": 4, "base_channels": 32, "channel_multiplier": [1, 1, 1]}
    if kind == "janus":
        janus = transformers.JanusVQVAEConfig(
            **sizes, num_embeddings=24, latent_channels=6, num_res_blocks=1, num_patches=SIZE // 4
        )
        return transformers.JanusVQVAE(janus)
    if kind == "emu3":
        sizes |= {"codebook_size": 24, "latent_channels": 4, "hidden_size": 32}
        emu3 = transformers.Emu3VQVAEConfig(
            **sizes, temporal_downsample_factor=2, num_res_blocks=1, attn_resolutions=[2]
        )
        return transformers.Emu3VQVAE(emu3)
    diffusers = pytest.importorskip("diffusers")
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        latent_channels=4,
        num_vq_embeddings=24,
        norm_num_groups=4,
        vq_embed_dim=3,
    )


def scatter(model: nn.Module) -> nn.Module:
    """Random weights, wide enough for tokens to differ; running statistics too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if weight.is_floating_point():
                noise = torch.randn(weight.shape, generator=generator)
                if weight.ndim > 1 and "embedding" not in name:
                    noise = 1.5 * noise / weight[0].numel() ** 0.5
                is_positive = name.endswith(("norm.weight", "running_var"))
                weight.copy_(1 + 0.1 * noise.abs() if is_positive else noise)
    return model


def source_folder(kind: str, folder: Path) -> Path:
    """A folder as its own library would write it."""
    torch.manual_seed(0)
    if kind in FOREIGN:
        scatter(library_model(kind)).save_pretrained(folder)  # type: ignore[operator]
    elif kind == "openai":
        sizes = {"width": 8, "num_blocks": 1, "codebook_size": 24, "code_dim": 5}
        encoder, decoder = openai_dvae.random_weights(**sizes)
        folder.mkdir()
        save_file(encoder, folder / "encoder.safetensors")
        save_file(decoder, folder / "decoder.safetensors")
    else:
        dalle = {"architecture": "dalle", "decoder_output": "logit_laplace", "patch_size": 1}
        changes: dict[str, dict[str, Any]] = {
            "ours": {"channels": (16,), "encoder_kernel_size": 3},
            "vq": {"channels": (16,), "quantizer": "vq"},
            "dalle": {**dalle, "channels": (8, 8, 16), "quantizer": "gumbel"},
        }
        config = VQVAEConfig(image_size=SIZE, vq_codebook_size=24, **changes[kind])
        model = VQVAE(config)
        scatter(model)
        if kind == "vq":  # its codes have length 1
            model.quantizer.codebook.copy_(F.normalize(model.quantizer.codebook))
        model.save_pretrained(folder)
    return folder
