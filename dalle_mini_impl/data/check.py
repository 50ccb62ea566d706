"""What is wrong with a source of captioned images: found, counted and named before training.

Every image is decoded once, as training does it. Nothing is changed.
"""

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from dalle_mini_impl.data.images import decode_image, describe_image
from dalle_mini_impl.data.loading import each_image
from dalle_mini_impl.data.pairs import Pairs, open_all_splits
from dalle_mini_impl.data.readers.records import SkippedRecord, are_too_many, printable
from dalle_mini_impl.data.text_tokenizer import TextTokenizer, train_text_tokenizer
from dalle_mini_impl.errors import UserError

HUGE_PIXELS = 8_000_000
LONG_SIDE_RATIO = 3
COMMON_KINDS = (
    "JPEG RGB",
    "JPEG L",
    "PNG RGB",
    "PNG RGBA",
    "PNG L",
    "PNG P",
    "WEBP RGB",
    "BMP RGB",
)
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
    """What `check_data` found."""

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
    seconds_per_image: float
    """To read and decode one, all processors at work."""
    findings: tuple[Finding, ...]

    @property
    def num_bad(self) -> int:
        """Count the records that training would leave out."""
        return self.num_records - sum(self.split_sizes.values())

    @property
    def has_problems(self) -> bool:
        """Tell whether anything should be mended before training."""
        return any(finding.is_problem for finding in self.findings)


@dataclass(frozen=True)
class _Facts:
    kind: str
    width: int
    height: int
    pixels: bytes


def check_data(
    source: str,
    *,
    image_size: int,
    text_length: int,
    vocab_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DataReport:
    """Read a whole source and say what is wrong with it.

    Args:
        source: Any source that training takes.
        image_size: Side in pixels that training scales to.
        text_length: Tokens per caption that training keeps.
        vocab_size: Of the caption tokenizer.
        progress: Called with (done, total).

    Returns:
        Counts and findings.

    Raises:
        UserError: If the source holds no captioned image at all.
    """
    pairs, splits = open_all_splits(source)
    started = time.monotonic()
    facts, unreadable = _read_all(pairs, progress)
    seconds = (time.monotonic() - started) / len(pairs)
    captions = [pair.captions for pair in pairs]
    texts = [text for index in facts for text in captions[index]]
    lengths = _token_counts(texts, text_length=text_length, vocab_size=vocab_size) if texts else []
    paths = [printable(pair.path) for pair in pairs]
    findings = [
        _listed("not usable, as the image cannot be read", unreadable),
        _listed("not usable, as image or caption is missing", pairs.skipped),
        *_duplicates(facts, paths, splits),
        *_unusual_images(facts, paths, image_size),
        _long_captions(texts, lengths, text_length),
    ]
    return DataReport(
        source=source,
        num_records=pairs.num_records,
        split_sizes=dict(Counter(splits[index] for index in facts)),
        num_captions=dict(_sum_by(splits, {index: len(captions[index]) for index in facts})),
        kinds=dict(Counter(fact.kind for fact in facts.values()).most_common()),
        caption_lengths=tuple(sorted(lengths)),
        text_length=text_length,
        seconds_per_image=seconds,
        findings=tuple(finding for finding in findings if finding.paths),
    )


def _read_all(
    pairs: Pairs, progress: Callable[[int, int], None]
) -> tuple[dict[int, _Facts], list[SkippedRecord]]:
    facts: dict[int, _Facts] = {}
    unreadable: list[SkippedRecord] = []

    def read(index: int, data: bytes, path: str) -> tuple[int, _Facts]:
        decoded = decode_image(data, source=path)
        digest = hashlib.sha256(f"{decoded.size}".encode())
        digest.update(decoded.tobytes())
        return index, _Facts(*describe_image(data), pixels=digest.digest()[:16])

    for done, result in enumerate(each_image(pairs, read), start=1):
        if isinstance(result, SkippedRecord):
            unreadable.append(result)
        else:
            facts[result[0]] = result[1]
        progress(done, len(pairs))
    return facts, unreadable


def _token_counts(texts: Sequence[str], *, text_length: int, vocab_size: int) -> list[int]:
    encoder = TextTokenizer(train_text_tokenizer(texts, vocab_size=vocab_size), text_length)
    return [len(row) for row in encoder.tokenizer.encode_batch_fast(list(texts))]


def _sum_by(names: Sequence[str], values: dict[int, int]) -> Counter[str]:
    total: Counter[str] = Counter()
    for index, value in values.items():
        total[names[index]] += value
    return total


def _listed(what: str, records: Sequence[SkippedRecord]) -> Finding:
    return Finding(what, tuple(f"{record.path}: {record.reason}" for record in records), True)


def _duplicates(
    facts: dict[int, _Facts], paths: Sequence[str], splits: Sequence[str]
) -> list[Finding]:
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, fact in facts.items():
        groups[fact.pixels].append(index)
    within, across = [], []
    for group in groups.values():
        if len(group) < 2:
            continue
        if len({splits[index] for index in group}) > 1:
            across.append(" = ".join(f"{paths[index]} ({splits[index]})" for index in group))
        else:
            within.append(" = ".join(paths[index] for index in group))
    return [
        Finding(
            "same pixels in different splits: what is measured was learned", tuple(across), True
        ),
        Finding("same pixels within a split", tuple(within), True),
    ]


def _unusual_images(
    facts: dict[int, _Facts], paths: Sequence[str], image_size: int
) -> list[Finding]:
    def named(holds: Callable[[int, _Facts], bool]) -> tuple[str, ...]:
        return tuple(
            f"{paths[index]} ({fact.kind}, {fact.width}x{fact.height})"
            for index, fact in facts.items()
            if holds(index, fact)
        )

    suffixes = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",)}

    def is_misnamed(index: int, fact: _Facts) -> bool:
        suffix = PurePath(paths[index]).suffix.lower()
        known = {name for names in suffixes.values() for name in names}
        return suffix in known and suffix not in suffixes.get(fact.kind.split()[0], ())

    tiny = named(lambda _, fact: min(fact.width, fact.height) < image_size)
    huge = named(lambda _, fact: fact.width * fact.height > HUGE_PIXELS)
    long = named(
        lambda _, fact: (
            max(fact.width, fact.height) > LONG_SIDE_RATIO * min(fact.width, fact.height)
        )
    )
    return [
        Finding(f"tiny: smaller than {image_size} pixels, and so enlarged", tiny, True),
        Finding(f"more than {LONG_SIDE_RATIO} times as long as wide: most is cut off", long, True),
        Finding(f"huge: over {HUGE_PIXELS // 10**6} million pixels, and so slow", huge, False),
        Finding(
            "odd format or mode, read all the same",
            named(lambda _, fact: fact.kind not in COMMON_KINDS),
            False,
        ),
        Finding("named as another format, read all the same", named(is_misnamed), False),
    ]


def _long_captions(texts: Sequence[str], lengths: Sequence[int], text_length: int) -> Finding:
    long = [
        f"{length} tokens: {printable(text[:60])}"
        for text, length in zip(texts, lengths, strict=True)
        if length > text_length
    ]
    return Finding(f"captions over {text_length} tokens, which are cut", tuple(long), True)


def report_lines(report: DataReport) -> list[str]:
    """Put a report into plain text.

    Args:
        report: Of `check_data`.

    Returns:
        Lines without line ends.
    """
    usable = sum(report.split_sizes.values())
    lines = [f"{printable(report.source)}: {usable} of {report.num_records} records can be used"]
    for split, size in sorted(report.split_sizes.items()):
        lines.append(f"  {split}: {size} images, {report.num_captions[split]} captions")
    lines.append("formats: " + ", ".join(f"{n} {kind}" for kind, n in report.kinds.items()))
    lines += _histogram(report.caption_lengths, report.text_length)
    for finding in report.findings:
        word = "PROBLEM" if finding.is_problem else "note"
        lines.append(f"{word}: {len(finding.paths)} {finding.what}")
        lines += [f"  {path}" for path in finding.paths[:_MAX_NAMED]]
        if len(finding.paths) > _MAX_NAMED:
            lines.append(f"  and {len(finding.paths) - _MAX_NAMED} more")
    return lines


def require_usable(report: DataReport, *, max_bad_fraction: float) -> None:
    """Refuse data that training would refuse.

    Args:
        report: Of `check_data`.
        max_bad_fraction: Fraction of bad records that training takes; one is always taken.

    Raises:
        UserError: If nothing, or too little, can be used.
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
    width = max(1, -(-text_length // 8))
    bins = Counter(min((length - 1) // width, -(-text_length // width)) for length in lengths)
    middle = lengths[len(lengths) // 2]
    lines = [f"caption tokens: {lengths[0]} to {lengths[-1]}, median {middle}, {text_length} fit"]
    for number in range(max(bins) + 1):
        first, last = number * width + 1, min((number + 1) * width, text_length)
        name = f"{first}-{last}" if first <= text_length else f"over {text_length}"
        bar = "#" * -(-_BAR * bins[number] // max(bins.values()))
        lines.append(f"  {name:>9} {bins[number]:>7} {bar}".rstrip())
    return lines
