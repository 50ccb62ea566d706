"""Beam search against every row that could be written, and against plain greedy search."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_mini_impl.models.seq2seq import EncoderDecoder, EncoderDecoderConfig
from dalle_mini_impl.sampling.beam_search import BeamConfig, beam_search, length_divisor
from tests.reference.random_weights import randomize

VOCAB_SIZE, MAX_LENGTH = 4, 3  # three tokens and the pad: 1 + 3 + 9 + 27 rows
SOURCES = torch.tensor([[1, 2, 3], [3, 3, 0], [2, 1, 0], [1, 0, 0]])


def build(seed: int) -> EncoderDecoder:
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    config = EncoderDecoderConfig(hidden_size=8, num_heads=2, intermediate_size=12, **layers)
    model = EncoderDecoder(config, vocab_size=VOCAB_SIZE).eval()
    randomize(model, seed=seed, scale=0.6)
    with torch.no_grad():
        model.embedding.weight[model.end_token_id] *= 0.2  # so that rows do not end at once
    return model


@torch.no_grad()
def log_prob(model: EncoderDecoder, source: Tensor, row: tuple[int, ...]) -> float:
    """Log-probability of a row and its end, all at once, pads and start left out."""
    target = torch.tensor([list(row)], dtype=torch.long)
    logits = model(source[None], target)[0]
    allowed = [1, 2, 3, model.end_token_id]
    log_probs = logits[:, allowed].log_softmax(dim=-1)
    tokens = [*row, model.end_token_id]
    return sum(float(log_probs[i, allowed.index(token)]) for i, token in enumerate(tokens))


def exhaustive(model: EncoderDecoder, source: Tensor, penalty: float) -> dict[Any, float]:
    rows = [row for length in range(MAX_LENGTH + 1) for row in product((1, 2, 3), repeat=length)]
    assert len(rows) == 40
    return {row: log_prob(model, source, row) / ((5 + len(row) + 1) / 6) ** penalty for row in rows}


def test_a_wide_beam_finds_the_best_of_all_rows() -> None:
    best_rows = set()
    for seed, penalty in product(range(2), (0.0, 0.6, 5.0)):
        model, config = build(seed), BeamConfig(num_beams=40, length_penalty=penalty)
        found = beam_search(model, SOURCES, config, max_length=MAX_LENGTH)
        for index, source in enumerate(SOURCES):
            scores = exhaustive(model, source, penalty)
            best = max(scores, key=lambda row: scores[row])
            got = tuple(token for token in found.token_ids[index].tolist() if token)
            assert got == best
            assert float(found.scores[index]) == pytest.approx(scores[best], abs=1e-4)
            best_rows.add(best)
    assert {len(row) for row in best_rows} >= {0, MAX_LENGTH}  # long rows need the right caches


def greedy(model: EncoderDecoder, source: Tensor) -> list[int]:
    """Without a cache: the likeliest token after the likeliest tokens."""
    row: list[int] = []
    while len(row) < MAX_LENGTH:
        with torch.no_grad():
            logits = model(source[None], torch.tensor([row], dtype=torch.long))[0, -1]
        logits[[0, model.start_token_id]] = float("-inf")
        if int(logits.argmax()) == model.end_token_id:
            break
        row.append(int(logits.argmax()))
    return row


def test_one_beam_is_greedy_search() -> None:
    found_rows = set()
    for seed in range(6):
        model = build(seed)
        found = beam_search(model, SOURCES, BeamConfig(num_beams=1), max_length=MAX_LENGTH)
        for index, source in enumerate(SOURCES):
            got = [token for token in found.token_ids[index].tolist() if token]
            assert got == greedy(model, source)
            found_rows.add(tuple(got))
    assert len(found_rows) > 3


def test_a_row_does_not_depend_on_its_neighbors() -> None:
    model, config = build(1), BeamConfig(num_beams=3)
    together = beam_search(model, SOURCES, config, max_length=MAX_LENGTH)
    for index in range(len(SOURCES)):
        alone = beam_search(model, SOURCES[index : index + 1], config, max_length=MAX_LENGTH)
        assert torch.equal(alone.token_ids[0], together.token_ids[index])
        assert float(alone.scores[0]) == pytest.approx(float(together.scores[index]), abs=1e-5)


def test_the_length_divisor_is_that_of_the_paper() -> None:
    assert length_divisor(1, 0.6) == 1.0
    assert length_divisor(7, 0.6) == pytest.approx(2**0.6)
    assert length_divisor(30, 0.0) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_beams": 0}, "beam.num_beams: got 0, expected at least 1"),
        ({"length_penalty": -0.1}, "beam.length_penalty: got -0.1, expected at least 0"),
        ({"length_penalty": float("nan")}, "beam.length_penalty: got nan, expected at least 0"),
    ],
)
def test_bad_config_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BeamConfig(**change)
