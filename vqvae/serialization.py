"""JSON and safetensors of every model of the project, checked before memory is spent.

A model folder may be damaged or hostile. So JSON is small and has exact types, every field of a
config is there, a model is built only if its sizes fit the header of its weights, and weights are
finite. Used by the image tokenizers here, and by the pipeline, the CLIP ranker and the translator.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from math import prod
from operator import attrgetter
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT_VERSION = 1  # of an image tokenizer's config.json
MAX_JSON_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20  # names and shapes of some ten thousand tensors
# Floating-point weights may be stored in half precision; integers have one type each.
LOADED_TYPES = {
    "F32": torch.float32,
    "F16": torch.float32,
    "BF16": torch.float32,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def own_file(folder: Path, name: str) -> Path:
    """Return the path of a regular file in a folder; ``ValueError`` if a link leads out of it."""
    path, root = folder / name, folder.resolve()
    if not path.is_file():
        raise ValueError(f"{path}: No such file; expected a regular file")
    # The Hugging Face Hub's cache links from snapshots/REVISION into the blobs beside snapshots.
    cache = [up.parent / "blobs" for up in root.parents[:2] if up.name == "snapshots"]
    target = path.resolve()
    if not any(target.is_relative_to(place) for place in (root, *cache)):
        raise ValueError(f"{path}: a link that leads out of the folder; expected the file itself")
    return path


def shown(value: object, max_length: int = 80) -> str:
    """Return the beginning of a value on one line, for a message."""
    text = " ".join(str(value).split())
    return text if len(text) <= max_length else f"{text[:max_length]}..."


@contextmanager
def located(place: object, errors: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Turn errors into a ``ValueError`` of one line that begins with their place."""
    try:
        yield
    except errors as error:
        raise ValueError(f"{place}: {shown(error, 300)}") from None


# JSON and configs


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a regular file in UTF-8, without trusting it.

    Raises:
        ValueError: If it is too large, no JSON object, nested too deeply, has a key twice, or a
            number that is not finite.
        OSError: If it cannot be read.
    """
    # Not by the size that the file claims: a device has none, and it may grow.
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
    # Python's own reader takes NaN, keeps the last of two equal keys, and may exhaust the stack.
    try:
        values = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique_keys,
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
    """Build a config dataclass from JSON values: exactly its fields, each of its own type.

    Fields may be numbers, text, Literals, tuples, unions of these and such dataclasses.
    ``ValueError`` if one is missing, unknown, of another type or out of range.
    """
    name = config_class.__name__
    if not isinstance(values, dict):
        raise ValueError(f"{name}: got {shown(repr(values))}, expected an object")
    hints = get_type_hints(config_class)
    names = {each.name for each in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    # A missing field is no less wrong than an unknown one: its default may be another model.
    odd = sorted(values.keys() ^ names)
    if odd:
        raise ValueError(f"{name}: unknown or missing fields: {shown(', '.join(odd))}")
    return config_class(**{key: typed(key, value, hints[key]) for key, value in values.items()})


def typed(key: str, value: Any, expected: Any) -> Any:
    """Return a JSON value, lists as tuples; ``ValueError`` if its type is not the expected one."""
    if dataclasses.is_dataclass(expected):
        return build_config(expected, value)  # type: ignore[arg-type]
    kinds = get_args(expected) if isinstance(expected, UnionType) else (expected,)
    found = [_fit(value, kind) for kind in kinds]
    for fits, _, fitting in found:
        if fits:
            return fitting
    words = " or ".join(words for _, words, _ in found)
    raise ValueError(f"{key}: got {shown(repr(value))}, expected {words}")


def _fit(value: Any, expected: Any) -> tuple[bool, str, Any]:
    """Tell whether a value has a type, which one in words, and return it, a list as a tuple."""
    # `type`, not `isinstance`: True is no number, and 1.0 no whole one.
    kinds = get_args(expected)
    if get_origin(expected) is Literal:
        fits = any(value == each and type(value) is type(each) for each in kinds)
        words = f"one of {', '.join(map(str, kinds))}"
    elif get_origin(expected) is tuple:
        any_length = kinds[-1] is Ellipsis
        fits = isinstance(value, list) and all(type(each) is kinds[0] for each in value)
        fits = fits and (any_length or len(value) == len(kinds))
        elements = "words" if kinds[0] is str else "whole numbers"
        words = f"a list of {elements}" if any_length else f"{len(kinds)} {elements}"
        value = tuple(value) if fits else value
    elif expected is float:
        fits, words = type(value) in (int, float), "a number"
        value = float(value) if fits else value
    else:
        fits = type(value) is expected
        words = {int: "a whole number", str: "text", bool: "true or false"}[expected]
    return fits, words, value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
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


# Weights


def build_checked(
    build: Callable[[], Model],
    path: Path,
    *,
    counts: Mapping[str, int],
    sizes: Mapping[str, int],
    num_elements: int,
) -> Model:
    """Build a model if the sizes of its config fit the header of a safetensors file.

    Args:
        build: Builds the model, with fresh weights.
        path: The weights; their names, shapes and types must be those of the model.
        counts: By field of the config, a lower bound of the number of tensors.
        sizes: By field of the config, a lower bound of the longest side of all tensors.
        num_elements: A lower bound of the number of elements of all tensors together.

    Raises:
        ValueError: If the file is damaged or holds another model's weights.
    """
    with _not_loaded(path):
        # 1. compare the config with the header: to build ten million layers would take hours. (The
        #    meta device saves memory, not time, and its first `arange` imports for a second.)
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
        # 2. build the model and compare tensor by tensor
        model = build()
        state = model.state_dict()
        expected = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
        for name in sorted(stored.keys() | expected.keys()):
            got, want = stored.get(name), expected.get(name)
            if got != want:
                raise ValueError(f"tensor {name[:80]}: got {_shape(got)}, expected {_shape(want)}")
    return model


def sizes_of(config: object, *names: str) -> dict[str, int]:
    """Look up (dotted) fields of a config for ``build_checked``; a tuple counts as its largest."""
    values = {name: attrgetter(name)(config) for name in names}
    return {name: max(each) if type(each) is tuple else each for name, each in values.items()}


def load_weights(model: Model, path: Path) -> Model:
    """Load a safetensors file into a model, strictly, and set it to evaluation mode.

    Raises:
        ValueError: If the file is damaged, or a number in it is not finite.
    """
    weights = read_weights(path)
    with _not_loaded(path):
        model.load_state_dict(weights, strict=True)
    return model.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; ``ValueError`` if it is damaged or not finite."""
    with _not_loaded(path):
        weights = load_file(path)
        for name, value in weights.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"tensor {name[:80]}: holds numbers that are not finite")
    return weights


def tensor_names(path: Path) -> set[str]:
    """Read the names of a safetensors file's tensors; ``ValueError`` if it is damaged."""
    with _not_loaded(path):
        return set(_read_header(path))


def save_weights(model: nn.Module, path: Path, *, dtype: torch.dtype) -> None:
    """Write the weights of a model as safetensors, the floating-point ones as ``dtype``."""
    weights = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, path)


def hash_weights(config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hash a config of JSON values and weights, in any order, to 16 hexadecimal digits."""
    # In the order of names: the order of a state dict may change without changing the model.
    digest = hashlib.sha256(json.dumps(config).encode())
    for name, tensor in sorted(weights, key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Return the shape of each tensor, and its type once it is loaded."""
    # The first 8 bytes are the header's length; safetensors itself would read up to 100 MB.
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"header: got {header_bytes} bytes, expected up to {MAX_HEADER_BYTES}")
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        return {
            name: (tuple(part.get_shape()), LOADED_TYPES.get(part.get_dtype()))
            for name, part in parts.items()
        }


def _shape(stored: tuple[tuple[int, ...], torch.dtype | None] | None) -> str:
    if stored is None:
        return "none"
    shape, dtype = stored
    return f"{str(shape)[:80]} of {str(dtype).removeprefix('torch.') if dtype else 'another type'}"


def _not_loaded(path: Path) -> AbstractContextManager[None]:
    errors = (SafetensorError, RuntimeError, OverflowError, OSError, ValueError)
    return located(f"{path}: not loaded", errors)


# The folder of an image tokenizer


def save_tokenizer(
    folder: str | Path, model: nn.Module, config: Mapping[str, Any], *, dtype: torch.dtype
) -> None:
    """Write ``config.json`` and ``model.safetensors`` into a folder, which is made if missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / WEIGHTS_NAME, dtype=dtype)
    versioned = {"format_version": FORMAT_VERSION, **config}
    (folder / CONFIG_NAME).write_text(json.dumps(versioned, indent=2) + "\n", encoding="utf-8")


def without_version(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``save_tokenizer`` was given as ``config``; ``ValueError`` at another format."""
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version: got {shown(version)}, expected {FORMAT_VERSION}")
    return {name: value for name, value in values.items() if name != "format_version"}
