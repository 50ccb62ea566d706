"""Write a published image tokenizer as safetensors, once: the only reader of pickles here.

A pickle may hold code. ``torch.load`` with ``weights_only`` builds tensors, numbers, texts and
containers, and refuses everything else before it runs.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vqvae.image_tokenizer import ImageTokenizer
from vqvae.pretrained.llamagen import convert_llamagen, is_llamagen
from vqvae.pretrained.load import load_tokenizer
from vqvae.serialization import CONFIG_NAME, WEIGHTS_NAME, located, read_weights, shown

USUAL_IMAGE_SIZE = 256
# Where training scripts keep a state dict, averaged weights first: GEAR's, then LlamaGen's. GEAR's
# `ema` is a decoder's, which has other names.
PLACES = ("vq_ema", "vq", "ema", "model", "state_dict")


def convert_tokenizer(source: str | Path, out: str | Path) -> ImageTokenizer:
    """Convert a file of LlamaGen's or GEAR's VQ tokenizer to a folder for ``load_tokenizer``.

    Args:
        source: A ``.safetensors`` file, or a pickle of ``torch.save`` that holds the state dict.
        out: Gets ``config.json`` and ``model.safetensors``, and must not hold them yet.

    Raises:
        ValueError: If the file is damaged, holds something other than tensors, or a tensor is
            missing, unknown, of another shape or not finite; or if ``out`` holds a tokenizer.
        OSError: If ``out`` cannot be written.
    """
    source, out = Path(source), Path(out)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if (out / name).exists():
            raise ValueError(f"out: got {out}, which holds {name}, expected a new folder")
    with located("source"):
        if not source.is_file():
            raise ValueError(f"{source}: No such file; expected a file such as vq_ds16_t2i.pt")
        is_pickle = source.suffix != ".safetensors"
        stored = read_pickle(source) if is_pickle else read_weights(source)
        with located(source):
            sizes, weights = convert_llamagen(stored)
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / WEIGHTS_NAME)
    # As transformers writes it: its images have a usual size, and others are accepted.
    kind = dict([sizes.marker])
    num_patches = USUAL_IMAGE_SIZE // sizes.downsampling
    values = {**kind, **dataclasses.asdict(sizes), "num_patches": max(1, num_patches)}
    (out / CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return load_tokenizer(out)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the state dict of an image tokenizer from a file of ``torch.save``; run no code in it.

    Raises:
        ValueError: If the file holds anything but tensors and plain values, or no such state dict,
            or numbers that are not finite.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes fail in any way
        raise ValueError(
            f"{path}: got {_reason(error)}, expected a file of torch.save with tensors alone"
        ) from None
    for place in (content, *(_at(content, name) for name in PLACES)):
        if isinstance(place, Mapping) and is_llamagen(name for name in place if type(name) is str):
            return {str(name): _checked(path, name, value) for name, value in place.items()}
    got = shown(", ".join(map(str, content)) if isinstance(content, Mapping) else type(content))
    raise ValueError(
        f"{path}: got {got}, expected the state dict of LlamaGen's or GEAR's VQ tokenizer, or one "
        f"under {', '.join(PLACES)}"
    )


def _reason(error: Exception) -> str:
    # The rest of torch's message advises how to load the object all the same.
    found = re.search(r"Unsupported \w+:? (?:GLOBAL )?\S+", str(error))
    return f"{type(error).__name__} ({shown(found[0])})" if found else type(error).__name__


def _at(content: Any, name: str) -> Any:
    return content.get(name) if isinstance(content, Mapping) else None


def _checked(path: Path, name: Any, value: Any) -> Tensor:
    """Refuse what is no plain tensor, or claims more numbers than the file holds."""
    place = f"{path}: tensor {shown(name)}"
    if not isinstance(value, Tensor):
        raise ValueError(f"{place}: got {type(value).__name__}, expected a tensor")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise ValueError(f"{place}: got {value.layout} on {value.device}, expected a dense tensor")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{place}: got {tuple(value.shape)}, which the file does not hold")
    if not torch.isfinite(value).all():
        raise ValueError(f"{place}: holds numbers that are not finite")
    return value
