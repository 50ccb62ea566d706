"""From logits to the distribution that is drawn from. No function here edits its input."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def keep_top_k(logits: Float[Tensor, "batch vocab"], top_k: int) -> Float[Tensor, "batch vocab"]:
    """Leave only the likeliest tokens.

    Args:
        logits: In nats, not normalised.
        top_k: How many tokens stay (a count); 0 keeps all. Ties with the last one stay as well.

    Returns:
        Logits with minus infinity elsewhere.

    Raises:
        ValueError: If ``top_k`` is negative.
    """
    if top_k < 0:
        raise ValueError(f"top_k: got {top_k}, wanted a count, or 0 for all tokens")
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, float("-inf"))


def keep_top_p(logits: Float[Tensor, "batch vocab"], top_p: float) -> Float[Tensor, "batch vocab"]:
    """Leave the smallest set of likeliest tokens that holds a given probability mass.

    Args:
        logits: In nats, not normalised.
        top_p: The mass, in (0, 1]; 1.0 keeps all. The likeliest token always stays.

    Returns:
        Logits with minus infinity elsewhere.

    Raises:
        ValueError: If ``top_p`` is not in (0, 1].

    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, wanted a probability mass above 0 and up to 1")
    if top_p == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    beyond = mass_before >= top_p
    beyond[..., 0] = False  # a top_p that float32 rounds to 0 would drop all
    return logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))


def gumbel_noise(
    seeds: Int[Tensor, " batch"], *, num_steps: int, vocab_size: int
) -> Float[Tensor, "steps batch vocab"]:
    """Draw all the noise of each picture from that picture's seed alone.

    Adding Gumbel noise to logits and taking the largest draws from their softmax, so these numbers
    decide a picture whatever is drawn beside it.

    Args:
        seeds: One per picture, in [0, 2 ** 63).
        num_steps: Tokens per picture.
        vocab_size: Number of different tokens.

    Returns:
        Standard Gumbel noise, float32, on the CPU.

    Source: Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030, section 2.
    """
    noise = torch.empty(num_steps, len(seeds), vocab_size)
    for row, seed in enumerate(seeds.tolist()):
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(num_steps, vocab_size, generator=generator)
        # float32 uniforms can be exactly 0, whose logarithm is not finite.
        noise[:, row] = -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()
    return noise
