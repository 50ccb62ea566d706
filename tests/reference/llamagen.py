"""LlamaGen's VQ tokenizer as plain functions of its state dict, by its published names."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
WIDTH, LATENT_CHANNELS = 32, 6  # the least that 32 groups of channels allow


def random_weights(
    multipliers: tuple[int, ...] = (1, 2, 2), *, num_blocks: int = 2, seed: int = 0
) -> Weights:
    """A state dict as `VQModel` names it: 24 codes of length 4, not yet of norm 1."""
    made = _Layers(torch.Generator().manual_seed(seed))
    widths = [WIDTH * each for each in multipliers]
    made.conv("encoder.conv_in", 3, WIDTH)
    for stage, (before, width) in enumerate(zip([WIDTH, *widths], widths, strict=False)):
        name, is_last = f"encoder.conv_blocks.{stage}", stage == len(widths) - 1
        made.stage(name, before, width, count=num_blocks, has_attention=is_last)
        if not is_last:
            made.conv(f"{name}.downsample.conv", width, width)
    made.middle("encoder", widths[-1])
    made.output("encoder", widths[-1], LATENT_CHANNELS)
    # The decoder's first stage is the coarsest.
    made.conv("decoder.conv_in", LATENT_CHANNELS, widths[-1])
    made.middle("decoder", widths[-1])
    widths.reverse()
    for stage, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
        name, is_last = f"decoder.conv_blocks.{stage}", stage == len(widths) - 1
        made.stage(name, before, width, count=num_blocks + 1, has_attention=stage == 0)
        if not is_last:
            made.conv(f"{name}.upsample.conv", width, width)
    made.output("decoder", widths[-1], 3)
    made.conv("quant_conv", LATENT_CHANNELS, 4, 1)
    made.conv("post_quant_conv", 4, LATENT_CHANNELS, 1)
    # Of very different lengths: a nearest code in space is seldom the nearest direction.
    made.weights["quantize.embedding.weight"] = made.noise(24, 4) * made.noise(24, 1).exp()
    made.weights["quantize.codebook_used"] = torch.zeros(65536)
    return made.weights


class _Layers:
    """Random layers by their names."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.weights: Weights = {}

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def conv(self, name: str, n_in: int, n_out: int, side: int = 3) -> None:
        noise = 1.5 * self.noise(n_out, n_in, side, side) / math.sqrt(n_in * side**2)
        self.weights[f"{name}.weight"] = noise
        self.weights[f"{name}.bias"] = 0.1 * self.noise(n_out)

    def norm(self, name: str, channels: int) -> None:
        self.weights[f"{name}.weight"] = 1 + 0.1 * self.noise(channels)
        self.weights[f"{name}.bias"] = 0.1 * self.noise(channels)

    def block(self, name: str, n_in: int, n_out: int) -> None:
        self.norm(f"{name}.norm1", n_in)
        self.conv(f"{name}.conv1", n_in, n_out)
        self.norm(f"{name}.norm2", n_out)
        self.conv(f"{name}.conv2", n_out, n_out)
        if n_in != n_out:
            self.conv(f"{name}.nin_shortcut", n_in, n_out, 1)

    def attention(self, name: str, channels: int) -> None:
        self.norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", channels, channels, 1)

    def stage(self, name: str, n_in: int, n_out: int, *, count: int, has_attention: bool) -> None:
        for index in range(count):
            self.block(f"{name}.res.{index}", n_out if index else n_in, n_out)
            if has_attention:
                self.attention(f"{name}.attn.{index}", n_out)

    def middle(self, name: str, channels: int) -> None:
        self.block(f"{name}.mid.0", channels, channels)
        self.attention(f"{name}.mid.1", channels)
        self.block(f"{name}.mid.2", channels, channels)

    def output(self, name: str, n_in: int, n_out: int) -> None:
        self.norm(f"{name}.norm_out", n_in)
        self.conv(f"{name}.conv_out", n_in, n_out)


def _conv(weights: Weights, name: str, x: Tensor, **options: int) -> Tensor:
    kernel = weights[f"{name}.weight"]
    padding = {"padding": kernel.shape[-1] // 2}
    return F.conv2d(x, kernel, weights[f"{name}.bias"], **(padding | options))


def _norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def _block(weights: Weights, name: str, x: Tensor) -> Tensor:
    h = _conv(weights, f"{name}.conv1", F.silu(_norm(weights, f"{name}.norm1", x)))
    h = _conv(weights, f"{name}.conv2", F.silu(_norm(weights, f"{name}.norm2", h)))
    shortcut = f"{name}.nin_shortcut"
    return h + (_conv(weights, shortcut, x) if f"{shortcut}.weight" in weights else x)


def _attention(weights: Weights, name: str, x: Tensor) -> Tensor:
    h = _norm(weights, f"{name}.norm", x)
    q, k, v = (_conv(weights, f"{name}.{part}", h).flatten(2).mT for part in "qkv")
    mixed = F.scaled_dot_product_attention(q, k, v)
    return x + _conv(weights, f"{name}.proj_out", mixed.mT.unflatten(2, x.shape[2:]))


def _middle(weights: Weights, name: str, x: Tensor) -> Tensor:
    x = _attention(weights, f"{name}.mid.1", _block(weights, f"{name}.mid.0", x))
    return _block(weights, f"{name}.mid.2", x)


def _stages(weights: Weights, part: str, x: Tensor) -> Tensor:
    stage = 0
    while f"{part}.conv_blocks.{stage}.res.0.norm1.weight" in weights:
        name, index = f"{part}.conv_blocks.{stage}", 0
        while f"{name}.res.{index}.norm1.weight" in weights:
            x = _block(weights, f"{name}.res.{index}", x)
            if f"{name}.attn.{index}.norm.weight" in weights:
                x = _attention(weights, f"{name}.attn.{index}", x)
            index += 1
        if f"{name}.downsample.conv.weight" in weights:
            # One more row and column at the bottom and the right alone.
            x = F.pad(x, (0, 1, 0, 1))
            x = _conv(weights, f"{name}.downsample.conv", x, stride=2, padding=0)
        if f"{name}.upsample.conv.weight" in weights:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = _conv(weights, f"{name}.upsample.conv", x)
        stage += 1
    return x


def _output(weights: Weights, part: str, x: Tensor) -> Tensor:
    return _conv(weights, f"{part}.conv_out", F.silu(_norm(weights, f"{part}.norm_out", x)))


def encode(weights: Weights, pixels: Tensor) -> Tensor:
    """Images in [-1, 1] to tokens: for each latent, the code of the largest cosine."""
    x = _stages(weights, "encoder", _conv(weights, "encoder.conv_in", pixels))
    x = _output(weights, "encoder", _middle(weights, "encoder", x))
    latents = _conv(weights, "quant_conv", x)
    codes = weights["quantize.embedding.weight"]
    cosines = F.cosine_similarity(latents.movedim(1, -1)[..., None, :], codes, dim=-1)
    return cosines.argmax(-1)


def decode(weights: Weights, token_ids: Tensor) -> Tensor:
    """Tokens to images, not clamped: codes are taken with length 1."""
    codes = weights["quantize.embedding.weight"]
    units = codes / codes.norm(dim=-1, keepdim=True)
    x = _conv(weights, "post_quant_conv", units[token_ids].movedim(-1, 1))
    x = _middle(weights, "decoder", _conv(weights, "decoder.conv_in", x))
    return _output(weights, "decoder", _stages(weights, "decoder", x))
