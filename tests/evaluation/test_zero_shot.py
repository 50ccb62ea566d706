"""Zero-shot classification: predictions against labels, with and without the prior."""

import re
from pathlib import Path
from typing import Any

import pytest

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.zero_shot import (
    MultipleChoice,
    classify,
    zero_shot_emoji,
    zero_shot_shapes,
)
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.likelihood import score_pairs
from tests.reference import tiny
from tests.reference.grid_data import CELLS, reference_images, write_grid_data

LABELS = tuple((color, shape) for color in tiny.COLORS for shape in tiny.SHAPES)


@pytest.fixture(scope="module")
def pipeline() -> TextToImagePipeline:
    return tiny.build_pipeline()


def test_predictions_are_counted_by_part(pipeline: TextToImagePipeline) -> None:
    text = pipeline.text_tokenizer.encode(tiny.CAPTIONS)
    best = []
    for number in range(4):
        scores = score_pairs(pipeline.dalle, text, pipeline.encode([tiny.render_image(number)]))
        best.append(int(scores.image_given_text[0].argmax()))
    # True, shape alone, color alone, nothing.
    truths = [best[0], (best[1] + 2) % 12, best[2] ^ 1, ((best[3] ^ 1) + 2) % 12]
    questions = [
        MultipleChoice(tiny.render_image(number), tiny.CAPTIONS, LABELS, truth)
        for number, truth in enumerate(truths)
    ]
    report = classify(pipeline, questions, parts=("color", "shape"))
    assert report.num_images == 4
    assert report.accuracy == {"color": 0.5, "shape": 0.5, "both": 0.25}
    assert report.chance == pytest.approx({"color": 1 / 6, "shape": 1 / 2, "both": 1 / 12})


def test_prior_prefers_probable_captions(pipeline: TextToImagePipeline) -> None:
    captions = ("a red disc", "a red disc " * 3)  # the longer one is far less probable
    text = pipeline.text_tokenizer.encode(captions)
    image = next(
        image
        for image in map(tiny.render_image, range(40))
        if score_pairs(pipeline.dalle, text, pipeline.encode([image])).probabilities()[0, 1] > 0.5
    )
    question = MultipleChoice(image, captions, (("red", "disc"), ("red", "discs")), 1)
    report = classify(pipeline, [question], parts=("color", "shape"))
    assert report.accuracy["both"] == 1
    scores = score_pairs(pipeline.dalle, text, pipeline.encode([image]))
    expected = float(scores.probabilities(use_prior=True)[0, 1] > 0.5)
    assert report.accuracy_with_prior["both"] == expected == 0


def test_encoder_decoder_predicts_without_prior() -> None:
    pipeline = tiny.build_pipeline(**tiny.WITH_ENCODER)
    text = pipeline.text_tokenizer.encode(tiny.CAPTIONS)
    scores = score_pairs(pipeline.dalle, text, pipeline.encode([tiny.render_image(0)]))
    assert scores.text is None
    with pytest.raises(ValueError, match="use_prior: got True, expected False"):
        scores.probabilities(use_prior=True)
    best = int(scores.image_given_text[0].argmax())
    question = MultipleChoice(tiny.render_image(0), tiny.CAPTIONS, LABELS, best)
    report = classify(pipeline, [question], parts=("color", "shape"))
    assert report.accuracy == {"color": 1.0, "shape": 1.0, "both": 1.0}
    assert report.accuracy_with_prior is None


def test_held_out_emoji_are_classified(pipeline: TextToImagePipeline, tmp_path: Path) -> None:
    folder = write_grid_data(tmp_path / "emoji", styles=("twemoji", "noto"))
    report = zero_shot_emoji(pipeline, folder)
    assert report.num_images == 4
    assert report.chance == pytest.approx({"gender": 1 / 3, "tone": 1 / 5, "both": 1 / 15})
    korean = zero_shot_emoji(pipeline, folder, num_images=2, language="ko", style="noto")
    assert korean.num_images == 2


def test_emoji_captions_are_those_of_the_role(
    pipeline: TextToImagePipeline, tmp_path: Path
) -> None:
    """Each held-out image is scored with the 15 captions of its role, in the chosen language."""
    folder = write_grid_data(tmp_path / "emoji", num_roles=1)
    images = reference_images(1)["role 0"]
    for language, template in (("en", "{1} {0} role 0"), ("ko", "{1} {0} role 0 이모지")):
        captions = tuple(template.format(*cell) for cell in CELLS)
        questions = [
            MultipleChoice(images[CELLS[index]], captions, tuple(CELLS), index)
            for index in (13, 14)
        ]
        expected = classify(pipeline, questions, parts=("gender", "tone"))
        assert zero_shot_emoji(pipeline, folder, language=language) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "num_images: got 0, expected at least 1"),
        ({"style": "apple"}, "has no held-out cells (test_compose) in apple"),
    ],
)
def test_bad_options_are_refused(
    pipeline: TextToImagePipeline, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    folder = write_grid_data(tmp_path / "emoji")
    with pytest.raises(UserError, match=re.escape(message)):
        zero_shot_emoji(pipeline, folder, **options)


def test_other_images_are_refused(pipeline: TextToImagePipeline, tmp_path: Path) -> None:
    folder = tiny.write_data(tmp_path / "data")
    with pytest.raises(UserError, match=r"expected the folder that prepare_emoji\.py wrote"):
        zero_shot_emoji(pipeline, folder)


def test_shapes_have_48_captions(pipeline: TextToImagePipeline) -> None:
    for split in ("test", "test_compose"):
        report = zero_shot_shapes(pipeline, split=split, num_images=2)
        assert report.num_images == 2
        assert report.chance == pytest.approx({"color": 1 / 8, "shape": 1 / 6, "both": 1 / 48})
    with pytest.raises(UserError, match="num_images: got 0, expected at least 1"):
        zero_shot_shapes(pipeline, split="test", num_images=0)
