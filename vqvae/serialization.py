"""Reading a model folder that may be damaged, or made to do harm: small files, exact types."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Config = TypeVar("Config")
MAX_JSON_BYTES = 1 << 20
_MAX_SHOWN = 80  # characters of a value in a message
Model = TypeVar("Model", bound=nn.Module)
MAX_HEADER_BYTES = 1 << 20  # names and shapes of some ten thousand tensors
# Weights may be kept shorter than they are used, and whole numbers as they are.
STORED_TYPES = {"F32": torch.float32, "F16": torch.float32, "BF16": torch.float32,
                "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8,
                "BOOL": torch.bool}  # fmt: skip


def own_file(folder: Path, name: str) -> Path:
    """Find a file of a folder that does not lead out of it.

    Links inside the folder are followed, and so are those of the cache of the Hugging Face Hub,
    whose ``snapshots/REVISION`` link into the ``blobs`` beside it.

    Args:
        folder: A model folder.
        name: Path of the file in it.

    Returns:
        The file's path.

    Raises:
        ValueError: If there is no such regular file, or a link leads elsewhere.
    """
    path, root = folder / name, folder.resolve()
    if not path.is_file():
        raise ValueError(f"{path}: No such file; expected a regular file")
    cache = [up.parent / "blobs" for up in root.parents[:2] if up.name == "snapshots"]
    target = path.resolve()
    if not any(target.is_relative_to(place) for place in (root, *cache)):
        raise ValueError(f"{path}: a link that leads out of the folder; expected the file itself")
    return path


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object, without believing it.

    Args:
        path: A regular file in UTF-8.
        max_bytes: More are not read.

    Returns:
        Its values.

    Raises:
        ValueError: If it is too large, no JSON object, nested too deeply, has a key twice, or a
            number that is not finite.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path}: larger than {max_bytes} bytes")
    try:
        values = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_without_twins,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {shown(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {type(values).__name__}, expected an object")
    return values


def build_config(config_class: type[Config], values: Any) -> Config:
    """Make a config of stored values, all of them there and each of its field's own type.

    A default in place of a missing value would be another model. Only fields whose metadata says
    ``later`` may be missing: their default is what files mean that are older than the field.

    Args:
        config_class: A dataclass of numbers, words, tuples and such dataclasses.
        values: As JSON gave them.

    Returns:
        The config.

    Raises:
        ValueError: If a field is missing, unknown, of another type or out of range.
    """
    name = config_class.__name__
    if not isinstance(values, dict):
        raise ValueError(f"{name}: got {shown(repr(values))}, expected an object")
    hints = get_type_hints(config_class)
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    older = {each.name for each in fields if "later" in each.metadata} - values.keys()
    odd = sorted((values.keys() ^ hints.keys()) - older)
    if odd:
        raise ValueError(f"{name}: unknown or missing fields: {shown(', '.join(odd))}")
    return config_class(**{key: _typed(key, value, hints[key]) for key, value in values.items()})


def shown(value: object) -> str:
    """Shorten what goes into a message.

    Args:
        value: Of any length.

    Returns:
        Its beginning, on one line.
    """
    text = " ".join(str(value).split())
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _typed(key: str, value: Any, expected: Any) -> Any:
    """Return a value if it is of the expected type; True is no number, and 1.0 no count."""
    if dataclasses.is_dataclass(expected):
        return build_config(expected, value)  # type: ignore[arg-type]
    kinds = get_args(expected)
    if get_origin(expected) is Literal:
        fits, kind = any(value == each and type(value) is type(each) for each in kinds), kinds
        words = f"one of {', '.join(map(str, kind))}"
    elif get_origin(expected) is tuple:
        any_length = kinds[-1] is Ellipsis
        fits = isinstance(value, list) and all(type(each) is kinds[0] for each in value)
        fits = fits and (any_length or len(value) == len(kinds))
        words = "a list of whole numbers" if any_length else f"{len(kinds)} whole numbers"
        words = words.replace("whole numbers", "words") if kinds[0] is str else words
        value = tuple(value) if fits else value
    elif expected is float:
        fits, words = type(value) in (int, float), "a number"
        value = float(value) if fits else value
    else:
        names = {int: "a whole number", str: "text", bool: "true or false"}
        fits, words = type(value) is expected, names[expected]
    if not fits:
        raise ValueError(f"{key}: got {shown(repr(value))}, expected {words}")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in values if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twin)!r} is there twice")
    return values


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"got the number {shown(text)}, expected finite ones")
    return number


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
        expected = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
        for name in sorted(stored.keys() | expected.keys()):
            if stored.get(name) != expected.get(name):
                got, want = (_shown(each.get(name)) for each in (stored, expected))
                raise ValueError(f"tensor {name[:80]}: got {got}, expected {want}")
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
        raise ValueError(f"header: got {header_bytes} bytes, expected up to {MAX_HEADER_BYTES}")
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
