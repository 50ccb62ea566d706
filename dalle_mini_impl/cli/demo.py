"""The demo: emoji data, image tokenizer, decoder, and prompts that training never combined."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dalle_mini_impl.cli.arguments import OneLineParser, user_path
from dalle_mini_impl.cli.main import COMMANDS, show_elapsed_minutes
from dalle_mini_impl.cli.train import train_both
from dalle_mini_impl.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from dalle_mini_impl.evaluation.emoji import GridReport

logger = logging.getLogger(__name__)

NUM_HELD_OUT_SHOWN = 16
README_STEPS = 1_850  # of configs/demo/dalle.yaml in its 9.5 minutes, on two idle cores


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=COMMANDS["demo"])
    add = parser.add_argument
    add("--out", type=user_path, default="out/demo", help="output folder; default: %(default)s")
    add("--configs", type=user_path, default="configs/demo", help="folder of the two presets")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Run all steps but those whose result is there already."""
    options = parse(arguments)
    show_elapsed_minutes()
    from dalle_mini_impl.builtin_datasets.emoji.prepare import prepare_emoji
    from dalle_mini_impl.config import find_preset, load_config
    from dalle_mini_impl.training.dalle import DalleRunConfig
    from dalle_mini_impl.training.vqvae import VQVAERunConfig

    out, presets = options.out, find_preset(options.configs)
    data, vqvae, dalle = out / "data", out / "vqvae", out / "dalle"

    def shared(run: Path) -> list[str]:
        is_begun = any((run / "checkpoints").glob("step-*"))
        resume = ["--resume", "latest"] if is_begun else []
        return ["--data.source", str(data), "--output_dir", str(run), *resume]

    # Both presets first: a wrong one is refused before any work is done.
    if not all((presets / f"{name}.yaml").is_file() for name in ("vqvae", "dalle")):
        raise UserError(
            f"configs: got {options.configs}, expected a folder with vqvae.yaml and dalle.yaml"
        )
    preset = ["--config", str(presets / "vqvae.yaml"), *shared(vqvae)]
    config, vqvae_resume = load_config(VQVAERunConfig, preset, description="")
    preset = ["--config", str(presets / "dalle.yaml"), *shared(dalle)]
    preset += ["--vqvae_dir", str(vqvae / "model")]
    run_config, dalle_resume = load_config(DalleRunConfig, preset, description="")
    # The last file that is written says that all are.
    if not (data / "metadata.jsonl").is_file():
        logger.info("writing the Twemoji data set")
        prepare_emoji(data, size=64)
    train_both(config, run_config, vqvae_resume=vqvae_resume, dalle_resume=dalle_resume)
    logger.info("generating images")
    for line in generate_demo(dalle / "model", data, out):
        logger.info(line)


def generate_demo(model_dir: Path, data_dir: Path, out: Path) -> list[str]:
    """Write three grids of images; return lines that name them and give the accuracy."""
    from dalle_mini_impl.builtin_datasets.emoji.prepare import FIXED_PROMPTS, FIXED_PROMPTS_KO
    from dalle_mini_impl.cli.pipelines import open_pipeline
    from dalle_mini_impl.data.image_grid import make_grid
    from dalle_mini_impl.evaluation.emoji import evaluate_grid

    pipeline = open_pipeline(str(model_dir))
    for name, prompts in (("prompts.png", FIXED_PROMPTS), ("prompts_ko.png", FIXED_PROMPTS_KO)):
        images = pipeline(list(prompts), num_images=2, num_candidates=2).images
        # In English on both: not every machine has a font for Hangul.
        captions = [prompt for prompt in FIXED_PROMPTS for _ in range(2)]
        make_grid(images, columns=8, captions=captions).save(out / name)
    report = evaluate_grid(pipeline, data_dir)
    held_out_sheet(report).save(out / "held_out.png")
    return [
        f"{report.num_cells} captions of combinations that were never trained on: "
        f"right cell of 15 {report.grid_accuracy:.0%} (chance 7%), right skin tone "
        f"{report.tone_accuracy:.0%} (chance 20%), right gender {report.gender_accuracy:.0%}",
        f"fixed prompts: {out / 'prompts.png'}",
        f"the same in Korean: {out / 'prompts_ko.png'}",
        f"held-out combinations next to the reference images: {out / 'held_out.png'}",
        *steps_report(model_dir.parent),
    ]


def steps_report(run_dir: Path) -> list[str]:
    """Warn, in one line, of far fewer steps than the decoder behind the README's images had."""
    names = (path.name for path in (run_dir / "checkpoints").glob("step-????????"))
    steps = int(max(names, default="step-0").removeprefix("step-"))
    # 0 steps: the model was copied here without its run.
    if not 0 < steps < 0.8 * README_STEPS:
        return []
    return [
        f"the README's images took about {README_STEPS} steps; this run made {steps}: close "
        "other programs and run again in another folder, or raise max_minutes in the preset"
    ]


def held_out_sheet(report: "GridReport") -> "Image.Image":
    """Lay pairs of generated and reference images of held-out combinations out."""
    from dalle_mini_impl.data.image_grid import make_grid

    # Evenly spaced, since combinations come sorted by role.
    step = max(1, len(report.generated) // NUM_HELD_OUT_SHOWN)
    images, captions = [], []
    for index in range(0, step * min(NUM_HELD_OUT_SHOWN, len(report.generated)), step):
        images += [report.generated[index], report.reference[index]]
        captions += [report.captions[index], "(reference image)"]
    return make_grid(images, columns=8, captions=captions)
