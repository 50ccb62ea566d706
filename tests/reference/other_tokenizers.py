"""Tiny image tokenizers of every kind, in folders as their own makers write them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.reference import openai_dvae
from vqvae import VQVAE, VQVAEConfig

SIZE = 16
FOREIGN = ("janus", "emu3", "diffusers")


def library_model(kind: str) -> Any:
    """The library's own class, as small as its 32 groups of channels let it be."""
    if kind == "janus":
        from transformers import JanusVQVAE, JanusVQVAEConfig

        janus = JanusVQVAEConfig(
            embed_dim=4, num_embeddings=24, latent_channels=6, base_channels=32,
            channel_multiplier=[1, 1, 1], num_res_blocks=1, num_patches=SIZE // 4,
        )  # fmt: skip
        return JanusVQVAE(janus)
    if kind == "emu3":
        from transformers import Emu3VQVAE, Emu3VQVAEConfig

        emu3 = Emu3VQVAEConfig(
            codebook_size=24, embed_dim=4, latent_channels=4, temporal_downsample_factor=2,
            base_channels=32, channel_multiplier=[1, 1, 1], num_res_blocks=1,
            attn_resolutions=[2], hidden_size=32,
        )  # fmt: skip
        return Emu3VQVAE(emu3)
    diffusers = pytest.importorskip("diffusers")
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), latent_channels=4, num_vq_embeddings=24, norm_num_groups=4,
        vq_embed_dim=3,
    )  # fmt: skip


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
    """A folder as its makers would write it."""
    torch.manual_seed(0)
    if kind in FOREIGN:
        scatter(library_model(kind)).save_pretrained(folder)  # type: ignore[operator]
    elif kind == "openai":
        encoder, decoder = openai_dvae.random_weights(
            width=8, num_blocks=1, codebook_size=24, code_dim=5
        )
        folder.mkdir()
        save_file(encoder, folder / "encoder.safetensors")
        save_file(decoder, folder / "decoder.safetensors")
    else:
        model = VQVAE(
            VQVAEConfig(image_size=SIZE, patch_size=4, channels=(16,), encoder_kernel_size=3)
            if kind == "ours"
            else VQVAEConfig(
                image_size=SIZE, patch_size=1, channels=(8, 8, 16), quantizer="gumbel",
                vq_codebook_size=24, architecture="dalle", decoder_output="logit_laplace",
            )
        )  # fmt: skip
        scatter(model).save_pretrained(folder)  # type: ignore[operator]
    return folder
