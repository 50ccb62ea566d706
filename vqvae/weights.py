"""Weights: hashed, saved, and loaded into a model whose sizes come from another file.

That file may be damaged.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

MAX_HEADER_BYTES = 1 << 20  # names and shapes of some ten thousand tensors
# Weights may be kept shorter than they are used, and whole numbers as they are.
STORED_TYPES = {"F32": torch.float32, "F16": torch.float32, "BF16": torch.float32,
                "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8,
                "BOOL": torch.bool}  # fmt: skip


def build_checked(
    build: Callable[[], Model],
    path: Path,
    *,
    counts: Mapping[str, int],
    sizes: Mapping[str, int],
    num_elements: int,
) -> Model:
    """Build a model after its sizes are known to fit the header of a weights file.

    A config that asks for ten million layers must not be believed: to build them takes hours.
    (torch's meta device would do for this, but its first ``arange`` alone imports for a second.)

    Args:
        build: Makes the model of a config.
        path: Its safetensors file.
        counts: Fields of the config, each with the least number of tensors that it stands for.
        sizes: Fields of the config, each with a length that some tensor must reach.
        num_elements: Least number of elements that the tensors must have together.

    Returns:
        The model with fresh weights; those of the file have the same names, shapes and types.

    Raises:
        ValueError: If the file is damaged or holds another model's weights.
    """
    try:
        stored = _read_header(path)
        longest = max((size for shape, _ in stored.values() for size in shape), default=0)
        for name, count in counts.items():
            if count > len(stored):
                raise ValueError(f"{name}: got {count}, the file holds {len(stored)} tensors")
        for name, size in sizes.items():
            if size > longest:
                raise ValueError(f"{name}: got {size}, the file's tensors end at {longest}")
        held = sum(prod(shape) for shape, _ in stored.values())
        if num_elements > held:
            raise ValueError(f"the config asks for {num_elements} numbers, the file holds {held}")
        model = build()
        state = model.state_dict()
        wanted = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                got, want = (_shown(each.get(name)) for each in (stored, wanted))
                raise ValueError(f"tensor {name[:80]}: got {got}, wanted {want}")
        return model
    except (SafetensorError, RuntimeError, OverflowError, OSError, ValueError) as error:
        raise _not_loaded(path, error) from None


def load_weights(model: Model, path: Path) -> Model:
    """Load a file into the model that ``build_checked`` made for it.

    Args:
        model: Changed in place.
        path: Its safetensors file.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: If the file is damaged, or a number in it is not finite.
    """
    try:
        weights = load_file(path)
        for name, value in weights.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"tensor {name}: holds numbers that are not finite")
        model.load_state_dict(weights, strict=True)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise _not_loaded(path, error) from None
    return model.eval()


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Return the shape of each tensor, and the type in which it is used."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"header: got {header_bytes} bytes, wanted up to {MAX_HEADER_BYTES}")
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        return {
            name: (tuple(part.get_shape()), STORED_TYPES.get(part.get_dtype()))
            for name, part in parts.items()
        }


def _shown(stored: tuple[tuple[int, ...], torch.dtype | None] | None) -> str:
    if stored is None:
        return "none"
    shape, dtype = stored
    return f"{str(shape)[:80]} of {str(dtype).removeprefix('torch.') if dtype else 'another type'}"


def _not_loaded(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not loaded: {' '.join(str(error).split())[:300]}")


def hash_weights(config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hash a config and weights.

    Args:
        config: What JSON can hold.
        weights: Names and tensors, in any order.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(config).encode())
    for name, tensor in sorted(weights, key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_weights(model: nn.Module, path: Path, *, dtype: torch.dtype) -> None:
    """Write the weights of a model as safetensors.

    Args:
        model: On any device.
        path: File to write.
        dtype: Of the floating-point ones.
    """
    weights = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, path)
