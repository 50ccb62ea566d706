"""Composition on emoji: held-out cells and clocks against the reference images of their kind."""

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dalle_mini_impl.builtin_datasets.emoji.prepare import grid_roles
from dalle_mini_impl.data.image_grid import make_grid
from dalle_mini_impl.data.images import bytes_to_pixels, image_to_pixels, pixels_to_images
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.bootstrap import Estimate, bootstrap_mean
from dalle_mini_impl.evaluation.report import CEILING, FLOOR, Section, Table, fraction_table
from dalle_mini_impl.evaluation.samples import (
    EvaluationData,
    Pixels,
    Row,
    Samples,
    derangement,
    evenly_spaced,
    join,
    list_data,
    to_images,
)
from dalle_mini_impl.pipeline import TextToImagePipeline

ATTRIBUTES = ("cell", "gender", "tone", "style")
ALL_STYLES = "all styles"
NUM_SHOWN = 24
TEXT = (
    "Each generated cell is classified as the nearest (in pixels) of the 15 reference images of "
    "its role: right cell (chance 6.7 %), gender (33 %), skin tone (20 %). Its style is that of "
    "the nearest reference image of the same emoji (always right with one style); a clock is "
    "classified as the nearest of 24. The cells were held out in every style. "
    "Intervals: bootstrap over cells; where all are right, 3 / cells bounds the error."
)
ImageTensor: TypeAlias = Float[Tensor, "3 height width"]
Name = TypeVar("Name", bound=Hashable)
ReadPixels: TypeAlias = Callable[[Row], Tensor]


@dataclass(frozen=True)
class HeldOutPrompt:
    """A held-out emoji to be generated, and the reference images to compare the result with."""

    row: Row
    """Metadata of the held-out image."""
    choices: Mapping[str, Mapping[Hashable, Tensor]]
    """By attribute (``cell``, ``style``, ``clock``): name -> reference image, [-1, 1]."""
    labels: Mapping[str, Hashable]
    """The correct name by attribute."""

    def check(self, image: ImageTensor) -> dict[str, bool]:
        """Tell which attributes of a generated image, [-1, 1], are right."""
        checks = {}
        for attribute, choices in self.choices.items():
            found, label = nearest(image, choices), self.labels[attribute]
            checks[attribute] = found == label
            # A cell is a pair: its gender may be right and its tone wrong.
            if isinstance(found, tuple) and isinstance(label, tuple):
                checks["gender"], checks["tone"] = found[0] == label[0], found[1] == label[1]
        return checks

    @property
    def reference(self) -> Tensor:
        """The held-out image itself."""
        attribute = next(iter(self.choices))
        return self.choices[attribute][self.labels[attribute]]


@dataclass(frozen=True)
class GridReport:
    """Fractions of held-out cells generated right; chance is 1/15, 1/3 and 1/5."""

    num_cells: int
    grid_accuracy: float
    gender_accuracy: float
    tone_accuracy: float
    captions: list[str]
    generated: list[Image.Image]
    reference: list[Image.Image]


def held_out_prompts(
    data: EvaluationData, styles: Sequence[str], *, max_samples: int
) -> tuple[list[HeldOutPrompt], Samples]:
    """List the held-out emoji of some styles (all when empty), with images in the same order.

    Of each style, at most ``max_samples`` cells and as many clocks. UserError without any cell.
    """
    samples = join([data.train, data.held_out_samples])
    rows = samples.rows
    indices = _indices_by_emoji(rows)

    @functools.cache  # the cells of a role share their 15 reference images
    def load(index: int) -> Tensor:
        return bytes_to_pixels(samples.pixels[index : index + 1])[0]

    def read(row: Row) -> Tensor:
        return load(indices[_emoji_of(row)])

    chosen_styles = styles or list(dict.fromkeys(str(row["style"]) for row in rows))
    prompts: list[HeldOutPrompt] = []
    for style in chosen_styles:
        for list_prompts in (grid_prompts, clock_prompts):
            found = list_prompts(rows, style=style, read=read)
            prompts += [found[index] for index in evenly_spaced(len(found), max_samples)]
    if not any("cell" in prompt.labels for prompt in prompts):
        raise UserError(
            f"data: no held-out grid cells (split test_compose) in {', '.join(chosen_styles)}"
        )
    return prompts, samples.take([indices[_emoji_of(prompt.row)] for prompt in prompts])


def measure_emoji(
    prompts: Sequence[HeldOutPrompt],
    captions: Sequence[str],
    generated: Mapping[str, Pixels],
    reconstructions: Pixels,
    *,
    seed: int,
) -> Section:
    """Judge generated images of held-out emoji, by style.

    Args:
        prompts: What was to be generated.
        captions: Their captions.
        generated: Sampling method (single, best of N) -> one image per prompt.
        reconstructions: Of the held-out images, by the image tokenizer.
        seed: Of the shuffling.
    """
    checks = {way: _check_images(prompts, pixels) for way, pixels in generated.items()}
    # No model can exceed its tokenizer; images of other prompts show what chance gives.
    checks[CEILING] = _check_images(prompts, reconstructions)
    checks[FLOOR] = _check_shuffled_images(prompts, next(iter(generated.values())), seed=seed)
    by_style: dict[str, list[int]] = {}  # indices of prompts
    for index, prompt in enumerate(prompts):
        by_style.setdefault(str(prompt.row["style"]), []).append(index)
    if len(by_style) > 1:
        by_style[ALL_STYLES] = list(range(len(prompts)))
    # way -> style -> attribute -> estimate
    figures = {
        way: {style: _fractions(found[i] for i in indices) for style, indices in by_style.items()}
        for way, found in checks.items()
    }
    tables = [
        _table("held-out cells", ATTRIBUTES, figures, prompts, by_style),
        _table("held-out clocks", ("clock",), figures, prompts, by_style),
    ]
    return Section(
        "Composition",
        TEXT,
        {"chance": {"cell": 1 / 15, "gender": 1 / 3, "tone": 1 / 5, "clock": 1 / 24}, **figures},
        [table for table in tables if table.rows],
        _sheets(prompts, captions, list(generated.values())[-1]),
    )


def evaluate_grid(
    pipeline: TextToImagePipeline, data_dir: Path, *, seed: int = 0, **overrides: Any
) -> GridReport:
    """Generate every held-out cell of Twemoji once, ``overrides`` being fields of SamplingConfig.

    Raises:
        UserError: If ``prepare_emoji.py`` did not write the folder, or no cell was held out.
    """
    # Only the roles with held-out cells are read: `read_data` would tokenize the whole data set.
    listed = list_data(str(data_dir))
    listed.require_emoji(str(data_dir))
    rows = [pair.attributes for pair in listed.pairs]
    indices, pixel_size = _indices_by_emoji(rows), pipeline.vqvae.config.pixel_size

    def read(row: Row) -> Tensor:
        return image_to_pixels(listed.read_image(indices[_emoji_of(row)], pixel_size=pixel_size))

    prompts = grid_prompts(rows, style="twemoji", read=read)
    if not prompts:
        raise UserError(f"data: {data_dir} has no held-out grid cells (split test_compose)")
    captions = [listed.pairs[indices[_emoji_of(prompt.row)]].captions[0] for prompt in prompts]
    generated = pipeline(captions, seed=seed, **overrides).images
    checks = [
        prompt.check(image_to_pixels(image))
        for prompt, image in zip(prompts, generated, strict=True)
    ]
    accuracy = {
        attribute: sum(check[attribute] for check in checks) / len(checks)
        for attribute in ("cell", "gender", "tone")
    }
    return GridReport(
        num_cells=len(prompts),
        grid_accuracy=accuracy["cell"],
        gender_accuracy=accuracy["gender"],
        tone_accuracy=accuracy["tone"],
        captions=captions,
        generated=generated,
        reference=[pixels_to_images(prompt.reference[None])[0] for prompt in prompts],
    )


def grid_prompts(rows: Sequence[Row], *, style: str, read: ReadPixels) -> list[HeldOutPrompt]:
    """List the held-out grid cells of a style: which cell of its role is it, in which style?

    ``rows`` are the metadata of all images; ``read`` gives the pixels of a row, [-1, 1].
    """
    # The same emoji in every style: which of these is nearest says which style was generated.
    by_emoji: dict[str, dict[Hashable, Row]] = {}
    for row in rows:
        by_emoji.setdefault(row["hexcode"], {})[row["style"]] = row
    prompts = []
    for grid in grid_roles(rows, style=style).values():
        held_out = {cell: row for cell, row in grid.items() if row["split"] == "test_compose"}
        if not held_out:
            continue  # without reading the images of the role
        # All 15 cells are choices: a model that cannot compose generates one it was trained on.
        cells: dict[Hashable, Tensor] = {cell: read(row) for cell, row in grid.items()}
        for cell, row in held_out.items():
            styles = {name: read(other) for name, other in by_emoji[row["hexcode"]].items()}
            choices = {"cell": cells, "style": styles}
            prompts.append(HeldOutPrompt(row, choices, {"cell": cell, "style": style}))
    return prompts


def clock_prompts(rows: Sequence[Row], *, style: str, read: ReadPixels) -> list[HeldOutPrompt]:
    """List the held-out clock faces of a style: which of all clocks is it?"""
    clocks = [row for row in rows if row["style"] == style and row.get("kind") == "clock"]
    choices: dict[Hashable, Tensor] = {row["hexcode"]: read(row) for row in clocks}
    return [
        HeldOutPrompt(row, {"clock": choices}, {"clock": row["hexcode"]})
        for row in clocks
        if row["split"] == "test_clock"
    ]


def nearest(image: ImageTensor, choices: Mapping[Name, Tensor]) -> Name:
    """Find the name of the reference image with the smallest squared error."""
    return min(choices, key=lambda name: float((choices[name] - image).square().mean()))


def _emoji_of(row: Row) -> tuple[str, str]:
    return row["hexcode"], row["style"]


def _indices_by_emoji(rows: Sequence[Row]) -> dict[tuple[str, str], int]:
    return {_emoji_of(row): index for index, row in enumerate(rows)}


def _check_images(prompts: Sequence[HeldOutPrompt], pixels: Pixels) -> list[dict[str, bool]]:
    pairs = zip(prompts, bytes_to_pixels(pixels), strict=True)
    return [prompt.check(image) for prompt, image in pairs]


def _check_shuffled_images(
    prompts: Sequence[HeldOutPrompt], pixels: Pixels, *, seed: int
) -> list[dict[str, bool]]:
    """Judge each image by another prompt of its kind."""
    checks: list[dict[str, bool]] = [{} for _ in prompts]
    for kind in ("cell", "clock"):
        indices = [index for index, prompt in enumerate(prompts) if kind in prompt.labels]
        # A derangement within the kind: no image meets its own prompt, no clock meets a cell.
        others = derangement(len(indices), seed=seed).tolist()
        for index, other in zip(indices, others, strict=True):
            checks[index] = prompts[index].check(bytes_to_pixels(pixels[indices[other]][None])[0])
    return checks


def _fractions(checks: Iterable[dict[str, bool]]) -> dict[str, Estimate]:
    """Average each attribute over the prompts that have it."""
    values: dict[str, list[float]] = {}
    for check in checks:
        for attribute, is_right in check.items():
            values.setdefault(attribute, []).append(float(is_right))
    return {
        attribute: bootstrap_mean(values[attribute])
        for attribute in (*ATTRIBUTES, "clock")
        if attribute in values
    }


def _table(
    name: str,
    attributes: Sequence[str],
    figures: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
    prompts: Sequence[HeldOutPrompt],
    by_style: Mapping[str, Sequence[int]],
) -> Table:
    """Tabulate one kind of prompt by sampling method and style."""
    fractions, counts = {}, {}
    for way, found in figures.items():
        for style, estimates in found.items():
            # Cells and clocks have different attributes, and a style may have none of one kind.
            if attributes[0] in estimates:
                row = f"{way}, {style}"
                fractions[row] = {f"right {each}": estimates[each] for each in attributes}
                counts[row] = sum(attributes[0] in prompts[i].labels for i in by_style[style])
    return fraction_table(name, "generated", fractions, counts)


def _sheets(
    prompts: Sequence[HeldOutPrompt], captions: Sequence[str], generated: Pixels
) -> dict[str, Image.Image]:
    """Lay out pairs of generated and reference images: cells, clocks, and errors."""
    checks = _check_images(prompts, generated)
    shown = {
        "held_out_cells": [i for i, check in enumerate(checks) if "cell" in check],
        "held_out_clocks": [i for i, check in enumerate(checks) if "clock" in check],
        "wrong": [i for i, check in enumerate(checks) if not all(check.values())],
    }
    sheets = {}
    for name, indices in shown.items():
        images, texts = [], []
        for index in (indices[i] for i in evenly_spaced(len(indices), NUM_SHOWN)):
            images += to_images(generated[index][None])
            images += pixels_to_images(prompts[index].reference[None])
            wrong = [attribute for attribute, is_right in checks[index].items() if not is_right]
            verdict = f" (WRONG {', '.join(wrong)})" if wrong else ""
            texts += [captions[index] + verdict, "(reference image)"]
        if images:
            sheets[name] = make_grid(images, columns=8, captions=texts)
    return sheets
