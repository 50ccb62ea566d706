"""Generating with the weights that ship: what Jacobi passes are worth where a model knows something.

`sample` generates with random weights, whose guesses of later tokens are as good as certain: its own
rows flatter us by the number of passes. Here our decoder is `checkpoints/emoji-64`, and beside it
stands transformers' Llama of its width, depth and lengths, whose time does not depend on weights.
"""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import ours, peers
from benchmarks.config import BenchmarkConfig
from benchmarks.sampling import NATIVE, llama_job
from benchmarks.sizes import Size
from benchmarks.timing import Job, Result, Variant, interleave
from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.native.decoder import NativeDecoder, NativeWeights
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.jacobi import best_window, jacobi_decode

MODEL = Path("checkpoints/emoji-64")
PROMPTS = (
    "red heart, Twemoji style", "a dog face, Noto style", "pizza, Twemoji style",
    "woman firefighter with medium skin tone, Noto style", "빨간색 하트", "green apple",
    "man teacher with dark skin tone, Twemoji style", "rocket, Noto style",
)  # fmt: skip
EMOJI_64 = Size(
    name="emoji-64", width=320, layers=7, heads=5, text_length=20, grid=16, vocab=4096,
    codebook=1000, batch=1,
)  # fmt: skip


def run(settings: BenchmarkConfig) -> list[Result]:
    """Generate one image at a time.

    Args:
        settings: Of the run.

    Returns:
        Rows in seconds per image.
    """
    pipeline = TextToImagePipeline.from_pretrained(MODEL)
    results = []
    for guided in (False, True):
        rows = list(variants(pipeline, guided=guided))
        results += interleave(
            f"generate {EMOJI_64.name}, trained, batch 1, "
            f"{f'guidance {pipeline.sampling_config.guidance_scale:g}' if guided else 'no guidance'}",
            rows[:2] if settings.quick else rows,
            unit="s",
            rounds=settings.rounds,
        )
    return results


def variants(pipeline: TextToImagePipeline, *, guided: bool) -> Iterator[Variant]:
    """Name the rows of a table.

    Args:
        pipeline: The trained model.
        guided: With its own guidance scale.

    Yields:
        Contestants.
    """
    ways: dict[str, dict[str, Any]] = {
        "ours, float32": {},
        "ours, float32, one token at a time": {"one_by_one": True},
        **{name: {"weights": weights} for weights, name in NATIVE.items()},
    }
    for name, options in ways.items():
        yield Variant(
            name=name,
            build=functools.partial(own_job, pipeline, guided=guided, **options),
            is_ours=True,
            matmul=ours.matmul_setting(),
        )
    for words, matmul in (
        ("dynamic cache", "highest"),
        ('dynamic cache, matmul "medium"', "medium"),
    ):
        yield Variant(
            name=f"{peers.LLAMA}, {words}",
            build=lambda: llama_job(
                lambda: peers.build_language_model(peers.LLAMA, EMOJI_64).eval(),
                EMOJI_64,
                1,
                guided,
                compiled=False,
            ),
            matmul=matmul,
        )


def own_job(
    pipeline: TextToImagePipeline,
    *,
    guided: bool,
    weights: NativeWeights | None = None,
    one_by_one: bool = False,
) -> Job:
    """Generate one prompt after the other.

    Args:
        pipeline: The trained model.
        guided: With its own guidance scale, or 1.
        weights: Of the compiled pass; None is torch.
        one_by_one: A pass per token.

    Returns:
        All prompts once; items are images.

    Raises:
        ValueError: If several tokens a pass generate another image than one.
    """
    model: TextToImageModel | NativeDecoder = pipeline.dalle
    if weights is not None:
        model = ours.compile_native(pipeline.dalle, weights)
    settings = pipeline.sampling_config.override({} if guided else {"guidance_scale": 1.0})
    text = pipeline.text_tokenizer.encode(PROMPTS)
    window = 1 if one_by_one else best_window(model, 1)

    def generate(number: int, window: int) -> tuple[torch.Tensor, int]:
        generated = jacobi_decode(
            model,
            text[number : number + 1],
            seeds=torch.tensor([number]),
            settings=settings,
            window=window,
        )
        return generated.image_token_ids, generated.num_passes

    generated = [generate(number, window) for number in range(len(PROMPTS))]
    if not torch.equal(generated[0][0], generate(0, 1)[0]):
        raise ValueError("Jacobi passes generate another image")
    passes = sum(count for _, count in generated) / len(PROMPTS)
    turn = itertools.cycle(range(len(PROMPTS)))
    return Job(
        run=lambda: [generate(next(turn), window) for _ in PROMPTS],
        items=len(PROMPTS),
        note=f"{passes:.1f} passes an image",
    )
