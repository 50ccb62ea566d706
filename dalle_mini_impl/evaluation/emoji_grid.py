"""Does the model compose? Held-out cells of the emoji grid of role x gender x skin tone.

For 3 x 5 cells of a role all true pictures exist, and some cells were kept from training. A picture
drawn from such a cell's caption is right if, of the role's 15 true pictures, the one of that cell
is nearest in pixels. Chance is 1/15 for the cell, 1/3 for the gender and 1/5 for the tone. A style
is right if the true picture in that style is nearest among all styles that drew the emoji, and a
clock if its own hour is nearest among all clocks of the style.
"""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dalle_mini_impl.builtin_datasets.emoji.prepare import grid_roles
from dalle_mini_impl.data.images import (
    decode_image,
    image_to_pixels,
    pixels_to_images,
    resize_and_crop,
)
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.pipeline import TextToImagePipeline

Row = Mapping[str, Any]
Picture = Float[Tensor, "3 height width"]
Key = TypeVar("Key", bound=Hashable)
Read = Callable[[Row], Tensor]


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
