"""What is asked of a model of emoji: held-out cells and clocks, by style."""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dalle_mini_impl.builtin_datasets.emoji.prepare import grid_roles
from dalle_mini_impl.data.image_grid import make_grid
from dalle_mini_impl.data.images import (
    decode_image,
    image_to_pixels,
    pixels_to_images,
    resize_and_crop,
)
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.bootstrap import Estimate, bootstrap_mean
from dalle_mini_impl.evaluation.likelihood import shuffled
from dalle_mini_impl.evaluation.report import CEILING, FLOOR, Section, Table, fraction_table
from dalle_mini_impl.evaluation.samples import (
    EvaluationData,
    Pixels,
    Samples,
    join,
    spread_indices,
    to_floats,
    to_images,
)
from dalle_mini_impl.pipeline import TextToImagePipeline

ATTRIBUTES = ("cell", "gender", "tone", "style")
ALL_STYLES = "all styles"
NUM_SHOWN = 24
Row = Mapping[str, Any]
ImageTensor = Float[Tensor, "3 height width"]
Key = TypeVar("Key", bound=Hashable)
Read = Callable[[Row], Tensor]


@dataclass(frozen=True)
class HeldOutPrompt:
    """A held-out image to be generated, and the true images that its generation is compared with."""

    row: Row
    """What the metadata say of the held-out image."""
    choices: Mapping[str, Mapping[Hashable, Tensor]]
    """By what is asked (``cell``, ``style``, ``clock``): name -> true image, [-1, 1]."""
    right: Mapping[str, Hashable]
    """The right name for each."""

    def check(self, image: ImageTensor) -> dict[str, bool]:
        """Judge a generation.

        Args:
            image: As large as the true ones, [-1, 1].

        Returns:
            What is asked -> whether the generation is right; for a cell its two parts as well.
        """
        checks = {}
        for what, choices in self.choices.items():
            found = nearest(image, choices)
            checks[what] = found == self.right[what]
            expected = self.right[what]
            if isinstance(found, tuple) and isinstance(expected, tuple):
                checks["gender"], checks["tone"] = found[0] == expected[0], found[1] == expected[1]
        return checks

    @property
    def reference(self) -> Tensor:
        """The true image."""
        [what, *_] = self.choices
        return self.choices[what][self.right[what]]


@dataclass(frozen=True)
class GridReport:
    """How many held-out cells of one style were generated right."""

    num_cells: int
    grid_accuracy: float
    """Fraction of images nearest to their own cell, in [0, 1]; chance 1/15."""
    gender_accuracy: float
    """Share whose nearest cell has the right gender; chance 1/3."""
    tone_accuracy: float
    """Share whose nearest cell has the right skin tone; chance 1/5."""
    captions: list[str]
    generated: list[Image.Image]
    reference: list[Image.Image]


def held_out_prompts(
    data: EvaluationData, styles: Sequence[str], *, max_samples: int
) -> tuple[list[HeldOutPrompt], Samples]:
    """Find the held-out emoji that a model shall generate.

    Args:
        data: Emoji.
        styles: Whose images are expected; all when empty.
        max_samples: Cells per style, spread over all of them.

    Returns:
        The questions, and their images and captions in the same order.

    Raises:
        UserError: If nothing was held out.
    """
    all_samples = join([data.train, data.held_out_samples])
    # The place of a row stands for its image, so that rows of the source stay as they are.
    rows: list[Row] = [{**row, "_at": at} for at, row in enumerate(all_samples.rows)]
    known = list(dict.fromkeys(str(row["style"]) for row in rows))
    pixels: dict[int, Tensor] = {}

    def read(row: Row) -> Tensor:
        at = int(row["_at"])
        if at not in pixels:
            pixels[at] = to_floats(all_samples.pixels[at : at + 1])[0]
        return pixels[at]

    prompts: list[HeldOutPrompt] = []
    for style in styles or known:
        cells = grid_prompts(rows, style=style, read=read)
        prompts += [cells[i] for i in spread_indices(len(cells), max_samples)]
        clocks = clock_prompts(rows, style=style, read=read)
        prompts += [clocks[i] for i in spread_indices(len(clocks), max_samples)]
    if not any("cell" in prompt.right for prompt in prompts):
        raise UserError(
            f"data: no held-out grid cells (split test_compose) in {', '.join(styles or known)}"
        )
    return prompts, all_samples.take([int(prompt.row["_at"]) for prompt in prompts])


def measure_emoji(
    prompts: Sequence[HeldOutPrompt],
    captions: Sequence[str],
    generated: Mapping[str, Pixels],
    reconstructions: Pixels,
    *,
    seed: int,
) -> Section:
    """Judge generated images of held-out emoji.

    Args:
        prompts: What was to be generated.
        captions: In whose words.
        generated: Way of generation -> one generation per question; the first way is also shuffled.
        reconstructions: The true images after the image tokenizer: the best that can be generated.
        seed: Of the shuffling.

    Returns:
        Fractions of right generated images by style, with ceiling and floor.
    """
    checks = {way: _check_images(prompts, pixels) for way, pixels in generated.items()}
    checks[CEILING] = _check_images(prompts, reconstructions)
    checks[FLOOR] = _check_shuffled_images(prompts, next(iter(generated.values())), seed=seed)
    styles = list(dict.fromkeys(str(prompt.row["style"]) for prompt in prompts))
    chosen = {style: [at for at, q in enumerate(prompts) if q.row["style"] == style]
              for style in styles}  # fmt: skip
    if len(styles) > 1:
        chosen[ALL_STYLES] = list(range(len(prompts)))
    figures = {
        way: {style: _fractions(found[at] for at in places) for style, places in chosen.items()}
        for way, found in checks.items()
    }
    return Section(
        "Composition",
        "Right where the true image of the same cell is nearest in pixels of all 15 of its role "
        "(chance 6.7 %), of the same gender (33 %), of the same skin tone (20 %); the right style "
        "where it is nearest of all styles of the same emoji (with one style always); a clock "
        "where it is nearest of 24. The cells were held out in every style. Intervals: bootstrap "
        "over cells; where all are right, 3 / cells bounds the fraction of others.",
        {"chance": {"cell": 1 / 15, "gender": 1 / 3, "tone": 1 / 5, "clock": 1 / 24}, **figures},
        [
            table
            for name, attributes in (
                ("held-out cells", ATTRIBUTES),
                ("held-out clocks", ("clock",)),
            )
            if (table := _table(name, attributes, figures, prompts, chosen)).rows
        ],
        _sheets(prompts, captions, list(generated.values())[-1]),
    )


def _check_images(prompts: Sequence[HeldOutPrompt], pixels: Pixels) -> list[dict[str, bool]]:
    """Judge one generation per question."""
    pairs = zip(prompts, to_floats(pixels), strict=True)
    return [prompt.check(image) for prompt, image in pairs]


def _check_shuffled_images(
    prompts: Sequence[HeldOutPrompt], pixels: Pixels, *, seed: int
) -> list[dict[str, bool]]:
    """Judge generated images as if each had been asked for by another question of its kind."""
    found: list[dict[str, bool]] = [{} for _ in prompts]
    for kind in ("cell", "clock"):
        places = [at for at, prompt in enumerate(prompts) if kind in prompt.right]
        for at, other in zip(places, shuffled(len(places), seed=seed).tolist(), strict=True):
            found[at] = prompts[at].check(to_floats(pixels[places[other]][None])[0])
    return found


def _fractions(checks: Iterable[dict[str, bool]]) -> dict[str, Estimate]:
    """Average what was asked."""
    found = list(checks)
    return {
        what: bootstrap_mean([float(check[what]) for check in found if what in check])
        for what in (*ATTRIBUTES, "clock")
        if any(what in check for check in found)
    }


def _table(
    name: str,
    attributes: Sequence[str],
    figures: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
    prompts: Sequence[HeldOutPrompt],
    chosen: Mapping[str, Sequence[int]],
) -> Table:
    """Lay the fractions of one kind of question out, by way of generation and style."""
    fractions, counts = {}, {}
    for way, by_style in figures.items():
        for style, found in by_style.items():
            if attributes[0] in found:
                row = f"{way}, {style}"
                fractions[row] = {f"right {what}": found[what] for what in attributes}
                counts[row] = sum(attributes[0] in prompts[at].right for at in chosen[style])
    return fraction_table(name, "generated", fractions, counts)


def _sheets(
    prompts: Sequence[HeldOutPrompt], captions: Sequence[str], generated: Pixels
) -> dict[str, Image.Image]:
    """CandidateTokens beside the true images: some cells, all clocks, and what is wrong."""
    checks = _check_images(prompts, generated)
    kinds: dict[str, list[int]] = {
        "held_out_cells": [i for i, a in enumerate(checks) if "cell" in a],
        "held_out_clocks": [i for i, a in enumerate(checks) if "clock" in a],
        "wrong": [i for i, a in enumerate(checks) if not all(a.values())],
    }
    sheets = {}
    for name, places in kinds.items():
        images, texts = [], []
        for at in (places[i] for i in spread_indices(len(places), NUM_SHOWN)):
            images += [
                *to_images(generated[at][None]),
                *pixels_to_images(prompts[at].reference[None]),
            ]
            wrong = [what for what, right in checks[at].items() if not right]
            verdict = f" (WRONG {', '.join(wrong)})" if wrong else ""
            texts += [captions[at] + verdict, "(true image)"]
        if images:
            sheets[name] = make_grid(images, columns=8, captions=texts)
    return sheets


def nearest(image: ImageTensor, choices: Mapping[Key, Tensor]) -> Key:
    """Find the true image with the smallest squared error.

    Args:
        image: A generation.
        choices: Name -> true image.

    Returns:
        The name of the nearest.
    """
    return min(choices, key=lambda name: float((choices[name] - image).square().mean()))


def grid_prompts(rows: Sequence[Row], *, style: str, read: Read) -> list[HeldOutPrompt]:
    """List the held-out grid cells of a style.

    Args:
        rows: Of all images of the data set.
        style: Whose images are expected.
        read: Gives the pixels of a row, [-1, 1].

    Returns:
        One question per cell: which cell, and which style.
    """
    by_emoji: dict[str, dict[Hashable, Row]] = {}
    for row in rows:
        by_emoji.setdefault(row["hexcode"], {})[row["style"]] = row
    prompts = []
    for grid in grid_roles(rows, style=style).values():
        held_out = {cell: row for cell, row in grid.items() if row["split"] == "test_compose"}
        truth: dict[Hashable, Tensor] = (
            {cell: read(row) for cell, row in grid.items()} if held_out else {}
        )
        for cell, row in held_out.items():
            styles = {name: read(other) for name, other in by_emoji[row["hexcode"]].items()}
            prompts.append(
                HeldOutPrompt(row, {"cell": truth, "style": styles}, {"cell": cell, "style": style})
            )
    return prompts


def clock_prompts(rows: Sequence[Row], *, style: str, read: Read) -> list[HeldOutPrompt]:
    """List the held-out clock faces of a style.

    Args:
        rows: Of all images of the data set.
        style: Whose images are expected.
        read: Gives the pixels of a row, [-1, 1].

    Returns:
        One question per clock: which of all clocks.
    """
    clocks = [row for row in rows if row["style"] == style and row.get("kind") == "clock"]
    truth: dict[Hashable, Tensor] = {row["hexcode"]: read(row) for row in clocks}
    return [
        HeldOutPrompt(row, {"clock": truth}, {"clock": row["hexcode"]})
        for row in clocks
        if row["split"] == "test_clock"
    ]


def evaluate_grid(
    pipeline: TextToImagePipeline, data_dir: Path, *, seed: int = 0, **overrides: Any
) -> GridReport:
    """Generate every held-out cell of Twemoji once and find the nearest true image.

    Args:
        pipeline: The model.
        data_dir: Folder that ``prepare_emoji.py`` wrote.
        seed: Of each image.
        **overrides: Fields of ``SamplingConfig``.

    Returns:
        Accuracies and the images.

    Raises:
        UserError: If the folder holds no emoji data, or no cell was held out.
    """
    metadata = data_dir / "metadata.jsonl"
    if not metadata.is_file():
        raise UserError(f"data: no {metadata}; expected the folder that prepare_emoji.py wrote")
    size = pipeline.vqvae.config.image_size

    def read(row: Row) -> Tensor:
        path = data_dir / row["file_name"]
        image = decode_image(path.read_bytes(), source=str(path))
        return image_to_pixels(resize_and_crop(image, size))

    try:
        lines = metadata.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        prompts = grid_prompts(rows, style="twemoji", read=read)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"data: {metadata}: {type(error).__name__}: {error}; "
            "expected the folder that prepare_emoji.py wrote"
        ) from None
    if not prompts:
        raise UserError(f"data: {metadata} has no held-out grid cells (split test_compose)")
    captions = [prompt.row["text"] for prompt in prompts]
    generated = pipeline(captions, seed=seed, **overrides).images
    checks = [
        prompt.check(image_to_pixels(image))
        for prompt, image in zip(prompts, generated, strict=True)
    ]
    cell, gender, tone = (
        sum(check[what] for check in checks) / len(checks) for what in ("cell", "gender", "tone")
    )
    reference = [pixels_to_images(prompt.reference[None])[0] for prompt in prompts]
    return GridReport(len(prompts), cell, gender, tone, captions, generated, reference)
