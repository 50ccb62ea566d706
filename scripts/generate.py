"""Draw pictures: python scripts/generate.py --model out/demo/dalle/model --prompt "red heart"."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dalle_mini_impl.cli import OneLineParser, run_script


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description="Draw pictures from prompts.")
    parser.add_argument("--model", required=True, help="model folder that train_dalle.py wrote")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts-file", type=Path, help="text file with one prompt per line")
    parser.add_argument("--num-images", type=int, default=4, help="pictures per prompt")
    parser.add_argument("--num-candidates", type=int, default=1, help="draw this many, keep one")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture of each prompt")
    parser.add_argument("--out", type=Path, default=Path("out/pictures"), help="output folder")
    parser.add_argument("--guidance-scale", type=float, help="strength of the caption; 1 = off")
    parser.add_argument("--guidance-schedule", choices=("constant", "cosine"))
    parser.add_argument("--temperature", type=float, help="below 1 plays safe")
    parser.add_argument("--top-k", type=int, help="draw among this many tokens; 0 = all")
    parser.add_argument("--top-p", type=float, help="draw among tokens of this probability mass")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Draw and write the pictures."""
    options = parse(arguments)
    # torch loads after the options fit
    from dalle_mini_impl.drawing import draw_to_folder, read_prompts

    names = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p")
    overrides = {name: getattr(options, name) for name in names}
    more = read_prompts(options.prompts_file) if options.prompts_file else []
    grid = draw_to_folder(
        options.model,
        prompts=[*options.prompt, *more],
        num_images=options.num_images,
        num_candidates=options.num_candidates,
        seed=options.seed,
        out=options.out,
        overrides={name: value for name, value in overrides.items() if value is not None},
        show=print,
    )
    if grid is not None:
        print(f"pictures: {options.out}\ngrid: {grid}")


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
