"""Loading weights into a model whose sizes come from another file, which may be damaged."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def build_and_load(
    build: Callable[[], Model],
    path: Path,
    *,
    counts: Mapping[str, int],
    sizes: Mapping[str, int],
) -> Model:
    """Build a model and load its weights, strictly, after the sizes are known to fit the file.

    A config that asks for ten million layers must not be believed: to build them takes hours.

    Args:
        build: Makes the model of a config.
        path: Its safetensors file.
        counts: Fields of the config, each with the least number of tensors that it stands for.
        sizes: Fields of the config, each with a length that some tensor must reach.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: If the file is damaged or holds another model's weights.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        longest = max((size for shape in stored.values() for size in shape), default=0)
        for name, count in counts.items():
            if count > len(stored):
                raise ValueError(f"{name}: got {count}, the file holds {len(stored)} tensors")
        for name, size in sizes.items():
            if size > longest:
                raise ValueError(f"{name}: got {size}, the file's tensors end at {longest}")
        with torch.device("meta"):
            wanted = {name: tuple(value.shape) for name, value in build().state_dict().items()}
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise ValueError(
                    f"tensor {name}: got {stored.get(name)}, wanted {wanted.get(name)}"
                )
        model = build()
        model.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, RuntimeError, OverflowError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not loaded: {' '.join(str(error).split())}") from None
    return model.eval()
