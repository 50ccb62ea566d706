"""Zero-shot classification: which caption makes a held-out image likeliest?

Nothing is generated. Each image is scored with captions that differ from its own in a few words,
and is classified right if its own caption gives the highest likelihood. The emoji grid has 15
captions for each held-out cell (3 genders x 5 skin tones of its role), the shapes world 48 for each
object (8 colors x 6 shapes, all other words equal).
"""

import dataclasses
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
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.samples import evenly_spaced, list_data
from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.likelihood import score_pairs

FIRST_SCENE_SEED = 20_000_000  # prepare_shapes counts from 0: these scenes are in no data set


@dataclass(frozen=True)
class MultipleChoice:
    """An image and the captions that it might have."""

    image: Image.Image
    captions: tuple[str, ...]
    labels: tuple[tuple[str, str], ...]
    """What each caption says, in two words: gender and tone, or color and shape."""
    correct: int
    """Index of the image's own caption."""


@dataclass(frozen=True)
class ZeroShotReport:
    """Accuracy in [0, 1], by part of the label and of ``both`` parts."""

    num_images: int
    accuracy: dict[str, float]
    """With every caption equally likely a priori."""
    accuracy_with_prior: dict[str, float] | None
    """With p(caption) of the decoder's text head; None for a model without one."""
    chance: dict[str, float]


def zero_shot_emoji(
    pipeline: TextToImagePipeline,
    data_dir: Path,
    *,
    language: str = "en",
    style: str = "twemoji",
    num_images: int | None = None,
) -> ZeroShotReport:
    """Classify gender and skin tone of the held-out emoji (split ``test_compose``) of a style.

    Raises:
        UserError: If the folder holds no such images, or ``num_images`` (None is all) is below 1.
    """
    if num_images is not None:
        _require_some(num_images)
    listed = list_data(str(data_dir), language=language)
    listed.require_emoji(str(data_dir))
    pairs = list(listed.pairs)
    # grid_roles hands rows back: the index finds the image and the caption of each.
    rows = [{**pair.attributes, "index": index} for index, pair in enumerate(pairs)]
    # Only grids with all 15 cells: chance must be the same for every image.
    held_out = [
        (grid, position, row["index"])
        for grid in grid_roles(rows, style=style).values()
        for position, row in enumerate(grid.values())
        if row["split"] == "test_compose"
    ]
    if not held_out:
        raise UserError(f"data: {data_dir} has no held-out cells (test_compose) in {style}")
    pixel_size, questions = pipeline.vqvae.config.pixel_size, []
    for chosen in evenly_spaced(len(held_out), num_images or len(held_out)):
        grid, position, index = held_out[chosen]
        image = listed.read_image(index, pixel_size=pixel_size)
        captions = tuple(pairs[row["index"]].captions[0] for row in grid.values())
        questions.append(MultipleChoice(image, captions, tuple(grid), position))
    return classify(pipeline, questions, parts=("gender", "tone"))


def zero_shot_shapes(
    pipeline: TextToImagePipeline, *, split: str, num_images: int, seed: int = 0
) -> ZeroShotReport:
    """Classify color and shape of single objects in images that no data set holds.

    In split ``test`` color and shape are paired as in training, in ``test_compose`` as never there.
    UserError if ``num_images`` is below 1.
    """
    _require_some(num_images)
    labels = tuple((color, shape) for color in COLORS for shape in SHAPES)
    questions = []
    for index in range(num_images):
        # Different seeds give different scenes.
        scene_seed = FIRST_SCENE_SEED + seed * num_images + index
        scene = make_scene(scene_seed, split=split, kinds=("single",))
        [item] = scene.objects
        captions = []
        # Only the object changes: every other word of the 48 captions is the same.
        for color, shape in labels:
            other = dataclasses.replace(item, color=color, shape=shape)
            captions.append(describe_scene(dataclasses.replace(scene, objects=(other,))).text)
        image = render_scene(scene, max(*pipeline.vqvae.config.pixel_size, MIN_IMAGE_SIZE))
        correct = labels.index((item.color, item.shape))
        questions.append(MultipleChoice(image, tuple(captions), labels, correct))
    return classify(pipeline, questions, parts=("color", "shape"))


def classify(
    pipeline: TextToImagePipeline, questions: Sequence[MultipleChoice], *, parts: tuple[str, str]
) -> ZeroShotReport:
    """Choose the likeliest caption of each image; ``parts`` names the two words of a label."""
    names = (*parts, "both")
    priors = (False, True) if isinstance(pipeline.dalle, Dalle) else (False,)
    # (first part, second part, both)
    num_right = {use_prior: torch.zeros(3) for use_prior in priors}
    chance = torch.zeros(3)
    device = pipeline.device
    # One image at a time: its pass has a row for each caption and one for the null caption.
    for question in questions:
        text_token_ids = pipeline.text_tokenizer.encode(question.captions).to(device)
        scores = score_pairs(pipeline.dalle, text_token_ids, pipeline.encode([question.image]))
        truth = question.labels[question.correct]
        for use_prior in priors:
            predicted = int(scores.probabilities(use_prior=use_prior)[0].argmax())
            num_right[use_prior] += _matches(question.labels[predicted], truth)
        # Chance is a uniform choice among the captions: several of them share a part.
        chance += torch.stack([_matches(label, truth) for label in question.labels]).mean(dim=0)
    fractions = {
        use_prior: dict(zip(names, (right / len(questions)).tolist(), strict=True))
        for use_prior, right in num_right.items()
    }
    return ZeroShotReport(
        num_images=len(questions),
        accuracy=fractions[False],
        accuracy_with_prior=fractions.get(True),
        chance=dict(zip(names, (chance / len(questions)).tolist(), strict=True)),
    )


def _require_some(num_images: int) -> None:
    if num_images < 1:
        raise UserError(f"num_images: got {num_images}, expected at least 1")


def _matches(label: tuple[str, str], truth: tuple[str, str]) -> torch.Tensor:
    return torch.tensor([float(label[0] == truth[0]), float(label[1] == truth[1]), label == truth])
