"""Images tokenized once: what the decoder trains on instead of pixels.

A token data set is a safetensors file of the run. Its name is a hash of the tokenizers, the
captions and the pixels, so that it is made again whenever one of them changes, and never otherwise.
Each image is stored in several views (slightly shifted or enlarged copies): view 0 is the image as
it is. With BPE dropout each caption is stored in several variants: variant 0 is the usual encoding.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dalle_mini_impl.data.augmentation import shift_images, zoom_images
from dalle_mini_impl.data.bpe_dropout import encode_variants
from dalle_mini_impl.data.images import bytes_to_pixels
from dalle_mini_impl.data.pairs import Pair
from dalle_mini_impl.data.text_tokenizer import TextTokenizer
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.progress import counted, log_now_and_then
from vqvae.image_tokenizer import ImageTokenizer

logger = logging.getLogger(__name__)
ENCODE_BATCH_SIZE = 64
NUM_MAIN_CAPTIONS = 2  # of an image; the first of its captions


@dataclass(frozen=True, kw_only=True)
class Variation:
    """Augmentation of images and captions, applied once, before they are tokenized."""

    num_views: int = 1
    """Views per image, at least 1; the first is the image as it is."""
    max_shift: int = 0
    """Largest shift of the other views, in pixels."""
    max_zoom: float = 1.0
    """Largest enlargement of the other views, of which a window is kept."""
    bpe_dropout: float = 0.0
    """Probability that a merge is left out when a caption is split, in [0, 1]."""


@dataclass(frozen=True)
class TokenDataset:
    """Image tokens in several views and caption tokens in several variants, all in memory.

    Captions are numbered consecutively over all samples: those of sample i run from
    ``caption_offsets[i]`` up to, but not including, ``caption_offsets[i + 1]``. Each has one row
    per variant; there is one variant unless BPE dropout is on.
    """

    image_token_ids: Int[Tensor, "samples views image_length"]
    text_token_ids: Int[Tensor, "rows text_length"]
    caption_offsets: Int[Tensor, " samples_plus_1"]

    def __len__(self) -> int:
        return len(self.image_token_ids)

    def captions_of(
        self, sample_ids: Int[Tensor, " batch"], uniforms: Float[Tensor, " batch"]
    ) -> Int[Tensor, "batch text_length"]:
        """Choose one caption for each sample: half of the time one of the first two.

        The main captions of a source stand first, often in two languages, and a prompt is more
        often one of them. The other half of the time every caption is as likely. ``uniforms`` in
        [0, 1) choose caption and variant; 0 is the first caption as it is.
        """
        # (batch,) each: rows of the table of captions
        start, end = self.caption_offsets[sample_ids], self.caption_offsets[sample_ids + 1]
        count = end - start
        # The lower half of [0, 1) stretched over the main captions, the upper half over all.
        main = 2 * uniforms * count.clamp(max=NUM_MAIN_CAPTIONS)
        any_of_all = (2 * uniforms - 1) * count
        place = torch.where(uniforms < 0.5, main, any_of_all)
        num_variants = len(self.text_token_ids) // int(self.caption_offsets[-1])
        # The fraction that is left of the random number chooses the variant.
        variant = (place.frac() * num_variants).long()
        return self.text_token_ids[(start + place.long()) * num_variants + variant].long()

    def images_of(
        self, sample_ids: Int[Tensor, " batch"], uniforms: Float[Tensor, " batch"]
    ) -> Int[Tensor, "batch image_length"]:
        """Choose one view of each sample by ``uniforms`` in [0, 1); 0 is the image as it is."""
        num_views = self.image_token_ids.shape[1]
        return self.image_token_ids[sample_ids, (uniforms * num_views).long()].long()


def build_token_dataset(
    pairs: Sequence[Pair],
    pixels: UInt8[Tensor, "samples 3 height width"],
    *,
    vqvae: ImageTokenizer,
    text_tokenizer: TextTokenizer,
    variation: Variation,
    cache_dir: Path,
) -> TokenDataset:
    """Tokenize images and captions, or read what an earlier run of the same inputs left.

    Args:
        pairs: One per image.
        pixels: The images as bytes, at the tokenizer's size.
        vqvae: Frozen, in evaluation mode.
        text_tokenizer: The caption tokenizer.
        variation: Views of each image and variants of each caption.
        cache_dir: Where token data sets are kept.
    """
    key = _fingerprint(pairs, pixels, vqvae, text_tokenizer, variation)
    # The name holds the hash of all inputs: any change makes another file, and both stay.
    path = cache_dir / f"tokens-{key}.safetensors"
    if path.is_file():
        try:
            stored = TokenDataset(**load_file(path))
        except (SafetensorError, OSError, TypeError) as error:
            logger.warning("%s cannot be read (%s); encoding again", path, error)
        else:
            logger.info(f"image and caption tokens: reading {path}")
            return stored
    logger.info(
        f"image and caption tokens: encoding {counted(len(pixels), 'image')} in "
        f"{counted(variation.num_views, 'view')}; "
        "they are kept when all are done"
    )
    dataset = TokenDataset(
        image_token_ids=_encode_views(pixels, vqvae, variation),
        text_token_ids=_encode_captions(pairs, text_tokenizer, variation.bpe_dropout).int(),
        caption_offsets=torch.tensor([0, *(len(pair.captions) for pair in pairs)]).cumsum(0),
    )
    # Several processes may write the same file: each its own, and the last rename wins.
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        save_file(vars(dataset), unfinished)
        unfinished.replace(path)  # whole or not at all
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"output_dir: cannot write {path}: {error}") from None
    return dataset


@torch.inference_mode()
def _encode_views(
    pixels: Tensor, vqvae: ImageTokenizer, variation: Variation
) -> Int[Tensor, "samples views image_length"]:
    progress = log_now_and_then("image tokens: encoded")
    device = next(vqvae.parameters()).device
    # The same views for every seed of a run, so that runs can use one file.
    generator = torch.Generator().manual_seed(0)
    views = []
    num_views, max_shift = variation.num_views, variation.max_shift
    for view in range(num_views):
        # For view 0 too, though unused: the numbers of a view depend only on its index.
        shape = (len(pixels), 2)
        offsets = torch.randint(-max_shift, max_shift + 1, shape, generator=generator)
        windows = None
        if variation.max_zoom > 1:
            windows = torch.rand((len(pixels), 3), generator=generator)
        ids = []
        for rows in torch.arange(len(pixels)).split(ENCODE_BATCH_SIZE):
            part = pixels[rows]
            if view > 0 and windows is not None:
                part = zoom_images(part, windows[rows], max_zoom=variation.max_zoom)
            if view > 0:
                part = shift_images(part, offsets[rows])
            part_ids = vqvae.encode_to_token_ids(bytes_to_pixels(part.to(device)))
            # Four bytes a token are enough, and halve the file.
            ids.append(part_ids.flatten(1).int().cpu())
            progress(view * len(pixels) + int(rows[-1]) + 1, num_views * len(pixels))
        views.append(torch.cat(ids))
    return torch.stack(views, dim=1)


def _encode_captions(
    pairs: Sequence[Pair], text_tokenizer: TextTokenizer, bpe_dropout: float
) -> Int[Tensor, "rows text_length"]:
    texts = [text for pair in pairs for text in pair.captions]
    if bpe_dropout == 0:
        return text_tokenizer.encode(texts, log_truncated=True)
    return encode_variants(text_tokenizer, texts, dropout=bpe_dropout)


def _fingerprint(
    pairs: Sequence[Pair],
    pixels: Tensor,
    vqvae: ImageTokenizer,
    text_tokenizer: TextTokenizer,
    variation: Variation,
) -> str:
    # All that the tokens depend on, pixels included: a stale cache would train on wrong tokens.
    digest = hashlib.sha256(vqvae.fingerprint().encode())
    # Without a copy of the pixels, which may fill much of the memory.
    digest.update(pixels.contiguous().numpy().data)
    digest.update(text_tokenizer.fingerprint().encode())
    texts = [list(pair.captions) for pair in pairs]
    digest.update(json.dumps([text_tokenizer.text_length, vars(variation), texts]).encode())
    return digest.hexdigest()[:16]
