"""The images of an evaluation: those of a data set, and those that the model generates."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from dalle_mini_impl.data.images import (
    BadImageError,
    bytes_to_pixels,
    decode_image,
    pixels_to_images,
    resize_to_fit,
)
from dalle_mini_impl.data.loading import load_all_pixels
from dalle_mini_impl.data.pairs import (
    DEFAULT_OPTIONS,
    Pair,
    Pairs,
    ReadOptions,
    open_all_splits,
)
from dalle_mini_impl.data.splits import TRAIN
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.pipeline import Rank, TextToImagePipeline
from dalle_mini_impl.progress import log_now_and_then
from dalle_mini_impl.sampling.generate import ROWS_PER_BATCH, generate_image_token_ids
from dalle_mini_impl.sampling.likelihood import log_likelihood_ratio
from dalle_mini_impl.sampling.sampler import SamplingConfig
from vqvae.image_tokenizer import ImageTokenizer

BATCH_SIZE = 64
Pixels: TypeAlias = UInt8[Tensor, "samples 3 height width"]
Row: TypeAlias = Mapping[str, Any]
DataSetKind = Literal["emoji", "shapes", "scenes", "images"]

# A built-in data set is known by the metadata that its checks need, wherever the files came from;
# a set without them is evaluated as plain captioned images. Nothing else decides the kind.
KIND_FIELDS: Mapping[DataSetKind, frozenset[str]] = {
    "scenes": frozenset({"facts", "split", "style"}),
    "shapes": frozenset({"facts", "split"}),
    "emoji": frozenset({"hexcode", "style", "role", "gender", "skin_tones", "split"}),
}


@dataclass(frozen=True)
class Samples:
    """Captioned images as bytes and as tokens in raster order."""

    pairs: list[Pair]
    pixels: UInt8[Tensor, "samples 3 height width"]
    image_token_ids: Int[Tensor, "samples image_length"]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def captions(self) -> list[str]:
        """The main caption of each image."""
        return [pair.captions[0] for pair in self.pairs]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The other metadata of each image."""
        return [pair.attributes for pair in self.pairs]

    def take(self, indices: Sequence[int]) -> "Samples":
        """Select images by index, in this order."""
        chosen = torch.tensor(list(indices), dtype=torch.long)
        pairs = [self.pairs[index] for index in indices]
        return Samples(pairs, self.pixels[chosen], self.image_token_ids[chosen])

    def subsample(self, limit: int) -> "Samples":
        """Select at most ``limit`` images at equal distances."""
        return self.take(evenly_spaced(len(self), limit))


@dataclass(frozen=True)
class EvaluationData:
    """All images of a data set, by split."""

    kind: DataSetKind
    train: Samples
    held_out: dict[str, Samples]
    """All other splits by name, at least one."""
    fingerprint: str
    """Hash of all pixels, captions and attributes."""

    @property
    def held_out_samples(self) -> Samples:
        """The held-out splits in one."""
        return join(list(self.held_out.values()))


@dataclass(frozen=True)
class ListedData:
    """Captions and metadata of all splits; the images are read from ``pairs`` when needed."""

    kind: DataSetKind
    pairs: Pairs
    splits: list[str]
    """The split of each pair."""

    def require_emoji(self, source: str) -> None:
        """Raise UserError unless these are emoji."""
        if self.kind != "emoji":
            raise UserError(f"data: {source}: expected the folder that prepare_emoji.py wrote")

    def read_image(self, index: int, *, pixel_size: tuple[int, int]) -> Image.Image:
        """Read one image and make it of this (height, width); UserError if it is damaged."""
        try:
            data, path = self.pairs.read_image(index), self.pairs[index].path
            return resize_to_fit(decode_image(data, source=path), pixel_size, self.pairs.fit)
        except BadImageError as error:
            raise UserError(f"data: {error}") from None


@dataclass(frozen=True)
class CandidateTokens:
    """Tokens that a model generated, several candidates per caption."""

    image_token_ids: Int[Tensor, "captions candidates image_length"]
    scores: Float[Tensor, "captions candidates"]
    """By the ranker: log-likelihood ratios in nats, or what a CLIP says; larger is better. Zeros
    for a single candidate without guidance."""

    @property
    def first(self) -> Int[Tensor, "captions image_length"]:
        """The first candidate of each caption: images without any selection."""
        return self.image_token_ids[:, 0]

    @property
    def best(self) -> Int[Tensor, "captions image_length"]:
        """The candidate of each caption with the highest score."""
        return self.image_token_ids[torch.arange(len(self.scores)), self.scores.argmax(dim=1)]


def list_data(
    source: str, *, language: str = "en", options: ReadOptions = DEFAULT_OPTIONS
) -> ListedData:
    """List all splits of a source that ``open_pairs`` takes; UserError if there is nothing.

    ``ko`` makes the Korean caption, where there is one, the main caption.
    """
    # The first caption of a pair is its main caption; the other columns stay as paraphrases.
    first = ("text_ko",) if language == "ko" else ()
    columns = tuple(dict.fromkeys((*first, *options.caption_columns)))
    try:
        pairs, splits = open_all_splits(source, options=replace(options, caption_columns=columns))
    except UserError as error:
        raise UserError(f"data: {error}") from None
    # All rows, not the first: a mixture of emoji and other images has no grid to check.
    rows = [pair.attributes for pair in pairs]
    for kind, fields in KIND_FIELDS.items():
        if all(fields <= row.keys() for row in rows):
            return ListedData(kind, pairs, splits)
    return ListedData("images", pairs, splits)


def read_data(
    source: str,
    vqvae: ImageTokenizer,
    *,
    language: str = "en",
    styles: Sequence[str] = (),
    options: ReadOptions = DEFAULT_OPTIONS,
) -> EvaluationData:
    """Read and tokenize all splits of a source.

    Raises:
        UserError: If there is nothing to read, if nothing but training images is there, or if the
            data have none of the emoji ``styles``.
    """
    listed = list_data(source, language=language, options=options)
    _require_styles(styles, listed)  # before the images are read, which takes minutes
    if not set(listed.splits) - {TRAIN}:
        raise UserError(f"data: {source} has only training images; expected a held-out split too")
    try:
        pixels, kept, _ = load_all_pixels(
            listed.pairs,
            pixel_size=vqvae.config.pixel_size,
            progress=log_now_and_then("images read"),
        )
    except UserError as error:
        raise UserError(f"data: {error}") from None
    # The hash goes split by split: reordering the splits of a file does not change it.
    digest = hashlib.sha256()
    by_split = {}
    # Unreadable images are left out, as in training; a split without any image ends it here.
    for split in dict.fromkeys([TRAIN, *listed.splits]):
        chosen = [index for index in kept if listed.splits[index] == split]
        if not chosen:
            raise UserError(f"data: {source}: no image of split {split!r} can be read")
        part = pixels[torch.tensor([listed.splits[index] == split for index in kept])]
        pairs = [listed.pairs[index] for index in chosen]
        by_split[split] = Samples(pairs, part, encode(vqvae, part))
        digest.update(part.numpy().tobytes())
        texts = [(pair.path, pair.captions, pair.attributes) for pair in pairs]
        digest.update(json.dumps(texts, sort_keys=True).encode())
    return EvaluationData(listed.kind, by_split.pop(TRAIN), by_split, digest.hexdigest()[:16])


def _require_styles(styles: Sequence[str], listed: ListedData) -> None:
    if not styles:
        return
    if listed.kind != "emoji":
        raise UserError(f"style: got {styles[0]!r}, but this is not an emoji data set")
    known = dict.fromkeys(str(pair.attributes["style"]) for pair in listed.pairs)
    for style in styles:
        if style not in known:
            raise UserError(f"style: got {style!r}, expected one of {', '.join(known)}")


def join(parts: Sequence[Samples]) -> Samples:
    """Concatenate at least one set."""
    return Samples(
        [pair for part in parts for pair in part.pairs],
        torch.cat([part.pixels for part in parts]),
        torch.cat([part.image_token_ids for part in parts]),
    )


def evenly_spaced(count: int, limit: int) -> list[int]:
    """Select at most ``limit`` of ``count`` indices at equal distances."""
    limit = min(count, limit)
    return [index * count // limit for index in range(limit)]


def derangement(count: int, *, seed: int) -> Int[Tensor, " count"]:
    """Sample a permutation without a fixed point; a single index stays where it is."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    found = torch.empty_like(order)
    # Each index goes to the place of its neighbor in a random order: one cycle through all.
    found[order] = order.roll(1)
    return found


@torch.inference_mode()
def generate_candidates(
    pipeline: TextToImagePipeline,
    captions: Sequence[str],
    *,
    sampling_config: SamplingConfig,
    num_candidates: int = 1,
    seed: int = 0,
    rank: Rank = "likelihood",
) -> CandidateTokens:
    """Generate candidates for every caption, each with a seed of its own.

    The first candidate of caption i has seed ``seed + i`` for any number of candidates, so
    ``pipeline(caption, seed=seed + i)`` generates the same image.

    ``rank`` scores the candidates; ``none`` generates only the first. UserError if a number
    is out of range.
    """
    count = len(captions)
    pipeline.check(captions, num_images=count, num_candidates=num_candidates, seed=seed)
    if rank == "none":
        num_candidates = 1
    device = pipeline.device
    text_token_ids = pipeline.text_tokenizer.encode(list(captions)).to(device)
    # Guided sampling accumulates the log-likelihood ratios; without guidance they take two more
    # passes, which are skipped for a single candidate.
    needs_ratios = (
        rank == "likelihood" and num_candidates > 1 and sampling_config.guidance_scale == 1.0
    )
    progress = log_now_and_then("images generated")
    candidates, scores = [], []
    # Candidates outside, captions inside: candidate k of caption i has seed + i + k * count, and
    # more candidates leave the first ones as they are.
    for candidate in range(num_candidates):
        token_parts, score_parts = [], []
        for indices in torch.arange(count).split(ROWS_PER_BATCH):
            text = text_token_ids[indices.to(device)]
            generated = generate_image_token_ids(
                pipeline.native or pipeline.dalle,
                text,
                seeds=indices + seed + candidate * count,
                sampling_config=sampling_config,
            )
            ratios = generated.log_likelihood_ratio
            if needs_ratios:
                ratios = log_likelihood_ratio(pipeline.dalle, text, generated.image_token_ids)
            token_parts.append(generated.image_token_ids.cpu())
            score_parts.append(ratios.float().cpu())
            progress(candidate * count + int(indices[-1]) + 1, num_candidates * count)
        candidates.append(torch.cat(token_parts))
        scores.append(torch.cat(score_parts))
    if not isinstance(rank, str):
        # Candidate by candidate: the pixels of all at once could exceed the memory.
        scores = [
            rank.score(to_images(decode(pipeline.vqvae, token_ids)), captions).float()
            for token_ids in candidates
        ]
    return CandidateTokens(torch.stack(candidates, dim=1), torch.stack(scores, dim=1))


@torch.inference_mode()
def encode(vqvae: ImageTokenizer, pixels: Pixels) -> Int[Tensor, "samples image_length"]:
    """Turn images into tokens in raster order, on the CPU."""
    device = next(vqvae.parameters()).device
    parts = [
        vqvae.encode_to_token_ids(bytes_to_pixels(part).to(device)).flatten(1).cpu()
        for part in pixels.split(BATCH_SIZE)
    ]
    return torch.cat(parts)


@torch.inference_mode()
def decode(vqvae: ImageTokenizer, image_token_ids: Int[Tensor, "samples image_length"]) -> Pixels:
    """Turn tokens in raster order into images, on the CPU."""
    device = next(vqvae.parameters()).device
    parts = []
    # Rounded to bytes as a PNG is: metrics see the pixels that a user gets.
    for part in image_token_ids.split(BATCH_SIZE):
        grid = part.reshape(len(part), *vqvae.image_grid_size).to(device)  # (batch, rows, columns)
        pixels = vqvae.decode_from_token_ids(grid).float().clamp(-1, 1)
        parts.append(((pixels + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(parts)


def to_images(pixels: Pixels) -> list[Image.Image]:
    """Turn bytes into one image each."""
    return pixels_to_images(bytes_to_pixels(pixels))
