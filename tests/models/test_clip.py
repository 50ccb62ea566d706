"""CLIP's towers against those of transformers, its losses against loops in float64."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from dalle_mini_impl.models.clip import (
    MAX_SCALE,
    Clip,
    ClipConfig,
    TextTower,
    TextTowerConfig,
    TowersConfig,
    sigmoid_loss,
    softmax_loss,
)
from dalle_mini_impl.models.vit import ViTConfig
from tests.reference.random_weights import randomize

VOCAB_SIZE, TEXT_LENGTH, WIDTH = 20, 6, 24
TEXT = TextTowerConfig(hidden_size=WIDTH, num_layers=2, num_heads=3, intermediate_size=40)
IMAGE = ViTConfig(patch_size=4, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)
CAPTIONS = torch.tensor([[3, 5, 19, 0, 0, 0], [19, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 19]])


def build(loss: str = "softmax") -> Clip:
    towers = TowersConfig(image=IMAGE, text=TEXT, embedding_size=10, loss=loss)  # type: ignore[arg-type]
    config = ClipConfig(towers=towers, image_size=8, vocab_size=VOCAB_SIZE, text_length=TEXT_LENGTH)
    model = Clip(config).eval()
    randomize(model)
    return model


@torch.no_grad()
def copy_of(ours: TextTower) -> nn.Module:
    """The text tower of transformers, with our weights by name."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    theirs = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=WIDTH,
            intermediate_size=40,
            projection_dim=10,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=TEXT_LENGTH,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            pad_token_id=0,
            bos_token_id=18,
            eos_token_id=19,  # whose state it projects: each caption above ends with it
        )
    ).eval()
    weights: dict[str, Tensor] = {
        "text_model.embeddings.token_embedding.weight": ours.embedding.weight,
        "text_model.embeddings.position_embedding.weight": ours.positions,
        "text_model.final_layer_norm.weight": ours.output_norm.weight,
        "text_model.final_layer_norm.bias": ours.output_norm.bias,
        "text_projection.weight": ours.head.weight,
    }
    names = {
        "attention_norm": "layer_norm1",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.out_proj",
        "feed_forward_norm": "layer_norm2",
        "feed_forward.input": "mlp.fc1",
        "feed_forward.output": "mlp.fc2",
    }
    for number, block in enumerate(ours.blocks):
        for mine, their in names.items():
            for kind, value in block.get_submodule(mine).named_parameters():
                weights[f"text_model.encoder.layers.{number}.{their}.{kind}"] = value
    known = theirs.state_dict()
    assert {name for name in known if not name.endswith("position_ids")} == weights.keys()
    theirs.load_state_dict(weights, strict=False)
    return theirs


@torch.no_grad()
def test_the_text_tower_equals_that_of_transformers() -> None:
    ours = build().text_tower
    theirs = copy_of(ours)
    # Sums in another order.
    torch.testing.assert_close(ours(CAPTIONS), theirs(CAPTIONS).text_embeds, atol=1e-5, rtol=0)


@torch.no_grad()
def test_embeddings_have_length_one_and_logits_are_scaled_cosines() -> None:
    model = build("sigmoid")
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images, texts = model.embed_images(pixels), model.embed_texts(CAPTIONS)
    assert images.shape == (4, 10)
    assert texts.shape == (3, 10)
    for rows in (images, texts):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
        assert (rows[0] - rows[1]).abs().max() > 0.01
    logits = model(CAPTIONS, pixels)
    torch.testing.assert_close(logits, model.log_scale.exp() * images @ texts.T + model.bias)
    assert logits.shape == (4, 3)


@torch.no_grad()
def test_padding_does_not_change_a_caption() -> None:
    model = build()
    for length in (3, 4, 5):
        cut = model.embed_texts(CAPTIONS[:2, :length])
        torch.testing.assert_close(cut, model.embed_texts(CAPTIONS)[:2], atol=1e-6, rtol=0)


def test_what_stands_before_the_last_token_counts() -> None:
    model = build()
    changed = CAPTIONS.clone()
    changed[0, 0] = 7
    before, after = model.embed_texts(CAPTIONS), model.embed_texts(changed)
    assert (before[0] - after[0]).abs().max() > 0.01
    assert torch.equal(before[1:], after[1:])


def some_logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(4, 4, dtype=torch.float64, generator=generator)
    is_match = torch.eye(4, dtype=torch.bool)
    is_match[0, 2] = is_match[2, 0] = True
    return logits, is_match


def test_the_softmax_loss_equals_a_loop() -> None:
    logits, is_match = some_logits()
    total = 0.0
    for scores, expected in ((logits, is_match), (logits.T, is_match.T)):
        for row in range(4):
            whole = sum(math.exp(x) for x in scores[row].tolist())
            right = [math.exp(scores[row, k]) / whole for k in range(4) if expected[row, k]]
            total -= sum(math.log(p) for p in right) / len(right) / 8
    assert float(softmax_loss(logits, is_match)) == pytest.approx(total, abs=1e-12)
    # Without twins it is the loss of the paper.
    labels = torch.arange(4)
    plain = [nn.functional.cross_entropy(x, labels) for x in (logits, logits.T)]
    alone = softmax_loss(logits, torch.eye(4, dtype=torch.bool))
    torch.testing.assert_close(alone, (plain[0] + plain[1]) / 2)


def test_the_sigmoid_loss_equals_a_loop() -> None:
    logits, is_match = some_logits()
    total = 0.0
    for row in range(4):
        for column in range(4):
            sign = 1 if is_match[row, column] else -1
            total += math.log1p(math.exp(-sign * logits[row, column])) / 4
    assert float(sigmoid_loss(logits, is_match)) == pytest.approx(total, abs=1e-12)


def test_the_scale_is_learned_and_kept_in_its_limit() -> None:
    model = build().train()
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = model(CAPTIONS, pixels)
    assert float(logits.detach().abs().max()) <= MAX_SCALE * (1 + 1e-6)
    assert float(model.log_scale.detach()) == pytest.approx(math.log(MAX_SCALE))
    softmax_loss(logits, torch.eye(3, dtype=torch.bool)).backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients.values())


def test_both_losses_start_as_in_their_papers() -> None:
    config = build().config
    for loss, scale in (("softmax", 1 / 0.07), ("sigmoid", 10.0)):
        towers = dataclasses.replace(config.towers, loss=loss)
        model = Clip(dataclasses.replace(config, towers=towers))
        assert float(model.log_scale.detach().exp()) == pytest.approx(scale)
        assert ("bias" in dict(model.named_parameters())) == (loss == "sigmoid")
        assert torch.isfinite(model(CAPTIONS, torch.rand(2, 3, 8, 8))).all()


@pytest.mark.parametrize("name", ["hidden_size", "num_layers", "num_heads", "intermediate_size"])
def test_sizes_that_no_tower_has_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"model.text.{name}: got 0, expected at least 1"):
        TextTowerConfig(**{name: 0})
    with pytest.raises(ValueError, match=r"model.text.hidden_size: got 10, expected a multiple"):
        TextTowerConfig(hidden_size=10)
    with pytest.raises(ValueError, match=r"model.embedding_size: got 0, expected at least 1"):
        TowersConfig(embedding_size=0)
