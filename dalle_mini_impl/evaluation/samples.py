"""What an evaluation looks at: images of every split with their tokens."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from dalle_mini_impl.data.images import pixels_to_images
from dalle_mini_impl.data.loading import load_all_pixels
from dalle_mini_impl.data.pairs import TEXT_COLUMNS, Pair, Pairs, open_all_splits
from dalle_mini_impl.data.splits import TRAIN
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.progress import log_now_and_then
from dalle_mini_impl.sampling.generate import ROWS_PER_BATCH, generate_image_token_ids
from dalle_mini_impl.sampling.likelihood import log_likelihood_ratio
from dalle_mini_impl.sampling.sampler import SamplingConfig
from vqvae.image_tokenizer import ImageTokenizer

BATCH_SIZE = 64
Pixels = UInt8[Tensor, "samples 3 height width"]


@dataclass(frozen=True)
class Samples:
    """Captioned images as bytes and as tokens."""

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
        """Whatever else the source says about each image."""
        return [pair.attributes for pair in self.pairs]

    def take(self, indices: Sequence[int]) -> "Samples":
        """Choose some of them.

        Args:
            indices: Which.

        Returns:
            Those, in this order.
        """
        chosen = torch.tensor(list(indices), dtype=torch.long)
        pairs = [self.pairs[index] for index in indices]
        return Samples(pairs, self.pixels[chosen], self.image_token_ids[chosen])

    def spread(self, count: int) -> "Samples":
        """Choose some at equal distances.

        Args:
            count: How many; all where there are not as many.

        Returns:
            Those.
        """
        return self.take(spread_indices(len(self), count))


@dataclass(frozen=True)
class EvaluationData:
    """Everything that a model is judged on."""

    kind: Literal["emoji", "shapes", "images"]
    """Decided by what the source says of its images."""
    train: Samples
    held_out: dict[str, Samples]
    """All other splits by name, at least one."""
    fingerprint: str
    """Hash of all pixels, captions and attributes."""

    @property
    def held_out_samples(self) -> Samples:
        """The held-out splits together."""
        return join(list(self.held_out.values()))


@dataclass(frozen=True)
class CandidateTokens:
    """Tokens that a model generated, several candidates per caption."""

    image_token_ids: Int[Tensor, "captions candidates image_length"]
    log_likelihood_ratios: Float[Tensor, "captions candidates"]
    """Caption gain of each candidate in nats; zeros where there is one only."""

    @property
    def first(self) -> Int[Tensor, "captions image_length"]:
        """The first candidates: images that nobody chose."""
        return self.image_token_ids[:, 0]

    @property
    def best(self) -> Int[Tensor, "captions image_length"]:
        """The candidates with the largest gain."""
        return self.image_token_ids[
            torch.arange(len(self.log_likelihood_ratios)), self.log_likelihood_ratios.argmax(dim=1)
        ]


def spread_indices(count: int, expected: int) -> list[int]:
    """Choose places at equal distances.

    Args:
        count: Of all places.
        expected: How many at most.

    Returns:
        Indices below ``count``.
    """
    expected = min(count, expected)
    return [index * count // expected for index in range(expected)]


def join(parts: Sequence[Samples]) -> Samples:
    """Put several sets together.

    Args:
        parts: At least one.

    Returns:
        Their images in order.
    """
    return Samples(
        [pair for part in parts for pair in part.pairs],
        torch.cat([part.pixels for part in parts]),
        torch.cat([part.image_token_ids for part in parts]),
    )


def read_data(
    source: str,
    vqvae: ImageTokenizer,
    *,
    language: str = "en",
    styles: Sequence[str] = (),
) -> EvaluationData:
    """Read and tokenize all splits of a source.

    Args:
        source: Whatever ``open_pairs`` takes.
        vqvae: The model's image tokenizer.
        language: ``ko`` takes the Korean captions where there are any.
        styles: Of emoji; the source must have them.

    Returns:
        The images.

    Raises:
        UserError: If there is nothing to read, nothing but training images, or a style is
            missing.
    """
    first = ("text_ko",) if language == "ko" else ()
    columns = tuple(dict.fromkeys((*first, *TEXT_COLUMNS)))
    try:
        pairs, names = open_all_splits(source, text_columns=columns)
    except UserError as error:
        raise UserError(f"data: {error}") from None
    kind = _kind_of([pair.attributes for pair in pairs])
    _require_styles(styles, kind, pairs)  # now: reading takes minutes
    if not set(names) - {TRAIN}:
        raise UserError(f"data: {source} has training images alone; expected held-out ones too")
    try:
        pixels, kept, _ = load_all_pixels(
            pairs,
            image_size=vqvae.config.image_size,
            progress=log_now_and_then("images read"),
        )
    except UserError as error:
        raise UserError(f"data: {error}") from None
    digest = hashlib.sha256()
    read = {}
    for split in dict.fromkeys([TRAIN, *names]):
        chosen = [index for index in kept if names[index] == split]
        if not chosen:
            raise UserError(f"data: {source}: no image of split {split!r} can be read")
        part = pixels[torch.tensor([names[index] == split for index in kept])]
        read[split] = Samples([pairs[index] for index in chosen], part, encode(vqvae, part))
        digest.update(part.numpy().tobytes())
        texts = [(pair.path, pair.captions, pair.attributes) for pair in read[split].pairs]
        digest.update(json.dumps(texts, sort_keys=True).encode())
    return EvaluationData(kind, read.pop(TRAIN), read, digest.hexdigest()[:16])


def _require_styles(styles: Sequence[str], kind: str, pairs: Pairs) -> None:
    if styles and kind != "emoji":
        raise UserError(f"style: got {styles[0]!r}, but the data are no emoji")
    known = dict.fromkeys(str(pair.attributes["style"]) for pair in pairs) if styles else {}
    unknown = [style for style in styles if style not in known]
    if unknown:
        raise UserError(f"style: got {unknown[0]!r}, expected one of {', '.join(known)}")


def _kind_of(rows: Sequence[dict[str, Any]]) -> Literal["emoji", "shapes", "images"]:
    if all("facts" in row for row in rows):
        return "shapes"
    return "emoji" if all({"role", "style", "hexcode"} <= row.keys() for row in rows) else "images"


@torch.inference_mode()
def encode(vqvae: ImageTokenizer, pixels: Pixels) -> Int[Tensor, "samples image_length"]:
    """Turn images into tokens.

    Args:
        vqvae: Image tokenizer.
        pixels: Bytes.

    Returns:
        Tokens in raster order, on the CPU.
    """
    device = next(vqvae.parameters()).device
    parts = [
        vqvae.encode_to_token_ids(to_floats(part).to(device)).flatten(1).cpu()
        for part in pixels.split(BATCH_SIZE)
    ]
    return torch.cat(parts)


@torch.inference_mode()
def decode(vqvae: ImageTokenizer, image_token_ids: Int[Tensor, "samples image_length"]) -> Pixels:
    """Turn tokens into images.

    Args:
        vqvae: Image tokenizer.
        image_token_ids: In raster order.

    Returns:
        Bytes, on the CPU.
    """
    device = next(vqvae.parameters()).device
    parts = []
    for part in image_token_ids.split(BATCH_SIZE):
        grid = part.reshape(len(part), *vqvae.image_grid_size).to(device)
        pixels = vqvae.decode_from_token_ids(grid).float().clamp(-1, 1)
        parts.append(((pixels + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(parts)


def to_floats(pixels: Pixels) -> Float[Tensor, "samples 3 height width"]:
    """Turn bytes into pixels in [-1, 1].

    Args:
        pixels: Bytes.

    Returns:
        Floats.
    """
    return pixels.float() / 127.5 - 1


def to_images(pixels: Pixels) -> list[Image.Image]:
    """Turn bytes into images.

    Args:
        pixels: Bytes.

    Returns:
        One image each.
    """
    return pixels_to_images(to_floats(pixels))


@torch.inference_mode()
def generate_candidates(
    pipeline: TextToImagePipeline,
    captions: Sequence[str],
    *,
    sampling_config: SamplingConfig,
    num_candidates: int = 1,
    seed: int = 0,
) -> CandidateTokens:
    """Generate candidates for every caption, each with a seed of its own.

    The first candidate of caption i has seed ``seed + i``, however many others there are, so that
    ``pipeline(caption, seed=seed + i)`` shows the same image.

    Args:
        pipeline: The model.
        captions: What to generate.
        sampling_config: How.
        num_candidates: Images per caption.
        seed: Of the first image.

    Returns:
        The tokens, on the CPU.

    Raises:
        UserError: If a number is out of range.
    """
    count = len(captions)
    pipeline.check(captions, num_images=count, num_candidates=num_candidates, seed=seed)
    device = pipeline.dalle.image_head.rows.device
    text = pipeline.text_tokenizer.encode(list(captions)).to(device)
    progress = log_now_and_then("images generated")
    columns = []
    for candidate in range(num_candidates):
        seeds = torch.arange(count) + seed + candidate * count
        parts = []
        for rows in torch.arange(count).split(ROWS_PER_BATCH):
            generated = generate_image_token_ids(
                pipeline.native or pipeline.dalle,
                text[rows.to(device)],
                seeds=seeds[rows],
                sampling_config=sampling_config,
            )
            log_likelihood_ratios = generated.log_likelihood_ratio
            if num_candidates > 1 and sampling_config.guidance_scale == 1.0:
                log_likelihood_ratios = log_likelihood_ratio(
                    pipeline.dalle, text[rows.to(device)], generated.image_token_ids
                )
            parts.append((generated.image_token_ids.cpu(), log_likelihood_ratios.float().cpu()))
            progress(candidate * count + int(rows[-1]) + 1, num_candidates * count)
        columns.append([torch.cat(part) for part in zip(*parts, strict=True)])
    return CandidateTokens(
        torch.stack([tokens for tokens, _ in columns], dim=1),
        torch.stack([log_likelihood_ratios for _, log_likelihood_ratios in columns], dim=1),
    )
