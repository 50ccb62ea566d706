"""The quantizers, one number at a time: slow, and easy to check against the papers."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def fsq_level_index(latent: float, level_count: int) -> int:
    """The equal-width interval of [-1, 1] that the bounded latent falls into."""
    bounded = 2 / (1 + math.exp(-1.6 * latent)) - 1
    interval = math.floor((bounded + 1) / 2 * level_count)
    return min(max(interval, 0), level_count - 1)


def fsq(encoder_latents: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Quantized values and token ids of (batch, channels, height, width) latents."""
    values = torch.empty(encoder_latents.shape)
    token_ids = torch.zeros(values[:, 0].shape, dtype=torch.int64)
    for b, y, x in np.ndindex(*token_ids.shape):
        place_value = 1
        for c, level_count in enumerate(levels):
            index = fsq_level_index(float(encoder_latents[b, c, y, x]), level_count)
            values[b, c, y, x] = -1 + 2 * index / (level_count - 1)
            token_ids[b, y, x] += index * place_value
            place_value *= level_count
    return values, token_ids


def nearest_code(vector: Tensor, codebook: Tensor) -> int:
    """The code at the smallest Euclidean distance from the vector, scaled to length 1."""
    unit = vector / vector.norm()
    distances = [float((unit - code).norm()) for code in codebook]
    return distances.index(min(distances))


def moving_average_update(
    codebook: Tensor, counts: Tensor, sums: Tensor, vectors: Tensor, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the moving averages of van den Oord et al. 2017, with codes of length 1."""
    ids = [nearest_code(vector, codebook) for vector in vectors]
    codebook, counts, sums = codebook.clone(), counts.clone(), sums.clone()
    for k in range(len(codebook)):
        members = [vectors[i] / vectors[i].norm() for i in range(len(vectors)) if ids[i] == k]
        total = torch.stack(members).sum(dim=0) if members else torch.zeros_like(sums[k])
        counts[k] = decay * counts[k] + (1 - decay) * len(members)
        sums[k] = decay * sums[k] + (1 - decay) * total
        if members:
            codebook[k] = sums[k] / sums[k].norm()
    return codebook, counts, sums


def uniform_noise(seed: int, num_cells: int, num_codes: int) -> Tensor:
    """The uniform numbers behind the noise of a fresh generator: torch's seed, numpy's numbers."""
    torch_seed = torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(seed))
    numbers = np.random.default_rng(int(torch_seed)).random((num_cells, num_codes), np.float32)
    return torch.from_numpy(numbers)


def gumbel_mixture(
    encoder_latents: Tensor, codebook: Tensor, uniform: Tensor, temperature: float
) -> Tensor:
    """Gumbel-softmax mixtures of codes; `uniform` has one row of noise per cell, row-major."""
    batch, _, height, width = encoder_latents.shape
    mixed = torch.zeros(batch, codebook.shape[1], height, width)
    for cell, (b, y, x) in enumerate(np.ndindex(batch, height, width)):
        noise = -torch.log(-torch.log(uniform[cell]))
        scores = torch.exp((encoder_latents[b, :, y, x] + noise) / temperature)
        for weight, code in zip(scores / scores.sum(), codebook, strict=True):
            mixed[b, :, y, x] += weight * code
    return mixed
