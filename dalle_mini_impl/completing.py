"""What ``generate.py --image`` does: a picture in, versions with a part redrawn out."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dalle_mini_impl.cli.generate import BY_LIKELIHOOD, Ranking, resources
from dalle_mini_impl.cli.image_files import (
    grid_name,
    next_number,
    picture_name,
    save_picture,
)
from dalle_mini_impl.data.images import make_grid, read_picture
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.hardware import use_fast_float32
from dalle_mini_impl.native.decoder import NativeWeights
from dalle_mini_impl.output_dirs import make_folder
from dalle_mini_impl.pipeline import TextToImagePipeline


@dataclasses.dataclass(frozen=True)
class Edit:
    """A picture, and which part of it is redrawn: one of the last three."""

    image: Path | None
    """The picture's file."""
    mask: Path | None = None
    """A picture as large, white where it is redrawn."""
    keep_rows: int | None = None
    """Rows of image tokens at the top that stay."""
    keep_share: float | None = None
    """Share of the image tokens that stay."""


def complete_to_folder(
    model: str,
    *,
    edit: Edit,
    prompts: Sequence[str],
    out: Path,
    overrides: dict[str, Any],
    ranking: Ranking = BY_LIKELIHOOD,
    show: Callable[[str], None] = lambda line: None,
    native: NativeWeights | None = None,
    **counts: int,
) -> Path | None:
    """Redraw a part of a picture for every prompt, and write the results.

    One picture is little work: where several processes run, the first one does it all.

    Args:
        model: Model folder.
        edit: The picture and the part.
        prompts: What the whole picture shall show.
        out: Output folder, made if missing.
        overrides: Fields of ``SamplingConfig``.
        ranking: By likelihood; here there is no other.
        show: Receives plain lines about the work.
        native: Draw with the compiled pass and weights of this kind, where that is possible.
        **counts: ``num_images``, ``num_candidates`` and ``seed``, as the pipeline takes them.

    Returns:
        The grid's path on the main process, None on the others.

    Raises:
        UserError: If a file cannot be read, or an option is out of range.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    if edit.image is None:
        raise UserError(
            "image: none given; wanted --image with --mask, --keep-rows or --keep-share"
        )
    if not prompts:
        raise UserError("prompt: none given; wanted --prompt TEXT or --prompts-file FILE")
    if ranking != BY_LIKELIHOOD:
        raise UserError(f"rank: got {ranking.by} with --image, wanted likelihood and no --clip")
    picture = read_picture(edit.image, field="image")
    mask = None if edit.mask is None else read_picture(edit.mask, field="mask")
    use_fast_float32()
    pipeline = TextToImagePipeline.from_pretrained(model)
    settings = {
        "model": Path(model).resolve().parent.name,
        "vqvae": pipeline.vqvae.fingerprint(),
        **{name: _shown(value) for name, value in vars(edit).items() if value is not None},
        "num_candidates": counts.get("num_candidates", 1),
        **dataclasses.asdict(pipeline.sampling_settings(overrides)),
    }
    if native is not None:
        pipeline.use_native(native)
    settings |= pipeline.native_settings
    make_folder(out, field="out")
    first = next_number(out)
    unique = list(dict.fromkeys(prompts))
    columns = counts.get("num_images", 1)
    num_pictures = len(unique) * columns
    show(f"drawing {num_pictures} picture{'s' if num_pictures > 1 else ''}")
    with resources(out):
        drawn = pipeline.complete(
            unique,
            picture,
            mask=mask,
            keep_rows=edit.keep_rows,
            keep_share=edit.keep_share,
            **counts,
            **overrides,
        )
        for image, prompt, seed in zip(drawn.images, drawn.prompts, drawn.seeds, strict=True):
            path = out / picture_name(first + unique.index(prompt), prompt, seed)
            save_picture(image, path, prompt=prompt, seed=seed, settings=settings)
        grid = out / grid_name(first)
        make_grid(drawn.images, columns=columns, captions=drawn.prompts).save(grid)
    return grid


def _shown(value: Any) -> Any:
    """Name a file without its folder, which is the user's own affair."""
    return value.name if isinstance(value, Path) else value
