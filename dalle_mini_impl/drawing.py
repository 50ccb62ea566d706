"""What ``generate.py`` does: prompts in, PNG files and one grid out, on any number of processes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image

from dalle_mini_impl.data.images import make_grid
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.picture_files import picture_name, save_picture

PROMPTS_AT_A_TIME = 64


def draw_to_folder(
    model: str,
    *,
    prompts: Sequence[str],
    prompts_file: Path | None,
    num_images: int,
    num_candidates: int,
    seed: int,
    out: Path,
    overrides: dict[str, Any],
) -> Path | None:
    """Draw every prompt's pictures and write them.

    Processes share the prompts among them; a picture is the same whichever process draws it.

    Args:
        model: Model folder.
        prompts: Prompts given by hand.
        prompts_file: More prompts, one per line; empty lines are passed over.
        num_images: Pictures per prompt.
        num_candidates: Pictures drawn for each one kept.
        seed: Of the first picture of each prompt.
        out: Output folder, made if missing.
        overrides: Fields of ``SamplingConfig``.

    Returns:
        The grid's path on the main process, None on the others.

    Raises:
        UserError: If there is no prompt, or an option is out of range.
    """
    every_prompt = [*prompts, *(_read_prompts(prompts_file) if prompts_file else [])]
    if not every_prompt:
        raise UserError("prompt: none given; wanted --prompt TEXT or --prompts-file FILE")
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file; wanted a folder")
    pipeline = TextToImagePipeline.from_pretrained(model)
    state = PartialState()
    pipeline.to(state.device)
    unique = list(dict.fromkeys(every_prompt))  # the same prompt twice would be the same pictures
    settings = {
        "model": Path(model).resolve().parent.name,
        "vqvae": pipeline.vqvae.fingerprint(),
        "num_candidates": num_candidates,
        **dataclasses.asdict(pipeline.settings),
        **overrides,
    }
    out.mkdir(parents=True, exist_ok=True)
    with state.split_between_processes(list(enumerate(unique))) as mine:
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
    state.wait_for_everyone()
    return _write_grid(out, unique, columns=num_images) if state.is_main_process else None


def _write_grid(out: Path, prompts: Sequence[str], *, columns: int) -> Path:
    """Lay out what all processes wrote, a row for each prompt."""
    images, captions = [], []
    for number, prompt in enumerate(prompts):
        for path in sorted(out.glob(f"{number:04d}-*.png"))[:columns]:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
            captions.append(prompt)
    path = out / "grid.png"
    make_grid(images, columns=columns, captions=captions).save(path)
    return path


def _read_prompts(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts-file: {path}: {error}; wanted a UTF-8 text file") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
