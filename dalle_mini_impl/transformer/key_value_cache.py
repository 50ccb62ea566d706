"""Keys and values of the positions already seen, so that each new token costs one position."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalle_mini_impl.transformer.attention import KeysAndValues


class KeyValueCache:
    """A preallocated cache for all layers of one batch."""

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        max_length: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Reserve memory for ``max_length`` positions.

        Args:
            num_layers: Attention layers that share this cache.
            batch_size: Rows.
            num_heads: Heads per layer.
            max_length: Positions that fit.
            head_dim: Size of one head.
            device: Where the tensors live.
            dtype: Of keys and values.
        """
        shape = (num_layers, batch_size, num_heads, max_length, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self._lengths = [0] * num_layers
        self.contexts: list[KeysAndValues] = []
        """What each layer's cross-attention reads, if the model has any: the same at all steps."""

    @property
    def length(self) -> int:
        """Positions stored so far."""
        return self._lengths[-1]

    def layer(self, index: int) -> "LayerCache":
        """Return the part of one layer."""
        return LayerCache(self, index)

    def scatter_layer(
        self, index: int, positions: Int[Tensor, "batch length"]
    ) -> "ScatterLayerCache":
        """Return the part of one layer, to be written at given positions of each row.

        What is returned by its ``append`` has the cache's full length at every call, whatever was
        written, and no number of it is known to Python: a step that attends through it under
        ``mask_at`` can be compiled or recorded once and run at every position, and rows need not
        be equally long.

        Args:
            index: Of the layer.
            positions: Where the new keys and values of each row go.

        Returns:
            The part, as attention wants it.
        """
        return ScatterLayerCache(self.keys[index], self.values[index], positions)

    def mask_at(
        self, positions: Int[Tensor, "batch length"]
    ) -> Bool[Tensor, "batch 1 length max_length"]:
        """Let each position see what stands in its row up to itself.

        Args:
            positions: Of the queries.

        Returns:
            True = may attend.
        """
        stored = torch.arange(self.keys.shape[3], device=positions.device)
        return (stored <= positions.unsqueeze(-1)).unsqueeze(1)

    def select_rows(self, rows: Int[Tensor, " new_batch"]) -> None:
        """Continue with other rows, as beam search does with the best of its hypotheses.

        Args:
            rows: Which old row each new row continues; an old row may be taken several times.
        """
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.contexts = [KeysAndValues(*(part[rows] for part in each)) for each in self.contexts]

    def append(
        self,
        layer: int,
        keys: Float[Tensor, "batch heads new_length head_dim"],
        values: Float[Tensor, "batch heads new_length head_dim"],
    ) -> tuple[Tensor, Tensor]:
        """Store new positions of one layer.

        Args:
            layer: Index of the layer.
            keys: Of the new positions.
            values: Of the new positions.

        Returns:
            Views of all keys and all values stored for that layer.

        Raises:
            ValueError: If the positions do not fit.
        """
        start, end = self._lengths[layer], self._lengths[layer] + keys.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"cache: got {end} positions, expected at most {self.keys.shape[3]}")
        self.keys[layer, :, :, start:end] = keys
        self.values[layer, :, :, start:end] = values
        self._lengths[layer] = end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class LayerCache:
    """One layer's part of a cache, as attention wants it."""

    def __init__(self, cache: KeyValueCache, index: int) -> None:
        """Remember the cache and the layer."""
        self._cache = cache
        self._index = index

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values and return all stored so far."""
        return self._cache.append(self._index, keys, values)


class ScatterLayerCache:
    """One layer's part of a cache, written at positions that tensors hold."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Remember the layer's tensors and the positions."""
        self._keys, self._values = keys, values
        self._positions = positions

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return the whole layer, later positions included."""
        index = self._positions[:, None, :, None].expand_as(keys)
        self._keys.scatter_(2, index, keys)
        self._values.scatter_(2, index, values)
        return self._keys, self._values
