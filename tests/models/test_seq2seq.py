"""The encoder-decoder against torch's own Transformer, and against itself."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from dalle_mini_impl.models.seq2seq import EncoderDecoder, EncoderDecoderConfig
from dalle_mini_impl.transformer.masks import causal_mask
from tests.reference.random_weights import randomize
from tests.reference.torch_transformer import give_block

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "intermediate_size": 24,
}
VOCAB_SIZE = 9
SOURCE = torch.tensor([[3, 1, 4, 1, 5, 8], [2, 6, 5, 0, 0, 0]])
TARGET = torch.tensor([[2, 7, 1, 8], [3, 1, 0, 0]])


def build(norm: Literal["pre", "post"] = "post", **changes: Any) -> EncoderDecoder:
    config = EncoderDecoderConfig(norm=norm, **(SIZES | changes))
    model = EncoderDecoder(config, vocab_size=VOCAB_SIZE).eval()
    randomize(model)
    return model


def torch_logits(model: EncoderDecoder) -> Tensor:
    """What torch's Transformer makes of the same weights, embeddings and positions."""
    is_pre = model.config.norm == "pre"
    shape: dict[str, Any] = {"dropout": 0.0, "layer_norm_eps": 1e-6, "batch_first": True}
    shape |= {"dim_feedforward": 24, "norm_first": is_pre}
    theirs = nn.Transformer(16, 2, 2, 3, **shape).eval()
    theirs.encoder.enable_nested_tensor = False
    if is_pre:
        theirs.encoder.norm.load_state_dict(model.encoder_norm.state_dict())
        theirs.decoder.norm.load_state_dict(model.decoder_norm.state_dict())
    else:  # torch ends the stacks with a norm in any case; the paper has none there
        theirs.encoder.norm = theirs.decoder.norm = None
    for mine, layer in zip(model.encoder_blocks, theirs.encoder.layers, strict=True):
        give_block(mine, layer)
    for mine, layer in zip(model.decoder_blocks, theirs.decoder.layers, strict=True):
        give_block(mine, layer)

    def embed(token_ids: Tensor) -> Tensor:
        rows = []
        for position in range(token_ids.shape[1]):
            angles = position / 10_000 ** (torch.arange(0, 16, 2) / 16)
            rows.append(torch.cat([angles.sin(), angles.cos()]))
        return model.embedding.weight[token_ids] * 4 + torch.stack(rows)

    start = torch.full((2, 1), VOCAB_SIZE)
    pads = SOURCE == 0
    hidden = theirs(
        embed(SOURCE),
        embed(torch.cat([start, TARGET], dim=1)),
        tgt_mask=~causal_mask(5),
        src_key_padding_mask=pads,
        memory_key_padding_mask=pads,
    )
    return hidden @ model.embedding.weight.T


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_logits_equal_those_of_torchs_transformer(norm: Literal["pre", "post"]) -> None:
    model = build(norm)
    expected = torch_logits(model)
    assert expected.std() > 0.5
    torch.testing.assert_close(model(SOURCE, TARGET), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(SOURCE, TARGET), expected, rtol=1e-5, atol=1e-5)


def test_a_padded_row_equals_the_row_alone() -> None:
    model = build()
    padded = model(SOURCE, TARGET)
    alone = model(SOURCE[1:, :3], TARGET[1:, :2])
    torch.testing.assert_close(padded[1:, :3], alone, **TOLERANCE)


def test_a_position_sees_no_later_target_and_the_whole_source() -> None:
    model = build()
    before = model(SOURCE, TARGET)
    later = TARGET.clone()
    later[0, 2] = 5
    moved = (model(SOURCE, later) - before).abs().amax(dim=-1)
    assert not moved[0, :3].any()
    assert (moved[0, 3:] > 1e-3).all()
    assert not moved[1].any()
    other = SOURCE.clone()
    other[0, 5] = 2  # the last source token reaches every target position
    moved = (model(other, TARGET) - before).abs().amax(dim=-1)
    assert (moved[0] > 1e-3).all()


def test_order_matters_in_source_and_target() -> None:
    model = build()
    flipped = SOURCE.clone()
    flipped[0] = flipped[0].flip(0)
    assert (model(flipped, TARGET)[0] - model(SOURCE, TARGET)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_token_by_token_equals_all_at_once(norm: Literal["pre", "post"]) -> None:
    model = build(norm)
    with torch.no_grad():
        expected = model(SOURCE, TARGET)
        state = model.start_decoding(SOURCE, rows_per_source=2, max_length=5)
        inputs = torch.cat([torch.full((2, 1), VOCAB_SIZE), TARGET], dim=1)
        for position in range(5):
            logits = model.decode_one(inputs[:, position].repeat_interleave(2), state)
            for row in range(2):
                both = logits.view(2, 2, -1)[:, row]
                torch.testing.assert_close(both, expected[:, position], **TOLERANCE)


def test_one_table_embeds_and_scores() -> None:
    model = build()
    names = {name for name, _ in model.named_parameters() if "block" not in name}
    assert names == {"embedding.weight"}


def test_fresh_embeddings_and_logits_have_a_variance_of_about_one() -> None:
    torch.manual_seed(0)
    model = EncoderDecoder(EncoderDecoderConfig(), vocab_size=500).eval()
    tokens = torch.randint(1, 500, (8, 20))
    with torch.no_grad():
        assert 0.9 < float((model.embedding(tokens) * 16).std()) < 1.1
        assert 0.5 < float(model(tokens, tokens).std()) < 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 0}, "model.num_heads: got 0, expected at least 1"),
        ({"num_heads": 3}, "model.hidden_size: got 16, expected an even multiple of num_heads 3"),
        ({"dropout_probability": 1.0}, "model.dropout_probability: got 1.0, expected 0 to below 1"),
    ],
)
def test_bad_sizes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderDecoderConfig(**(SIZES | change))
