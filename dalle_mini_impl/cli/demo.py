"""The images at the end of a demo: fixed prompts in two languages, and held-out combinations."""

from pathlib import Path

from PIL import Image

from dalle_mini_impl.builtin_datasets.emoji.prepare import FIXED_PROMPTS, FIXED_PROMPTS_KO
from dalle_mini_impl.data.image_grid import make_grid
from dalle_mini_impl.evaluation.emoji import GridReport, evaluate_grid
from dalle_mini_impl.pipeline import TextToImagePipeline

NUM_HELD_OUT_SHOWN = 16
README_STEPS = 1_850  # of configs/demo/dalle.yaml in its 9.5 minutes, on two idle cores


def generate_demo(model_dir: Path, data_dir: Path, out: Path) -> list[str]:
    """Generate ``prompts.png``, ``prompts_ko.png`` and ``held_out.png`` in ``out``.

    Returns:
        Lines that say where the images are and how well the model composes.
    """
    pipeline = TextToImagePipeline.from_pretrained(model_dir)
    for name, prompts in (("prompts.png", FIXED_PROMPTS), ("prompts_ko.png", FIXED_PROMPTS_KO)):
        images = pipeline(list(prompts), num_images=2, num_candidates=2).images
        # English captions under both grids: readers compare them image by image.
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
        f"unseen combinations and reference images: {out / 'held_out.png'}",
        *steps_report(model_dir.parent),
    ]


def steps_report(run_dir: Path) -> list[str]:
    """Return a line if the run made far fewer steps than that of the README's images, else none."""
    names = (path.name for path in (run_dir / "checkpoints").glob("step-????????"))
    steps = int(max(names, default="step-0").removeprefix("step-"))
    # 0 steps: no checkpoint is left, which says nothing about the run.
    if not 0 < steps < 0.8 * README_STEPS:
        return []
    return [
        f"the README's images took about {README_STEPS} steps; this run made {steps}: close "
        "other programs and run again in another folder, or raise max_minutes in the preset"
    ]


def held_out_sheet(report: GridReport) -> Image.Image:
    """Lay generated images of held-out cells out, each next to its reference image."""
    # Every nth cell: the first ones are all of the same role.
    step = max(1, len(report.generated) // NUM_HELD_OUT_SHOWN)
    images, captions = [], []
    for index in range(0, step * min(NUM_HELD_OUT_SHOWN, len(report.generated)), step):
        images += [report.generated[index], report.reference[index]]
        captions += [report.captions[index], "(reference image)"]
    return make_grid(images, columns=8, captions=captions)
