"""Generate images: python scripts/generate.py --model out/demo/dalle/model --prompt "red heart"."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dalle_mini_impl.cli.main import OneLineParser, run_script

RANK = "by what the kept one is chosen; none keeps the first; default: %(default)s"
OF_MODEL = "default: the model's own"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description="Generate images from prompts.")
    parser.add_argument("--model", required=True, help="model folder that train_dalle.py wrote")
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="may be given several times")
    add("--prompts-file", type=Path, help="text file with one prompt per line")
    add("--num-images", type=int, default=4, help="images per prompt; default: %(default)s")
    add("--num-candidates", type=int, default=1, help="generate N, keep one; default: %(default)s")
    add("--rank", choices=("likelihood", "clip", "none"), default="likelihood", help=RANK)
    add("--clip", help="CLIP of --rank clip: folder or Hub name; default: MODEL/clip")
    add("--seed", type=int, default=0, help="of each prompt's first image; default: %(default)s")
    add("--out", type=Path, default=Path("out/images"), help="folder; default: %(default)s")
    add("--guidance-scale", type=float, help=f"strength of the caption, 1 = off; {OF_MODEL}")
    add("--guidance-schedule", choices=("constant", "cosine"), help=OF_MODEL)
    add("--temperature", type=float, help=f"below 1 plays safe; {OF_MODEL}")
    add("--top-k", type=int, help=f"sample among this many tokens, 0 = all; {OF_MODEL}")
    add("--top-p", type=float, help=f"sample among tokens of this probability mass; {OF_MODEL}")
    add("--native", choices=("float32", "int8"), help="compiled here, not torch; see guide")
    add("--image", type=Path, help="inpaint a part of this image, which is:")
    add("--mask", type=Path, help="what is white in this image of the same size")
    add("--keep-rows", type=int, help="all but the first rows of image tokens")
    add("--keep-fraction", type=float, help="all but this fraction of the image tokens")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Generate and write the images."""
    options = parse(arguments)
    # torch loads after the options fit
    from dalle_mini_impl.cli.generate import (
        InpaintingOptions,
        Ranking,
        generate_to_folder,
        inpaint_to_folder,
        read_prompts,
    )

    names = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p")
    overrides = {name: getattr(options, name) for name in names}
    more = read_prompts(options.prompts_file) if options.prompts_file else []
    inpainting = InpaintingOptions(
        options.image, options.mask, options.keep_rows, options.keep_fraction
    )
    generate = (
        generate_to_folder
        if inpainting == InpaintingOptions(None)
        else partial(inpaint_to_folder, inpainting=inpainting)
    )
    grid = generate(
        options.model,
        prompts=[*options.prompt, *more],
        num_images=options.num_images,
        num_candidates=options.num_candidates,
        seed=options.seed,
        ranking=Ranking(options.rank, options.clip),
        out=options.out,
        overrides={name: value for name, value in overrides.items() if value is not None},
        native=options.native,
    )
    if grid is not None:
        print(f"images: {options.out}\ngrid: {grid}")


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
