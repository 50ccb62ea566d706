"""Which image tokenizer makes images that a decoder can learn: all of them at equal steps.

    python scripts/prepare_emoji.py --out out/bake_off/emoji
    python -m benchmarks.bake_off --emoji out/bake_off/emoji

Each tokenizer is `configs/demo/vqvae.yaml` with the options below, and a small decoder is trained
on its tokens. A tokenizer is judged by what its held-out images cost that decoder (bits per
image) and by how well they come back from the tokens (PSNR). Either is cheap without the other:
two FSQ tokenizers with few and with many codes span a line, and a good tokenizer lies below it.

Budgets are steps, so that other programs on the machine change nothing; what a step costs stands
in the table as seconds of processor time. Data and cells are those of `benchmarks.sweep`.
Stopped, the same command goes on where it was. Results: `results.jsonl`, and a table at the end.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.sweep import CONFIGS, Overrides, evaluate_model, hold_out_other_cells

GAN: Overrides = {
    "discriminator.weight": 0.1,
    "discriminator.feature_matching_weight": 1.0,
    "discriminator.num_layers": 2,
    "discriminator.starts_at": 0.5,
}
SMALL_CODES = {"vqvae.fsq_levels": "[8,6,5]"}


@dataclass(frozen=True)
class Contender:
    """A tokenizer, and what was expected of it."""

    name: str
    expected: str
    options: Overrides = field(default_factory=dict)
    """Of train_vqvae.py."""


CONTENDERS = (
    Contender("FSQ, 1,000 codes", "the standard"),
    Contender("VQ, 1,024 codes", "fewer bits at 0.5 dB less", {"vqvae.quantizer": "vq"}),
    Contender("perturbed tokens", "as many bits, 0.3 dB less, more cells",
              {"task.perturbed_image_fraction": 0.1}),
    Contender("Gumbel, 1,024 codes", "fewest bits, 2 dB less", {"vqvae.quantizer": "gumbel"}),
    Contender("PatchGAN, feature matching", "as many bits, 0.3 dB less, sharper", GAN),
    Contender("perceptual loss", "a little more bits, 0.3 dB less, sharper",
              {"task.perceptual_weight": 0.5}),
    Contender("FSQ, 240 codes", "1.5 bits a token fewer, 1 dB less", SMALL_CODES),
    Contender("another seed", "within 5 bits and 0.1 dB of the first", {"training.seed": 1}),
    Contender("adaptive PatchGAN", "as the fixed one, less stable",
              GAN | {"discriminator.weight": 0.8, "discriminator.adaptive": "true",
                     "discriminator.feature_matching_weight": 0.0}),
    Contender("next-feature loss", "4 % fewer bits, 0.1 dB less, a tenth fewer codes",
              {"task.next_feature_weight": 0.1}),
)  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """Steps of a tokenizer and of a decoder."""

    tokenizer_steps: int
    decoder_steps: int


def train(script: str, run: Path, preset: str, options: Overrides) -> None:
    """Train in a process of its own, from the last checkpoint if there is one.

    The seconds of processor time are kept in `seconds.json` of the run, those of its last start.

    Args:
        script: Of `scripts/`, without its ending.
        run: Folder of the run.
        preset: File of `configs/demo/`.
        options: Changes to it.
    """
    if (run / "model").exists():
        return
    run.parent.mkdir(parents=True, exist_ok=True)
    arguments = ["--config", str(CONFIGS / preset), "--tracking.mode=disabled", "--resume=latest"]
    arguments += [f"--output_dir={run}", "--training.max_minutes=null"]
    arguments += [f"--{name}={value}" for name, value in options.items()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (run.parent / f"{run.name}.log").open("a") as log:
        subprocess.run(
            [sys.executable, f"scripts/{script}.py", *arguments],
            check=True,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (run / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def run_contender(contender: Contender, out: Path, budget: Budget) -> dict[str, Any]:
    """Train and judge one tokenizer.

    Args:
        contender: Which.
        out: Folder of all of them; `data/` is in it.
        budget: How long.

    Returns:
        Named figures.
    """
    name = "".join(char if char.isalnum() else "-" for char in contender.name)
    tokenizer, decoder = out / "tokenizer" / name, out / "decoder" / name
    every = {f"training.{what}_every_steps": 100 for what in ("log", "checkpoint")}
    data = {"data.source": str(out / "data")} | every
    steps = {"training.max_steps": budget.tokenizer_steps}
    train("train_vqvae", tokenizer, "vqvae.yaml", data | steps | contender.options)
    options = {"vqvae_dir": str(tokenizer / "model"), "training.max_steps": budget.decoder_steps}
    train("train_dalle", decoder, "dalle.yaml", data | options)
    reconstructions, learned = last_figures(tokenizer), last_figures(decoder)
    tokens = math.prod(image_grid_size(tokenizer / "model"))
    return {
        "tokenizer": contender.name,
        "expected": contender.expected,
        "psnr_db": reconstructions["validation/psnr_db"],
        "codebook_usage": reconstructions["validation/codebook_usage"],
        "codebook_perplexity": reconstructions["validation/codebook_perplexity"],
        "bits": learned["validation/image_nats"] * tokens / math.log(2),
        "seconds": json.loads((tokenizer / "seconds.json").read_text(encoding="utf-8")),
        "feature_distance": feature_distance(tokenizer / "model", out / "data"),
        **evaluate_model(decoder / "model", out / "data", {}),
    }


def last_figures(run: Path) -> dict[str, Any]:
    """Read the last value of each metric of a run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {key: value for line in lines for key, value in json.loads(line).items()}


def image_grid_size(model: Path) -> tuple[int, int]:
    """Tell how many tokens a tokenizer's image has, as rows and columns."""
    from vqvae import VQVAE

    return VQVAE.from_pretrained(model).image_grid_size


def feature_distance(model: Path, data: Path) -> float:
    """Compare held-out images with their copies by colors and contrasts at several scales.

    Args:
        model: The tokenizer's folder.
        data: Folder of the images.

    Returns:
        The mean squared distance in `evaluation.features`; 0 for equal images.
    """
    import torch

    from dalle_mini_impl.data.images import decode_image, image_to_pixels
    from dalle_mini_impl.evaluation.distribution import FeatureSpace
    from vqvae import VQVAE

    torch.set_num_threads(1)
    lines = (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "test_compose"]
    images = [decode_image((data / row["file_name"]).read_bytes(), source="") for row in rows]
    pixels = torch.stack([image_to_pixels(image) for image in images])
    true = ((pixels + 1) * 127.5).round().byte()
    vqvae = VQVAE.from_pretrained(model)
    reconstructions = vqvae.decode_from_token_ids(vqvae.encode_to_token_ids(pixels))
    copies = ((reconstructions + 1) * 127.5).round().byte()
    space = FeatureSpace(true)
    return float((space(copies) - space(true)).square().sum(dim=1).mean())


def bits_above_line(row: dict[str, Any], results: list[dict[str, Any]]) -> float | None:
    """Hold a tokenizer against FSQ at its own PSNR: the line through FSQ's two numbers of codes.

    Args:
        row: Its figures.
        results: Of all.

    Returns:
        Bits per image more (or, below 0, fewer) than FSQ would need; None if the line's ends are
        not there yet, or too near to each other to generate one.
    """
    known = {result["tokenizer"]: result for result in results}
    ends = [known.get(name) for name in ("FSQ, 240 codes", "FSQ, 1,000 codes")]
    if ends[0] is None or ends[1] is None:
        return None
    run = ends[1]["psnr_db"] - ends[0]["psnr_db"]
    if abs(run) < 0.1:
        return None
    slope = (ends[1]["bits"] - ends[0]["bits"]) / run
    return row["bits"] - ends[0]["bits"] - slope * (row["psnr_db"] - ends[0]["psnr_db"])


def table(results: list[dict[str, Any]]) -> str:
    """Lay the results out as Markdown, in the order of the contenders."""
    order = [contender.name for contender in CONTENDERS]
    lines = [
        "| tokenizer | expected | PSNR, dB | bits per image | bits above FSQ at that PSNR "
        "| codes used | perplexity | distance of features | cells | tone | gender | seconds |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(results, key=lambda row: order.index(row["tokenizer"])):
        above = bits_above_line(row, results)
        fractions = " | ".join(f"{100 * row[name]:.0f} %" for name in ("cells", "tone", "gender"))
        lines.append(
            f"| {row['tokenizer']} | {row['expected']} | {row['psnr_db']:.2f} | {row['bits']:.0f} "
            f"| {'' if above is None else f'{above:+.0f}'} | {100 * row['codebook_usage']:.0f} % "
            f"| {row['codebook_perplexity']:.0f} | {row['feature_distance']:.3f} | {fractions} "
            f"| {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emoji", type=Path, required=True, help="folder of prepare_emoji.py")
    parser.add_argument("--out", type=Path, default=Path("out/bake_off"))
    parser.add_argument("--tokenizer-steps", type=int, default=500)
    parser.add_argument("--decoder-steps", type=int, default=250)
    options = parser.parse_args()
    if not (options.out / "data" / "metadata.jsonl").exists():
        hold_out_other_cells(options.emoji, options.out / "data")
    file = options.out / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    results = [json.loads(line) for line in lines]
    budget = Budget(options.tokenizer_steps, options.decoder_steps)
    for contender in CONTENDERS:
        if contender.name in {row["tokenizer"] for row in results}:
            continue
        results.append(run_contender(contender, options.out, budget))
        with file.open("a", encoding="utf-8") as lines_out:
            lines_out.write(json.dumps(results[-1]) + "\n")
        print(json.dumps(results[-1]), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
