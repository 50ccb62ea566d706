"""Which samples belong to which optimizer step, and with which randomness: functions, not state.

The samples form one endless stream, epoch after epoch, each epoch in an order that is a function of
(seed, epoch). Step ``k`` (from 0) takes the global batch at stream position
``k * global_batch_size``, so a resumed run needs to remember nothing but ``step``. Every process
computes the whole global batch and takes its own part, so the number of processes does not change
what a step sees.
"""

import hashlib

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def epoch_order(
    num_samples: int,
    *,
    seed: int,
    epoch: int,
    weights: Float[Tensor, " num_samples"] | None = None,
) -> Int64[Tensor, " num_samples"]:
    """Compute the order of one epoch as a function of (seed, epoch); the global RNG is not touched.

    Without weights, a permutation. With weights (finite, not negative, not all zero), an epoch
    still has ``num_samples`` entries; sample i is expected n * w_i / sum(w) times and appears that
    often rounded down or up (systematic resampling: evenly spaced points with one random offset on
    the cumulative weights), shuffled.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, expected at least 1")
    if epoch < 0:
        raise ValueError(f"epoch is {epoch}, expected at least 0")
    generator = _generator("order", seed, epoch)
    if weights is None:
        return torch.randperm(num_samples, generator=generator)
    if weights.shape != (num_samples,):
        raise ValueError(f"weights have shape {tuple(weights.shape)}, expected ({num_samples},)")
    if not weights.isfinite().all() or (weights < 0).any() or not (weights > 0).any():
        raise ValueError("weights hold negative, non-finite or only zero values, expected w >= 0")
    # Systematic resampling: points at distance 1 on a line on which sample i covers its expected
    # count, so it is hit that often, rounded down or up.
    cumulated = weights.double().cpu().cumsum(0)
    ends = cumulated / cumulated[-1] * num_samples
    offset = torch.rand(1, dtype=torch.float64, generator=generator)
    points = torch.arange(num_samples, dtype=torch.float64) + offset
    order = torch.searchsorted(ends, points, right=True)
    # Rounding may push the last point past the end; it then belongs to the last sample in use.
    order = order.clamp(max=int(weights.nonzero().max()))
    return order[torch.randperm(num_samples, generator=generator)]


class SampleOrder:
    """The sample indices of every step; keeps the orders of the last two epochs at hand."""

    def __init__(
        self,
        num_samples: int,
        *,
        global_batch_size: int,
        seed: int,
        weights: Float[Tensor, " num_samples"] | None = None,
    ) -> None:
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size is {global_batch_size}, expected at least 1")
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._weights = weights
        # The first epoch now: bad sizes and weights are refused here, not at the first step.
        self._orders = {0: epoch_order(num_samples, seed=seed, epoch=0, weights=weights)}

    def indices(self, step: int) -> Int64[Tensor, " global_batch_size"]:
        """Return the samples of one optimizer step; a batch may straddle epochs."""
        if step < 0:
            raise ValueError(f"step is {step}, expected at least 0")
        # The place in the endless stream is all the state there is.
        position = step * self.global_batch_size
        end = position + self.global_batch_size
        parts = []
        while position < end:
            epoch, offset = divmod(position, self.num_samples)
            part = self._order(epoch)[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        return torch.cat(parts)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            # A batch may straddle two epochs; older ones are not asked for again.
            self._orders = {key: kept for key, kept in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = epoch_order(
                self.num_samples, seed=self.seed, epoch=epoch, weights=self._weights
            )
        return self._orders[epoch]


def step_generator(seed: int, step: int, rank: int, purpose: int = 0) -> torch.Generator:
    """Make the CPU generator for one step: its state is a function of the arguments alone.

    ``purpose`` tells independent uses within a step apart (augmentation, caption dropout, ...).
    """
    return _generator("step", seed, step, rank, purpose)


def _generator(domain: str, *numbers: int) -> torch.Generator:
    # A hash, because neighboring seeds of the Mersenne Twister give related streams.
    text = ":".join([domain, *map(str, numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
