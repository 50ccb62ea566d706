"""What ``generate.py`` does: prompts in, PNG files and one grid out, on any number of processes."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from PIL import Image

from dalle_mini_impl.data.images import make_grid
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.folders import make_folder
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.picture_files import picture_name, save_picture
from dalle_mini_impl.training.precision import use_fast_float32
from dalle_mini_impl.training.sources import build_accelerator

PROMPTS_AT_A_TIME = 64


def draw_to_folder(
    model: str,
    *,
    prompts: Sequence[str],
    num_images: int,
    num_candidates: int,
    seed: int,
    out: Path,
    overrides: dict[str, Any],
    show: Callable[[str], None] = lambda line: None,
) -> Path | None:
    """Draw every prompt's pictures and write them.

    Processes share the prompts among them; a picture is the same whichever process draws it.

    Args:
        model: Model folder.
        prompts: What to draw; the same prompt twice is drawn once.
        num_images: Pictures per prompt.
        num_candidates: Pictures drawn for each one kept.
        seed: Of the first picture of each prompt.
        out: Output folder, made if missing.
        overrides: Fields of ``SamplingConfig``.
        show: Receives plain lines about the work, on the main process.

    Returns:
        The grid's path on the main process, None on the others.

    Raises:
        UserError: If there is no prompt, or an option is out of range.
    """
    if not prompts:
        raise UserError("prompt: none given; wanted --prompt TEXT or --prompts-file FILE")
    unique = list(dict.fromkeys(prompts))  # the same prompt twice would be the same pictures
    use_fast_float32()
    pipeline = TextToImagePipeline.from_pretrained(model)
    pipeline.check(unique, num_images=num_images, num_candidates=num_candidates, seed=seed)
    make_folder(out, field="out")
    processes = build_accelerator("no")  # float32: the last bits decide which picture it is
    pipeline.to(processes.device)
    settings = {
        "model": Path(model).resolve().parent.name,
        "vqvae": pipeline.vqvae.fingerprint(),
        "num_candidates": num_candidates,
        **dataclasses.asdict(pipeline.settings),
        **overrides,
    }
    show = show if processes.is_main_process else (lambda line: None)
    show(f"drawing {len(unique) * num_images} pictures")
    written: list[tuple[str, str]] = []
    with processes.split_between_processes(list(enumerate(unique))) as mine:
        for start in range(0, len(mine), PROMPTS_AT_A_TIME):
            part = dict(mine[start : start + PROMPTS_AT_A_TIME])
            drawn = pipeline(
                list(part.values()),
                num_images=num_images,
                seed=seed,
                num_candidates=num_candidates,
                **overrides,
            )
            numbers = [number for number in part for _ in range(num_images)]
            facts = zip(numbers, drawn.images, drawn.prompts, drawn.seeds, strict=True)
            for number, image, prompt, image_seed in facts:
                path = out / picture_name(number, prompt, image_seed)
                save_picture(image, path, prompt=prompt, seed=image_seed, settings=settings)
                written.append((str(path), prompt))
            if len(mine) > PROMPTS_AT_A_TIME:
                show(f"{len(written)} of {len(mine) * num_images} drawn")
    written = gather_object(written)  # in the order of the processes, which is that of the prompts
    grid = out / "grid.png"
    if processes.is_main_process:
        _write_grid(grid, written, columns=num_images)
    return grid if processes.is_main_process else None


def _write_grid(path: Path, written: Sequence[tuple[str, str]], *, columns: int) -> None:
    """Lay out what all processes wrote, a row for each prompt."""
    images = []
    for picture, _ in written:
        with Image.open(picture) as image:
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
        raise UserError(f"prompts-file: {path}: {reason}; wanted a UTF-8 text file") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
