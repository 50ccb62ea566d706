"""The key-value cache: what goes in comes out, layer by layer."""

import pytest
import torch

from dalle_mini_impl.transformer.attention import KeysAndValues
from dalle_mini_impl.transformer.key_value_cache import KeyValueCache


def cache(max_length: int = 5) -> KeyValueCache:
    return KeyValueCache(num_layers=2, batch_size=3, num_heads=2, max_length=max_length, head_dim=4)


def test_everything_appended_comes_back_in_order() -> None:
    store = cache()
    parts = [torch.randn(2, 3, 2, length, 4) for length in (3, 1, 1)]
    for keys, values in parts:
        for layer in range(2):
            seen_keys, seen_values = store.layer(layer).append(keys + layer, values - layer)
    assert store.length == 5
    keys, values = torch.cat(parts, dim=3)
    assert torch.equal(seen_keys, keys + 1)
    assert torch.equal(seen_values, values - 1)
    assert torch.equal(store.keys[0], keys)  # the other layer is untouched
    assert torch.equal(store.values[0], values)


def test_too_many_positions_are_refused() -> None:
    store = cache(max_length=4)
    part = torch.zeros(3, 2, 3, 4)
    store.append(0, part, part)
    with pytest.raises(ValueError, match="cache: got 6 positions, expected at most 4"):
        store.append(0, part, part)


def test_selected_rows_keep_their_context() -> None:
    store = cache()
    keys, values = torch.randn(2, 3, 2, 7, 4)
    store.contexts = [KeysAndValues(keys, values), KeysAndValues(values, keys)]
    store.select_rows(torch.tensor([2, 0, 0, 1]))
    assert len(store.contexts) == 2
    for row, old in enumerate([2, 0, 0, 1]):
        assert torch.equal(store.contexts[0].keys[row], keys[old])
        assert torch.equal(store.contexts[1].keys[row], values[old])


def test_dtype_and_device_are_as_asked() -> None:
    store = KeyValueCache(
        num_layers=1,
        batch_size=1,
        num_heads=1,
        max_length=1,
        head_dim=1,
        device="meta",
        dtype=torch.bfloat16,
    )
    assert (store.keys.dtype, store.values.device.type) == (torch.bfloat16, "meta")
