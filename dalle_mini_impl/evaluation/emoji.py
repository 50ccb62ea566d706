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
from dalle_mini_impl.evaluation.report import CEILING, FLOOR, Section, Table, share_table
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

ASKED = ("cell", "gender", "tone", "style")
ALL_STYLES = "all styles"
NUM_SHOWN = 24
Row = Mapping[str, Any]
Picture = Float[Tensor, "3 height width"]
Key = TypeVar("Key", bound=Hashable)
Read = Callable[[Row], Tensor]


def ask(
    data: EvaluationData, styles: Sequence[str], *, max_samples: int
) -> tuple[list[Question], Samples]:
    """Find the held-out emoji that a model shall draw.

    Args:
        data: Emoji.
        styles: Whose pictures are wanted; all when empty.
        max_samples: Cells per style, spread over all of them.

    Returns:
        The questions, and their pictures and captions in the same order.

    Raises:
        UserError: If nothing was held out.
    """
    all_samples = join([data.train, data.held_out_samples])
    # The place of a row stands for its picture, so that rows of the source stay as they are.
    rows: list[Row] = [{**row, "_at": at} for at, row in enumerate(all_samples.rows)]
    known = list(dict.fromkeys(str(row["style"]) for row in rows))
    pixels: dict[int, Tensor] = {}

    def read(row: Row) -> Tensor:
        at = int(row["_at"])
        if at not in pixels:
            pixels[at] = to_floats(all_samples.pixels[at : at + 1])[0]
        return pixels[at]

    questions: list[Question] = []
    for style in styles or known:
        cells = grid_questions(rows, style=style, read=read)
        questions += [cells[i] for i in spread_indices(len(cells), max_samples)]
        clocks = clock_questions(rows, style=style, read=read)
        questions += [clocks[i] for i in spread_indices(len(clocks), max_samples)]
    if not any("cell" in question.right for question in questions):
        raise UserError(
            f"data: no held-out grid cells (split test_compose) in {', '.join(styles or known)}"
        )
    return questions, all_samples.take([int(question.row["_at"]) for question in questions])


def measure_emoji(
    questions: Sequence[Question],
    captions: Sequence[str],
    drawn: Mapping[str, Pixels],
    rebuilt: Pixels,
    *,
    seed: int,
) -> Section:
    """Judge drawings of held-out emoji.

    Args:
        questions: What was to be drawn.
        captions: In whose words.
        drawn: Way of drawing -> one drawing per question; the first way is also shuffled.
        rebuilt: The true pictures after the image tokenizer: the best that can be drawn.
        seed: Of the shuffling.

    Returns:
        Shares of right drawings by style, with ceiling and floor.
    """
    answers = {way: _answers(questions, pixels) for way, pixels in drawn.items()}
    answers[CEILING] = _answers(questions, rebuilt)
    answers[FLOOR] = _shuffled_answers(questions, next(iter(drawn.values())), seed=seed)
    styles = list(dict.fromkeys(str(question.row["style"]) for question in questions))
    chosen = {style: [at for at, q in enumerate(questions) if q.row["style"] == style]
              for style in styles}  # fmt: skip
    if len(styles) > 1:
        chosen[ALL_STYLES] = list(range(len(questions)))
    figures = {
        way: {style: _shares(found[at] for at in places) for style, places in chosen.items()}
        for way, found in answers.items()
    }
    return Section(
        "Composition",
        "Right where the true picture of the same cell is nearest in pixels of all 15 of its role "
        "(chance 6.7 %), of the same gender (33 %), of the same skin tone (20 %); the right style "
        "where it is nearest of all styles of the same emoji (with one style always); a clock "
        "where it is nearest of 24. The cells were held out in every style. Intervals: bootstrap "
        "over cells; where all are right, 3 / cells bounds the share of others.",
        {"chance": {"cell": 1 / 15, "gender": 1 / 3, "tone": 1 / 5, "clock": 1 / 24}, **figures},
        [
            table
            for name, asked in (("held-out cells", ASKED), ("held-out clocks", ("clock",)))
            if (table := _table(name, asked, figures, questions, chosen)).rows
        ],
        _sheets(questions, captions, list(drawn.values())[-1]),
    )


def _answers(questions: Sequence[Question], pixels: Pixels) -> list[dict[str, bool]]:
    """Judge one drawing per question."""
    pairs = zip(questions, to_floats(pixels), strict=True)
    return [question.answer(picture) for question, picture in pairs]


def _shuffled_answers(
    questions: Sequence[Question], pixels: Pixels, *, seed: int
) -> list[dict[str, bool]]:
    """Judge drawings as if each had been asked for by another question of its kind."""
    found: list[dict[str, bool]] = [{} for _ in questions]
    for kind in ("cell", "clock"):
        places = [at for at, question in enumerate(questions) if kind in question.right]
        for at, other in zip(places, shuffled(len(places), seed=seed).tolist(), strict=True):
            found[at] = questions[at].answer(to_floats(pixels[places[other]][None])[0])
    return found


def _shares(answers: Iterable[dict[str, bool]]) -> dict[str, Estimate]:
    """Average what was asked."""
    found = list(answers)
    return {
        what: bootstrap_mean([float(answer[what]) for answer in found if what in answer])
        for what in (*ASKED, "clock")
        if any(what in answer for answer in found)
    }


def _table(
    name: str,
    asked: Sequence[str],
    figures: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
    questions: Sequence[Question],
    chosen: Mapping[str, Sequence[int]],
) -> Table:
    """Lay the shares of one kind of question out, by way of drawing and style."""
    shares, counts = {}, {}
    for way, by_style in figures.items():
        for style, found in by_style.items():
            if asked[0] in found:
                row = f"{way}, {style}"
                shares[row] = {f"right {what}": found[what] for what in asked}
                counts[row] = sum(asked[0] in questions[at].right for at in chosen[style])
    return share_table(name, "drawn", shares, counts)


def _sheets(
    questions: Sequence[Question], captions: Sequence[str], drawn: Pixels
) -> dict[str, Image.Image]:
    """Drawings beside the true pictures: some cells, all clocks, and what is wrong."""
    answers = _answers(questions, drawn)
    kinds: dict[str, list[int]] = {
        "held_out_cells": [i for i, a in enumerate(answers) if "cell" in a],
        "held_out_clocks": [i for i, a in enumerate(answers) if "clock" in a],
        "wrong": [i for i, a in enumerate(answers) if not all(a.values())],
    }
    sheets = {}
    for name, places in kinds.items():
        images, texts = [], []
        for at in (places[i] for i in spread_indices(len(places), NUM_SHOWN)):
            images += [*to_images(drawn[at][None]), *pixels_to_images(questions[at].true[None])]
            wrong = [what for what, right in answers[at].items() if not right]
            verdict = f" (WRONG {', '.join(wrong)})" if wrong else ""
            texts += [captions[at] + verdict, "(true picture)"]
        if images:
            sheets[name] = make_grid(images, columns=8, captions=texts)
    return sheets


@dataclass(frozen=True)
class Question:
    """A held-out picture to be drawn, and the true pictures that its drawing is compared with."""

    row: Row
    """What the metadata say of the held-out picture."""
    choices: Mapping[str, Mapping[Hashable, Tensor]]
    """By what is asked (``cell``, ``style``, ``clock``): name -> true picture, [-1, 1]."""
    right: Mapping[str, Hashable]
    """The right name for each."""

    def answer(self, picture: Picture) -> dict[str, bool]:
        """Judge a drawing.

        Args:
            picture: As large as the true ones, [-1, 1].

        Returns:
            What is asked -> whether the drawing is right; for a cell its two parts as well.
        """
        answers = {}
        for what, choices in self.choices.items():
            found = nearest(picture, choices)
            answers[what] = found == self.right[what]
            wanted = self.right[what]
            if isinstance(found, tuple) and isinstance(wanted, tuple):
                answers["gender"], answers["tone"] = found[0] == wanted[0], found[1] == wanted[1]
        return answers

    @property
    def true(self) -> Tensor:
        """The true picture."""
        [what, *_] = self.choices
        return self.choices[what][self.right[what]]


def nearest(picture: Picture, choices: Mapping[Key, Tensor]) -> Key:
    """Find the true picture with the smallest squared error.

    Args:
        picture: A drawing.
        choices: Name -> true picture.

    Returns:
        The name of the nearest.
    """
    return min(choices, key=lambda name: float((choices[name] - picture).square().mean()))


def grid_questions(rows: Sequence[Row], *, style: str, read: Read) -> list[Question]:
    """List the held-out grid cells of a style.

    Args:
        rows: Of all pictures of the data set.
        style: Whose pictures are wanted.
        read: Gives the pixels of a row, [-1, 1].

    Returns:
        One question per cell: which cell, and which style.
    """
    by_emoji: dict[str, dict[Hashable, Row]] = {}
    for row in rows:
        by_emoji.setdefault(row["hexcode"], {})[row["style"]] = row
    questions = []
    for grid in grid_roles(rows, style=style).values():
        held_out = {cell: row for cell, row in grid.items() if row["split"] == "test_compose"}
        truth: dict[Hashable, Tensor] = (
            {cell: read(row) for cell, row in grid.items()} if held_out else {}
        )
        for cell, row in held_out.items():
            styles = {name: read(other) for name, other in by_emoji[row["hexcode"]].items()}
            questions.append(
                Question(row, {"cell": truth, "style": styles}, {"cell": cell, "style": style})
            )
    return questions


def clock_questions(rows: Sequence[Row], *, style: str, read: Read) -> list[Question]:
    """List the held-out clock faces of a style.

    Args:
        rows: Of all pictures of the data set.
        style: Whose pictures are wanted.
        read: Gives the pixels of a row, [-1, 1].

    Returns:
        One question per clock: which of all clocks.
    """
    clocks = [row for row in rows if row["style"] == style and row.get("kind") == "clock"]
    truth: dict[Hashable, Tensor] = {row["hexcode"]: read(row) for row in clocks}
    return [
        Question(row, {"clock": truth}, {"clock": row["hexcode"]})
        for row in clocks
        if row["split"] == "test_clock"
    ]


@dataclass(frozen=True)
class GridReport:
    """How many held-out cells of one style were drawn right."""

    num_cells: int
    grid_accuracy: float
    """Share of pictures nearest to their own cell, in [0, 1]; chance 1/15."""
    gender_accuracy: float
    """Share whose nearest cell has the right gender; chance 1/3."""
    tone_accuracy: float
    """Share whose nearest cell has the right skin tone; chance 1/5."""
    captions: list[str]
    drawn: list[Image.Image]
    true: list[Image.Image]


def evaluate_grid(
    pipeline: TextToImagePipeline, data_dir: Path, *, seed: int = 0, **settings: Any
) -> GridReport:
    """Draw every held-out cell of Twemoji once and find the nearest true picture.

    Args:
        pipeline: The model.
        data_dir: Folder that ``prepare_emoji.py`` wrote.
        seed: Of each picture.
        **settings: Fields of ``SamplingConfig``.

    Returns:
        Accuracies and the pictures.

    Raises:
        UserError: If the folder holds no emoji data, or no cell was held out.
    """
    metadata = data_dir / "metadata.jsonl"
    if not metadata.is_file():
        raise UserError(f"data: no {metadata}; wanted the folder that prepare_emoji.py wrote")
    size = pipeline.vqvae.config.image_size

    def read(row: Row) -> Tensor:
        path = data_dir / row["file_name"]
        image = decode_image(path.read_bytes(), source=str(path))
        return image_to_pixels(resize_and_crop(image, size))

    try:
        lines = metadata.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        questions = grid_questions(rows, style="twemoji", read=read)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"data: {metadata}: {type(error).__name__}: {error}; "
            "wanted the folder that prepare_emoji.py wrote"
        ) from None
    if not questions:
        raise UserError(f"data: {metadata} has no held-out grid cells (split test_compose)")
    captions = [question.row["text"] for question in questions]
    drawn = pipeline(captions, seed=seed, **settings).images
    answers = [
        question.answer(image_to_pixels(image))
        for question, image in zip(questions, drawn, strict=True)
    ]
    cell, gender, tone = (
        sum(answer[what] for answer in answers) / len(answers)
        for what in ("cell", "gender", "tone")
    )
    true = [pixels_to_images(question.true[None])[0] for question in questions]
    return GridReport(len(questions), cell, gender, tone, captions, drawn, true)
