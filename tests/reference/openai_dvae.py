"""DALL-E's published tokenizer as plain functions of its state dicts, by their published names."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def random_weights(
    *, width: int, num_blocks: int, codebook_size: int, code_dim: int, seed: int = 0
) -> tuple[Weights, Weights]:
    """State dicts as `dall_e.Encoder` and `dall_e.Decoder` name them."""
    generator = torch.Generator().manual_seed(seed)

    def add(weights: Weights, name: str, n_in: int, n_out: int, side: int) -> None:
        noise = torch.randn(n_out, n_in, side, side, generator=generator)
        weights[f"{name}.w"] = noise / math.sqrt(n_in * side**2)
        weights[f"{name}.b"] = 0.1 * torch.randn(n_out, generator=generator)

    def add_groups(weights: Weights, widths: list[int], before: int, sides: list[int]) -> None:
        for group, n_out in enumerate(widths, start=1):
            for block in range(1, num_blocks + 1):
                name, hidden = f"blocks.group_{group}.block_{block}", n_out // 4
                steps = [before, hidden, hidden, hidden, n_out]
                for index, side in enumerate(sides):
                    part = f"{name}.res_path.conv_{index + 1}"
                    add(weights, part, steps[index], steps[index + 1], side)
                if before != n_out:
                    add(weights, f"{name}.id_path", before, n_out, 1)
                before = n_out

    widths = [width, 2 * width, 4 * width, 8 * width]
    encoder: Weights = {}
    add(encoder, "blocks.input", 3, width, 7)
    add_groups(encoder, widths, width, [3, 3, 3, 1])
    add(encoder, "blocks.output.conv", 8 * width, codebook_size, 1)
    decoder: Weights = {}
    add(decoder, "blocks.input", codebook_size, code_dim, 1)
    add_groups(decoder, widths[::-1], code_dim, [1, 3, 3, 3])
    add(decoder, "blocks.output.conv", width, 6, 1)
    return encoder, decoder


def run(weights: Weights, values: Tensor, *, pooling: bool) -> Tensor:
    """Run either network: input, four groups with a change of size between them, output."""
    blocks = {name.split(".")[2] for name in weights if ".block_" in name}
    gain = 1 / (4 * len(blocks)) ** 2

    def convolve(name: str, x: Tensor) -> Tensor:
        kernel = weights[f"{name}.w"]
        return F.conv2d(x, kernel, weights[f"{name}.b"], padding=kernel.shape[-1] // 2)

    x = convolve("blocks.input", values)
    for group in range(1, 5):
        for block in range(1, len(blocks) + 1):
            name = f"blocks.group_{group}.block_{block}"
            branch = x
            for index in range(1, 5):
                branch = convolve(f"{name}.res_path.conv_{index}", branch.relu())
            skip = convolve(f"{name}.id_path", x) if f"{name}.id_path.w" in weights else x
            x = skip + gain * branch
        if group < 4:
            doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = F.max_pool2d(x, 2) if pooling else doubled
    return convolve("blocks.output.conv", x.relu())


def encode(encoder: Weights, pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] to token ids."""
    return run(encoder, 0.8 * (pixels + 1) / 2 + 0.1, pooling=True).argmax(dim=1)


def decode(decoder: Weights, token_ids: Tensor) -> Tensor:
    """Token ids to pixels in [-1, 1]."""
    codebook_size = decoder["blocks.input.w"].shape[1]
    one_hot = F.one_hot(token_ids, codebook_size).permute(0, 3, 1, 2)
    maps = run(decoder, one_hot.to(decoder["blocks.input.w"].dtype), pooling=False)
    unit = (torch.sigmoid(maps[:, :3]) - 0.1) / 0.8
    return unit.clamp(0, 1) * 2 - 1
