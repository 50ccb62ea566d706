"""Zero-shot classification: which caption fits a true image best, by likelihood.

Nothing is generated. Each held-out image is scored with captions that differ from its own in a few
words, and counts as right if its own one makes it likeliest. The emoji grid has 15 captions for
each held-out cell (3 genders x 5 skin tones of its role), the shapes world 48 for each object (8
colors x 6 shapes, all other words equal).
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from dalle_mini_impl.builtin_datasets.emoji.prepare import grid_roles
from dalle_mini_impl.builtin_datasets.shapes.captions import describe_scene
from dalle_mini_impl.builtin_datasets.shapes.scene import (
    COLORS,
    MIN_IMAGE_SIZE,
    SHAPES,
    make_scene,
    render_scene,
)
from dalle_mini_impl.data.images import read_image_file
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.likelihood import score_pairs

FIRST_SCENE_SEED = 20_000_000  # ``prepare_shapes`` counts from 0: these scenes are in no data set


@dataclass(frozen=True)
class MultipleChoice:
    """An image and the captions that it might have."""

    image: Image.Image
    captions: tuple[str, ...]
    labels: tuple[tuple[str, str], ...]
    """What each caption says, in two words: gender and tone, or color and shape."""
    answer: int
    """Index of the true caption."""


@dataclass(frozen=True)
class ZeroShotReport:
    """Fractions of right answers, in [0, 1], beside those of guessing."""

    num_questions: int
    accuracy: dict[str, float]
    """By part of the answer, and of ``both``; every caption equally likely beforehand."""
    accuracy_with_prior: dict[str, float] | None
    """The same with p(caption) of the decoder's text head; None of a model without one."""
    chance: dict[str, float]


def zero_shot_emoji(
    pipeline: TextToImagePipeline,
    data_dir: Path,
    *,
    language: str = "en",
    style: str = "twemoji",
    num_images: int | None = None,
) -> ZeroShotReport:
    """Ask for gender and skin tone of the emoji that were held out (split ``test_compose``).

    Args:
        pipeline: The model.
        data_dir: Folder that ``prepare_emoji.py`` wrote.
        language: Of the captions: ``en`` or ``ko``.
        style: Whose images are asked about.
        num_images: So many of them, spread evenly; None is all.

    Returns:
        The shares.

    Raises:
        UserError: If the folder holds no such images, or the number is below 1.
    """
    metadata, field = data_dir / "metadata.jsonl", "text" if language == "en" else "text_ko"
    questions = []
    try:
        lines = metadata.read_text(encoding="utf-8").splitlines()
        roles = grid_roles([json.loads(line) for line in lines if line.strip()], style=style)
        for grid in roles.values():
            captions = tuple(row[field] for row in grid.values())
            for index, row in enumerate(grid.values()):
                if row["split"] == "test_compose":
                    image = read_image_file(data_dir / row["file_name"], field="data")
                    questions.append(MultipleChoice(image, captions, tuple(grid), index))
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"data: {metadata}: {error.strerror}; expected the folder that prepare_emoji.py wrote"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"data: {metadata}: {type(error).__name__}: {error}; "
            "expected the folder that prepare_emoji.py wrote"
        ) from None
    if not questions:
        raise UserError(f"data: {metadata} has no held-out cells (test_compose) in {style}")
    if num_images is not None and num_images < 1:
        raise UserError(f"num_images: got {num_images}, expected at least 1")
    count = min(num_images or len(questions), len(questions))
    spread = [questions[place * len(questions) // count] for place in range(count)]
    return answer(pipeline, spread, parts=("gender", "tone"))


def zero_shot_shapes(
    pipeline: TextToImagePipeline, *, split: str, num_images: int, seed: int = 0
) -> ZeroShotReport:
    """Ask for color and shape of single objects in images that no data set holds.

    Args:
        pipeline: The model.
        split: ``test`` (as in training) or ``test_compose`` (color and shape never met together).
        num_images: How many.
        seed: Decides the scenes.

    Returns:
        The shares.

    Raises:
        UserError: If the split is unknown, or the number below 1.
    """
    if num_images < 1:
        raise UserError(f"num_images: got {num_images}, expected at least 1")
    labels = tuple((color, shape) for color in COLORS for shape in SHAPES)
    questions = []
    for index in range(num_images):
        scene_seed = FIRST_SCENE_SEED + seed * num_images + index
        scene = make_scene(scene_seed, split=split, kinds=("single",))
        only = scene.objects[0]
        rivals = [dataclasses.replace(only, color=color, shape=shape) for color, shape in labels]
        captions = tuple(
            describe_scene(dataclasses.replace(scene, objects=(rival,))).text for rival in rivals
        )
        image = render_scene(scene, max(pipeline.vqvae.config.image_size, MIN_IMAGE_SIZE))
        questions.append(
            MultipleChoice(image, captions, labels, labels.index((only.color, only.shape)))
        )
    return answer(pipeline, questions, parts=("color", "shape"))


def answer(
    pipeline: TextToImagePipeline, questions: Sequence[MultipleChoice], *, parts: tuple[str, str]
) -> ZeroShotReport:
    """Pick the likeliest caption of every image and count the right ones.

    Args:
        pipeline: The model.
        questions: At least one.
        parts: What the two words of a label are.

    Returns:
        The shares.
    """
    priors = (False, True) if isinstance(pipeline.dalle, Dalle) else (False,)
    right = {use_prior: torch.zeros(3) for use_prior in priors}
    chance = torch.zeros(3)
    for question in questions:
        device = pipeline.dalle.image_head.rows.device
        text_token_ids = pipeline.text_tokenizer.encode(question.captions).to(device)
        scores = score_pairs(pipeline.dalle, text_token_ids, pipeline.encode([question.image]))
        truth = question.labels[question.answer]
        for use_prior in right:
            predicted = int(scores.probabilities(use_prior=use_prior)[0].argmax())
            right[use_prior] += _hits(question.labels[predicted], truth)
        chance += torch.stack([_hits(label, truth) for label in question.labels]).mean(dim=0)
    names = (*parts, "both")

    def probabilities(sums: torch.Tensor) -> dict[str, float]:
        return dict(zip(names, (sums / len(questions)).tolist(), strict=True))

    return ZeroShotReport(
        num_questions=len(questions),
        accuracy=probabilities(right[False]),
        accuracy_with_prior=probabilities(right[True]) if True in right else None,
        chance=probabilities(chance),
    )


def _hits(label: tuple[str, str], truth: tuple[str, str]) -> torch.Tensor:
    return torch.tensor([float(label[0] == truth[0]), float(label[1] == truth[1]), label == truth])
