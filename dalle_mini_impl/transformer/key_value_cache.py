"""Keys and values of earlier positions, so that each new token costs one position of attention."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class KeyValueCache:
    """Preallocated keys and values of all layers: (layer, batch, head, position, head_dim)."""

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
        shape = (num_layers, batch_size, num_heads, max_length, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.contexts: list[KeysAndValues] = []
        """What each layer's cross-attention reads, if the model has any: the same at all steps."""

    def layer(
        self, index: int, positions: Int[Tensor, "batch length"] | None = None
    ) -> "LayerCache":
        """Return one layer, to be written at ``positions``, or from position 0 on when None."""
        return LayerCache(self.keys[index], self.values[index], positions)

    def mask_at(
        self, positions: Int[Tensor, "batch length"]
    ) -> Bool[Tensor, "batch 1 length max_length"]:
        """Let the query at each position attend to its row up to itself (True = may attend)."""
        stored = torch.arange(self.keys.shape[3], device=positions.device)
        return (stored <= positions.unsqueeze(-1)).unsqueeze(1)

    def select_rows(self, rows: Int[Tensor, " new_batch"]) -> None:
        """Continue old row ``rows[i]`` as row i, as beam search does with its best hypotheses."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.contexts = [KeysAndValues(*(part[rows] for part in each)) for each in self.contexts]


class KeysAndValues(NamedTuple):
    """Keys and values of one layer."""

    keys: Float[Tensor, "batch heads key_length head_dim"]
    values: Float[Tensor, "batch heads key_length head_dim"]


class LayerCache:
    """One layer of a cache, and the positions where its next keys and values go."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor | None) -> None:
        self.keys, self.values, self.positions = keys, values, positions

    def update(
        self,
        keys: Float[Tensor, "batch heads length head_dim"],
        values: Float[Tensor, "batch heads length head_dim"],
    ) -> KeysAndValues:
        """Store new keys and values, and return what to attend to."""
        if self.positions is None:
            length = keys.shape[2]
            self.keys[:, :, :length] = keys
            self.values[:, :, :length] = values
            return KeysAndValues(self.keys[:, :, :length], self.values[:, :, :length])
        # The positions are tensors and all shapes are constant, so that one captured CUDA graph
        # serves every step, and each row may be at a step of its own. Hence the whole layer is
        # returned: ``mask_at`` hides the part that is not yet written, or no longer valid.
        index = self.positions[:, None, :, None].expand_as(keys)
        self.keys.scatter_(2, index, keys)
        self.values.scatter_(2, index, values)
        return KeysAndValues(self.keys, self.values)
