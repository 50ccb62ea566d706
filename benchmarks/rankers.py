r"""What choosing among candidates gains: the same images, picked by each ranker.

    python -m benchmarks.rankers --model checkpoints/emoji-64 --data out/emoji64_styles/data \
        --clip out/clip/emoji/model

Every prompt is generated `--num-candidates` times, once for all rankers, with the seeds that
`generate.py --num-candidates` uses; candidates are kept in the output folder, so that the command
goes on where it stopped and a second ranker costs no generation. Emoji: held-out cells of the grid of
role, gender and skin tone (`evaluation/emoji_grid.py`). Shapes: held-out captions, by the exact
checker. Prompts are spread evenly over all of them. Results: `rankers.json` and a table.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dalle_mini_impl.data.image_grid import make_grid
from dalle_mini_impl.data.images import decode_image, image_to_pixels, resize_and_crop
from dalle_mini_impl.evaluation.bootstrap import bootstrap_mean
from dalle_mini_impl.evaluation.samples import spread_indices
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.generate import generate_image_token_ids
from dalle_mini_impl.sampling.likelihood import log_likelihood_ratio
from dalle_mini_impl.sampling.rerank import ImageRanker
from dalle_mini_impl.sampling.sampler import SamplingConfig

NONE, LIKELIHOOD, ORACLE = "none", "likelihood", "oracle"
NUM_SHOWN = 12
Answer = Mapping[str, float]


@dataclass(frozen=True)
class Prompt:
    """What is generated, and how a generation is judged."""

    text: str
    judge: Callable[[Image.Image], Answer]
    """What is asked -> 1 for a right generation; ``psnr_db`` against the true image."""


def read_rows(data: Path) -> list[dict[str, Any]]:
    """Read what a script wrote beside its images.

    Args:
        data: Folder that prepare_emoji.py or prepare_shapes.py wrote.

    Returns:
        One object per image.
    """
    lines = (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def emoji_prompts(data: Path, *, size: int, count: int) -> list[Prompt]:
    """Ask for held-out cells, those of all styles in turn.

    Args:
        data: Folder of the emoji.
        size: Side of the generated images in pixels.
        count: Prompts.

    Returns:
        Prompts with their judges.
    """
    from dalle_mini_impl.evaluation.emoji import HeldOutPrompt, Row, grid_prompts

    rows = read_rows(data)

    def read(row: Row) -> Tensor:
        path = data / row["file_name"]
        image = decode_image(path.read_bytes(), source=str(path))
        return image_to_pixels(resize_and_crop(image, size))

    def judge(held_out_prompt: HeldOutPrompt) -> Callable[[Image.Image], Answer]:
        def answer(image: Image.Image) -> Answer:
            pixels = image_to_pixels(image)
            error = (
                float((held_out_prompt.reference - pixels).square().mean()) / 4
            )  # of pixels in [0, 1]
            right = {what: float(found) for what, found in held_out_prompt.answer(pixels).items()}
            return right | {"psnr_db": -10 * float(torch.tensor(max(error, 1e-10)).log10())}

        return answer

    styles = list(dict.fromkeys(row["style"] for row in rows))
    found = [each for style in styles for each in grid_prompts(rows, style=style, read=read)]
    chosen = [found[index] for index in spread_indices(len(found), count)]
    return [
        Prompt(held_out_prompt.row["text"], judge(held_out_prompt)) for held_out_prompt in chosen
    ]


def shapes_prompts(data: Path, *, count: int) -> list[Prompt]:
    """Ask for captions of the shapes world that training never showed.

    Args:
        data: Folder of the shapes.
        count: Prompts.

    Returns:
        Prompts with their judges.
    """
    from dalle_mini_impl.builtin_datasets.shapes.checker import read_objects
    from dalle_mini_impl.builtin_datasets.shapes.facts import Fact, facts_hold, parse_fact

    def judge(facts: Sequence[Fact]) -> Callable[[Image.Image], Answer]:
        def answer(image: Image.Image) -> Answer:
            held = facts_hold(facts, read_objects(image))
            return {"whole caption": float(all(held)), "facts": sum(held) / len(held)}

        return answer

    rows = [row for row in read_rows(data) if row["split"] == "test_compose"]
    by_text = list({row["text"]: row for row in rows}.values())
    chosen = [by_text[index] for index in spread_indices(len(by_text), count)]
    return [
        Prompt(row["text"], judge([parse_fact(line) for line in row["facts"]])) for row in chosen
    ]


@torch.inference_mode()
def generate_candidates(
    pipeline: TextToImagePipeline,
    prompt: str,
    *,
    sampling_config: SamplingConfig,
    num_candidates: int,
    seed: int,
) -> dict[str, Tensor]:
    """Generate one prompt several times.

    Args:
        pipeline: The model.
        prompt: What to generate.
        sampling_config: How.
        num_candidates: How often.
        seed: Of the first one.

    Returns:
        ``image_token_ids`` (candidates, image_length), and their caption ``log_likelihood_ratios`` in nats.
    """
    text = pipeline.text_tokenizer.encode([prompt]).expand(num_candidates, -1)
    seeds = torch.arange(seed, seed + num_candidates)
    generated = generate_image_token_ids(
        pipeline.dalle, text, seeds=seeds, sampling_config=sampling_config
    )
    log_likelihood_ratios = log_likelihood_ratio(pipeline.dalle, text, generated.image_token_ids)
    return {
        "image_token_ids": generated.image_token_ids.contiguous(),
        "gains": log_likelihood_ratios.contiguous(),
    }


def load_or_generate(
    file: Path, protocol: str, generate_missing: Callable[[], dict[str, Tensor]]
) -> Any:
    """Read candidates of an earlier run of the same protocol, or generate them.

    Args:
        file: Where they are kept.
        protocol: What decides them.
        generate_missing: Generates them.

    Returns:
        Tensors by name.
    """
    if file.is_file():
        with safe_open(file, framework="pt") as stored:
            if stored.metadata() == {"protocol": protocol}:
                return {name: stored.get_tensor(name) for name in stored.keys()}
    generated = generate_missing()
    unfinished = file.with_suffix(".tmp")
    save_file(generated, unfinished, metadata={"protocol": protocol})
    unfinished.replace(file)
    return generated


def compare(answers: Sequence[Sequence[Answer]], picks: Mapping[str, Sequence[int]]) -> Any:
    """Score the picks of each ranker, and what they gain over the first candidate.

    Args:
        answers: Of each prompt, of each of its candidates.
        picks: Ranker -> the candidate that it picks for each prompt; ``none`` among them.

    Returns:
        Ranker -> what is asked -> the mean and its gain over ``none``, with 95 % intervals by
        bootstrap over prompts; ``mean of all`` and ``oracle`` (the best candidate by the judge)
        bound what a ranker can do.
    """
    asked = list(answers[0][0])
    rows = {
        name: {what: [each[at][what] for each, at in zip(answers, chosen, strict=True)]
               for what in asked}
        for name, chosen in picks.items()
    }  # fmt: skip
    rows["mean of all"] = {
        what: [sum(one[what] for one in each) / len(each) for each in answers] for what in asked
    }
    rows[ORACLE] = {what: [max(one[what] for one in each) for each in answers] for what in asked}
    figures: dict[str, dict[str, Any]] = {}
    for name, values in rows.items():
        figures[name] = {}
        for what in asked:
            pairs = zip(values[what], rows[NONE][what], strict=True)
            figures[name][what] = {
                "mean": dataclasses.asdict(bootstrap_mean(values[what])),
                "gain": dataclasses.asdict(bootstrap_mean([a - b for a, b in pairs])),
            }
    return figures


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay figures out as Markdown.

    Args:
        figures: As ``compare`` makes them.

    Returns:
        A row per ranker: means, and gains with their intervals.
    """
    asked = list(figures[NONE])
    lines = [
        "| ranker | " + " | ".join(f"{what} | gain" for what in asked) + " |",
        "|---|" + "--:|" * (2 * len(asked)),
    ]
    for name, values in figures.items():
        cells = []
        for what in asked:
            mean, gain_over_none = values[what]["mean"], values[what]["gain"]
            scale, unit = (1, " dB") if what.endswith("_db") else (100, " %")
            spread = (
                f"{gain_over_none['low'] * scale:+.1f} to {gain_over_none['high'] * scale:+.1f}"
            )
            cells += [
                f"{mean['value'] * scale:.1f}{unit}",
                f"{gain_over_none['value'] * scale:+.1f} ({spread})",
            ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Generate, rank and judge.

    Args:
        options: Of the command line.

    Returns:
        The protocol and the figures.
    """
    pipeline = TextToImagePipeline.from_pretrained(options.model)
    is_shapes = "facts" in read_rows(options.data)[0]
    size = pipeline.vqvae.config.image_size
    prompts = (
        shapes_prompts(options.data, count=options.num_prompts)
        if is_shapes
        else emoji_prompts(options.data, size=size, count=options.num_prompts)
    )
    given = {name: getattr(options, name) for name in ("temperature", "guidance_scale")}
    sampling_config = pipeline.sampling_config.override(
        {k: v for k, v in given.items() if v is not None}
    )
    facts = {
        "model": hashlib.sha256(
            (Path(options.model) / "model_index.json").read_bytes()
        ).hexdigest()[:16],
        "settings": dataclasses.asdict(sampling_config),
        "num_candidates": options.num_candidates,
        "seed": options.seed,
    }
    kept = options.out / "candidates"
    kept.mkdir(parents=True, exist_ok=True)
    rankers = load_rankers(options)
    answers: list[list[Answer]] = []
    picks: dict[str, list[int]] = {name: [] for name in (NONE, LIKELIHOOD, *rankers)}
    shown: list[tuple[Image.Image, str]] = []
    for number, prompt in enumerate(prompts):
        protocol = json.dumps({**facts, "prompt": prompt.text}, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(protocol.encode()).hexdigest()[:16]
        generated = load_or_generate(
            kept / f"{digest}.safetensors",
            protocol,
            lambda text=prompt.text: generate_candidates(  # type: ignore[misc]
                pipeline,
                text,
                sampling_config=sampling_config,
                num_candidates=options.num_candidates,
                seed=options.seed,
            ),
        )
        images = pipeline.decode(generated["image_token_ids"])
        answers.append([prompt.judge(image) for image in images])
        picks[NONE].append(0)
        picks[LIKELIHOOD].append(int(generated["gains"].argmax()))
        for name, ranker in rankers.items():
            scores = ranker.score(images, [prompt.text] * len(images))
            picks[name].append(int(scores.argmax()))
        if number < NUM_SHOWN:
            shown += [(images[picks[name][-1]], f"{prompt.text} ({name})") for name in picks]
        print(f"{number + 1} of {len(prompts)} prompts", flush=True)
    captions = [caption for _, caption in shown]
    grid = make_grid([image for image, _ in shown], columns=2 * len(picks), captions=captions)
    grid.save(options.out / "picked.png")
    return {
        **facts,
        "num_prompts": len(prompts),
        "clip": {name: str(options.clip) for name in rankers},
        "figures": compare(answers, picks),
        "picks": picks,
    }


def load_rankers(options: argparse.Namespace) -> dict[str, ImageRanker]:
    """Load the CLIP, if there is one.

    Args:
        options: Of the command line.

    Returns:
        Rankers beside those that need nothing.
    """
    if options.clip is None:
        return {}
    from dalle_mini_impl.clip_ranker import load_clip_ranker

    return {"clip": load_clip_ranker(options.clip)}


def main() -> None:
    """Read the command line, and write and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rankers", description=__doc__)
    parser.add_argument("--model", required=True, help="model folder that generates")
    parser.add_argument("--data", type=Path, required=True, help="emoji or shapes, with splits")
    parser.add_argument("--clip", help="folder or name of a CLIP; without it likelihood alone")
    parser.add_argument("--out", type=Path, default=Path("out/rankers"), help="output folder")
    parser.add_argument("--num-prompts", type=int, default=60)
    parser.add_argument("--num-candidates", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of each prompt's first candidate")
    parser.add_argument("--temperature", type=float, help="default: the model's own")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's own")
    options = parser.parse_args()
    results = run(options)
    path = options.out / "rankers.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(results["figures"]), end="")


if __name__ == "__main__":
    main()
