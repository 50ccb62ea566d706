"""What runs leave behind, and how two of them are compared: bit for bit, but for their times."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from dalle_mini_impl.training.checkpoint import Checkpoint, newest_checkpoint
from dalle_mini_impl.training.run import save_config
from tests.reference import tiny

EVERYTHING_RANDOM = {
    "caption_dropout_probability": 0.3,
    "token_noise_probability": 0.2,
    "random_order_probability": 0.5,
    "shifted_view_probability": 0.5,
    "augmentation_ends_at": 1.0,
}
SPEEDS = ("samples_per_second", "tokens_per_second", "data_wait_fraction", "save_fraction")
TIMES = {"time", *(f"train/{name}" for name in SPEEDS)}


def config_file(config: Any) -> Path:
    """Write a run's config beside its folder, as `<output_dir>.yaml`."""
    path = Path(f"{config.output_dir}.yaml")
    save_config(config, path)
    return path


def facts_of(file: Any) -> dict[str, Any]:
    """What a generated image says of its making."""
    with Image.open(file) as image:
        return dict(json.loads(image.text["dalle_mini_impl"]))  # type: ignore[attr-defined]


def newest(out: Path) -> Checkpoint:
    """The newest checkpoint of a run, which must have one."""
    found = newest_checkpoint(out / "checkpoints")
    assert found is not None
    return found


def checkpoint_dir(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def read_files(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Files by their paths below a folder; by default all tensors."""
    paths = [path for pattern in patterns or ("*.safetensors",) for path in folder.rglob(pattern)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def timeless_rows(out: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without times and speeds."""
    rows = tiny.read_metrics(out)
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def run_results(out: Path, step: int, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Everything of a finished run that must not depend on whether it was stopped."""
    checkpoint = checkpoint_dir(out, step)
    state = json.loads((checkpoint / "state.json").read_text())["state"]
    for name in ("elapsed_seconds", *without):
        state.pop(name, None)
    return {
        "checkpoint": read_files(checkpoint),
        "model": read_files(out / "model"),
        "images": read_files(out / "samples", "*.png") if (out / "samples").exists() else {},
        "rows": timeless_rows(out),
        "state": state,
    }


def assert_same_end(one: Path, two: Path) -> None:
    """Two finished runs have the same weights, losses and evaluations."""
    assert read_files(one / "model") == read_files(two / "model")
    assert timeless_rows(one) == timeless_rows(two)
