"""Which settings learn most in equal budgets: decoders of the emoji, judged on cells of their own.

    python scripts/prepare_emoji.py --out out/sweep/emoji
    python -m benchmarks.sweep recipes --emoji out/sweep/emoji --minutes 4
    python -m benchmarks.sweep tokenizers --emoji out/sweep/emoji

Every recipe of sweep.yaml is `configs/demo` with some options changed, on one thread: a tokenizer,
then a decoder on its tokens. `recipes` have equal minutes. `tokenizers` have equal steps, so that
other programs on the machine change nothing; the table has their seconds of processor time. A
tokenizer is judged by what its held-out images cost the decoder (bits per image) and by their
reconstruction (PSNR). Either is cheap without the other: two FSQ tokenizers with few and with many
codes span a line, and a good tokenizer lies below it.

The cells of `test_compose` are neither trained on nor judged: two further cells of every role are
held out here, so that what is chosen here is measured on fresh ones. Start the command several
times to use several cores; stopped, it resumes. Results: `results.jsonl`, and a table at the end.
"""

import argparse
import fcntl
import functools
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.data import read_json_lines, read_pixels, read_rows, to_bytes
from dalle_mini_impl.builtin_datasets.emoji.prepare import grid_roles
from dalle_mini_impl.data.images import image_to_pixels
from dalle_mini_impl.data.splits import stable_hash
from dalle_mini_impl.evaluation.distribution import FeatureSpace
from dalle_mini_impl.evaluation.emoji import evaluate_grid
from dalle_mini_impl.pipeline import TextToImagePipeline
from vqvae import VQVAE

CONFIGS = Path("configs/demo")
NUM_PLAIN = 96
NUM_TIMED = 9
Overrides = dict[str, Any]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A row of sweep.yaml."""

    name: str
    expected: str
    decoder: Overrides = field(default_factory=dict)
    tokenizer: Overrides = field(default_factory=dict)
    # Fields of SamplingConfig; without other changes the preset's decoder generates.
    sampling: Overrides = field(default_factory=dict)


@functools.cache
def read_recipes() -> dict[str, list[Recipe]]:
    """Read the lists of recipes."""
    lists = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {name: [Recipe(**row) for row in rows] for name, rows in lists.items()}


def as_options(overrides: Overrides) -> list[str]:
    """Turn overrides into arguments of a command line."""
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in overrides.items()
    ]


def hold_out_other_cells(emoji: Path, out: Path) -> None:
    """Copy the data set with two other cells of each role in `test_compose`."""
    # Chosen by a hash of the cell: the same cells for every sweep, whatever the order of rows.
    rows, chosen = read_rows(emoji), set()
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


@contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Keep other processes of a sweep out; yields False where one of them is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:  # closing it, or the end of the process, unlocks it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def train(script: str, run: Path, overrides: Overrides) -> None:
    """Train in a process of its own, from the last checkpoint if there is one.

    The seconds of processor time of its last start are kept in `seconds.json` of the run.
    """
    arguments = ["--config", str(CONFIGS / f"{script.removeprefix('train_')}.yaml")]
    arguments += ["--tracking.mode=disabled", "--resume=latest", f"--output_dir={run}"]
    arguments += as_options(overrides)
    # Recipes share tokenizers, and several processes may want the same one.
    with lock(run.with_name(f"{run.name}.lock"), wait=True):
        # The model folder is the last thing that a run writes.
        if (run / "model").exists():
            return
        # The sum over all children so far, so take the difference.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with run.with_name(f"{run.name}.log").open("a") as log:
            command = [sys.executable, f"scripts/{script}.py", *arguments]
            # One thread each: several processes of a sweep have a core of their own.
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        (run / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def run_recipe(recipe: Recipe, preset: Recipe, out: Path, *budgets: Overrides) -> Figures:
    """Train and judge one recipe; the budgets are of its tokenizer and of its decoder."""
    tokenizer_budget, decoder_budget = budgets
    data = {"data.source": str(out / "data")}
    options = json.dumps(recipe.tokenizer, sort_keys=True) if recipe.tokenizer else "preset"
    vqvae = out / "vqvae" / slug(options)
    train("train_vqvae", vqvae, data | tokenizer_budget | recipe.tokenizer)
    decoder = out / "dalle" / slug(preset.name if recipe.sampling else recipe.name)
    shared = data | {"vqvae_dir": str(vqvae / "model")}
    train("train_dalle", decoder, shared | decoder_budget | recipe.decoder)

    # bits and PSNR: what the tokens cost a decoder, and what they keep of an image
    tokenizer_figures, figures = last_figures(vqvae), last_figures(decoder)
    num_tokens, distance = reconstruct(vqvae / "model", out / "data")
    return {
        "recipe": recipe.name,
        "expected": recipe.expected,
        "steps": figures["step"],
        "held_out_nats": figures["validation/image_nats"],
        "train_nats": figures["validation/train_image_nats"],
        "bits": figures["validation/image_nats"] * num_tokens / math.log(2),
        "psnr_db": tokenizer_figures["validation/psnr_db"],
        "codebook_usage": tokenizer_figures["validation/codebook_usage"],
        "codebook_perplexity": tokenizer_figures["validation/codebook_perplexity"],
        "tokenizer_seconds": json.loads((vqvae / "seconds.json").read_text(encoding="utf-8")),
        "feature_distance": distance,
        **evaluate_model(decoder / "model", out / "data", recipe.sampling),
    }


def slug(name: str) -> str:
    """Make a file name."""
    return "".join(char if char.isalnum() else "-" for char in name)


def last_figures(run: Path) -> Figures:
    """Read the last value of each metric of a run."""
    rows = read_json_lines(run / "metrics.jsonl")
    return {key: value for row in rows for key, value in row.items()}


def reconstruct(model: Path, data: Path) -> tuple[int, float]:
    """Return a tokenizer's tokens per image, and how far held-out reconstructions are off.

    By colors and contrasts at several scales: the mean squared distance in
    `evaluation.distribution`, 0 for equal images.
    """
    torch.set_num_threads(1)
    pixels = read_pixels(data, [row for row in read_rows(data) if row["split"] == "test_compose"])
    vqvae = VQVAE.from_pretrained(model)
    reconstructions = vqvae.decode_from_token_ids(vqvae.encode_to_token_ids(pixels))
    true, coded = to_bytes(pixels), to_bytes(reconstructions)
    space = FeatureSpace(true)
    distance = (space(coded) - space(true)).square().sum(dim=1).mean()
    return math.prod(vqvae.image_grid_size), float(distance)


def evaluate_model(model: Path, data: Path, sampling: Overrides) -> Figures:
    """Generate held-out cells, and plain things that training showed, in both languages.

    Fractions: cells, tones and genders right; plain things nearest to their own image, of all plain
    things. And the seconds of processor time that an image takes, one by one.
    """
    torch.set_num_threads(1)
    pipeline = TextToImagePipeline.from_pretrained(str(model))
    grid = evaluate_grid(pipeline, data, **sampling)
    figures = {"cells": grid.grid_accuracy, "tone": grid.tone_accuracy}
    figures["gender"] = grid.gender_accuracy
    plain = [row for row in read_rows(data) if row["split"] == "train" and not row["skin_tones"]]
    things = [row for row in plain if row["kind"] in {"other", "country flag"}]
    # In an order of their own, so that a longer list begins with the same things.
    things.sort(key=lambda row: stable_hash("plain", row["hexcode"]))
    reference = read_pixels(data, things).flatten(1)
    for language, column in (("plain_en", "text"), ("plain_ko", "text_ko")):
        prompts = [row[column] for row in things[:NUM_PLAIN]]
        generated = pipeline(prompts, seed=0, **sampling).images
        pixels = torch.stack([image_to_pixels(image).flatten() for image in generated])
        # Chance level: one in all plain things.
        nearest = torch.cdist(pixels, reference).argmin(dim=1)
        figures[language] = float((nearest == torch.arange(len(prompts))).float().mean())
    seconds = []
    for row in things[:NUM_TIMED]:
        started = time.process_time()  # which other programs do not change
        pipeline(row["text"], seed=0, **sampling)
        seconds.append(time.process_time() - started)
    figures["seconds_per_image"] = statistics.median(seconds)
    return figures


def bits_above_line(row: Figures, results: list[Figures]) -> float | None:
    """Return how many bits an image needs more (below 0: fewer) than FSQ's at its own PSNR.

    None if FSQ's two numbers of codes are not measured yet, or too near to each other.
    """
    # FSQ at any PSNR: the line through its two numbers of codes.
    known = {result["recipe"]: result for result in results}
    few, many = known.get("FSQ, 240 codes"), known.get("FSQ, 1,000 codes")
    if few is None or many is None:
        return None
    run = many["psnr_db"] - few["psnr_db"]
    # Over a shorter run the noise of its ends would decide the slope.
    if abs(run) < 0.1:
        return None
    slope = (many["bits"] - few["bits"]) / run
    return row["bits"] - few["bits"] - slope * (row["psnr_db"] - few["psnr_db"])


Column = Callable[[Figures, list[Figures]], str]


def _figure(key: str, spec: str) -> Column:
    return lambda row, _: format(row[key], spec)


def _percent(key: str) -> Column:
    return lambda row, _: f"{100 * row[key]:.0f} %"


def _bits_above(row: Figures, results: list[Figures]) -> str:
    above = bits_above_line(row, results)
    return "" if above is None else f"{above:+.0f}"


JUDGED = {name: _percent(name) for name in ("cells", "tone", "gender")}
COLUMNS: dict[str, dict[str, Column]] = {
    "recipes": {
        "steps": _figure("steps", ","),
        "held-out nats": _figure("held_out_nats", ".2f"),
        "train nats": _figure("train_nats", ".2f"),
        **JUDGED,
        "plain": _percent("plain_en"),
        "plain, Korean": _percent("plain_ko"),
        "CPU seconds per image": _figure("seconds_per_image", ".3f"),
    },
    "tokenizers": {
        "PSNR, dB": _figure("psnr_db", ".2f"),
        "bits per image": _figure("bits", ".0f"),
        "bits above FSQ at that PSNR": _bits_above,
        "codes used": _percent("codebook_usage"),
        "perplexity": _figure("codebook_perplexity", ".0f"),
        "distance of features": _figure("feature_distance", ".3f"),
        **JUDGED,
        "seconds": _figure("tokenizer_seconds", ".0f"),
    },
}


def table(sweep: str, results: list[Figures]) -> str:
    """Format the results of a sweep as Markdown, in the order of its recipes."""
    order = [recipe.name for recipe in read_recipes()[sweep]]
    columns = COLUMNS[sweep]
    lines = [f"| recipe | expected | {' | '.join(columns)} |", "|---|---|" + "--:|" * len(columns)]
    for row in sorted(results, key=lambda row: order.index(row["recipe"])):
        cells = [column(row, results) for column in columns.values()]
        lines.append(f"| {' | '.join([row['recipe'], row['expected'], *cells])} |")
    return "\n".join(lines)


def read_results(file: Path) -> list[Figures]:
    """Read the results so far."""
    return read_json_lines(file) if file.exists() else []


def main() -> None:
    """Run each recipe that has no result and is not running elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", choices=COLUMNS, nargs="?", default="recipes")
    parser.add_argument("--emoji", type=Path, required=True, help="folder of prepare_emoji.py")
    parser.add_argument("--out", type=Path, help="default: out/sweep/ and the name of the sweep")
    parser.add_argument("--only", nargs="+", help="names of the recipes to run")
    minutes_help = "of each decoder of the recipes; the tokenizer has three quarters of them"
    parser.add_argument("--minutes", type=float, default=4.0, help=minutes_help)
    parser.add_argument("--tokenizer-steps", type=int, default=500, help="of the tokenizers")
    parser.add_argument("--decoder-steps", type=int, default=250, help="of their decoders")
    options = parser.parse_args()
    budgets: list[Overrides]
    if options.sweep == "recipes":
        budgets = [{"training.max_minutes": part * options.minutes} for part in (0.75, 1.0)]
    else:
        steps: Overrides = {f"training.{what}_every_steps": 100 for what in ("log", "checkpoint")}
        steps["training.max_minutes"] = None
        max_steps = (options.tokenizer_steps, options.decoder_steps)
        budgets = [steps | {"training.max_steps": number} for number in max_steps]
    out = options.out or Path("out/sweep") / options.sweep
    with lock(out / "data.lock", wait=True):
        if not (out / "data" / "metadata.jsonl").exists():
            hold_out_other_cells(options.emoji, out / "data")
    recipes, file = read_recipes()[options.sweep], out / "results.jsonl"
    for recipe in recipes:
        if options.only and recipe.name not in options.only:
            continue
        # Another process may be at this recipe, or have finished it since the last look.
        with lock(out / "locks" / slug(recipe.name), wait=False) as is_free:
            if not is_free or recipe.name in {row["recipe"] for row in read_results(file)}:
                continue
            figures = run_recipe(recipe, recipes[0], out, *budgets)
            with file.open("a", encoding="utf-8") as results:
                results.write(json.dumps(figures) + "\n")
            print(json.dumps(figures), flush=True)
    print(table(options.sweep, read_results(file)))


if __name__ == "__main__":
    main()
