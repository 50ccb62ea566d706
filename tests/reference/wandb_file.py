"""A reader of the `.wandb` files that offline runs leave, to see what W&B would have been sent.

The file is a LevelDB log: 7 bytes of header, then blocks of 32 KiB that hold chunks
(crc32, length, type, data); a record is one chunk or a row of first, middle and last ones. Each
record is a protobuf `Record`. (wandb itself can no longer read it from Python.)
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from wandb.proto import wandb_internal_pb2

HEADER_SIZE, BLOCK_SIZE, CHUNK_HEADER_SIZE = 7, 32 * 1024, 7
FULL, LAST = 1, 4
NAMES = ("run_id", "project", "entity")


class WandbFile(TypedDict):
    """What a run recorded."""

    history: dict[str, list[Any]]
    """Key -> the values logged, in order; parts of an image set are `key.captions` and so on."""
    config: dict[str, Any]
    files: list[str]
    """Names under the run's `files/` folder, and `artifact:<type>/<name>/<path>`."""
    run_id: str
    project: str
    entity: str


def read_wandb_file(folder: Path) -> WandbFile:
    """Read `<output_dir>/wandb/offline-run-*`; `wandb.teardown()` first completes it."""
    (path,) = folder.glob("*.wandb")
    found: WandbFile = {"history": {}, "config": {}, "files": []} | dict.fromkeys(NAMES, "")
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            for item in record.history.item:
                key = item.key or ".".join(item.nested_key)
                found["history"].setdefault(key, []).append(json.loads(item.value_json))
        elif kind in ("run", "config"):
            config = record.run.config if kind == "run" else record.config
            for item in config.update:
                key = item.key or ".".join(item.nested_key)
                found["config"][key] = json.loads(item.value_json)
            if kind == "run":
                for name in NAMES:
                    found[name] = found[name] or getattr(record.run, name)
        elif kind == "files":
            found["files"] += [file.path for file in record.files.files]
        elif kind == "artifact":
            name = f"artifact:{record.artifact.type}/{record.artifact.name}"
            found["files"] += [f"{name}/{e.path}" for e in record.artifact.manifest.contents]
    return found


def _records(content: bytes) -> Iterator[bytes]:
    """Join chunks to records, checking each against its checksum."""
    position, parts = HEADER_SIZE, b""
    while position + CHUNK_HEADER_SIZE <= len(content):
        left = BLOCK_SIZE - position % BLOCK_SIZE
        if left < CHUNK_HEADER_SIZE:  # too short for a chunk: filler
            position += left
            continue
        checksum = int.from_bytes(content[position : position + 4], "little")
        size = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]
        end = position + CHUNK_HEADER_SIZE + size
        assert zlib.crc32(content[position + 6 : end]) == checksum, f"bad chunk at {position}"
        parts += content[position + CHUNK_HEADER_SIZE : end]
        if kind in (FULL, LAST):
            yield parts
            parts = b""
        position = end
