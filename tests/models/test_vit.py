"""The Vision Transformer against that of transformers, and against itself."""

from typing import Any

import pytest
import torch
from torch import nn

from dalle_mini_impl.models.vit import VisionTransformer, ViTConfig
from tests.reference.random_weights import randomize

SIZES: dict[str, Any] = {
    "patch_size": 4,
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 3,
    "intermediate_size": 40,
}


def build(**changes: Any) -> VisionTransformer:
    config = ViTConfig(**(SIZES | changes))
    model = VisionTransformer(config, image_size=12, num_channels=3, num_classes=5).eval()
    randomize(model)
    return model


@torch.no_grad()
def copy_of(ours: VisionTransformer) -> nn.Module:
    """The ViT of transformers, with our weights by name."""
    from transformers import ViTConfig as TheirConfig
    from transformers import ViTModel

    theirs = ViTModel(
        TheirConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=40,
            layer_norm_eps=1e-6,
            image_size=12,
            patch_size=4,
        ),
        add_pooling_layer=False,
    ).eval()
    weights = {
        "embeddings.cls_token": ours.class_token.view(1, 1, -1),
        "embeddings.position_embeddings": ours.positions.unsqueeze(0),
        "embeddings.patch_embeddings.projection.weight": ours.patch_embedding.weight.view(
            24, 3, 4, 4
        ),
        "embeddings.patch_embeddings.projection.bias": ours.patch_embedding.bias,
        "layernorm.weight": ours.output_norm.weight,
        "layernorm.bias": ours.output_norm.bias,
    }
    names = {
        "attention.q_proj": "attention.query",
        "attention.k_proj": "attention.key",
        "attention.v_proj": "attention.value",
        "attention.o_proj": "attention.output",
        "layernorm_before": "attention_norm",
        "layernorm_after": "feed_forward_norm",
        "mlp.fc1": "feed_forward.input",
        "mlp.fc2": "feed_forward.output",
    }
    for index, block in enumerate(ours.blocks):
        for their_name, our_name in names.items():
            for name, value in block.get_submodule(our_name).named_parameters():
                weights[f"layers.{index}.{their_name}.{name}"] = value
    theirs.load_state_dict(weights, strict=True)
    return theirs


def test_features_equal_those_of_transformers() -> None:
    ours = build()
    pixels = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = copy_of(ours)(pixels).last_hidden_state
        got = ours.features(pixels)
    assert got.shape == (2, 10, 24)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.features(pixels), expected, rtol=0, atol=1e-5)  # training path


@pytest.mark.parametrize("pooling", ["class_token", "mean"])
def test_every_patch_and_its_place_count(pooling: str) -> None:
    model = build(pooling=pooling)
    assert model.positions.shape[0] == (10 if pooling == "class_token" else 9)
    pixels = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    before = model(pixels)
    assert before.shape == (1, 5)
    for row in range(0, 12, 4):
        for column in range(0, 12, 4):
            changed = pixels.clone()
            changed[:, :, row : row + 4, column : column + 4] += 1
            assert (model(changed) - before).abs().max() > 1e-3
    assert (model(pixels.flip(-1)) - before).abs().max() > 1e-3
    swapped = pixels.roll(4, dims=-1)  # the same patches in another order
    assert (model(swapped) - before).abs().max() > 1e-3


def test_mean_pooling_is_the_mean_of_the_patches() -> None:
    model = build(pooling="mean")
    pixels = torch.randn(2, 3, 12, 12)
    expected = model.features(pixels).mean(dim=1) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(pixels), expected, rtol=0, atol=1e-5)


def test_a_fresh_model_knows_nothing() -> None:
    model = VisionTransformer(ViTConfig(**SIZES), image_size=12, num_channels=1, num_classes=5)
    assert not model(torch.randn(3, 1, 12, 12)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 0}, "patch_size: got 0, expected at least 1"),
        ({"patch_size": 5}, "model.patch_size: got 5, expected a divisor of the image's side 12"),
        ({"num_heads": 5}, "hidden_size: got 24, expected a multiple of num_heads 5"),
        ({"dropout_probability": -1.0}, "dropout_probability: got -1.0, expected 0 to below"),
    ],
)
def test_bad_sizes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**change)
