"""Run tracking that never stops a run: `metrics.jsonl` is the truth, Weights & Biases shows it.

Plain wandb instead of Accelerate's tracker, which cannot go offline when the network is missing,
and lets wandb's errors end the training. Here every wandb call may fail; the run then goes on with
`metrics.jsonl` and the images under `samples/`.
"""

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from PIL import Image

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.wandb_run import (
    GLOBAL_STEP,
    choose_mode,
    init_wandb,
    one_line,
    take_down_wandb,
)

logger = logging.getLogger(__name__)

DEFAULT_PROJECT = "dalle-mini-impl"
METRICS_NAME = "metrics.jsonl"
SAMPLES_NAME = "samples"
_UNSAFE = re.compile(r"[^\w.-]+", re.ASCII)


@dataclass(frozen=True)
class TrackingConfig:
    """How a run is followed."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """W&B mode; `auto` obeys WANDB_MODE, else is online with a key and a network, else offline."""
    project: str | None = None
    """W&B project; None: ``WANDB_PROJECT``, else dalle-mini-impl."""
    entity: str | None = None
    """W&B user or team that owns the project; None: ``WANDB_ENTITY``, else the key's own."""
    run_name: str | None = None
    """Name of the run in W&B; None lets W&B choose one."""


class Tracker:
    """Writes metrics and images; `open_tracker` makes one.

    Args:
        output_dir: Folder of the run; None where nothing is written (not the main process).
        metrics_file: `metrics.jsonl`, open for appending; closed by `close`.
    """

    run_id: str | None
    """W&B's id of the run, to be kept in checkpoints; None if W&B never started."""

    def __init__(self, output_dir: Path | None, metrics_file: TextIO | None) -> None:
        self.run_id = None
        self._output_dir = output_dir
        self._metrics_file = metrics_file
        self._run: Any = None
        self._broken_run: Any = None
        self._warned_of_files = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers; the names `step` and `time`, which every line has, are a ValueError."""
        if self._metrics_file is None:
            return
        if taken := {"step", "time"} & metrics.keys():
            raise ValueError(
                f"metrics: got the names {sorted(taken)}, which every line has already"
            )
        # To our file first: whatever W&B does afterwards, the numbers are kept.
        values = {name: float(value) for name, value in metrics.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values})
        self._to_files(lambda: self._write_line(line))
        self._to_wandb("log", lambda run: run.log({**values, GLOBAL_STEP: step}))

    def log_images(
        self, key: str, images: Sequence[Image.Image], captions: Sequence[str], step: int
    ) -> None:
        """Record images: as one PNG with a text file of captions, in W&B one by one."""
        if len(images) != len(captions) or not images:
            raise ValueError(
                f"images: got {len(images)} for {len(captions)} captions, expected one each"
            )
        if self._output_dir is None:
            return
        # A key is no file name: `samples/validation`.
        path = self._output_dir / SAMPLES_NAME / f"{_UNSAFE.sub('_', key)}_{step:08d}.png"
        self._to_files(lambda: _write_grid(path, images, captions))

        def send(run: Any) -> None:
            import wandb

            pairs = zip(images, captions, strict=True)
            wandb_images = [wandb.Image(image, caption=caption) for image, caption in pairs]
            run.log({key: wandb_images, GLOBAL_STEP: step})

        self._to_wandb("log images", send)

    def log_table(
        self, key: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int
    ) -> None:
        """Show a table in W&B; in no file of ours."""

        def send(run: Any) -> None:
            import wandb

            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            run.log({key: table, GLOBAL_STEP: step})

        self._to_wandb("log a table", send)

    def log_artifact(self, folder: Path, name: str, type: str) -> None:
        """Keep a folder with the run in W&B; characters of the name that W&B refuses become `_`.

        The folder is uploaded from where it is: it must not change until `close` (or, offline,
        until `wandb sync`).
        """

        def send(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(_UNSAFE.sub("_", name), type)
            # Without copies into wandb's cache in the home folder, which is never emptied.
            artifact.add_dir(str(folder.resolve()), policy="immutable", skip_cache=True)
            run.log_artifact(artifact)

        self._to_wandb("log an artifact", send)

    def close(self) -> None:
        """Finish the run; online, wait at most 5 minutes for uploads. Later calls do nothing."""
        # Metrics are closed last, and whatever W&B did.
        self._to_wandb("finish", lambda run: run.finish())
        self._run = None
        if self._broken_run is not None:
            take_down_wandb(self._broken_run)
            self._broken_run = None
        if self._metrics_file is not None:
            self._to_files(self._metrics_file.close)
        self._metrics_file = self._output_dir = None

    def _start_wandb(
        self, config: TrackingConfig, run_config: Mapping[str, Any], run_id: str | None
    ) -> None:
        """Start the W&B run, offline if online fails, or warn and go on without."""
        assert self._output_dir is not None
        folder = self._output_dir.resolve()
        mode: str = config.mode
        names: Any = {
            "project": config.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
            "entity": config.entity,
            "run_name": config.run_name,
            "run_id": run_id,
        }
        try:
            if mode == "auto":
                mode = choose_mode()
            if mode == "disabled":
                return
            try:
                self._run = init_wandb(mode, folder, run_config, **names)
            except Exception as error:
                # An offline record can still be sent later.
                if mode != "online":
                    raise
                logger.warning("W&B: cannot go online (%s); recording offline", one_line(error))
                mode = "offline"
                self._run = init_wandb(mode, folder, run_config, **names)
        # wandb talks to a network and to a process of its own. It may fail in any way at any time,
        # and no failure is worth a training run.
        except Exception as error:
            logger.warning("W&B: cannot start (%s); only %s", one_line(error), METRICS_NAME)
            return
        self.run_id = self._run.id
        where = self._run.url if mode == "online" else f"offline in {folder / 'wandb'}"
        logger.info("W&B: run %s, %s", self.run_id, where)

    def _to_wandb(self, what: str, call: Callable[[Any], None]) -> None:
        """Call with the run; the first failure of any kind ends W&B for this run."""
        if self._run is None:
            return
        try:
            call(self._run)
        # As in `_start_wandb`: whatever wandb raises, training goes on.
        except Exception as error:
            logger.warning(
                "W&B: cannot %s (%s); from here on only %s", what, one_line(error), METRICS_NAME
            )
            self._run, self._broken_run = None, self._run

    def _to_files(self, call: Callable[[], None]) -> None:
        """Write; a full disk costs metrics, not the run (the next checkpoint will fail)."""
        try:
            call()
        except OSError as error:
            if not self._warned_of_files:
                logger.warning("cannot write metrics or images: %s", error)
            self._warned_of_files = True

    def _write_line(self, line: str) -> None:
        assert self._metrics_file is not None
        self._metrics_file.write(line + "\n")
        self._metrics_file.flush()


def open_tracker(
    config: TrackingConfig,
    *,
    output_dir: Path,
    run_config: Mapping[str, Any],
    is_main: bool,
    resume_step: int = 0,
    run_id: str | None = None,
) -> Tracker:
    """Open `metrics.jsonl` and, unless disabled, a W&B run.

    Args:
        config: Mode, project and name.
        output_dir: Made if missing. W&B's files go to its `wandb/`.
        run_config: Shown in W&B.
        is_main: Whether this process records; on others all methods do nothing.
        resume_step: Step of the checkpoint this run continues; later lines of `metrics.jsonl`
            are dropped. At 0 the run is new, and an older file is renamed to `metrics.jsonl.old`.
        run_id: W&B id from the checkpoint, to continue that run.

    Raises:
        UserError: If nothing can be written to `output_dir`.
    """
    if not is_main:
        return Tracker(None, None)
    path = output_dir / METRICS_NAME
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        _rewind(path, resume_step)
        metrics_file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {output_dir}: {error}") from error
    tracker = Tracker(output_dir, metrics_file)
    tracker.run_id = run_id
    if config.mode != "disabled":
        tracker._start_wandb(config, run_config, run_id)
    return tracker


def _rewind(path: Path, resume_step: int) -> None:
    """Drop the lines after a step, and half-written ones of a kill."""
    if not path.exists():
        return
    if resume_step == 0:
        os.replace(path, path.with_name(f"{path.name}.old"))
        return
    # Line by line into a second file: a kill meanwhile leaves the first one as it is.
    rewound = path.with_name(f"{path.name}.new")
    with path.open("rb") as old, rewound.open("wb") as new:
        for line in old:
            try:
                keep = json.loads(line)["step"] <= resume_step
            except (ValueError, TypeError, KeyError):
                keep = False
            if keep:
                new.write(line.rstrip(b"\n") + b"\n")
    os.replace(rewound, path)


def _write_grid(path: Path, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
    """Write one PNG with all images row by row, and a text file with a caption per line."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    gap = 2
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image.convert("RGB"), (column * (width + gap), row * (height + gap)))
    path.parent.mkdir(exist_ok=True)
    grid.save(path)
    lines = [" ".join(caption.split()) for caption in captions]
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
