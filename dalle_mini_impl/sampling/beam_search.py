"""Beam search for the likeliest row of tokens, and greedy search.

Beam search keeps the ``num_beams`` likeliest unfinished rows; one beam is greedy search. Finished
rows are compared by log-probability over the length penalty of Wu et al. 2016 (arXiv:1609.08144,
equation 14), with which Vaswani et al. 2017 decode (4 beams, penalty 0.6).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_mini_impl.models.seq2seq import PAD_TOKEN_ID, EncoderDecoder


@dataclass(frozen=True, kw_only=True)
class BeamConfig:
    """How targets are searched."""

    num_beams: int = 4
    """Hypotheses per source; 1 is greedy search."""
    length_penalty: float = 0.6
    """Exponent of the length, at least 0; 0 compares plain log-probabilities, which favors short
    rows."""

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"beam.num_beams: got {self.num_beams}, expected at least 1")
        if not 0 <= self.length_penalty < float("inf"):
            raise ValueError(f"beam.length_penalty: got {self.length_penalty}, expected at least 0")


class BeamOutput(NamedTuple):
    """The best row of each source."""

    token_ids: Int[Tensor, "batch max_length"]
    """Without start and end, padded on the right."""
    scores: Float[Tensor, " batch"]
    """Log-probability, end included, over the length penalty."""


def length_divisor(length: int, length_penalty: float) -> float:
    """Compute ((5 + length) / 6) ** length_penalty; ``length`` counts the end as well."""
    return ((5 + length) / 6) ** length_penalty


@torch.no_grad()
def beam_search(
    model: EncoderDecoder,
    source_token_ids: Int[Tensor, "batch source_length"],
    config: BeamConfig,
    *,
    max_length: int,
) -> BeamOutput:
    """Search the best target of each source, of at most ``max_length`` tokens before the end.

    A result does not depend on the other sources.
    """
    batch, beams, device = len(source_token_ids), config.num_beams, source_token_ids.device
    state = model.start_decoding(source_token_ids, rows_per_source=beams, max_length=max_length + 1)
    search = _Search(batch, beams, max_length, device)
    last = torch.full((batch * beams,), model.start_token_id, device=device)
    for length in range(max_length + 1):
        log_probs = _log_probs(model, model.decode_one(last, state))
        if length == max_length:
            # Only the end may follow.
            others = torch.arange(log_probs.shape[-1], device=device) != model.end_token_id
            log_probs = log_probs.masked_fill(others, float("-inf"))
        rows = search.advance(log_probs, length, model.end_token_id, config.length_penalty)
        if length == max_length or search.is_done.all():
            break
        state.cache.select_rows(rows)  # the context is the same for all rows of a source
        last = search.tokens[:, :, length].flatten()
    return BeamOutput(search.best_tokens, search.best_scores)


def _log_probs(model: EncoderDecoder, logits: Tensor) -> Tensor:
    """Normalize over the tokens that may follow: neither pad nor start."""
    logits = logits.float().clone()
    logits[:, [PAD_TOKEN_ID, model.start_token_id]] = float("-inf")
    return logits.log_softmax(dim=-1)


class _Search:
    """The unfinished rows of every source, and the best finished one."""

    def __init__(self, batch: int, beams: int, max_length: int, device: torch.device) -> None:
        self.max_length = max_length
        self.tokens = torch.full((batch, beams, max_length), PAD_TOKEN_ID, device=device)
        self.log_probs = torch.full((batch, beams), float("-inf"), device=device)
        # All rows are equal at first: only one of them counts, or the beams would stay equal.
        self.log_probs[:, 0] = 0.0
        self.best_tokens = self.tokens[:, 0].clone()
        self.best_scores = torch.full((batch,), float("-inf"), device=device)
        self.num_finished = torch.zeros(batch, dtype=torch.long, device=device)
        self.is_done = torch.zeros(batch, dtype=torch.bool, device=device)

    def advance(
        self, log_probs: Tensor, length: int, end_token_id: int, length_penalty: float
    ) -> Tensor:
        """Add a token to each row; return which old row each row continues."""
        batch, beams = self.log_probs.shape
        # 1. Rank all continuations of all rows of a source together.
        totals = self.log_probs[:, :, None] + log_probs.unflatten(0, (batch, beams))
        # Each row ends in one way only: among the best 2 * beams at least ``beams`` do not end.
        count = min(2 * beams, totals[0].numel())
        values, places = totals.flatten(1).topk(count)
        parents, tokens = places // totals.shape[-1], places % totals.shape[-1]
        # 2. Those that end among the best ``beams`` are finished rows.
        is_end = tokens == end_token_id
        ranks = torch.arange(count, device=values.device)
        self._finish(
            values.masked_fill(~(is_end & (ranks < beams)), float("-inf")),
            parents,
            length_divisor(length + 1, length_penalty),
        )
        # 3. The best of the others are the new rows.
        self.log_probs, chosen = values.masked_fill(is_end, float("-inf")).topk(beams)
        parents = parents.gather(1, chosen)
        if length < self.max_length:
            self.tokens = self._rows(parents)
            self.tokens[:, :, length] = tokens.gather(1, chosen)
        # 4. A source is done after ``beams`` finished rows, or when no unfinished row can win: its
        # log-probability only falls, and at best it is divided by the largest divisor.
        longest = length_divisor(self.max_length + 1, length_penalty)
        self.is_done |= self.num_finished >= beams
        self.is_done |= self.best_scores >= self.log_probs[:, 0] / longest
        return (parents + beams * torch.arange(batch, device=values.device)[:, None]).flatten()

    def _finish(self, ended: Tensor, parents: Tensor, divisor: float) -> None:
        """Keep the best finished row; ``ended`` is -inf where a candidate does not end."""
        self.num_finished += ended.isfinite().sum(dim=1)
        value, place = ended.max(dim=1)
        is_better = (value / divisor > self.best_scores) & ~self.is_done
        rows = self._rows(parents.gather(1, place[:, None]))[:, 0]
        self.best_tokens = torch.where(is_better[:, None], rows, self.best_tokens)
        self.best_scores = torch.where(is_better, value / divisor, self.best_scores)

    def _rows(self, parents: Tensor) -> Tensor:
        return self.tokens.gather(1, parents[:, :, None].expand(-1, -1, self.max_length))
