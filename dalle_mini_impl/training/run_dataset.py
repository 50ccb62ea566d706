"""A run's images: read once, bad ones counted and listed, the order kept over a resume.

All pixels are in memory from then on: a file that vanishes during the run changes nothing. At a
resume the images are read again, and a missing one is replaced, so that all others keep their
places in the order of samples.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dalle_mini_impl.data.loading import load_all_pixels
from dalle_mini_impl.data.pairs import Pair, open_pairs
from dalle_mini_impl.data.readers.records import SkippedRecord, are_too_many, notes_by_reason
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.progress import counted, log_now_and_then
from dalle_mini_impl.training.config import DataConfig

logger = logging.getLogger(__name__)

MAX_LISTED = 5
SKIPPED_NAME = "skipped.jsonl"
_LISTED_FIELDS = ("path", "captions", "attributes")  # where the bytes lie is asked at each start


@dataclass(frozen=True)
class LoadedPairs:
    """Captioned images in memory; nothing is read from the source after this."""

    pairs: list[Pair]
    """One per image, those that stand in for missing ones included."""
    pixels: UInt8[Tensor, "samples 3 height width"]
    listed: list[Pair]
    """As the run began with them. A missing image's place in the order is taken by another one, but
    its captions and attributes still count."""
    mixed: tuple[tuple[int, float], ...] = ()
    """Of each source that is mixed in, its number of images, which stand last, and its fraction of
    the samples."""

    @property
    def num_own(self) -> int:
        """Images of the run's own source."""
        return len(self.pairs) - sum(count for count, _ in self.mixed)

    def weights(self, balance_by: str | None) -> Float[Tensor, " samples"] | None:
        """Weigh each own image by 1 / sqrt(size of its group), and sources by their fractions.

        None stands for equal weights.

        Raises:
            UserError: No own image has the attribute ``balance_by``.
        """
        own = self._own_weights(balance_by)
        if not self.mixed:
            return own
        own = torch.ones(self.num_own) if own is None else own
        rest = 1 - sum(fraction for _, fraction in self.mixed)
        parts = [torch.full((count,), fraction / count) for count, fraction in self.mixed]
        return torch.cat([own * (rest / own.sum()), *parts])

    def _own_weights(self, balance_by: str | None) -> Float[Tensor, " own"] | None:
        if balance_by is None:
            return None
        listed = self.listed[: self.num_own]
        known = {name for pair in listed for name in pair.attributes}
        if balance_by not in known:
            raise UserError(
                f"data.balance_by: no image has the attribute {balance_by!r}; "
                f"expected {', '.join(['null (equal weights)', *sorted(known)])}"
            )
        # Of the list as it began: a missing image must not change the weights of the others.
        groups = [str(pair.attributes.get(balance_by)) for pair in listed]
        sizes = Counter(groups)
        return torch.tensor([sizes[group] ** -0.5 for group in groups])


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """Files in a run's folder that say which images it uses and which it left out."""

    folder: Path
    writes: bool
    """False for all processes of a run but one."""
    resumes: bool
    """Whether the run keeps to the images that it began with."""

    @property
    def skipped_file(self) -> Path:
        """The list of what was left out, a JSON object per line."""
        return self.folder / SKIPPED_NAME

    def write_skipped(self, skipped: Sequence[SkippedRecord], *, anew: bool) -> None:
        """Add to the list of what was left out; with ``anew`` begin it again."""
        if not self.writes:
            return
        lines = [json.dumps(vars(record), ensure_ascii=False) + "\n" for record in skipped]
        try:
            if anew:
                self.skipped_file.unlink(missing_ok=True)
            if lines:
                with self.skipped_file.open("a", encoding="utf-8") as opened:
                    opened.writelines(lines)
        except OSError as error:
            raise UserError(f"output_dir: cannot write {self.skipped_file}: {error}") from None

    def write_listed(self, pairs: Sequence[Pair], role: str) -> None:
        """Write down which images a run begins with; ``role``: "train", "held_out", "mixed-1"."""
        if not self.writes:
            return
        file = self._listed_file(role)
        unfinished = file.with_suffix(".tmp")
        try:
            with unfinished.open("w", encoding="utf-8") as opened:
                for pair in pairs:
                    row = {name: getattr(pair, name) for name in _LISTED_FIELDS}
                    opened.write(json.dumps(row) + "\n")
            # Whole or not at all: a resumed run trusts it.
            unfinished.replace(file)
        except OSError as error:
            raise UserError(f"output_dir: cannot write {file}: {error}") from None

    def listed_pairs(self, role: str) -> list[Pair] | None:
        """Read which images a resumed run began with; None for a new run."""
        file = self._listed_file(role)
        if not self.resumes or not file.is_file():
            return None
        try:
            with file.open(encoding="utf-8") as opened:
                rows = [json.loads(line) for line in opened]
            return [Pair(row["path"], tuple(row["captions"]), row["attributes"]) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"resume: {file} cannot be read ({error})") from None

    def _listed_file(self, role: str) -> Path:
        return self.folder / f"images-{role}.jsonl"


def load_splits(
    config: DataConfig,
    *,
    pixel_size: tuple[int, int],
    records: RunRecords,
    needs_captions: bool = True,
) -> tuple[LoadedPairs, LoadedPairs]:
    """Read the training images, those of mixed sources behind the own ones, and the held-out ones.

    A resumed run keeps to the images, captions and places that it began with.

    Raises:
        UserError: There is nothing to read, or too much of it is bad.
    """
    load = partial(
        load_pairs, pixel_size=pixel_size, records=records, needs_captions=needs_captions
    )
    train = load(config, config.train_split, role="train")
    held_out = load(config, config.validation_split, role="held_out")
    mixed = [
        load(
            DataConfig(source=source, max_bad_fraction=config.max_bad_fraction),
            config.train_split,
            role=f"mixed-{number}",
        )
        for number, source in enumerate(config.mix, start=1)
    ]
    if mixed:
        whole = [train, *mixed]
        train = LoadedPairs(
            [pair for part in whole for pair in part.pairs],
            torch.cat([part.pixels for part in whole]),
            [pair for part in whole for pair in part.listed],
            mixed=tuple(
                zip(map(len, (part.pairs for part in mixed)), config.mix.values(), strict=True)
            ),
        )
    return train, held_out


def load_pairs(
    config: DataConfig,
    split: str,
    *,
    role: str,
    pixel_size: tuple[int, int],
    records: RunRecords,
    needs_captions: bool = True,
) -> LoadedPairs:
    """Read one split into memory and log what was left out; raises as ``load_splits``."""
    field = "data.mix" if role.startswith("mixed") else "data.source"
    try:
        # 1. list, then read; stop early where too much is bad
        options = config.read_options(needs_captions=needs_captions)
        source = open_pairs(config.source, split=split, options=options)
        # Readers skip before they split: report it for one split alone.
        skipped = list(source.skipped) if role != "held_out" else []
        _refuse_too_many(skipped, source.num_records, config, records)
        pixels, kept, unreadable = load_all_pixels(
            source,
            pixel_size=pixel_size,
            max_bad_fraction=config.max_bad_fraction,
            progress=log_now_and_then(f"{split}: images read"),
        )
        if skipped:
            _refuse_too_many([*skipped, *unreadable], source.num_records, config, records)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    # 2. the order of a new run is that of the source, of a resumed one that of its beginning
    found = [source[index] for index in kept]
    listed = records.listed_pairs(role)
    replaced: list[SkippedRecord] = []
    if listed is None:
        loaded = LoadedPairs(found, pixels, found)
        records.write_listed(found, role)
    else:
        loaded, replaced = _as_listed(listed, found, pixels, unreadable, config)
    # 3. say what was left out
    if role != "held_out":
        for reason, paths in notes_by_reason(source.notes).items():
            logger.info(f"left out: {len(paths)} {reason}: {', '.join(paths[:MAX_LISTED])}")
    skipped += [*unreadable, *replaced]
    for record in skipped[:MAX_LISTED]:
        logger.info(f"skipped {record.path}: {record.reason}")
    records.write_skipped(skipped, anew=role == "train")
    if len(skipped) > MAX_LISTED:
        logger.info(f"skipped {len(skipped) - MAX_LISTED} more; {records.skipped_file} lists all")
    images = counted(len(found), "image")
    logger.info(f"{split}: {images} from {config.source}, {len(skipped)} skipped")
    if replaced:
        logger.info(f"{split}: {len(replaced)} missing images are replaced by others")
    return loaded


def _as_listed(
    listed: list[Pair],
    found: list[Pair],
    pixels: Tensor,
    unreadable: Sequence[SkippedRecord],
    config: DataConfig,
) -> tuple[LoadedPairs, list[SkippedRecord]]:
    """Put images in the order in which the run began; choose others in place of missing ones."""
    row_of = {pair.path: row for row, pair in enumerate(found)}
    present = [place for place, pair in enumerate(listed) if pair.path in row_of]
    missing = len(listed) - len(present)
    if not present or are_too_many(missing, len(listed), config.max_bad_fraction):
        raise UserError(
            f"data.source: {missing} of the {len(listed)} images that this run began with are gone "
            f"or unreadable, more than data.max_bad_fraction = {config.max_bad_fraction} allows"
        )
    reasons = {record.path: record.reason for record in unreadable}
    places, replaced = [], []
    for place, pair in enumerate(listed):
        if pair.path in row_of:
            places.append(place)
            continue
        # A hash of its path: the same stand-in at every resume, as long as no other is missing.
        digest = hashlib.sha256(pair.path.encode()).digest()
        places.append(present[int.from_bytes(digest[:8], "big") % len(present)])
        reason = f"replaced by {listed[places[-1]].path}"
        if pair.path not in reasons:
            reason = f"gone since the run began, {reason}"
        replaced.append(SkippedRecord(pair.path, reason))
    # Rows of the pixels in the order in which the run began.
    rows = [row_of[listed[place].path] for place in places]
    if rows != list(range(len(pixels))):
        pixels = pixels[rows]
    return LoadedPairs([listed[place] for place in places], pixels, listed), replaced


def _refuse_too_many(
    skipped: Sequence[SkippedRecord], num_records: int, config: DataConfig, records: RunRecords
) -> None:
    """Stop, with a list of them all, where more records are bad than allowed."""
    if not are_too_many(len(skipped), num_records, config.max_bad_fraction):
        return
    records.write_skipped(skipped, anew=True)
    shown = "; ".join(f"{record.path}: {record.reason}" for record in skipped[:MAX_LISTED])
    raise UserError(
        f"{len(skipped)} of {num_records} records cannot be used, more than "
        f"data.max_bad_fraction = {config.max_bad_fraction} allows: {shown}"
    )
