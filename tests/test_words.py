"""One word for one thing, everywhere: the field's."""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# Forbidden words -> what to write. Parts of identifiers count as words.
WORDS = {
    r"drawn|drawings?|draws|redraw\w*": "generate an image, sample a token, inpaint",
    r"pictures?": "image",
    r"wanted": "a message says: field: got X, expected Y; remedy",
    r"rebuilt": "reconstruction",
    r"foretell\w*": "predict",
    r"guess(?:es|ed)?": "draft tokens",
    r"paint(?:s|ed|ing)?|repaint\w*": "generate an image, inpaint",
    r"colours?|coloured|neighbours?|neighbouring": "American spelling: color, neighbor",
    r"grey|licences?|behaviours?|memorisation": "gray, license, behavior, memorization",
    r"caption_gains?": "log_likelihood_ratio",
    r"strangers|stranger_token_ids": "noise_token_ids",
    r"DigitTable": "FactorizedEmbedding",
    r"CaptionEncoder": "TextTokenizer",
    r"TokenChoice": "Sampler",
    r"PictureGrid|PictureRanker|DrawnTokens": "ImageGrid, ImageRanker, GeneratedTokens",
}
ALLOWED = {
    ("dalle_mini_impl/builtin_datasets/labelled_images.py", "picture"): "part of a hashed key",
    ("dalle_mini_impl/builtin_datasets/scenes/captions.py", "picture"): "captions are data",
    ("dalle_mini_impl/builtin_datasets/shapes/captions.py", "picture"): "captions are data",
    ("dalle_mini_impl/builtin_datasets/shapes/scene.py", "drawn"): "Pillow draws shapes",
    ("dalle_mini_impl/builtin_datasets/shapes/scene.py", "draws"): "Pillow draws shapes",
}
# History keeps its words; the other two list the forbidden ones.
UNCHECKED = {"docs/log.md", "CHANGELOG.md", "CONTRIBUTING.md", "tests/test_words.py"}


def tracked_texts() -> list[str]:
    kinds = "*.py *.yaml *.md *.toml *.cpp Makefile .ci/*"
    command = ["git", "ls-files", "--", *kinds.split()]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    names = [name for name in done.stdout.splitlines() if (REPOSITORY / name).is_file()]
    return [name for name in names if name not in UNCHECKED]


@pytest.mark.parametrize("pattern", WORDS)
def test_no_text_has_another_word_for_it(pattern: str) -> None:
    names = tracked_texts()
    if not names:
        pytest.skip("needs git, which lists the files of the repository")
    word = re.compile(rf"(?<![a-z])(?:{pattern})(?![a-z])", re.IGNORECASE)
    found = []
    for name in names:
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            words = {each.lower() for each in word.findall(line)}
            found += [f"{name}:{number}: {each}" for each in words if (name, each) not in ALLOWED]
    assert not found, f"write {WORDS[pattern]}:\n" + "\n".join(found)


def test_every_exception_is_needed() -> None:
    texts = {path: (REPOSITORY / path).read_text(encoding="utf-8").lower() for path, _ in ALLOWED}
    assert [key for key in ALLOWED if key[1] not in texts[key[0]]] == []
