"""The key-value cache: what is stored comes back, layer by layer and row by row."""

import pytest
import torch

from dalle_mini_impl.transformer.key_value_cache import KeysAndValues, KeyValueCache


def cache(max_length: int = 5) -> KeyValueCache:
    return KeyValueCache(num_layers=2, batch_size=3, num_heads=2, max_length=max_length, head_dim=4)


def test_prefix_comes_back_alone() -> None:
    store = cache()
    keys, values = torch.randn(2, 3, 2, 3, 4)
    stored = store.layer(1).update(keys, values)
    assert torch.equal(stored.keys, keys)
    assert torch.equal(stored.values, values)
    assert torch.equal(store.keys[1, :, :, :3], keys)
    assert not store.keys[0].any()  # the other layer is untouched
    assert not store.keys[1, :, :, 3:].any()


def test_positions_are_written_row_by_row_and_overwritten() -> None:
    store = cache()
    prefix = torch.randn(3, 2, 3, 4)
    store.layer(0).update(prefix, -prefix)
    positions = torch.tensor([[3, 4], [1, 2], [2, 3]])
    for _ in range(2):  # the second write replaces the first, as after a rejected draft
        keys = torch.randn(3, 2, 2, 4)
        stored = store.layer(0, positions).update(keys, -keys)
    assert stored.keys.shape[2] == 5
    for row, places in enumerate(positions):
        assert torch.equal(stored.keys[row][:, places], keys[row])
        assert torch.equal(stored.values[row][:, places], -keys[row])
    assert torch.equal(stored.keys[0, :, :3], prefix[0])
    assert torch.equal(stored.keys[1, :, 0], prefix[1, :, 0])


def test_mask_shows_each_query_its_row_up_to_itself() -> None:
    mask = cache().mask_at(torch.tensor([[0, 2], [4, 1], [3, 3]]))
    assert mask.shape == (3, 1, 2, 5)
    assert mask.sum(dim=-1).squeeze(1).tolist() == [[1, 3], [5, 2], [4, 4]]
    assert mask[0, 0, 1].tolist() == [True, True, True, False, False]


def test_too_many_positions_are_refused() -> None:
    part = torch.zeros(3, 2, 3, 4)
    with pytest.raises(RuntimeError, match="size"):
        cache(max_length=2).layer(0).update(part, part)
    with pytest.raises(RuntimeError, match="out of bounds"):
        cache(max_length=4).layer(0, torch.tensor([[2, 3, 4]] * 3)).update(part, part)


def test_selected_rows_keep_their_keys_and_context() -> None:
    store = cache()
    keys, values = torch.randn(2, 3, 2, 7, 4)
    store.contexts = [KeysAndValues(keys, values), KeysAndValues(values, keys)]
    own = torch.randn(3, 2, 5, 4)
    store.layer(0).update(own, own)
    store.select_rows(torch.tensor([2, 0, 0, 1]))
    assert len(store.contexts) == 2
    for row, old in enumerate([2, 0, 0, 1]):
        assert torch.equal(store.keys[0, row], own[old])
        assert torch.equal(store.contexts[0].keys[row], keys[old])
        assert torch.equal(store.contexts[1].keys[row], values[old])


def test_dtype_and_device_are_as_asked() -> None:
    sizes = {"num_layers": 1, "batch_size": 1, "num_heads": 1, "max_length": 1, "head_dim": 1}
    store = KeyValueCache(**sizes, device="meta", dtype=torch.bfloat16)
    assert (store.keys.dtype, store.values.device.type) == (torch.bfloat16, "meta")
