"""Generate images from prompts, or inpaint a part of an image, on any number of processes."""

import argparse
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dalle_mini_impl.cli.arguments import (
    OneLineParser,
    add_native,
    read_lines,
    user_path,
    user_text,
)
from dalle_mini_impl.cli.main import COMMANDS
from dalle_mini_impl.errors import UserError

if TYPE_CHECKING:
    import torch

    from dalle_mini_impl.cli.image_files import ImageFile
    from dalle_mini_impl.pipeline import TextToImagePipeline
    from dalle_mini_impl.sampling.request import GenerationRequest, Inpainting, Rank

logger = logging.getLogger(__name__)

IMAGES_AT_A_TIME = 64  # generated, then written: an interrupted call loses at most these
CLIP_FOLDER = "clip"  # of a model folder
MAX_IMAGES = 100_000  # of one call, with candidates: days of work; more is probably a typo
OF_MODEL = "default: the model's own"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=COMMANDS["generate"])
    add = parser.add_argument
    add("--model", type=user_text, required=True, help="model folder that train_dalle.py wrote")
    add("--prompt", action="append", default=[], help="may be given several times")
    add("--prompts-file", type=user_path, help="text file with one prompt per line")
    add("--num-images", type=int, default=4, help="images per prompt; default: %(default)s")
    add("--num-candidates", type=int, default=1, help="generate N, keep one; default: %(default)s")
    add(
        "--rank",
        choices=("likelihood", "clip", "none"),
        default="likelihood",
        help="how the kept one is chosen; none keeps the first; default: %(default)s",
    )
    add("--clip", type=user_text, help="of --rank clip: folder or Hub name; default: MODEL/clip")
    add("--seed", type=int, default=0, help="of each prompt's first image; default: %(default)s")
    add("--out", type=user_path, default="out/images", help="folder; default: %(default)s")
    add("--guidance-scale", type=float, help=f"strength of the caption, 1 = off; {OF_MODEL}")
    add("--guidance-schedule", choices=("constant", "cosine"), help=OF_MODEL)
    add("--temperature", type=float, help=f"below 1 plays safe; {OF_MODEL}")
    add("--top-k", type=int, help=f"sample among this many tokens, 0 = all; {OF_MODEL}")
    add("--top-p", type=float, help=f"sample among tokens of this probability mass; {OF_MODEL}")
    add_native(parser)
    add("--image", type=user_path, help="inpaint this image; needs one of the next three")
    add("--mask", type=user_path, help="an image of the same size, white where it is inpainted")
    add("--keep-rows", type=int, help="inpaint all but the first rows of image tokens")
    add("--keep-fraction", type=float, help="inpaint all but this fraction of the image tokens")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Generate and write the images."""
    options = parse(arguments)
    prompts = list(options.prompt)
    if options.prompts_file:
        prompts += read_lines(options.prompts_file, field="prompts-file")
    inpainting = InpaintingFiles(
        options.image, options.mask, options.keep_rows, options.keep_fraction
    )
    grid = generate_to_folder(
        options.model,
        prompts=prompts,
        num_images=options.num_images,
        num_candidates=options.num_candidates,
        seed=options.seed,
        out=options.out,
        overrides=sampling_overrides(options),
        ranking=Ranking(options.rank, options.clip),
        # None only without any option of inpainting: a mask without its image must be refused.
        inpainting=None if inpainting == InpaintingFiles() else inpainting,
        native=options.native,
    )
    if grid is not None:
        logger.info(f"images: {options.out}\ngrid: {grid}")


def sampling_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Collect the fields of ``SamplingConfig`` that the command line gives."""
    names = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p")
    # Not every command has all of them.
    values = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Which of several candidates is kept."""

    by: Literal["likelihood", "clip", "none"] = "likelihood"
    """The largest log-likelihood ratio, the highest score of a CLIP, or the first one."""
    clip: str | None = None
    """The CLIP: a folder, or a name on the Hub. The folder ``clip`` of the model when None."""

    def check(self, model: str) -> None:
        """Refuse a missing CLIP, or one that is not used, before anything is loaded."""
        if self.by != "clip" and self.clip is not None:
            raise UserError(f"clip: got {self.clip} with --rank {self.by}, expected --rank clip")
        # The folder is looked for before the model is loaded, which takes longer.
        if self.by == "clip" and self.clip is None and not (Path(model) / CLIP_FOLDER).is_dir():
            raise UserError(
                f"rank: got clip, but {model} has no folder {CLIP_FOLDER}; expected --clip with a "
                "folder that train_clip.py wrote, or the name of a CLIP of transformers"
            )

    def load(self, model: str, device: "torch.device") -> "Rank":
        """Load the ranker that the pipeline takes."""
        if self.by != "clip":
            return self.by
        from dalle_mini_impl.clip_ranker import load_clip_ranker

        return load_clip_ranker(self.clip or Path(model) / CLIP_FOLDER).to(device)


BY_LIKELIHOOD = Ranking()


@dataclasses.dataclass(frozen=True)
class InpaintingFiles:
    """An image, and which part of it is inpainted: fields of ``Inpainting``, images as files."""

    image: Path | None = None
    mask: Path | None = None
    keep_rows: int | None = None
    keep_fraction: float | None = None

    def load(self, ranking: Ranking) -> "Inpainting":
        """Read the image and its mask."""
        if self.image is None:
            raise UserError(
                "image: none given; expected --image with --mask, --keep-rows or --keep-fraction"
            )
        if ranking != BY_LIKELIHOOD:
            raise UserError(
                f"rank: got {ranking.by} with --image, expected likelihood and no --clip"
            )
        from dalle_mini_impl.data.images import read_image_file
        from dalle_mini_impl.data.inpainting_mask import check_part
        from dalle_mini_impl.sampling.request import Inpainting

        image = read_image_file(self.image, field="image")
        mask = None if self.mask is None else read_image_file(self.mask, field="mask")
        part: dict[str, Any] = {"keep_rows": self.keep_rows, "keep_fraction": self.keep_fraction}
        check_part(mask=mask, source_size=image.size, **part)
        return Inpainting(image, mask, **part)

    def metadata(self) -> dict[str, Any]:
        """Name the given fields; files without their folders, which are the user's own affair."""
        return {
            name: value.name if isinstance(value, Path) else value
            for name, value in vars(self).items()
            if value is not None
        }


def generate_to_folder(
    model: str,
    *,
    prompts: Sequence[str],
    out: Path,
    overrides: dict[str, Any],
    ranking: Ranking = BY_LIKELIHOOD,
    inpainting: InpaintingFiles | None = None,
    native: Literal["float32", "int8"] | None = None,
    **counts: int,
) -> Path | None:
    """Generate every prompt's images and write them next to those of earlier calls.

    Processes split the prompts; an image is the same whichever process generates it.

    Args:
        model: Model folder.
        prompts: The same prompt twice is generated once.
        out: Output folder, made if missing.
        overrides: Fields of ``SamplingConfig``.
        ranking: Which candidates are kept.
        inpainting: Inpaint a part of an image, for each prompt.
        native: Weights of the compiled forward pass, which is used where it is possible.
        **counts: ``num_images``, ``num_candidates`` and ``seed``, as the pipeline takes them.

    Returns:
        The grid's path on the main process, None on the others.

    Raises:
        UserError: If there is no prompt, an option is out of range, or memory or disk is full.
    """
    from dalle_mini_impl.cli import image_files
    from dalle_mini_impl.cli.pipelines import Processes, open_pipeline
    from dalle_mini_impl.output_dirs import make_folder
    from dalle_mini_impl.progress import counted

    # 1. refuse what is wrong before seconds are spent on loading
    if not prompts:
        raise UserError("prompt: none given; expected --prompt TEXT or --prompts-file FILE")
    unique = list(dict.fromkeys(prompts))  # the same prompt twice would be the same images
    num_images = len(unique) * counts["num_images"]
    if num_images > MAX_IMAGES:
        raise UserError(
            f"num_images: got {counts['num_images']} of {len(unique)} prompts, expected at most "
            f"{MAX_IMAGES} images in one call"
        )
    if num_images * counts["num_candidates"] > MAX_IMAGES:
        raise UserError(
            f"num_candidates: got {counts['num_candidates']} for each of {num_images} images, "
            f"expected at most {MAX_IMAGES} candidates in one call"
        )
    ranking.check(model)
    source = inpainting.load(ranking) if inpainting else None
    # 2. load, and check what depends on the model
    processes = Processes()
    pipeline = open_pipeline(model, native=native, device=processes.device)
    rank = ranking.load(model, processes.device)
    request = pipeline.check(unique, rank=rank, inpainting=source, **counts, **overrides)
    metadata = image_files.describe_generation(model, pipeline, request)
    metadata |= {} if ranking == BY_LIKELIHOOD else {"rank": ranking.by}
    metadata |= inpainting.metadata() if inpainting else {}
    # 3. generate and write, batch by batch
    make_folder(out, field="out")
    # Every process asks before any of them writes.
    first = processes.gather([image_files.next_number(out)])[0]
    numbers = {prompt: first + index for index, prompt in enumerate(unique)}
    total = len(unique) * request.num_images
    logger.info(f"generating {counted(total, 'image')}")
    # Numbers are given before the prompts are split: names must not depend on the processes.
    mine = dataclasses.replace(request, prompts=processes.split(unique))
    with _full_memory_or_disk_in_one_line(out):
        files = _write_batches(pipeline, mine, out, numbers=numbers, metadata=metadata)
        # In the order of the prompts again, whichever process generated them.
        files = sorted(processes.gather(files))
        if not processes.is_main:
            return None
        grid = out / image_files.grid_name(first)
        image_files.save_grid(grid, files, num_images=request.num_images)
    return grid


def _write_batches(
    pipeline: "TextToImagePipeline",
    request: "GenerationRequest",
    out: Path,
    *,
    numbers: dict[str, int],
    metadata: dict[str, Any],
) -> list["ImageFile"]:
    from dalle_mini_impl.cli.image_files import save_images

    total = len(request.prompts) * request.num_images
    files: list[ImageFile] = []
    for batch in request.batches(IMAGES_AT_A_TIME):
        output = pipeline.generate(batch)
        files += save_images(output, out, numbers=numbers, metadata=metadata)
        if total > IMAGES_AT_A_TIME:
            logger.info(f"{len(files)} of {total} generated")
    return files


@contextmanager
def _full_memory_or_disk_in_one_line(out: Path) -> Iterator[None]:
    """Raise a UserError where memory or disk is full; files written before stay."""
    from dalle_mini_impl.hardware import is_out_of_memory

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch raises plain RuntimeErrors where a CPU's memory is full.
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "memory: not enough to generate; lower --num-candidates or --num-images, or close "
            f"other programs. Images generated before are in {out}"
        ) from None
    except OSError as error:
        raise UserError(
            f"out: writing into {out} failed: {error.strerror or error}; expected free space in a "
            "folder that can be written to. Images written before are intact"
        ) from None
