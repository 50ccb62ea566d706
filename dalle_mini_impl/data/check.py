"""Problems of a source of captioned images: found, counted and named before training.

Every image is decoded once, as training does it. Nothing is changed.
"""

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from dalle_mini_impl.data.images import Fit, decode_image, describe_image, window_fraction
from dalle_mini_impl.data.loading import each_image
from dalle_mini_impl.data.pairs import DEFAULT_OPTIONS, Pairs, ReadOptions, open_all_splits
from dalle_mini_impl.data.readers.records import (
    SkippedRecord,
    are_too_many,
    notes_by_reason,
    printable,
)
from dalle_mini_impl.data.text_tokenizer import TextTokenizer
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.progress import counted

HUGE_PIXELS = 8_000_000
MIN_SEEN = 1 / 3
MAX_CUT = 0.2
COMMON_KINDS = (
    *("JPEG RGB", "JPEG L", "WEBP RGB", "BMP RGB"),
    *("PNG RGB", "PNG RGBA", "PNG L", "PNG P"),
)
_FORMAT_OF_SUFFIX = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
}
_BAR = 40  # letters
_MAX_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """Records that have one thing in common."""

    what: str
    """What it is, in a few words."""
    paths: tuple[str, ...]
    """The records, with the reason where it differs."""
    is_problem: bool
    """False for what is worth knowing but harmless."""


@dataclass(frozen=True)
class DataReport:
    """What ``check_data`` found."""

    source: str
    num_records: int
    """All records, bad ones included."""
    split_sizes: dict[str, int]
    """Usable images of each split."""
    num_captions: dict[str, int]
    """Their captions."""
    kinds: dict[str, int]
    """Images of each format and mode."""
    caption_lengths: tuple[int, ...]
    """Tokens of each caption, shortest first."""
    text_length: int
    """Tokens that fit."""
    num_cut: int
    """Images of which a crop cuts off more than ``MAX_CUT``."""
    seconds_per_image: float
    """To read and decode one, all processors at work."""
    findings: tuple[Finding, ...]

    @property
    def num_bad(self) -> int:
        """Count the records that training would leave out."""
        return self.num_records - sum(self.split_sizes.values())

    @property
    def has_problems(self) -> bool:
        """Tell whether anything should be fixed before training."""
        return any(finding.is_problem for finding in self.findings)


@dataclass(frozen=True)
class _Image:
    path: str
    split: str
    captions: tuple[str, ...]
    kind: str
    width: int
    height: int
    pixels: bytes  # a hash of them

    def __str__(self) -> str:
        return f"{self.path} ({self.kind}, {self.width}x{self.height})"


def check_data(
    source: str,
    *,
    pixel_size: tuple[int, int],
    text_length: int,
    vocab_size: int,
    options: ReadOptions = DEFAULT_OPTIONS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DataReport:
    """Read any source that training takes, all of it, and find what is wrong with it.

    ``pixel_size``, (height, width), ``text_length``, ``vocab_size`` and ``options`` are those of
    the training to come; ``progress`` is called with (done, total).

    Raises:
        UserError: The source holds no captioned image at all.
    """
    try:
        pairs, splits = open_all_splits(source, options=options)
    except UserError as error:
        raise UserError(f"source: {error}") from None
    started = time.monotonic()
    images, unreadable = _read_all(pairs, splits, progress)
    # Measured here, because the estimate of a run needs it.
    seconds = (time.monotonic() - started) / len(pairs)
    # The tokenizer that training would learn tells how many captions would be cut.
    texts = [text for image in images for text in image.captions]
    lengths = _token_counts(texts, text_length=text_length, vocab_size=vocab_size) if texts else []
    findings = [
        _left_out("not usable, as the image cannot be read", unreadable),
        _left_out("not usable, as image or caption is missing", pairs.skipped),
        *_duplicates(images),
        *_unusual_images(images, pixel_size, options.fit),
        _long_captions(texts, lengths, text_length),
        *(
            Finding(f"{reason}, left out", tuple(paths), False)
            for reason, paths in notes_by_reason(pairs.notes).items()
        ),
    ]
    num_captions: Counter[str] = Counter()
    for image in images:
        num_captions[image.split] += len(image.captions)
    return DataReport(
        source=source,
        num_records=pairs.num_records,
        split_sizes=dict(Counter(image.split for image in images)),
        num_captions=dict(num_captions),
        kinds=dict(Counter(image.kind for image in images).most_common()),
        caption_lengths=tuple(sorted(lengths)),
        text_length=text_length,
        num_cut=sum(is_much_cut((image.width, image.height), pixel_size) for image in images),
        seconds_per_image=seconds,
        findings=tuple(finding for finding in findings if finding.paths),
    )


def is_much_cut(size: tuple[int, int], pixel_size: tuple[int, int]) -> bool:
    """Tell whether a crop takes more than ``MAX_CUT`` off an image (width, height)."""
    return window_fraction(size, pixel_size) < 1 - MAX_CUT


def _read_all(
    pairs: Pairs, splits: Sequence[str], progress: Callable[[int, int], None]
) -> tuple[list[_Image], list[SkippedRecord]]:
    images: list[_Image] = []
    unreadable: list[SkippedRecord] = []

    def read(index: int, data: bytes, path: str) -> _Image:
        decoded = decode_image(data, source=path)
        # Equal bytes of other width and height are another image.
        digest = hashlib.sha256(f"{decoded.size}".encode())
        digest.update(decoded.tobytes())
        kind, (width, height) = describe_image(data), decoded.size
        captions, pixels = pairs[index].captions, digest.digest()[:16]
        return _Image(printable(path), splits[index], captions, kind, width, height, pixels)

    for done, result in enumerate(each_image(pairs, read), start=1):
        if isinstance(result, SkippedRecord):
            unreadable.append(result)
        else:
            images.append(result)
        progress(done, len(pairs))
    return images, unreadable


def _token_counts(texts: Sequence[str], *, text_length: int, vocab_size: int) -> list[int]:
    text_tokenizer = TextTokenizer.learn(texts, vocab_size=vocab_size, text_length=text_length)
    return [len(row) for row in text_tokenizer.tokenize(texts)]


def _left_out(what: str, records: Sequence[SkippedRecord]) -> Finding:
    return Finding(what, tuple(f"{record.path}: {record.reason}" for record in records), True)


def _duplicates(images: Sequence[_Image]) -> list[Finding]:
    groups: dict[bytes, list[_Image]] = defaultdict(list)
    for image in images:
        groups[image.pixels].append(image)
    within, across = [], []
    # A copy in another split is worse than one in the same: it makes evaluation too good.
    # Whole groups: three copies are one finding, not three pairs.
    for group in groups.values():
        if len({image.split for image in group}) > 1:
            across.append(" = ".join(f"{image.path} ({image.split})" for image in group))
        elif len(group) > 1:
            within.append(" = ".join(image.path for image in group))
    leak = "same pixels in different splits: evaluation would measure memorization"
    return [
        Finding(leak, tuple(across), True),
        Finding("same pixels within a split", tuple(within), True),
    ]


def _unusual_images(
    images: Sequence[_Image], pixel_size: tuple[int, int], fit: Fit
) -> list[Finding]:
    found: dict[str, list[str]] = defaultdict(list)
    for image in images:
        suffix = PurePath(image.path).suffix.lower()
        named_format = _FORMAT_OF_SUFFIX.get(suffix)
        seen = window_fraction((image.width, image.height), pixel_size)
        checks = {
            "tiny": image.height < pixel_size[0] or image.width < pixel_size[1],
            "long": fit == "crop" and seen < MIN_SEEN,
            "huge": image.width * image.height > HUGE_PIXELS,
            "odd": image.kind not in COMMON_KINDS,
            "misnamed": named_format not in (None, image.kind.split()[0]),
        }
        for name, applies in checks.items():
            if applies:
                found[name].append(str(image))
    million = HUGE_PIXELS // 10**6
    rows = [
        (
            "tiny",
            f"tiny: smaller than {pixel_size[0]} x {pixel_size[1]} pixels, and so enlarged",
            True,
        ),
        ("long", "far too long or too wide: more than two thirds are cut off", True),
        ("huge", f"huge: over {million} million pixels, and so slow", False),
        ("odd", "odd format or mode, read all the same", False),
        ("misnamed", "named as another format, read all the same", False),
    ]
    return [Finding(what, tuple(found[name]), is_problem) for name, what, is_problem in rows]


def _long_captions(texts: Sequence[str], lengths: Sequence[int], text_length: int) -> Finding:
    long = [
        f"{length} tokens: {printable(text[:60])}"
        for text, length in zip(texts, lengths, strict=True)
        if length > text_length
    ]
    return Finding(f"captions over {text_length} tokens, which are cut", tuple(long), True)


def report_lines(report: DataReport) -> list[str]:
    """Put a report into lines of plain text."""
    usable = sum(report.split_sizes.values())
    lines = [f"{printable(report.source)}: {usable} of {report.num_records} records can be used"]
    for split, size in sorted(report.split_sizes.items()):
        captions = counted(report.num_captions[split], "caption")
        lines.append(f"  {split}: {counted(size, 'image')}, {captions}")
    lines.append("formats: " + ", ".join(f"{n} {kind}" for kind, n in report.kinds.items()))
    lines += _histogram(report.caption_lengths, report.text_length)
    for finding in report.findings:
        word = "PROBLEM" if finding.is_problem else "note"
        lines.append(f"{word}: {len(finding.paths)} {finding.what}")
        # A few examples are enough to find the cause, which is mostly one for all.
        lines += [f"  {path}" for path in finding.paths[:_MAX_NAMED]]
        if len(finding.paths) > _MAX_NAMED:
            lines.append(f"  and {len(finding.paths) - _MAX_NAMED} more")
    return lines


def require_usable(report: DataReport, *, max_bad_fraction: float) -> None:
    """Refuse data that training would refuse: nothing, or too little, can be used.

    Raises:
        UserError: Says how many records are bad.
    """
    if not report.split_sizes:
        raise UserError(f"source: none of the {report.num_records} records can be used")
    if are_too_many(report.num_bad, report.num_records, max_bad_fraction):
        raise UserError(
            f"source: {report.num_bad} of {report.num_records} records cannot be used, more than "
            f"data.max_bad_fraction = {max_bad_fraction} allows: training would refuse them"
        )


def _histogram(lengths: Sequence[int], text_length: int) -> list[str]:
    if not lengths:
        return []
    # Eight bins for what fits, and one for all that is cut.
    width = max(1, -(-text_length // 8))
    bins = Counter(min((length - 1) // width, -(-text_length // width)) for length in lengths)
    middle = lengths[len(lengths) // 2]
    lines = [f"caption tokens: {lengths[0]} to {lengths[-1]}, median {middle}, {text_length} fit"]
    for number in range(max(bins) + 1):
        # The last bin that fits may be narrower than the others.
        first, last = number * width + 1, min((number + 1) * width, text_length)
        name = f"{first}-{last}" if first <= text_length else f"over {text_length}"
        bar = "#" * -(-_BAR * bins[number] // max(bins.values()))
        lines.append(f"  {name:>9} {bins[number]:>7} {bar}".rstrip())
    return lines
