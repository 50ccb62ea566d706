"""The image tokenizers of other libraries: their sizes, and how to build and call them.

Only the fields listed here are read of a library's config, each of its own type. All other fields,
such as the name of code to run, never reach the library.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqvae.serialization import build_config, shown, sizes_of

DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")
MAX_TEMPORAL_DOWNSAMPLING = 64


@dataclass(frozen=True, kw_only=True)
class LibrarySizes:
    """The sizes of a library's model; a subclass lists its fields."""

    # The field of the library's config that tells its kind, and its value.
    marker: ClassVar[tuple[str, str]]
    # The field with one number per stage; every stage but the last halves the image.
    stages: ClassVar[str]
    # Fields that stand for at least as many tensors, and fields that some tensor is as long as.
    counts: ClassVar[tuple[str, ...]]
    lengths: ClassVar[tuple[str, ...]]
    may_be_empty: ClassVar[tuple[str, ...]] = ()
    weights_name: ClassVar[str] = "model.safetensors"

    def __post_init__(self) -> None:
        # Sizes are whole numbers or tuples of them; text and booleans pass.
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            is_empty = not numbers and name not in self.may_be_empty
            if is_empty or any(type(number) is int and number < 1 for number in numbers):
                raise ValueError(f"{name}: got {shown(value)}, expected at least 1")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return getattr(self, self.stages)

    @property
    def downsampling(self) -> int:
        """Pixels per token along one side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def min_counts(self) -> dict[str, int]:
        """The ``counts`` of ``build_checked``."""
        return {**sizes_of(self, *self.counts), self.stages: len(self.widths)}

    @property
    def min_lengths(self) -> dict[str, int]:
        """The ``sizes`` of ``build_checked``."""
        return {**sizes_of(self, *self.lengths), self.stages: max(self.widths)}


@dataclass(frozen=True, kw_only=True)
class JanusSizes(LibrarySizes):
    """Sizes of ``transformers.JanusVQVAE`` (Chen et al. 2025, arXiv:2501.17811)."""

    marker = ("model_type", "janus_vqgan")
    stages = "channel_multiplier"
    counts = ("num_res_blocks",)
    lengths = ("num_embeddings", "embed_dim", "latent_channels")

    embed_dim: int
    num_embeddings: int
    latent_channels: int
    base_channels: int
    channel_multiplier: tuple[int, ...]
    num_res_blocks: int

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the library's values of fields that a config leaves out."""
        from transformers import JanusVQVAEConfig

        return JanusVQVAEConfig().to_dict()

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.num_embeddings

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.base_channels * each for each in self.channel_multiplier)

    def build(self, image_grid_size: tuple[int, int]) -> nn.Module:
        """Build the model with fresh weights."""
        from transformers import JanusVQVAE, JanusVQVAEConfig

        model = JanusVQVAE(JanusVQVAEConfig(**dataclasses.asdict(self)))
        # The library lays decoded tokens out on this grid, of num_patches a side by default.
        model.quantize.quant_state_dims = list(image_grid_size)
        return model

    def encode(self, model: Any, pixels: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b gh gw"]:
        """Images in [-1, 1] to tokens."""
        height, width = (side // self.downsampling for side in pixels.shape[-2:])
        return model.encode(pixels).image_tokens.reshape(len(pixels), height, width)

    def decode(self, model: Any, token_ids: Int[Tensor, "b gh gw"]) -> Float[Tensor, "b 3 h w"]:
        """Tokens to images, not clamped."""
        return model.decode(token_ids.flatten(1))


@dataclass(frozen=True, kw_only=True)
class Emu3Sizes(LibrarySizes):
    """Sizes of ``transformers.Emu3VQVAE`` (Wang et al. 2024, arXiv:2409.18869), for images."""

    marker = ("model_type", "emu3_vqgan")
    stages = "channel_multiplier"
    counts = ("num_res_blocks",)
    lengths = ("codebook_size", "embed_dim", "latent_channels", "hidden_size")
    may_be_empty = ("attn_resolutions",)

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
        super().__post_init__()
        # The model has a convolution for each factor of 2, which no tensor's length tells.
        factor = self.temporal_downsample_factor
        if factor > MAX_TEMPORAL_DOWNSAMPLING:
            raise ValueError(
                f"temporal_downsample_factor: got {factor}, "
                f"expected at most {MAX_TEMPORAL_DOWNSAMPLING}"
            )

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the library's values of fields that a config leaves out."""
        from transformers import Emu3VQVAEConfig

        return Emu3VQVAEConfig().to_dict()

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.base_channels * each for each in self.channel_multiplier)

    def build(self, image_grid_size: tuple[int, int]) -> nn.Module:
        """Build the model with fresh weights."""
        from transformers import Emu3VQVAE, Emu3VQVAEConfig

        del image_grid_size
        # Convolutions alone: one model takes every size.
        return Emu3VQVAE(Emu3VQVAEConfig(**dataclasses.asdict(self)))

    def encode(self, model: Any, pixels: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b gh gw"]:
        """Images in [-1, 1] to tokens."""
        # The model crops each image's tokens to its size without padding; ours have no padding.
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels)).reshape(-1, 2)
        return torch.stack(model.encode(pixels, sizes).image_tokens)

    def decode(self, model: Any, token_ids: Int[Tensor, "b gh gw"]) -> Float[Tensor, "b 3 h w"]:
        """Tokens to images, not clamped."""
        return model.decode(token_ids)


@dataclass(frozen=True, kw_only=True)
class DiffusersSizes(LibrarySizes):
    """Sizes of ``diffusers.VQModel`` (Esser et al. 2021, arXiv:2012.09841)."""

    marker = ("_class_name", "VQModel")
    stages = "block_out_channels"
    counts = ("layers_per_block",)
    lengths = ("num_vq_embeddings", "vq_embed_dim", "latent_channels")
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
        super().__post_init__()
        num_stages = len(self.block_out_channels)
        for name, expected in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            got = getattr(self, name)
            if len(got) != num_stages or set(got) - set(expected):
                words = f"{num_stages} of {', '.join(expected)}"
                raise ValueError(f"{name}: got {shown(got)}, expected {words}")
        if self.act_fn not in ACTIVATIONS:
            words = f"one of {', '.join(ACTIVATIONS)}"
            raise ValueError(f"act_fn: got {shown(self.act_fn)}, expected {words}")

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the library's values of fields that a config leaves out."""
        parameters = inspect.signature(_vq_model().__init__).parameters.values()
        return {each.name: each.default for each in parameters}

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.num_vq_embeddings

    def build(self, image_grid_size: tuple[int, int]) -> nn.Module:
        """Build the model with fresh weights."""
        del image_grid_size
        # Without lookup_from_codebook, decoding would take ids for latents.
        return _vq_model()(**dataclasses.asdict(self), lookup_from_codebook=True)

    def encode(self, model: Any, pixels: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b gh gw"]:
        """Images in [-1, 1] to tokens."""
        latents = model.encode(pixels).latents
        # (quantized, loss, (perplexity, one-hot codes, ids))
        token_ids = model.quantize(latents)[2][2]
        return token_ids.reshape(len(latents), *latents.shape[-2:])

    def decode(self, model: Any, token_ids: Int[Tensor, "b gh gw"]) -> Float[Tensor, "b 3 h w"]:
        """Tokens to images, not clamped."""
        # The lookup returns rows of codes; the shape folds them into a grid again.
        shape = (*token_ids.shape, self.vq_embed_dim)
        return model.decode(token_ids.flatten(), force_not_quantize=True, shape=shape).sample


Sizes = JanusSizes | Emu3Sizes | DiffusersSizes
KINDS: dict[str, type[Sizes]] = {
    "janus": JanusSizes,
    "emu3": Emu3Sizes,
    "diffusers": DiffusersSizes,
}


def kind_of(values: Mapping[str, Any]) -> str | None:
    """Recognize a library's config: a key of ``KINDS``, or None."""
    for kind, sizes_class in KINDS.items():
        name, expected = sizes_class.marker
        if values.get(name) == expected:
            return kind
    return None


def read_sizes(kind: str, values: Mapping[str, Any]) -> tuple[Sizes, int | None]:
    """Read the sizes from a library's config, and the image size in pixels if it fixes one.

    Fields at the library's defaults may be missing.

    Raises:
        ValueError: If a field is of another type or out of range, or the library is missing.
    """
    sizes_class = KINDS[kind]
    known = sizes_class.defaults() | dict(values)
    # Fixed by our interface: RGB, and one code per cell. Other values would load and fail late.
    for name, expected in (("in_channels", 3), ("out_channels", 3), ("double_latent", False)):
        if known.get(name, expected) != expected:
            raise ValueError(f"{name}: got {shown(known[name])}, expected {expected}")
    # The library's own rule.
    if kind == "diffusers" and known["vq_embed_dim"] is None:
        known["vq_embed_dim"] = known["latent_channels"]
    chosen = {each.name: known[each.name] for each in dataclasses.fields(sizes_class)}
    # The library's defaults may be tuples, where JSON has lists.
    plain = {name: list(each) if type(each) is tuple else each for name, each in chosen.items()}
    sizes = build_config(sizes_class, plain)
    # Janus alone fixes its image size, in tokens per side.
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
