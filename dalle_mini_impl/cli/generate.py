"""What ``generate.py`` does: prompts in, PNG files and one grid out, on any number of processes."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from dalle_mini_impl.cli.image_files import (
    grid_name,
    image_name,
    next_number,
    save_image,
)
from dalle_mini_impl.clip_ranker import load_clip_ranker
from dalle_mini_impl.data.image_grid import make_grid
from dalle_mini_impl.data.images import read_image_file
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.hardware import is_out_of_memory, use_fast_float32
from dalle_mini_impl.native.decoder import NativeWeights
from dalle_mini_impl.output_dirs import make_folder
from dalle_mini_impl.pipeline import Rank, TextToImagePipeline

logger = logging.getLogger(__name__)

IMAGES_AT_A_TIME = 64  # generated, then written: so much is lost at most
CLIP_FOLDER = "clip"  # of a model folder
MAX_IMAGES = 100_000  # of one call: days of generation, and a slip of the finger beyond


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Which of several candidates is kept."""

    by: Literal["likelihood", "clip", "none"] = "likelihood"
    """The decoder's own likelihoods, a CLIP, or nothing: then it is the first one."""
    clip: str | None = None
    """The CLIP: a folder, or a name on the Hub. The folder ``clip`` of the model when None."""

    def check(self, model: str) -> None:
        """Refuse what cannot rank, before anything is generated or loaded.

        Args:
            model: Model folder.

        Raises:
            UserError: If there is no CLIP to rank by, or one that nobody asked for.
        """
        if self.by != "clip" and self.clip is not None:
            raise UserError(f"clip: got {self.clip} with --rank {self.by}, expected --rank clip")
        if self.by == "clip" and self.clip is None and not (Path(model) / CLIP_FOLDER).is_dir():
            raise UserError(
                f"rank: got clip, but {model} has no folder {CLIP_FOLDER}; expected --clip with a "
                "folder that train_clip.py wrote, or the name of a CLIP of transformers"
            )

    def load(self, model: str, device: torch.device) -> Rank:
        """Load the ranker.

        Args:
            model: Model folder.
            device: Where it works.

        Returns:
            What the pipeline takes.

        Raises:
            UserError: If the CLIP does not load.
        """
        if self.by != "clip":
            return self.by
        return load_clip_ranker(self.clip or Path(model) / CLIP_FOLDER).to(device)


BY_LIKELIHOOD = Ranking()


def generate_to_folder(
    model: str,
    *,
    prompts: Sequence[str],
    out: Path,
    overrides: dict[str, Any],
    ranking: Ranking = BY_LIKELIHOOD,
    native: NativeWeights | None = None,
    **counts: int,
) -> Path | None:
    """Generate every prompt's images and write them beside those of earlier calls.

    Processes share the prompts among them; an image is the same whichever process generates it.

    Args:
        model: Model folder.
        prompts: What to generate; the same prompt twice is generated once.
        out: Output folder, made if missing.
        overrides: Fields of ``SamplingConfig``.
        ranking: Which candidates are kept.
        native: Generate with the compiled pass and weights of this kind, where that is possible.
        **counts: ``num_images``, ``num_candidates`` and ``seed``, as the pipeline takes them.

    Returns:
        The grid's path on the main process, None on the others.

    Raises:
        UserError: If there is no prompt, an option is out of range, or memory or disk is full.
    """
    if not prompts:
        raise UserError("prompt: none given; expected --prompt TEXT or --prompts-file FILE")
    num_images, num_candidates, seed = (
        counts[name] for name in ("num_images", "num_candidates", "seed")
    )
    unique = list(dict.fromkeys(prompts))  # the same prompt twice would be the same images
    if len(unique) * num_images > MAX_IMAGES:
        raise UserError(
            f"num_images: got {num_images} of {len(unique)} prompts, expected at most {MAX_IMAGES} "
            "images in one call"
        )
    ranking.check(model)
    use_fast_float32()
    pipeline = TextToImagePipeline.from_pretrained(model)
    pipeline.check(unique, num_images=num_images, num_candidates=num_candidates, seed=seed)
    folder = Path(model).resolve()
    metadata = {
        # a run calls each of its models "model"
        "model": folder.parent.name if folder.name == "model" else folder.name,
        "vqvae": pipeline.vqvae.fingerprint(),
        "num_candidates": num_candidates,
        **({} if ranking == BY_LIKELIHOOD else {"rank": ranking.by}),
        **dataclasses.asdict(pipeline.resolve_sampling_config(overrides)),
    }
    make_folder(out, field="out")
    processes = _Processes()
    pipeline.to(processes.device)
    rank = ranking.load(model, processes.device)
    if native is not None:
        pipeline.use_native(native)
    metadata |= pipeline.native_metadata
    # Every process asks before any of them writes.
    first = processes.gather([next_number(out)])[0]
    total_images = len(unique) * num_images
    logger.info(f"generation {total_images} image{'s' if total_images > 1 else ''}")
    mine = processes.split(list(enumerate(unique, start=first)))
    written: list[tuple[int, int, str, str]] = []
    with resources(out):
        for part, offset, count in _parts(mine, num_images):
            generated = pipeline(
                list(part.values()),
                num_images=count,
                seed=seed + offset * num_candidates,
                num_candidates=num_candidates,
                rank=rank,
                **overrides,
            )
            places = [(number, offset + index) for number in part for index in range(count)]
            facts = zip(places, generated.images, generated.prompts, generated.seeds, strict=True)
            for place, image, prompt, image_seed in facts:
                path = out / image_name(place[0], prompt, image_seed)
                save_image(image, path, prompt=prompt, seed=image_seed, metadata=metadata)
                written.append((*place, str(path), prompt))
            if len(mine) * num_images > IMAGES_AT_A_TIME:
                logger.info(f"{len(written)} of {len(mine) * num_images} generated")
        written = sorted(processes.gather(written))
        if not processes.is_main:
            return None
        grid = out / grid_name(first)
        _write_grid(grid, [entry[2:] for entry in written], columns=num_images)
    return grid


def _parts(
    numbered: Sequence[tuple[int, str]], num_images: int
) -> Iterator[tuple[dict[int, str], int, int]]:
    """Split the work into (prompts by number, first image of each, images of each)."""
    prompts_at_a_time = max(IMAGES_AT_A_TIME // num_images, 1)
    for start in range(0, len(numbered), prompts_at_a_time):
        part = dict(numbered[start : start + prompts_at_a_time])
        for offset in range(0, num_images, IMAGES_AT_A_TIME):
            yield part, offset, min(num_images - offset, IMAGES_AT_A_TIME)


class _Processes:
    """The processes of this call: one, unless a launcher started more."""

    def __init__(self) -> None:
        self._accelerator = None
        if "WORLD_SIZE" in os.environ or torch.accelerator.is_available():
            # Imported here: Accelerate takes a second, and one process on a CPU has no use for it.
            from dalle_mini_impl.hardware import build_accelerator

            # float32: the last bits decide which image it is
            self._accelerator = build_accelerator("no")
        self.device = self._accelerator.device if self._accelerator else torch.device("cpu")
        self.is_main = self._accelerator is None or self._accelerator.is_main_process

    def split(self, items: list[Any]) -> list[Any]:
        if self._accelerator is None:
            return items
        with self._accelerator.split_between_processes(items) as mine:
            return list(mine)

    def gather(self, items: list[Any]) -> list[Any]:
        if self._accelerator is None:
            return items
        from accelerate.utils import gather_object

        return list(gather_object(items))


@contextmanager
def resources(out: Path) -> Iterator[None]:
    """Say in one line that memory or disk is full; what was written before stays.

    Args:
        out: The folder that images are written to.

    Yields:
        Nothing.

    Raises:
        UserError: If one of them is.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "memory: not enough to generate; lower --num-candidates or --num-images, or close other "
            f"programs. Images generated before are in {out}"
        ) from None
    except OSError as error:
        raise UserError(
            f"out: writing into {out} failed: {error.strerror or error}; expected free space in a "
            "folder that can be written to. Images written before are intact"
        ) from None


def _write_grid(path: Path, written: Sequence[tuple[str, str]], *, columns: int) -> None:
    """Lay out what all processes wrote, a row for each prompt."""
    images = []
    for source_image, _ in written:
        with Image.open(source_image) as image:
            images.append(image.convert("RGB"))
    make_grid(images, columns=columns, captions=[prompt for _, prompt in written]).save(path)


def read_prompts(path: Path) -> list[str]:
    """Read a text file with one prompt per line; empty lines are passed over.

    Args:
        path: In UTF-8.

    Returns:
        The prompts.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"prompts-file: {path}: {reason}; expected a UTF-8 text file") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


@dataclasses.dataclass(frozen=True)
class InpaintingOptions:
    """An image, and which part of it is inpainted: one of the last three."""

    image: Path | None
    """The image's file."""
    mask: Path | None = None
    """An image as large, white where it is inpainted."""
    keep_rows: int | None = None
    """Rows of image tokens at the top that stay."""
    keep_fraction: float | None = None
    """Fraction of the image tokens that stay."""


def inpaint_to_folder(
    model: str,
    *,
    inpainting: InpaintingOptions,
    prompts: Sequence[str],
    out: Path,
    overrides: dict[str, Any],
    ranking: Ranking = BY_LIKELIHOOD,
    native: NativeWeights | None = None,
    **counts: int,
) -> Path | None:
    """Inpaint a part of an image for every prompt, and write the results.

    One image is little work: where several processes run, the first one does it all.

    Args:
        model: Model folder.
        inpainting: The image and the part.
        prompts: What the whole image shall show.
        out: Output folder, made if missing.
        overrides: Fields of ``SamplingConfig``.
        ranking: By likelihood; here there is no other.
        native: Generate with the compiled pass and weights of this kind, where that is possible.
        **counts: ``num_images``, ``num_candidates`` and ``seed``, as the pipeline takes them.

    Returns:
        The grid's path on the main process, None on the others.

    Raises:
        UserError: If a file cannot be read, or an option is out of range.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    if inpainting.image is None:
        raise UserError(
            "image: none given; expected --image with --mask, --keep-rows or --keep-fraction"
        )
    if not prompts:
        raise UserError("prompt: none given; expected --prompt TEXT or --prompts-file FILE")
    if ranking != BY_LIKELIHOOD:
        raise UserError(f"rank: got {ranking.by} with --image, expected likelihood and no --clip")
    source_image = read_image_file(inpainting.image, field="image")
    mask = None if inpainting.mask is None else read_image_file(inpainting.mask, field="mask")
    use_fast_float32()
    pipeline = TextToImagePipeline.from_pretrained(model)
    metadata = {
        "model": Path(model).resolve().parent.name,
        "vqvae": pipeline.vqvae.fingerprint(),
        **{name: _shown(value) for name, value in vars(inpainting).items() if value is not None},
        "num_candidates": counts.get("num_candidates", 1),
        **dataclasses.asdict(pipeline.resolve_sampling_config(overrides)),
    }
    if native is not None:
        pipeline.use_native(native)
    metadata |= pipeline.native_metadata
    make_folder(out, field="out")
    first = next_number(out)
    unique = list(dict.fromkeys(prompts))
    columns = counts.get("num_images", 1)
    total_images = len(unique) * columns
    logger.info(f"generation {total_images} image{'s' if total_images > 1 else ''}")
    with resources(out):
        generated = pipeline.inpaint(
            unique,
            source_image,
            mask=mask,
            keep_rows=inpainting.keep_rows,
            keep_fraction=inpainting.keep_fraction,
            **counts,
            **overrides,
        )
        for image, prompt, seed in zip(
            generated.images, generated.prompts, generated.seeds, strict=True
        ):
            path = out / image_name(first + unique.index(prompt), prompt, seed)
            save_image(image, path, prompt=prompt, seed=seed, metadata=metadata)
        grid = out / grid_name(first)
        make_grid(generated.images, columns=columns, captions=generated.prompts).save(grid)
    return grid


def _shown(value: Any) -> Any:
    """Name a file without its folder, which is the user's own affair."""
    return value.name if isinstance(value, Path) else value
