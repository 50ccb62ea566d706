"""Zero-shot answers: a decoder that knows the truth is always right, one that does not guesses."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from dalle_mini_impl.builtin_datasets.emoji.splits import GENDERS, TONES
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.zero_shot import (
    MultipleChoice,
    answer,
    zero_shot_emoji,
    zero_shot_shapes,
)
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.likelihood import score_pairs
from tests.reference import tiny

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
    report = answer(pipeline, questions, parts=("color", "shape"))
    assert report.num_questions == 4
    assert report.accuracy == {"color": 0.5, "shape": 0.5, "both": 0.25}
    assert report.chance == pytest.approx({"color": 1 / 6, "shape": 1 / 2, "both": 1 / 12})


def test_the_prior_counts_where_it_is_asked_for(pipeline: TextToImagePipeline) -> None:
    captions = ("a red disc", "a red disc " * 3)  # the longer one is far less probable
    text = pipeline.text_tokenizer.encode(captions)
    image = next(
        image
        for image in map(tiny.render_image, range(40))
        if score_pairs(pipeline.dalle, text, pipeline.encode([image])).probabilities()[0, 1] > 0.5
    )
    question = MultipleChoice(image, captions, (("red", "disc"), ("red", "discs")), 1)
    report = answer(pipeline, [question], parts=("color", "shape"))
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
    report = answer(pipeline, [question], parts=("color", "shape"))
    assert report.accuracy == {"color": 1.0, "shape": 1.0, "both": 1.0}
    assert report.accuracy_with_prior is None


def write_grid(folder: Path) -> Path:
    """Two roles of 15 cells, three of them held out."""
    folder.mkdir()
    rows = []
    for role in ("cook", "judge"):
        for gender in GENDERS:
            for tone in TONES:
                name = f"{role}-{gender}-{tone}.png"
                Image.new("RGB", (16, 16), (len(rows) * 8, 90, 30)).save(folder / name)
                rows.append(
                    {
                        "file_name": name, "text": f"a {gender} {role}, {tone} skin",
                        "text_ko": f"{tone} {role}", "style": "twemoji", "role": role,
                        "gender": gender, "skin_tones": [tone], "hexcode": name,
                        "split": "test_compose" if len(rows) in (3, 14, 20) else "train",
                    }
                )  # fmt: skip
    lines = (json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_held_out_emoji_are_asked_about(pipeline: TextToImagePipeline, tmp_path: Path) -> None:
    folder = write_grid(tmp_path / "emoji")
    report = zero_shot_emoji(pipeline, folder)
    assert report.num_questions == 3
    assert report.chance == pytest.approx({"gender": 1 / 3, "tone": 1 / 5, "both": 1 / 15})
    assert zero_shot_emoji(pipeline, folder, num_images=2, language="ko").num_questions == 2
    for options, message in (
        ({"num_images": 0}, "num_images: got 0, expected at least 1"),
        ({"style": "noto"}, "has no held-out cells (test_compose) in noto"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            zero_shot_emoji(pipeline, folder, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"expected the folder that prepare_emoji\.py wrote"):
        zero_shot_emoji(pipeline, tmp_path)


def test_shapes_ask_for_one_of_48_captions(pipeline: TextToImagePipeline) -> None:
    for split in ("test", "test_compose"):
        report = zero_shot_shapes(pipeline, split=split, num_images=2)
        assert report.num_questions == 2
        assert report.chance == pytest.approx({"color": 1 / 8, "shape": 1 / 6, "both": 1 / 48})
    with pytest.raises(UserError, match="num_images: got 0, expected at least 1"):
        zero_shot_shapes(pipeline, split="test", num_images=0)
