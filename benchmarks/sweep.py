"""Which settings learn most in equal minutes: decoders of the emoji, judged on cells of their own.

    python scripts/prepare_emoji.py --out out/recipes/emoji
    python -m benchmarks.sweep --emoji out/recipes/emoji --minutes 4

Every recipe is `configs/demo` with the options below changed, on one thread. The cells of
`test_compose` are neither trained on nor judged: two further cells of every role are held out here,
so that what is chosen here is measured on fresh ones. Start the command several times to use
several cores; each recipe is run once. Results: `results.jsonl`, and a table at the end.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIGS = Path("configs/demo")
NUM_PLAIN = 96
NUM_TIMED = 9
Overrides = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A change to the demo's preset, and what was expected of it."""

    name: str
    expected: str
    decoder: Overrides = field(default_factory=dict)
    """Options of train_dalle.py."""
    tokenizer: Overrides = field(default_factory=dict)
    """Options of train_vqvae.py; recipes with the same ones share a tokenizer."""
    sampling: Overrides = field(default_factory=dict)
    """BenchmarkConfig of the generation; without other changes the first recipe's model generates."""


MUON_RATE, NOISE = "training.learning_rate", "task.token_noise_probability"
FINE = {"vqvae.channels": "[128]"}
RECIPES = (
    Recipe("the preset", "the standard"),
    Recipe("another seed", "within the noise of the measure", {"training.seed": 1}),
    Recipe("no token noise", "worse cells, lower loss in training", {NOISE: 0.0}),
    Recipe("token noise 0.3", "a little worse cells", {NOISE: 0.3}),
    Recipe("token noise 0.7", "as good cells, worse plain things", {NOISE: 0.7}),
    Recipe("noise to the end", "worse plain things", {"task.augmentation_ends_at": 1.0}),
    Recipe("noise for half", "a little worse cells", {"task.augmentation_ends_at": 0.5}),
    Recipe("AdamW, 2e-3", "worse", {"training.optimizer": "adamw", MUON_RATE: 2e-3}),
    Recipe("AdamW, 4e-3", "worse", {"training.optimizer": "adamw", MUON_RATE: 4e-3}),
    Recipe("Muon, 1.5e-3", "a little worse", {MUON_RATE: 1.5e-3}),
    Recipe("Muon, 6e-3", "a little better: few steps", {MUON_RATE: 6e-3}),
    Recipe("batch 16", "better: twice the steps", {"training.global_batch_size": 16}),
    Recipe("batch 64", "worse: half the steps", {"training.global_batch_size": 64}),
    Recipe("dropout 0.1", "worse in so few steps", {"decoder.dropout_probability": 0.1}),
    Recipe(
        "6 layers of 160",
        "as good",
        {"decoder.num_layers": 6, "decoder.hidden_size": 160, "decoder.num_heads": 4},
    ),
    Recipe("3 layers of 224", "as good", {"decoder.num_layers": 3, "decoder.hidden_size": 224}),
    Recipe("4 layers of 128", "better: more steps", {"decoder.hidden_size": 128}),
    Recipe("4 layers of 256", "worse: fewer steps", {"decoder.hidden_size": 256}),
    Recipe("decay over 70 %", "better", {"training.decay_fraction": 0.7}),
    Recipe("cosine", "as good", {"training.schedule": "cosine"}),
    Recipe("average of weights", "better", {"training.ema_decay": 0.99}),
    Recipe("no caption loss", "as good", {"task.text_loss_weight": 0.0}),
    Recipe("captions always given", "as good", {"task.caption_dropout_probability": 0.0}),
    Recipe("random order", "worse: it is to fade out", {"task.random_order_probability": 0.5}),
    Recipe(
        "always random order",
        "far worse: every order is to be learned",
        {"task.random_order_probability": 1.0, "task.augmentation_ends_at": 1.0},
    ),
    Recipe(
        "shifted views",
        "better cells",
        {"num_views": 4, "max_shift": 2, "task.shifted_view_probability": 0.5},
    ),
    Recipe("2,048 caption tokens", "worse plain things", {"text.vocab_size": 2048}),
    Recipe("every image as often", "better cells", {"data.balance_by": "null"}),
    Recipe("240 codes", "better cells, blurred", tokenizer={"vqvae.fsq_levels": "[8,6,5]"}),
    Recipe("4,096 codes", "worse", tokenizer={"vqvae.fsq_levels": "[8,8,8,8]"}),
    Recipe("encoder sees neighbors", "worse", tokenizer={"vqvae.encoder_kernel_size": 3}),
    Recipe("16 x 16 tokens", "worse: a quarter of the steps", {"decoder.hidden_size": 128}, FINE),
    Recipe("guidance 1", "worse cells", sampling={"guidance_scale": 1.0}),
    Recipe("guidance 2", "better cells", sampling={"guidance_scale": 2.0}),
    Recipe("guidance 3", "better cells, worse plain things", sampling={"guidance_scale": 3.0}),
    Recipe(
        "guidance 3, rising",
        "as guidance 2",
        sampling={"guidance_scale": 3.0, "guidance_schedule": "cosine"},
    ),
    Recipe("temperature 0.1", "as good", sampling={"temperature": 0.1}),
    Recipe("temperature 0.7", "worse", sampling={"temperature": 0.7}),
    Recipe(
        "encoder and decoder",
        "as good: as many parameters, and as much work in a step",
        {
            "decoder.architecture": "encoder_decoder",
            "decoder.num_encoder_layers": 2,
            "decoder.num_layers": 4,
        },
    ),
)


def hold_out_other_cells(emoji: Path, out: Path) -> None:
    """Write the data set again: `test_compose` out of use, two other cells of each role in it.

    Args:
        emoji: Folder that prepare_emoji.py wrote.
        out: Folder to write; its images are copies.
    """
    from dalle_mini_impl.builtin_datasets.emoji.prepare import grid_roles
    from dalle_mini_impl.data.splits import stable_hash

    lines = (emoji / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    chosen = set()
    for role, grid in grid_roles(rows).items():
        free = [cell for cell, row in grid.items() if row["split"] == "train"]
        for cell in sorted(free, key=lambda cell: stable_hash("recipes", role, *cell))[:2]:
            chosen.add(grid[cell]["file_name"])
    for row in rows:
        row["split"] = "train" if row["split"] == "train" else "not used"
        if row["file_name"] in chosen:
            row["split"] = "test_compose"
    shutil.copytree(emoji / "images", out / "images", dirs_exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "metadata.jsonl").write_text(text, encoding="utf-8")


def train(script: str, run: Path, preset: str, overrides: Overrides) -> None:
    """Train in a process of its own; what is there already stays."""
    if (run / "model").exists():
        return
    options = [f"--{name}={value}" for name, value in overrides.items()]
    shared = ["--config", str(CONFIGS / preset), "--tracking.mode=disabled", "--output_dir"]
    with (run.parent / f"{run.name}.log").open("w") as log:
        subprocess.run(
            [sys.executable, f"scripts/{script}.py", *shared, str(run), *options],
            check=True,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def run_recipe(recipe: Recipe, out: Path, minutes: float) -> dict[str, Any]:
    """Train and judge one recipe.

    Args:
        recipe: Which.
        out: Folder of all recipes.
        minutes: Of the decoder's training; the tokenizer has three quarters of them.

    Returns:
        Named figures.
    """
    data = {"data.source": str(out / "data")}
    name = json.dumps(recipe.tokenizer, sort_keys=True) if recipe.tokenizer else "preset"
    vqvae = out / "vqvae" / "".join(char if char.isalnum() else "-" for char in name)
    vqvae.parent.mkdir(exist_ok=True)
    train(
        "train_vqvae",
        vqvae,
        "vqvae.yaml",
        data | {"training.max_minutes": 0.75 * minutes} | recipe.tokenizer,
    )
    only_generates = bool(recipe.sampling)
    run = out / "dalle" / ("0" if only_generates else str(RECIPES.index(recipe)))
    run.parent.mkdir(exist_ok=True)
    shared = {"vqvae_dir": str(vqvae / "model"), "training.max_minutes": minutes}
    train("train_dalle", run, "dalle.yaml", data | shared | recipe.decoder)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = {key: value for line in lines for key, value in json.loads(line).items()}
    return {
        "recipe": recipe.name,
        "expected": recipe.expected,
        "steps": last["step"],
        "held_out_nats": last["validation/image_nats"],
        "train_nats": last["validation/train_image_nats"],
        **evaluate_model(run / "model", out / "data", recipe.sampling),
    }


def evaluate_model(model: Path, data: Path, sampling: Overrides) -> dict[str, float]:
    """Generate held-out cells, and plain things that training showed, in both languages.

    Returns:
        Shares: cells, tones and genders right; plain things nearest to their own image, of all
        plain things. And the seconds of processor time that an image takes, one by one.
    """
    import time

    import torch

    from dalle_mini_impl.data.images import decode_image, image_to_pixels
    from dalle_mini_impl.data.splits import stable_hash
    from dalle_mini_impl.evaluation.emoji import evaluate_grid
    from dalle_mini_impl.pipeline import TextToImagePipeline

    torch.set_num_threads(1)
    pipeline = TextToImagePipeline.from_pretrained(str(model))
    grid = evaluate_grid(pipeline, data, **sampling)
    figures = {
        "cells": grid.grid_accuracy,
        "tone": grid.tone_accuracy,
        "gender": grid.gender_accuracy,
    }
    lines = (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    things = [row for row in rows if row["split"] == "train" and not row["skin_tones"]]
    things = [row for row in things if row["kind"] in ("other", "country flag")]
    things.sort(key=lambda row: stable_hash("plain", row["hexcode"]))
    truth = torch.stack(
        [
            image_to_pixels(
                decode_image((data / row["file_name"]).read_bytes(), source="")
            ).flatten()
            for row in things
        ]
    )
    for language, column in (("plain_en", "text"), ("plain_ko", "text_ko")):
        prompts = [row[column] for row in things[:NUM_PLAIN]]
        generated = pipeline(prompts, seed=0, **sampling).images
        pixels = torch.stack([image_to_pixels(image).flatten() for image in generated])
        nearest = torch.cdist(pixels, truth).argmin(dim=1)
        figures[language] = float((nearest == torch.arange(len(prompts))).float().mean())
    seconds = []
    for row in things[:NUM_TIMED]:
        started = time.process_time()
        pipeline(row["text"], seed=0, **sampling)
        seconds.append(time.process_time() - started)
    figures["seconds_per_image"] = statistics.median(seconds)
    return figures


def table(results: list[dict[str, Any]]) -> str:
    """Lay the results out as Markdown, in the order of the recipes."""
    order = [recipe.name for recipe in RECIPES]
    lines = [
        "| recipe | expected | steps | held-out / train nats | cells | tone | gender "
        "| plain | plain, Korean | CPU seconds per image |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(results, key=lambda row: order.index(row["recipe"])):
        fractions = ("cells", "tone", "gender", "plain_en", "plain_ko")
        percent = " | ".join(f"{100 * row[name]:.0f} %" for name in fractions)
        nats = f"{row['held_out_nats']:.2f} / {row['train_nats']:.2f}"
        lines.append(
            f"| {row['recipe']} | {row['expected']} | {row['steps']:,} | {nats} | {percent} "
            f"| {row['seconds_per_image']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what nobody has run or is running."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emoji", type=Path, required=True, help="folder of prepare_emoji.py")
    parser.add_argument("--out", type=Path, default=Path("out/recipes"))
    parser.add_argument("--minutes", type=float, default=4.0, help="of each decoder, on one thread")
    parser.add_argument("--first", type=int, default=0, help="number of the recipe to begin with")
    parser.add_argument("--only", nargs="+", help="names of the recipes to run")
    options = parser.parse_args()
    if not (options.out / "data" / "metadata.jsonl").exists():
        hold_out_other_cells(options.emoji, options.out / "data")
    results = options.out / "results.jsonl"
    (options.out / "begun").mkdir(exist_ok=True)
    for number, recipe in list(enumerate(RECIPES))[options.first :]:
        if options.only and recipe.name not in options.only:
            continue
        try:
            (options.out / "begun" / str(number)).mkdir()
        except FileExistsError:
            continue
        figures = run_recipe(recipe, options.out, options.minutes)
        with results.open("a") as file:
            file.write(json.dumps(figures) + "\n")
        print(json.dumps(figures), flush=True)
    print(table([json.loads(line) for line in results.read_text().splitlines()]))


if __name__ == "__main__":
    main()
