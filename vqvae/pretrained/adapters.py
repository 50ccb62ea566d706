"""The tokenizers of other libraries: which sizes they have, how they are built and called.

Only the fields listed here are read of a library's config, each of its own type. Whatever else
stands there, such as the name of code to run, never reaches the library.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqvae.serialization import build_config, shown

DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")


@dataclass(frozen=True, kw_only=True)
class JanusSizes:
    """Sizes of ``transformers.JanusVQVAE`` (Chen et al. 2025, arXiv:2501.17811)."""

    marker = ("model_type", "janus_vqgan")
    weights_name = "model.safetensors"

    embed_dim: int
    num_embeddings: int
    latent_channels: int
    base_channels: int
    channel_multiplier: tuple[int, ...]
    num_res_blocks: int

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        _require_positive(self)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What the library means by fields that a config leaves out."""
        from transformers import JanusVQVAEConfig

        return JanusVQVAEConfig().to_dict()

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.num_embeddings

    @property
    def downsampling(self) -> int:
        """Pixels per token along one side."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def counts(self) -> dict[str, int]:
        """Fields with the least number of tensors that each stands for."""
        return {
            "num_res_blocks": self.num_res_blocks,
            "channel_multiplier": len(self.channel_multiplier),
        }

    @property
    def lengths(self) -> dict[str, int]:
        """Fields with a length that some tensor reaches."""
        return {
            "num_embeddings": self.num_embeddings,
            "embed_dim": self.embed_dim,
            "latent_channels": self.latent_channels,
            "base_channels": self.base_channels * max(self.channel_multiplier),
        }

    def build(self, image_size: int) -> nn.Module:
        """Build the model with fresh weights, for images of this size."""
        from transformers import JanusVQVAE, JanusVQVAEConfig

        values = dataclasses.asdict(self)
        return JanusVQVAE(JanusVQVAEConfig(**values, num_patches=image_size // self.downsampling))

    def encode(self, model: Any, pixels: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b gh gw"]:
        """Images to tokens."""
        height, width = (side // self.downsampling for side in pixels.shape[-2:])
        return model.encode(pixels).image_tokens.reshape(len(pixels), height, width)

    def decode(self, model: Any, token_ids: Int[Tensor, "b gh gw"]) -> Float[Tensor, "b 3 h w"]:
        """Tokens to images."""
        return model.decode(token_ids.flatten(1))


@dataclass(frozen=True, kw_only=True)
class Emu3Sizes:
    """Sizes of ``transformers.Emu3VQVAE`` (Wang et al. 2024, arXiv:2409.18869), for images."""

    marker = ("model_type", "emu3_vqgan")
    weights_name = "model.safetensors"

    codebook_size: int
    embed_dim: int
    latent_channels: int
    temporal_downsample_factor: int
    base_channels: int
    channel_multiplier: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    hidden_size: int
    num_attention_heads: int

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        _require_positive(self, except_for=("attn_resolutions",))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What the library means by fields that a config leaves out."""
        from transformers import Emu3VQVAEConfig

        return Emu3VQVAEConfig().to_dict()

    @property
    def downsampling(self) -> int:
        """Pixels per token along one side."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def counts(self) -> dict[str, int]:
        """Fields with the least number of tensors that each stands for."""
        return {
            "num_res_blocks": self.num_res_blocks,
            "channel_multiplier": len(self.channel_multiplier),
            "temporal_downsample_factor": int(math.log2(self.temporal_downsample_factor)),
        }

    @property
    def lengths(self) -> dict[str, int]:
        """Fields with a length that some tensor reaches."""
        return {
            "codebook_size": self.codebook_size,
            "embed_dim": self.embed_dim,
            "latent_channels": self.latent_channels,
            "base_channels": self.base_channels * max(self.channel_multiplier),
            "hidden_size": self.hidden_size,
        }

    def build(self, image_size: int) -> nn.Module:
        """Build the model with fresh weights; it takes images of any size."""
        from transformers import Emu3VQVAE, Emu3VQVAEConfig

        del image_size
        return Emu3VQVAE(Emu3VQVAEConfig(**dataclasses.asdict(self)))

    def encode(self, model: Any, pixels: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b gh gw"]:
        """Images to tokens."""
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels)).reshape(-1, 2)
        return torch.stack(model.encode(pixels, sizes).image_tokens)

    def decode(self, model: Any, token_ids: Int[Tensor, "b gh gw"]) -> Float[Tensor, "b 3 h w"]:
        """Tokens to images: the first of the frames that the model makes of them."""
        return model.decode(token_ids)


@dataclass(frozen=True, kw_only=True)
class DiffusersSizes:
    """Sizes of ``diffusers.VQModel`` (Esser et al. 2021, arXiv:2012.09841)."""

    marker = ("_class_name", "VQModel")
    weights_name = "diffusion_pytorch_model.safetensors"

    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    act_fn: str
    latent_channels: int
    num_vq_embeddings: int
    norm_num_groups: int
    vq_embed_dim: int
    norm_type: Literal["group", "spatial"]
    mid_block_add_attention: bool

    def __post_init__(self) -> None:
        """Refuse sizes below 1 and layers that a tokenizer cannot have."""
        _require_positive(self)
        for name, expected in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            got = getattr(self, name)
            if len(got) != len(self.block_out_channels) or set(got) - set(expected):
                raise ValueError(
                    f"{name}: got {shown(got)}, expected {len(self.block_out_channels)} of "
                    f"{', '.join(expected)}"
                )
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(
                f"act_fn: got {shown(self.act_fn)}, expected one of {', '.join(ACTIVATIONS)}"
            )

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What the library means by fields that a config leaves out."""
        parameters = inspect.signature(_vq_model().__init__).parameters.values()
        return {each.name: each.default for each in parameters}

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.num_vq_embeddings

    @property
    def downsampling(self) -> int:
        """Pixels per token along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def counts(self) -> dict[str, int]:
        """Fields with the least number of tensors that each stands for."""
        return {
            "layers_per_block": self.layers_per_block,
            "block_out_channels": len(self.block_out_channels),
        }

    @property
    def lengths(self) -> dict[str, int]:
        """Fields with a length that some tensor reaches."""
        return {
            "num_vq_embeddings": self.num_vq_embeddings,
            "vq_embed_dim": self.vq_embed_dim,
            "latent_channels": self.latent_channels,
            "block_out_channels": max(self.block_out_channels),
        }

    def build(self, image_size: int) -> nn.Module:
        """Build the model with fresh weights; it takes images of any size."""
        del image_size
        return _vq_model()(**dataclasses.asdict(self), lookup_from_codebook=True)

    def encode(self, model: Any, pixels: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b gh gw"]:
        """Images to tokens."""
        latents = model.encode(pixels).latents
        token_ids = model.quantize(latents)[2][2]
        return token_ids.reshape(len(latents), *latents.shape[-2:])

    def decode(self, model: Any, token_ids: Int[Tensor, "b gh gw"]) -> Float[Tensor, "b 3 h w"]:
        """Tokens to images."""
        shape = (*token_ids.shape, self.vq_embed_dim)
        return model.decode(token_ids.flatten(), force_not_quantize=True, shape=shape).sample


Sizes = JanusSizes | Emu3Sizes | DiffusersSizes
KINDS: dict[str, type[Sizes]] = {
    "janus": JanusSizes,
    "emu3": Emu3Sizes,
    "diffusers": DiffusersSizes,
}


def kind_of(values: Mapping[str, Any]) -> str | None:
    """Recognise a library's config.

    Args:
        values: Its JSON.

    Returns:
        A key of ``KINDS``, or None.
    """
    for kind, sizes_class in KINDS.items():
        name, expected = sizes_class.marker
        if values.get(name) == expected:
            return kind
    return None


def read_sizes(kind: str, values: Mapping[str, Any]) -> tuple[Sizes, int | None]:
    """Take a library's config apart.

    Args:
        kind: A key of ``KINDS``.
        values: Its JSON; fields at the library's defaults may be missing.

    Returns:
        The sizes, and the side of its images in pixels if the config fixes one.

    Raises:
        ValueError: If a field is of another type or out of range, or the library is missing.
    """
    sizes_class = KINDS[kind]
    known = sizes_class.defaults() | dict(values)
    for name, expected in (("in_channels", 3), ("out_channels", 3), ("double_latent", False)):
        if known.get(name, expected) != expected:
            raise ValueError(f"{name}: got {shown(known[name])}, expected {expected}")
    if kind == "diffusers" and known["vq_embed_dim"] is None:
        known["vq_embed_dim"] = known["latent_channels"]
    chosen = {each.name: known[each.name] for each in dataclasses.fields(sizes_class)}
    plain = {name: list(each) if type(each) is tuple else each for name, each in chosen.items()}
    sizes = build_config(sizes_class, plain)
    patches = known.get("num_patches")
    return sizes, patches * sizes.downsampling if type(patches) is int else None


def _vq_model() -> Any:
    try:
        from diffusers import VQModel
    except ImportError:
        raise ValueError(
            "VQModel needs the library diffusers: pip install 'dalle-mini-impl[pretrained]'"
        ) from None
    return VQModel


def _require_positive(sizes: Sizes, *, except_for: tuple[str, ...] = ()) -> None:
    for name, value in vars(sizes).items():
        numbers = value if isinstance(value, tuple) else (value,)
        whole = [number for number in numbers if type(number) is int]
        if (not numbers or any(number < 1 for number in whole)) and name not in except_for:
            raise ValueError(f"{name}: got {shown(value)}, expected at least 1")
