"""Composition on scenes: the tasks of GenEval, by an exact checker instead of a detector.

GenEval: Ghosh, Hajishirzi & Schmidt 2023, arXiv 2310.11513. Its six tasks are splits of the data
set here, and ask for combinations that training never showed.
"""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from dalle_mini_impl.builtin_datasets.scenes.facts import facts_hold, parse_fact
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.facts import INTERVALS, World
from dalle_mini_impl.evaluation.samples import Row


def _read(image: Image.Image, row: Row) -> Any:
    try:
        from dalle_mini_impl.builtin_datasets.scenes.checker import read_scene
    except ImportError as error:
        raise UserError(f"{error}; expected: pip install -e '.[eval]'") from None
    # Of the row, the checker gets the style alone.
    return read_scene(image, style=row["style"])


def _judge(lines: Sequence[str], reading: Any) -> list[tuple[str, bool]]:
    facts = [parse_fact(line) for line in lines]
    held = facts_hold(facts, reading.objects, reading.background)
    return [(fact.topic, holds) for fact, holds in zip(facts, held, strict=True)]


SCENES = World(
    "An exact checker names the things and the background of each generated image, of all things "
    "in all colors. `test_single` and `test_words` (words never trained on) show things as in "
    "training; the other splits combinations that training never showed: thing and color, thing "
    "and number, two things (with colors: `test_attribution`), two things and their relation; "
    f"{INTERVALS}",
    _read,
    _judge,
)
