"""Logit filters and Gumbel noise for sampling. No function modifies its input."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def keep_top_k(logits: Float[Tensor, "batch vocab"], top_k: int) -> Float[Tensor, "batch vocab"]:
    """Set all but the ``top_k`` likeliest tokens to minus infinity; 0 keeps all.

    Ties with the last one stay as well. Logits are in nats, not normalized.
    """
    if top_k < 0:
        raise ValueError(f"top_k: got {top_k}, expected a count, or 0 for all tokens")
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, float("-inf"))


def keep_top_p(logits: Float[Tensor, "batch vocab"], top_p: float) -> Float[Tensor, "batch vocab"]:
    """Keep the smallest set of likeliest tokens that holds the probability mass ``top_p``, (0, 1].

    The others become minus infinity; the likeliest token always stays. 1.0 keeps all.

    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected a probability mass above 0 and up to 1")
    if top_p == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    # A token stays if those before it do not yet hold the mass.
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    beyond = mass_before >= top_p
    beyond[..., 0] = False  # a top_p that float32 rounds to 0 would drop all
    return logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))


def gumbel_noise(
    seeds: Int[Tensor, " batch"], *, steps: Int[Tensor, "#batch 1"] | int, vocab_size: int
) -> Float[Tensor, "batch vocab"]:
    """Compute standard Gumbel noise for one token of each image, from its seed and the step alone.

    Seeds are in [0, 2 ** 63), steps below 2 ** 31, noise between -2.9 and 16.7.

    Source: Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030, section 2. The bits are squares32 of
        Widynski 2020, arXiv:2004.06278; the seeds are scattered by splitmix64 (Steele et al. 2014).
    """
    # Counter-based, without state: the same numbers on every device, in any order and for any
    # batch, and without a Python loop over images.
    key = (_scatter(seeds) | 1).unsqueeze(1)
    counter = steps * vocab_size + torch.arange(vocab_size, device=seeds.device)
    weyl = counter * key  # int64 products wrap around, as the source's unsigned ones do
    bits = weyl
    # Four rounds of "middle square": square, add, swap the halves.
    for increment in (weyl, weyl + key, weyl, weyl + key):
        bits = bits * bits + increment
        bits = (bits << 32) | _shift_right(bits, 32)
    # 23 bits and a half: exact in float32, and never 0 or 1, whose noise would not be finite.
    uniform = (((bits >> 9) & 0x7FFFFF).float() + 0.5) / 2**23
    return -(-uniform.log()).log()


def _scatter(seeds: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Turn successive seeds into numbers that share no pattern (splitmix64)."""
    mixed = seeds - 0x61C8864680B583EB
    mixed = (mixed ^ _shift_right(mixed, 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ _shift_right(mixed, 27)) * -0x6B2FB644ECCEEE15
    return mixed ^ _shift_right(mixed, 31)


def _shift_right(numbers: Int[Tensor, "*shape"], places: int) -> Int[Tensor, "*shape"]:
    """Shift as if the numbers had no sign."""
    return (numbers >> places) & ((1 << (64 - places)) - 1)
